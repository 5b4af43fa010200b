"""Update a quantised model on a device by a patch: a file that moves the scales of its blocks and leaves all else.

A patch is a safetensors file.  Its metadata `patch` is JSON: the SHA-256 of the GGUF file it is for and of the one it makes,
where the blocks lie, and key, law and grid of a ledger, whose directions and coefficients are its tensors.  Applying needs numpy,
no torch, and a few MB.  A patch states what it produces, but not who made it: get it from where you get models.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fleetune.common.display import counted, quoted
from fleetune.common.files import locked, storage_error, sync_folder
from fleetune.common.ggml import BYTES, HALVES
from fleetune.common.sums import sha256
from fleetune.errors import Interrupted, ModelError, UsageError, VersionError
from fleetune.runs.listener import Listener, Silent
from fleetune.seeds import noise
from fleetune.seeds.ledger import GRID_LIMIT

FORMAT: Final = 1
PIECE: Final = 1 << 20  # bytes that are copied, or of blocks that are moved, at a time
MOST: Final = 1 << 48  # of a place's numbers
# what a patch's entries may ask of a device: passes, and numbers in their tables (4 M steps of 4,096 directions a pool)
PASSES: Final = 1 << 14
TABLES: Final = 1 << 22
AGAIN: Final = "get the patch again from its origin"
# what reading bytes that are no patch can raise
DAMAGED: Final = (
    SafetensorError,
    OSError,
    ArithmeticError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
)
SILENT: Final = Silent()

Moves = Callable[[int, int, np.ndarray], np.ndarray]
"""(number of a place, its first row, blocks of some rows uint8 [n, bytes]) -> their scales, new; rows come in order."""


class BlockPlace(NamedTuple):
    """Where the blocks of a matrix lie in the file."""

    offset: int  # of the first byte
    kind: str
    rows: int
    blocks: int  # of a row
    heads: int  # in how many heads the file's rows are interleaved; 0: as they are
    start: int  # global number of the first scale

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the file."""
        return self.blocks * BYTES[self.kind]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.rows * self.row_bytes

    @property
    def scales(self) -> int:
        """Scales of a row."""
        return self.blocks * HALVES[self.kind]

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


class Entries(NamedTuple):
    """What a patch has of a ledger."""

    run_key: int
    law: str
    K: int
    grid: float
    ids: np.ndarray  # uint64 [n]
    coefficients: np.ndarray  # int64 [n]

    @property
    def passes(self) -> int:
        """Return the passes over all scales that they take."""
        return noise.count_passes(self.law, self.ids, self.coefficients)

    def fit(self) -> bool:
        """Return whether a device computes them: at most `PASSES` passes, with `TABLES` numbers in their tables."""
        passes = self.passes
        return passes <= PASSES and passes * (self.K if self.law == noise.POOL else 1) <= TABLES

    def moves(self, places: tuple[BlockPlace, ...]) -> Moves:
        """Return what computes the scales of blocks; ValueError or UsageError for entries that no ledger has."""
        if (
            self.law not in ("hashed", "rademacher")  # whose sums are integers
            or not 0 <= self.run_key < 1 << 64
            or not 0.0 < self.grid <= GRID_LIMIT
        ):
            raise ValueError("no ledger has such a head")
        if (self.ids.dtype, self.coefficients.dtype) != (np.dtype(np.uint64), np.dtype(np.int64)):
            raise ValueError("its entries are of other types")
        passes = noise.passes(self.law, self.K, self.ids, self.coefficients)

        def moved(number: int, first: int, blocks: np.ndarray) -> np.ndarray:
            place = places[number]
            old = scales_of(blocks, place.kind).reshape(-1, place.scales)
            order = place.in_model(len(old))
            model = np.empty_like(old)
            model[order] = old
            start = place.start + first * place.scales
            new = noise.moved_scales(model.reshape(-1), start, self.run_key, passes, self.grid)
            in_file: np.ndarray = new.reshape(old.shape)[order].reshape(len(blocks), -1)
            return in_file

        return moved


