# SPDX-License-Identifier: Apache-2.0
"""Read and write patches: files that move the scales of a quantised model, or its codes, and leave all else (`patch.py`).

A patch is a safetensors file.  Its metadata `patch` is JSON: the SHA-256 of the GGUF file it is for and of the one it makes,
and where the blocks lie.  Format 1 moves scales, format 2 codes.  It carries one of two things:

    entries    a ledger's directions and coefficients, with its key, law and grid: kilobytes; the device computes the moves,
               a number for each scale or code and pass
    changes    the differences of the scales' bits or of the codes' bytes, compressed (zlib): megabytes, for a device that only
               copies
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fleetune.common.display import counted
from fleetune.common.files import regular
from fleetune.common.ggml import BLOCK, BYTES, HALVES
from fleetune.errors import ModelError, UsageError
from fleetune.seeds import code_grid, noise, scale_grid
from fleetune.seeds.ledger_head import GRID_LIMIT
from fleetune.seeds.noise import Passes

MOST: Final = 1 << 48  # of a place's numbers
LAWS: Final = ("hashed", "pooled", "rademacher")  # whose sums are integers
# what reading bytes that are no patch can raise
DAMAGED: Final = (
    SafetensorError, OSError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError, RecursionError,
)  # fmt: skip
AGAIN: Final = "get the patch again from its origin"
# what a patch's entries may ask of a device: passes, and numbers in their tables (4 M steps of 4,096 directions a pool)
PASSES: Final = 1 << 14
TABLES: Final = 1 << 22
DIGITS: Final = 20  # of a size
FED: Final = 1 << 16  # bytes of packed changes that are unpacked at a time: zlib copies what it leaves

Moves = Callable[[int, int, np.ndarray], np.ndarray]
"""(number of a place, its first row, blocks of some rows uint8 [n, bytes]) -> what moves of them, new; rows come in order."""


class Part(NamedTuple):
    """What a patch moves of a block."""

    format: int  # of its patches
    type: str  # numpy's, of the numbers that move
    lies: Callable[[int], slice]  # in a block that begins with so many fp16 numbers
    numbers: Callable[[str], int]  # of a block of a kind that a direction has
    moved: Callable[[np.ndarray, str, int, int, Passes, str, float], np.ndarray]

    def read(self, blocks: np.ndarray, kind: str) -> np.ndarray:
        """Return what moves of blocks uint8 [n, bytes]: [n, ..], a copy."""
        return np.ascontiguousarray(blocks[:, self.lies(HALVES[kind])]).view(self.type)

    def write(self, blocks: np.ndarray, kind: str, new: np.ndarray) -> None:
        """Put it into blocks."""
        blocks[:, self.lies(HALVES[kind])] = np.ascontiguousarray(new.astype(self.type)).view(np.uint8)


def _moved_scales(
    blocks: np.ndarray, kind: str, start: int, run_key: int, passes: Passes, law: str, grid: float
) -> np.ndarray:
    bits = PARTS["scales"].read(blocks, kind)
    return scale_grid.moved(bits.reshape(-1), start, run_key, passes, law, grid).reshape(bits.shape)


PARTS: Final[Mapping[str, Part]] = MappingProxyType(
    {
        "scales": Part(1, "<u2", lambda halves: slice(2 * halves), lambda kind: HALVES[kind], _moved_scales),
        "codes": Part(2, "u1", lambda halves: slice(2 * halves, None), lambda kind: BLOCK, code_grid.moved),
    }
)
TRAINS: Final = {part.format: name for name, part in PARTS.items()}


class Place(NamedTuple):
    """Where the blocks of a matrix lie in the file."""

    offset: int  # of the first byte
    kind: str
    rows: int
    blocks: int  # of a row
    heads: int  # in how many heads the file's rows are interleaved; 0: as they are
    start: int  # global number of the first scale, or of the first weight

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the file."""
        return self.blocks * BYTES[self.kind]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.rows * self.row_bytes

    @property
    def together(self) -> int:
        """Rows that must be taken together: those of a head, where they are interleaved."""
        return self.rows // self.heads if self.heads else 1

    def in_model(self, count: int | None = None) -> np.ndarray:
        """Return for each of the first rows of the file (default: all) which row of the model it is: int64 [count]."""
        rows = np.arange(self.rows if count is None else count)
        if not self.heads:
            return rows
        found: np.ndarray = rows.reshape(-1, 2, self.together // 2).swapaxes(1, 2).reshape(-1)
        return found


class Patch(NamedTuple):
    """A patch in memory."""

    base: str  # SHA-256 of the file that it is for
    result: str  # ... and of the one that it makes
    trains: str  # one of PARTS
    places: tuple[Place, ...]  # by rising offset
    moves: Callable[[], Moves]  # to be called for each writing
    encoded: Callable[[], bytes]
    passes: int = 0  # over its numbers, that are computed; 0 where it carries differences

    @property
    def work(self) -> str:
        """Say what applying it computes, "12 passes over 3,072 scales"; "" where it carries differences."""
        numbers = sum(p.rows * p.blocks * PARTS[self.trains].numbers(p.kind) for p in self.places)
        return (
            f"{counted(self.passes, 'pass', 'passes')} over {numbers:,} {self.trains}" if self.passes else ""
        )

    @property
    def file(self) -> bytes:
        """Return the bytes of its file, encoded anew."""
        return self.encoded()


def with_entries(
    base: str, result: str, trains: str, places: tuple[Place, ...], *, run_key: int, law: str, K: int, grid: float,
    ids: np.ndarray, coefficients: np.ndarray,
) -> Patch:  # fmt: skip
    """Return a patch that carries a ledger's entries: ids uint64 [n], coefficients int64 [n]; ValueError for what cannot be."""
    if law not in LAWS or not 0 <= run_key < 1 << 64 or not 0.0 < grid <= GRID_LIMIT:
        raise ValueError(f"no ledger has law {law!r:.40}, key {run_key:x} and grid {grid}")
    if (ids.dtype, coefficients.dtype) != (np.dtype(np.uint64), np.dtype(np.int64)):
        raise ValueError(f"its entries are {ids.dtype} and {coefficients.dtype}")
    passes, part = noise.passes(law, K, ids, coefficients), PARTS[trains]

    def moved(number: int, first: int, blocks: np.ndarray) -> np.ndarray:
        place = places[number]
        rows = blocks.reshape(-1, place.row_bytes)
        order = place.in_model(len(rows))
        model = np.empty_like(rows)
        model[order] = rows
        start = place.start + first * place.blocks * part.numbers(place.kind)
        new = part.moved(model.reshape(blocks.shape), place.kind, start, run_key, passes, law, grid)
        in_file: np.ndarray = new.reshape(len(rows), -1)[order].reshape(new.shape)
        return in_file

    head = {"run_key": f"{run_key:016x}", "law": law, "K": K, "grid": grid}
    arrays = {"id": ids, "coefficient": coefficients}
    return Patch(
        base, result, trains, places, lambda: moved,
        lambda: _encoded(base, result, trains, places, head, arrays), len(passes.ids),
    )  # fmt: skip


def check_work(law: str, K: int, passes: int) -> None:
    """Raise ModelError where a patch's entries would ask a device for more than `PASSES`, or for larger tables than `TABLES`."""
    tables = passes * K if law in noise.POOLS else passes
    if passes > PASSES or tables > TABLES:
        size = f" with tables of {tables:,} numbers" if tables > passes else ""
        raise ModelError(
            f"the patch's entries ask a device for {counted(passes, 'pass', 'passes')}{size}; at most {PASSES:,} "
            f"passes and {TABLES:,} numbers are computed",
            hint="make it with --changes: nothing is computed for such a patch",
        )


def with_changes(
    base: str, result: str, trains: str, places: tuple[Place, ...], changes: np.ndarray
) -> Patch:
    """Return a patch that carries differences (`difference`) of all places one after the other, compressed: uint8 [n]."""
    last, part = len(places) - 1, PARTS[trains]

    def moves() -> Moves:
        unpack = _unpacker(changes.data)

        def moved(number: int, first: int, blocks: np.ndarray) -> np.ndarray:
            place = places[number]
            old = part.read(blocks, place.kind)
            ends = number == last and first * place.blocks + len(blocks) == place.rows * place.blocks
            try:
                raw, whole = unpack(old.nbytes, ends)
            except zlib.error as error:
                raise ModelError(f"the patch is damaged ({error})", hint=AGAIN) from error
            if not whole:
                raise ModelError("the patch is damaged: its changes are not those of its tensors", hint=AGAIN)
            new: np.ndarray = old + np.frombuffer(raw, part.type).reshape(old.shape)
            return new

        return moved

    return Patch(
        base, result, trains, places, moves,
        lambda: _encoded(base, result, trains, places, {}, {"changes": changes}),
    )  # fmt: skip


def _unpacker(packed: memoryview) -> Callable[[int, bool], tuple[bytes, bool]]:
    """Return a function (size, ends) that unpacks the next bytes and tells whether there are so many, and none after an end."""
    reader, at = zlib.decompressobj(), 0

    def some(size: int) -> bytes:
        nonlocal at
        parts = list[bytes]()
        while size and not reader.eof:
            fed: bytes | memoryview = reader.unconsumed_tail
            if not fed:
                fed = packed[at : at + FED]
                at += len(fed)
            part = reader.decompress(fed, size)
            if not part and not fed:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def unpack(size: int, ends: bool) -> tuple[bytes, bool]:
        raw = some(size)
        left = ends and (some(1) or not reader.eof or reader.unused_data or at < len(packed))
        return raw, len(raw) == size and not left

    return unpack


def difference(old: np.ndarray, new: np.ndarray, trains: str) -> bytes:
    """Return what leads from old to new numbers of a part: their differences, modulo 2^16 or 2^8."""
    moved: np.ndarray = (new - old).astype(PARTS[trains].type)
    return moved.tobytes()


def _encoded(
    base: str, result: str, trains: str, places: tuple[Place, ...], head: dict[str, Any],
    arrays: dict[str, np.ndarray],
) -> bytes:  # fmt: skip
    raw: bytes = save(arrays, {"patch": _stated(base, result, trains, places, head)})
    return raw


def _stated(base: str, result: str, trains: str, places: tuple[Place, ...], head: dict[str, Any]) -> str:
    stated = {"format": PARTS[trains].format, "base": base, "result": result, "places": places, **head}
    return json.dumps(stated, sort_keys=True, separators=(",", ":"))


def header_of_changes(base: str, result: str, trains: str, places: tuple[Place, ...], size: int) -> bytes:
    """Return what stands before `size` bytes of packed changes in a patch's file: as many bytes whatever the size is."""
    changes = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    stated = {"patch": _stated(base, result, trains, places, {})}
    text = json.dumps({"__metadata__": stated, "changes": changes}, separators=(",", ":"))
    room = len(text) + 2 * (DIGITS - len(str(size)))
    room += -room % 8  # where safetensors wants the data to begin
    return room.to_bytes(8, "little") + text.encode().ljust(room)


def load(path: Path) -> Patch:
    """Read a patch; ModelError for a file that is none, is damaged, or asks for too much work (`check_work`)."""
    if not path.is_file():
        raise ModelError(f"there is no patch {path}", hint="check the path")
    try:
        with safe_open(str(path), framework="numpy") as file:
            head = json.loads((file.metadata() or {})["patch"])
            names = set(file.keys())
            changes = file.get_slice("changes") if names == {"changes"} else None
            arrays = {} if changes else {name: file.get_tensor(name) for name in names}
        if type(head["format"]) is not int or (trains := TRAINS.get(head["format"])) is None:
            raise _OtherFormat(repr(head["format"])[:40])
        places = tuple(_place(row) for row in head["places"])
        _check_order(places)
        base, result = _digest(head["base"]), _digest(head["result"])
        if changes:
            if changes.get_dtype() != "U8":
                raise ValueError(f"its changes are {changes.get_dtype()}")
            packed = _last_bytes(path, math.prod(changes.get_shape()))
            return with_changes(base, result, trains, places, packed)
        if type(head["K"]) is not int or type(head["grid"]) is not float:
            raise ValueError("its head has the wrong types")
        check_work(
            head["law"], head["K"], noise.count_passes(head["law"], arrays["id"], arrays["coefficient"])
        )
        return with_entries(
            base, result, trains, places, run_key=_key(head["run_key"]), law=str(head["law"]), K=head["K"],
            grid=head["grid"], ids=arrays["id"], coefficients=arrays["coefficient"],
        )  # fmt: skip
    except _OtherFormat as error:
        raise ModelError(
            f"{path} is a patch of format {error}, this program reads {', '.join(map(str, TRAINS))}",
            hint="apply it with the version of Fleetune that made it",
        ) from error
    except DAMAGED as error:
        raise ModelError(f"{path} is no patch, or is damaged: {_why(error)}", hint=AGAIN) from error
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", hint=error.hint) from error
    except UsageError as error:
        raise ModelError(f"{path} is no patch, or is damaged: {error.message:.120}", hint=AGAIN) from error


def _last_bytes(path: Path, size: int) -> np.ndarray:
    """Read the end of a file, uint8 [size]: safetensors' own reading of a tensor holds it three times."""
    with open(path, "rb", opener=regular) as file:
        file.seek(-size, os.SEEK_END)
        return np.fromfile(file, np.uint8)


class _OtherFormat(Exception):
    pass


def _why(error: BaseException) -> str:
    """Say in words what is wrong with bytes that are no patch."""
    if isinstance(error, OSError):
        return error.strerror or "it cannot be read"
    if isinstance(error, SafetensorError | RecursionError):
        return "it is not a whole safetensors file"
    if isinstance(error, json.JSONDecodeError | UnicodeError):
        return "its head is not JSON"
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r:.80}"
    return f"{error!s:.120}" if type(error) is ValueError else "its head is not that of a patch"


def _key(text: Any) -> int:
    try:
        return int(text, 16)
    except (TypeError, ValueError) as error:
        raise ValueError(f"no key: {text!r:.80}") from error


def _digest(text: Any) -> str:
    if type(text) is not str or len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError(f"no SHA-256: {text!r:.80}")
    return text


def _place(row: Any) -> Place:
    place = Place(*row)
    counts = (place.offset, place.rows, place.blocks)
    if not all(type(n) is int and 0 < n < MOST for n in counts) or place.kind not in BYTES:
        raise ValueError(f"no place of a tensor: {row!r:.80}")
    if not all(type(n) is int and 0 <= n < MOST for n in (place.heads, place.start)) or place.size >= MOST:
        raise ValueError(f"no place of a tensor: {row!r:.80}")
    if place.heads and place.rows % (2 * place.heads):
        raise ValueError(f"{place.rows} rows are not {place.heads} heads")
    return place


def _check_order(places: tuple[Place, ...]) -> None:
    end = 0
    for place in places:
        if place.offset < end:
            raise ValueError("its tensors overlap")
        end = place.offset + place.size
    if not places:
        raise ValueError("it has no tensors")
