"""Encode named arrays and scalars as exact bytes, decode them, and check what a device replies.

A message of any method and fleet is

    b"FT1" | CRC-32 of the body (4 bytes, little-endian) | body

and the body is MessagePack of `[round, base, scalars, arrays]`: the round, the first eight bytes of the base model's digest, the
scalars by name, and per array `[dtype, shape, raw little-endian bytes]`.  Counts and sizes are checked before memory or time is
taken.  `check` refuses a reply in another form than was agreed before any method sees it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack
import numpy as np

from fleetune.errors import MessageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer
from typing import Self

MAGIC = b"FT1"
HEAD = 7  # bytes before the body
MAX_BYTES = 1 << 32  # a message larger than 4 GiB is an attack or a mistake
MAX_DIMS = 8  # of an array; the widest that a method sends has 4
MAX_NAMES = 1 << 17  # of arrays or scalars; an adapter on every expert of a large mixture has 2^16
MAX_NAME = 512  # characters
# bytes of a text, which may take four times that in memory; the longest names each expert of a block
MAX_TEXT = 1 << 20
EMPTY = 1 << 31  # of a dim of an array without values
DTYPES = (  # their places in this table are what is sent
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "float32",
    "float64",
)

Scalar = int | float | str | bool | bytes


@dataclass(frozen=True)
class Payload:
    """Named arrays and named scalars: all that a method ever sends or receives."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)

    def take(self) -> dict[str, np.ndarray]:
        """Return the arrays and forget them, so that each is gone from memory when the caller has done with it."""
        taken = dict(self.arrays)
        object.__setattr__(self, "arrays", {})
        return taken

    def int(self, name: str) -> int:
        """Return the scalar `name` as an integer of 0 or more; MessageError if it is missing or something else."""
        value = self.scalars.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise MessageError(f"scalar '{name}' is {value!r}, expected an integer, none below 0")
        return value

    def float(self, name: str) -> float:
        """Return the scalar `name` as a float; MessageError if it is missing or something else."""
        value = self.scalars.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MessageError(f"scalar '{name}' is {value!r}, expected a number")
        return float(value)

    def array(self, name: str) -> np.ndarray:
        """Return the array `name`; MessageError if it is missing."""
        if name not in self.arrays:
            raise MessageError(f"array '{name}' is missing; there are {', '.join(self.arrays) or 'none'}")
        return self.arrays[name]


@dataclass(frozen=True)
class Message:
    """A payload and what it belongs to: the round and the base model (first 8 bytes of its digest)."""

    round: int
    base: bytes
    payload: Payload


LARGEST = 1e9  # of a float in an array: what a device trained is far below, and sums stay finite


class NotFiniteError(MessageError):
    """A reply that holds NaN or infinity."""


Range = tuple[type, float, float]  # of a scalar: its type, lowest, highest
# The scalars of every method's reply: the rows that a client has, and its training loss.
REPORTED: Final[Mapping[str, Range]] = MappingProxyType({"n": (int, 1, 1 << 31), "loss": (float, -1e9, 1e9)})


class ReplySpec(NamedTuple):
    """The form that a payload must have.  Shapes may hold -n: at most n."""

    arrays: Mapping[str, tuple[str, tuple[int, ...]]]
    scalars: Mapping[str, Range] = REPORTED


def encode(message: Message) -> bytes:
    """Encode a message; arrays are sent as they lie in memory, little-endian, with no padding.

    Their bytes are copied once, into the message.
    MessageError for a dtype or a scalar that has no wire type (a numpy number, None, more than 64 bits).
    """
    try:
        body = list(_pieces(message))
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError(
            f"round {message.round}, a scalar or an array has no wire type ({error})"
        ) from error
    crc = 0
    for piece in body:
        crc = zlib.crc32(piece, crc)
    return b"".join([MAGIC, crc.to_bytes(4, "little"), *body])