@dataclass(frozen=True)
class Patch:
    """A patch in memory."""

    base: str  # SHA-256 of the file that it is for
    result: str  # ... and of the one that it makes
    places: tuple[BlockPlace, ...]  # by rising offset
    entries: Entries

    @property
    def work(self) -> str:
        """Say what applying it computes, "12 passes over 3,072 scales"."""
        numbers = sum(place.rows * place.scales for place in self.places)
        return f"{counted(self.entries.passes, 'pass', 'passes')} over {numbers:,} scales"

    @property
    def file(self) -> bytes:
        """Return the bytes of its file."""
        e, stated = self.entries, {"format": FORMAT, "base": self.base, "result": self.result}
        stated |= {
            "places": self.places,
            "run_key": f"{e.run_key:016x}",
            "law": e.law,
            "K": e.K,
            "grid": e.grid,
        }
        arrays = {"id": e.ids, "coefficient": e.coefficients}
        raw: bytes = save(arrays, {"patch": json.dumps(stated, sort_keys=True, separators=(",", ":"))})
        return raw


def scales_of(blocks: np.ndarray, kind: str) -> np.ndarray:
    """Return the bits of the scales of blocks uint8 [n, bytes]: uint16 [n, 1 or 2], a copy."""
    return np.ascontiguousarray(blocks[:, : 2 * HALVES[kind]]).view("<u2")


# Reading a patch -------------------------------------------------------------------------------------


