"""Read the head of a .gguf file: its values, and where its tensors are (the ggml project's docs/gguf.md, versions 2 and 3).

It takes a twentieth of the gguf package's time, and no torch.  Every length is checked against the rest of the file before
anything of that length is made.
"""

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np

from fleetune.common.display import quoted
from fleetune.errors import ModelError, UsageError

# the numbers of the types of values -> struct's letter; 8 is text, 9 a list
NUMBERS: Final[Mapping[int, str]] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
TEXT, LIST = 8, 9
DIMS: Final = 4  # of a tensor, ggml's own bound
PARTS: Final = "split.count"  # of a model that lies in several files
AGAIN: Final = "copy, fetch or export it again"


class TensorPlace(NamedTuple):
    """A tensor as the head describes it."""

    name: str
    kind: str  # F32, Q4_1, ..; its number where the package gguf does not know it
    shape: tuple[int, ...]  # in the order of rows
    offset: int  # of its first byte in the file
    size: int  # bytes; 0 where the kind is not known


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself; a list among the values is a list."""

    path: Path
    values: Mapping[str, Any]
    tensors: Sequence[TensorPlace]

    def bytes(self, tensor: TensorPlace) -> np.ndarray:
        """Return uint8 [.., bytes of a row], which is the mapped file itself: a tensor of a known kind."""
        shape = (*tensor.shape[:-1], tensor.size // math.prod(tensor.shape[:-1]))
        return np.memmap(self.path, np.uint8, "r", tensor.offset, shape)


def check(path: Path) -> GgufHeader:
    """Return the head of a file with a model in it, or with a part of one.

    UsageError for an adapter, which is no model; ModelError as of `read`, or without tensors.
    """
    head = read(path)
    if head.values.get("general.type") == "adapter":
        raise UsageError(
            f"{path} is an adapter, not a model: it runs beside a file of its base",
            hint=f"name the run it is of, or: llama-cli -m BASE.gguf --lora {quoted(path)}",
        )
    if not head.tensors and PARTS not in head.values:
        raise ModelError(f"{path} holds no tensors", hint="give a file with a model")
    return head


def check_whole(path: Path) -> GgufHeader:
    """Return the head of a file with a whole model in it; ModelError for a part of one, the rest as in `check`."""
    head = check(path)
    if head.values.get(PARTS, 1) != 1:
        raise ModelError(
            f"{path} is a part of a split model, and models are read from one file",
            hint="with all parts in a folder: llama-gguf-split --merge FIRST.gguf OUT.gguf   and then give OUT.gguf",
        )
    return head


def read(path: Path) -> GgufHeader:
    """Return the head of a file.  ModelError when there is none, when it cannot be read, or tensors are cut off."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(
                    f"{path} is not a GGUF file", hint="give a .gguf file, or export the model again"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
                head, has = GgufHeader(path, *_read(_Reader(raw))), len(raw)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint="check the path") from error
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise ModelError(f"{path} is cut off or damaged: its head cannot be read", hint=AGAIN) from error
    if (size := max((t.offset + t.size for t in head.tensors), default=0)) > has:
        raise ModelError(f"{path} is cut off: it has {has:,} bytes, its tensors take {size:,}", hint=AGAIN)
    return head


class _Reader:
    """Reads values in turn; struct.error or ValueError beyond the end."""

    def __init__(self, raw: mmap.mmap) -> None:
        self.raw, self.at = raw, 4

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.raw, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return value

    def claim(self, count: int, size: int) -> int:
        """Return the bytes of `count` items; ValueError when less than that is left of the file."""
        if count * size > len(self.raw) - self.at:
            raise ValueError("beyond the end")
        return count * size

    def text(self) -> str:
        start = self.at + 8
        self.at = start + self.claim(self.number("Q"), 1)
        return self.raw[start : self.at].decode()

    def value(self) -> Any:
        if (kind := self.number("I")) != LIST:
            return self.text() if kind == TEXT else self.number(NUMBERS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner == TEXT:
            self.claim(count, 8)  # the length of each
            return [self.text() for _ in range(count)]
        start, letter = self.at, NUMBERS[inner]
        self.at += self.claim(count, struct.calcsize(f"<{letter}"))
        return list(struct.unpack_from(f"<{count}{letter}", self.raw, start))


def _read(reader: _Reader) -> tuple[dict[str, Any], list[TensorPlace]]:
    if reader.number("I") not in (2, 3):
        raise ValueError("another version, or big-endian")
    tensors, keys = reader.number("Q"), reader.number("Q")
    values = {reader.text(): reader.value() for _ in range(keys)}
    found = [_tensor(reader) for _ in range(tensors)]
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError("an alignment that is none")
    start = -(-reader.at // alignment) * alignment
    return values, [tensor._replace(offset=start + tensor.offset) for tensor in found]


def _tensor(reader: _Reader) -> TensorPlace:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, dims = reader.text(), reader.number("I")
    if dims > DIMS:
        raise ValueError("more dims than a tensor has")
    shape = tuple(reader.number("Q") for _ in range(dims))[::-1]
    kind, offset = reader.number("I"), reader.number("Q")
    try:
        known = GGMLQuantizationType(kind)
    except ValueError:  # newer than the package: an engine may know it
        return TensorPlace(name, str(kind), shape, offset, 0)
    block, size = map(int, GGML_QUANT_SIZES[known])
    if math.prod(shape[-1:]) % block:
        raise ValueError("a row that is no whole blocks")
    return TensorPlace(name, known.name, shape, offset, math.prod(shape) // block * size)