def _pieces(message: Message) -> Iterator[Buffer]:
    """Yield the body of a message piece by piece; what is long is the sender's own memory, not a copy of it."""
    packer, payload = msgpack.Packer(), message.payload
    yield packer.pack_array_header(4)
    yield packer.pack(message.round) + packer.pack(message.base)
    yield packer.pack_map_header(len(payload.scalars))
    for name, value in payload.scalars.items():
        known = _scalar(name, value)
        yield packer.pack(name)
        if isinstance(known, bytes):
            yield from (_binary(len(known)), known)
        else:
            yield packer.pack(known)
    yield packer.pack_map_header(len(payload.arrays))
    for name, array in payload.arrays.items():
        if array.dtype.name not in DTYPES:
            raise MessageError(f"array '{name}' has dtype {array.dtype}, which has no wire type")
        raw = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
        yield packer.pack(name) + packer.pack_array_header(3)
        yield packer.pack(DTYPES.index(array.dtype.name)) + packer.pack(list(array.shape)) + _binary(len(raw))
        yield raw.data


def _binary(size: int) -> bytes:
    """Return what MessagePack has in front of so many bytes: the narrowest of three forms."""
    for code, width in ((0xC4, 1), (0xC5, 2), (0xC6, 4)):
        if size < 1 << 8 * width:
            return bytes([code]) + size.to_bytes(width, "big")
    raise ValueError(f"{size} bytes are too many for a part of a message")


def crc_of(data: bytes | bytearray) -> int:
    """Return the CRC-32 that a message states of its body."""
    return int.from_bytes(data[HEAD - 4 : HEAD], "little")


def decode(
    data: bytes | bytearray, *, any_size: bool = False, names: int = MAX_NAMES, text: int = MAX_TEXT
) -> Message:
    """Decode a message of at most so many names, and bytes of a text; `any_size` for a file of our own, which has no limit.

    MessageError for anything damaged, cut short or malformed.
    """
    if len(data) < HEAD or data[:3] != MAGIC:
        raise MessageError(f"not a Fleetune message ({len(data)} bytes, starts with {data[:3]!r})")
    if len(data) > MAX_BYTES and not any_size:
        raise MessageError(f"message of {len(data)} bytes is over the limit of {MAX_BYTES}")
    with memoryview(data) as whole, whole[HEAD:] as body:
        return _read(body, crc_of(data), len(data), names, text)


def _read(body: memoryview, crc: int, size: int, names: int, text: int) -> Message:
    """Return the message that has this body and is of this size."""
    if zlib.crc32(body) != crc:
        raise MessageError(f"message of {size} bytes is damaged (checksum differs)")
    try:
        round_, base, scalars, arrays = msgpack.unpackb(
            body,
            strict_map_key=True,
            use_list=True,
            object_pairs_hook=_Parts(2, _named),
            list_hook=_Parts(2 * names + 1),
            max_array_len=MAX_DIMS,
            max_map_len=names,
            max_ext_len=0,
            max_str_len=text,
        )
        if type(round_) is not int or type(base) is not bytes or {type(scalars), type(arrays)} != {dict}:
            raise ValueError("its parts have the wrong types")
        named = {name: _array(name, value) for name, value in arrays.items()}
        kept = {name: _scalar(name, value) for name, value in scalars.items()}
    except MessageError:
        raise
    except (ValueError, TypeError, AttributeError, msgpack.UnpackException, RecursionError) as error:
        raise MessageError(f"message of {size} bytes is malformed ({error})") from error
    return Message(round_, base, Payload(named, kept))


class _Parts:
    """Count the maps or lists of a message while it is read: each takes many times the byte that it may come as."""

    def __init__(self, most: int, made: Callable[[Any], Any] = lambda part: part) -> None:
        self.left, self.made = most, made

    def __call__(self, part: Any) -> Any:
        """Return what is made of a map or a list; ValueError for more of them than a message has."""
        self.left -= 1
        if self.left < 0:
            raise ValueError("it has more maps or lists than a message")
        return self.made(part)