def load(path: Path) -> Patch:
    """Read a patch; ModelError for a file that is none, is damaged, or asks for too much work (`Entries.fit`)."""
    if not path.is_file():
        raise ModelError(f"there is no patch {path}", hint="check the path")
    try:
        with safe_open(str(path), framework="numpy") as file:
            head = json.loads((file.metadata() or {})["patch"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if head["format"] != FORMAT or type(head["format"]) is not int:
            raise VersionError(path)
        places = tuple(_place(row) for row in head["places"])
        ends = [0, *(place.offset + place.size for place in places)]
        if not places or any(place.offset < end for place, end in zip(places, ends, strict=False)):
            raise ValueError("it has no tensors, or they overlap")
        base, result = head["base"], head["result"]
        if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in (base, result)):
            raise ValueError("a digest is no SHA-256")
        if type(head["K"]) is not int or type(head["grid"]) is not float:
            raise ValueError("its head has the wrong types")
        entries = Entries(
            int(head["run_key"], 16),
            str(head["law"]),
            head["K"],
            head["grid"],
            arrays["id"],
            arrays["coefficient"],
        )
        if not entries.fit():
            raise ModelError(
                f"its entries ask for {counted(entries.passes, 'pass', 'passes')} with K = {entries.K:,}; at most {PASSES:,} "
                f"passes and {TABLES:,} numbers in their tables are computed",
                hint=AGAIN,
            )
        entries.moves(places)
        return Patch(base, result, places, entries)
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", hint=error.hint) from error
    except (*DAMAGED, UsageError) as error:
        raise ModelError(f"{path} is no patch, or is damaged", hint=AGAIN) from error


def _place(row: Any) -> BlockPlace:
    """Return a place; ValueError for what is none."""
    place = BlockPlace(*row)
    counts, others = (place.offset, place.rows, place.blocks), (place.heads, place.start)
    if (
        not all(type(n) is int and 0 < n < MOST for n in counts)
        or not all(type(n) is int and 0 <= n < MOST for n in others)
        or place.kind not in BYTES
        or place.size >= MOST
        or (place.heads and place.rows % (2 * place.heads))
    ):
        raise ValueError("no place of a tensor")
    return place


# Applying a patch ------------------------------------------------------------------------------------


def apply(path: Path, patch: Patch, out: Path | None = None, listener: Listener = SILENT) -> None:
    """Write the patched file to `out`, or in the place of `path`.

    ModelError, with nothing changed, where the file is not the patch's base or the result is not what the patch states;
    UsageError where `out` exists or its folder does not; StorageError where it cannot be written; Interrupted where the
    listener asks to stop.
    """
    path = path.resolve()  # a link stays one
    if not path.is_file():
        raise ModelError(f"there is no file {path}", hint="give the GGUF file on the device")
    if out is not None:
        require_folder(out)
    with _alone(out or path):
        if out is not None and os.path.lexists(out):
            raise UsageError(f"{out} exists already", hint="choose a new name: nothing is overwritten")
        _require_base(path, patch, listener)
        moves = patch.entries.moves(patch.places)
        write(path, patch.places, moves, out or path, listener, patch.work, patch.result)


def require_folder(out: Path) -> None:
    """Raise UsageError where the folder of a file to write does not exist."""
    if not out.parent.is_dir():
        raise UsageError(
            f"there is no folder {out.parent} for {out.name}",
            hint=f"make it first: mkdir -p {quoted(out.parent)}",
        )


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Wait for other processes that write a file, and remove what killed ones have left beside it."""
    with locked(target):
        own = re.compile(rf"\.{re.escape(target.name)}\.[^.]+\.tmp")
        for left in target.parent.iterdir():
            if own.fullmatch(left.name):
                left.unlink(missing_ok=True)
        yield


def told(listener: Listener, what: str, text: str = "") -> Callable[[int, int], None]:
    """Return a function that tells a listener how many bytes are done, and raises Interrupted when it asks to stop."""

    def tell(done: int, total: int) -> None:
        listener.progress(what, done, total, text)
        if listener.stop_requested:
            raise Interrupted("stopped before the new file was whole; nothing was changed")

    return tell


def _require_base(path: Path, patch: Patch, listener: Listener) -> None:
    """Raise ModelError unless a file is the one that a patch is for."""
    listener.note(f"{patch.work} to compute")
    found = sha256(path)
    if found == patch.base:
        return
    if found == patch.result:
        raise ModelError(
            f"{path} has this patch already", hint="there is nothing to do; the file from before is its base"
        )
    raise ModelError(
        f"the patch is for a file with SHA-256 {patch.base[:16]}.., {path} has {found[:16]}..",
        hint="get the file that the model was tuned on; nothing was changed",
    )


def write(
    path: Path,
    places: tuple[BlockPlace, ...],
    moves: Moves,
    target: Path,
    listener: Listener = SILENT,
    work: str = "",
    result: str = "",
) -> None:
    """Write the file with other scales beside `target`, and rename it into place; errors as of `apply`.

    `result` is the SHA-256 that the new file must have, where it is known.
    """
    sha, temporary, done = hashlib.sha256(), None, 0
    tell, size = told(listener, "bytes written", work), path.stat().st_size
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            for part in patched(path, places, moves):
                file.write(part)
                sha.update(part)
                done += len(part)
                tell(done, size)
            file.flush()
            os.fsync(file.fileno())
        if result and sha.hexdigest() != result:
            raise ModelError(
                f"the patched file would have SHA-256 {sha.hexdigest()[:16]}.., the patch states {result[:16]}..",
                hint=AGAIN,
            )
        os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise storage_error(error, target) from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


def patched(path: Path, places: tuple[BlockPlace, ...], moves: Moves) -> Iterator[bytes]:
    """Yield the new file a piece at a time; ModelError where the file is too short."""
    if path.stat().st_size < places[-1].offset + places[-1].size:
        raise ModelError(f"{path} is shorter than the patch's tensors", hint="the patch is for another file")
    with open(path, "rb") as file:
        at = 0
        for number, place in enumerate(places):
            for left in range(place.offset - at, 0, -PIECE):
                yield _read(file, min(left, PIECE), path)
            step = max(1, PIECE // (place.together * place.row_bytes)) * place.together
            for first in range(0, place.rows, step):
                rows = min(step, place.rows - first)
                raw = np.frombuffer(bytearray(_read(file, rows * place.row_bytes, path)), np.uint8)
                blocks = raw.reshape(-1, BYTES[place.kind])
                new = moves(number, first, blocks).astype("<u2")
                blocks[:, : 2 * HALVES[place.kind]] = np.ascontiguousarray(new).view(np.uint8)
                yield raw.tobytes()
            at = place.offset + place.size
        while rest := file.read(PIECE):
            yield rest


def _read(file: Any, size: int, path: Path) -> bytes:
    part: bytes = file.read(size)
    if len(part) != size:
        raise ModelError(f"{path} was cut while it was read", hint="repeat the command")
    return part