def _named(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return the pairs of a map; ValueError where a name is no text, too long or there twice."""
    for name, _ in pairs:
        if type(name) is not str or len(name) > MAX_NAME:
            raise ValueError(f"a name is not text of at most {MAX_NAME} characters")
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError("a name is there twice")
    return named


def _array(name: str, value: Any) -> np.ndarray:
    code, shape, raw = value
    if type(code) is not int or not 0 <= code < len(DTYPES) or type(raw) is not bytes:
        raise MessageError(f"array '{name}' has an unknown type")
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        raise MessageError(f"array '{name}' has shape {shape!r}")
    if len(shape) > MAX_DIMS or max(shape, default=0) > (EMPTY if 0 in shape else len(raw)):
        raise MessageError(f"array '{name}' has shape {shape} for {len(raw)} bytes")
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise MessageError(
            f"array '{name}' of shape {shape} and type {dtype.name} came with {len(raw)} bytes"
        )
    return np.frombuffer(raw, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _scalar(name: str, value: Any) -> Scalar:
    if not isinstance(value, int | float | str | bool | bytes):
        raise MessageError(f"scalar '{name}' has type {type(value).__name__}")
    return value


def check(message: Message, spec: ReplySpec, *, round: int, base: bytes) -> Payload:
    """Return the payload of a reply that agrees with `spec`; MessageError with the reason for any other."""
    if message.round != round:
        raise MessageError(f"reply is for round {message.round}, this is round {round}")
    if message.base != base:
        raise MessageError(f"reply was made on base {message.base.hex()}, this run's base is {base.hex()}")
    payload = message.payload
    _check_names("arrays", payload.arrays, spec.arrays)
    _check_names("scalars", payload.scalars, spec.scalars)
    for name, (dtype, shape) in spec.arrays.items():
        _check_array(name, payload.arrays[name], dtype, shape)
    for name, (kind, low, high) in spec.scalars.items():
        value = payload.scalars[name]
        if type(value) is not kind:
            raise MessageError(f"scalar '{name}' is {type(value).__name__}, agreed was {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise NotFiniteError(f"scalar '{name}' is {value!r}, agreed was {low:g} to {high:g}")
        if isinstance(value, str | bytes) or not low <= value <= high:
            raise MessageError(f"scalar '{name}' is {value!r}, agreed was {low:g} to {high:g}")
    return payload


def _check_names(kind: str, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    if have.keys() != want.keys():
        more, less = sorted(have.keys() - want.keys()), sorted(want.keys() - have.keys())
        raise MessageError(f"{kind} differ from the agreed: {more} more, {less} missing")


def _check_array(name: str, array: np.ndarray, dtype: str, shape: tuple[int, ...]) -> None:
    if array.dtype.name != dtype:
        raise MessageError(f"array '{name}' is {array.dtype.name}, agreed was {dtype}")
    fits = len(array.shape) == len(shape) and all(
        have <= -want if want < 0 else have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        raise MessageError(f"array '{name}' has shape {array.shape}, agreed was {shape}")
    if array.dtype.kind == "f":
        if bad := int(np.count_nonzero(~np.isfinite(array))):
            raise NotFiniteError(f"array '{name}' holds {bad} values that are not finite")
        if (top := max(abs(float(array.max(initial=0))), abs(float(array.min(initial=0))))) > LARGEST:
            raise MessageError(f"array '{name}' holds {top:.3g}, agreed was -{LARGEST:g} to {LARGEST:g}")


def narrow(a: np.ndarray) -> np.ndarray:
    """Return the same integers in the narrowest signed type that holds them all (the wire type of sums)."""
    top = int(np.abs(a, dtype=np.int64).max(initial=0)) if a.size else 0
    for kind in (np.int8, np.int16, np.int32):
        if top <= np.iinfo(kind).max:
            return a.astype(kind)
    return a.astype(np.int64)


def _levels() -> np.ndarray:
    levels = [0, 1]
    while len(levels) < 128:
        levels.append(max(levels[-1] + 1, levels[-1] * 9 // 8))
    return np.array(levels, dtype=np.int64)


class LogCode:
    """One byte for one integer coefficient: bit 7 the sign, bits 0-6 the level of its magnitude.

    Level m stands for the integer `LEVELS[m]`: 0, 1, 2, .. 8, then growing by 9/8 up to 6,349,996.  A real
    number between two levels goes to either with the probability that makes its mean exact (unbiased),
    beyond the last it is clipped.  Zero has one code; 128 ("minus zero") is not a code and decodes to zero.
    """

    LEVELS = _levels()

    @staticmethod
    def encode(x: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Encode real numbers `x` [n] as codes uint8[n]; `u` [n] are uniform in [0, 1), one a number."""
        levels = LogCode.LEVELS
        size = np.minimum(np.abs(x), float(levels[-1]))
        low = np.minimum(np.searchsorted(levels, size, side="right") - 1, 126)
        share = (size - levels[low]) / (levels[low + 1] - levels[low])
        level = low + (u < share)
        return np.asarray(level + np.where((x < 0) & (level > 0), 128, 0), np.uint8)

    @staticmethod
    def decode(codes: np.ndarray) -> np.ndarray:
        """Return the integers int64[n] that codes uint8[n] stand for."""
        size = LogCode.LEVELS[codes & 127]
        return np.asarray(np.where(codes & 128, -size, size))


Tensors = dict[str, np.ndarray]


class Signs(NamedTuple):
    """The change of some tensors in planes of signs: one bit a number, 1 for what is below 0, and a scale a group.

    signSGD's scaled sign (Bernstein et al. 2018, arXiv 1802.04434; Karimireddy et al. 2019, arXiv 1901.09847, Algorithm 1): a
    group x is written as s = mean |x| and the signs of x, which of all such is nearest to x.  A further plane writes what is
    left in the same way.  A matrix has a group for each place along its shorter side, so that LoRA has one for each direction
    of A and of B; any other tensor is one matrix of its first axis by the rest.
    """

    bits: np.ndarray  # uint8 [planes, numbers / 8, rounded up]
    scales: np.ndarray  # float32 [planes, groups]


class Layout(NamedTuple):
    """Where the numbers of tensors stand in one vector: the tensors in the order of their names, each group in one piece."""

    shapes: Mapping[str, tuple[int, ...]]
    groups: np.ndarray  # uint32 [tensors, 2]: groups, and numbers of each

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> Self:
        shapes = {name: tensors[name].shape for name in sorted(tensors)}
        sides = [sorted((s[0], math.prod(s[1:]))) for s in shapes.values()]
        return cls(shapes, np.array(sides, np.uint32).reshape(-1, 2))

    @property
    def sizes(self) -> np.ndarray:
        """The numbers of each group, int64."""
        return np.repeat(self.groups[:, 1], self.groups[:, 0]).astype(np.int64)

    def flat(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return tensors as the one vector."""
        matrices = [tensors[name].reshape((*tensors[name].shape[:1], -1)) for name in self.shapes]
        return np.concatenate([(m.T if len(m) > m.shape[1] else m).ravel() for m in matrices])

    def tensors(self, vector: np.ndarray) -> Tensors:
        """Return the tensors of the one vector."""
        parts = np.split(vector, np.cumsum(self.groups.prod(axis=1, dtype=np.int64))[:-1])
        found = {}
        for part, (name, shape), sides in zip(parts, self.shapes.items(), self.groups.tolist(), strict=True):
            matrix = part.reshape(sides)
            found[name] = np.ascontiguousarray(matrix.T if shape[0] > sides[0] else matrix).reshape(shape)
        return found


def signs_of(x: np.ndarray, sizes: np.ndarray, planes: int = 1) -> Signs:
    """Return x, in groups of these sizes, as planes of signs."""
    starts, left = np.cumsum(sizes) - sizes, x.astype(np.float64)
    scales = np.empty((planes, len(sizes)), np.float32)
    bits = []
    for plane in range(planes):
        scales[plane] = np.add.reduceat(np.abs(left), starts) / sizes
        bits.append(np.packbits(left < 0))
        left -= _plane(bits[-1], scales[plane], sizes)
    return Signs(np.stack(bits), scales)


def add_signs(vector: np.ndarray, signs: Signs, sizes: np.ndarray) -> np.ndarray:
    """Return float32 `vector` and the planes, added one after another."""
    vector = vector.astype(np.float32)
    for bits, scales in zip(*signs, strict=True):
        vector += _plane(bits, scales, sizes)
    return vector


def _plane(bits: np.ndarray, scales: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    size = np.repeat(scales, sizes)
    return np.where(np.unpackbits(bits, count=len(size)).view(np.bool_), -size, size)
