# SPDX-License-Identifier: Apache-2.0
"""Update a quantised model on a device by a patch of kilobytes: its scales move, its codes stay.

A patch is a safetensors file.  Its metadata `patch` is JSON: the SHA-256 of the GGUF file it is for and of the one it makes,
and where the scales lie.  It carries one of two things:

    entries    a ledger's directions and coefficients, with its key, law and grid: kilobytes; the device computes the moves
    changes    the differences of the scales' bits, compressed (zlib): megabytes at most, for a device that only copies

Applying needs numpy, no torch.  The file is checked before and after, written beside the old one and renamed into its place,
so at any instant there is the old file or the new one.  A patch in place leaves `FILE.undo`, a patch that leads back.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fleetune.common.files import storage_error, sync_folder, write_atomic
from fleetune.common.shell import quoted
from fleetune.common.sums import sha256
from fleetune.errors import ModelError, UsageError
from fleetune.seeds import noise, scale_grid

FORMAT: Final = 1
BLOCK: Final = 32
PIECE: Final = 1 << 20  # bytes that are copied, and scales that are moved, at a time
AGAIN: Final = "get the patch again from its origin"
BYTES: Final = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "IQ4_NL": 18}  # of a block
HALVES: Final = {
    "Q4_0": 1,
    "Q4_1": 2,
    "Q5_0": 1,
    "Q5_1": 2,
    "Q8_0": 1,
    "IQ4_NL": 1,
}  # fp16 numbers that it begins with


class Place(NamedTuple):
    """Where the blocks of a matrix lie in the file."""

    offset: int  # of the first byte
    kind: str
    rows: int
    blocks: int  # of a row
    heads: int  # in how many heads the file's rows are interleaved; 0: as they are
    start: int  # global number of the first scale

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.rows * self.blocks * BYTES[self.kind]

    @property
    def scales(self) -> int:
        """Number of scales."""
        return self.rows * self.blocks * HALVES[self.kind]

    def in_model(self) -> np.ndarray:
        """Return for each row of the file which row of the model it is: int64 [rows]."""
        rows = np.arange(self.rows)
        return rows.reshape(self.heads, 2, -1).swapaxes(1, 2).reshape(-1) if self.heads else rows


class Patch(NamedTuple):
    """A patch in memory."""

    base: str  # SHA-256 of the file that it is for
    result: str  # ... and of the one that it makes
    places: tuple[Place, ...]  # by rising offset
    changed: Callable[
        [int, np.ndarray], np.ndarray
    ]  # (number of a place, its scales' bits uint16 [n]) -> new ones
    file: bytes


def with_entries(
    base: str, result: str, places: tuple[Place, ...], *, run_key: int, law: str, K: int, grid: float,
    ids: np.ndarray, coefficients: np.ndarray,
) -> Patch:  # fmt: skip
    """Return a patch that carries a ledger's entries: ids uint64 [n], coefficients int64 [n]."""
    moves = noise.passes(law, K, ids, coefficients)

    def changed(number: int, bits: np.ndarray) -> np.ndarray:
        place = places[number]
        order = place.in_model()
        own = bits.reshape(place.rows, -1)
        model = np.empty_like(own)
        model[order] = own
        flat = model.reshape(-1)
        for first in range(0, len(flat), PIECE):
            part = flat[first : first + PIECE]
            flat[first : first + PIECE] = scale_grid.moved(
                part, place.start + first, run_key, moves, law, grid
            )
        back: np.ndarray = model[order].reshape(-1)
        return back

    head = {"run_key": f"{run_key:016x}", "law": law, "K": K, "grid": grid}
    file = _encoded(base, result, places, head, {"id": ids, "coefficient": coefficients})
    return Patch(base, result, places, changed, file)


def with_changes(base: str, result: str, places: tuple[Place, ...], changes: bytes) -> Patch:
    """Return a patch that carries differences of bits, uint16 modulo 2^16 of all places one after the other, compressed."""
    starts = np.cumsum([0, *(place.scales for place in places)])

    def unpacked() -> np.ndarray:
        reader = zlib.decompressobj()
        raw = reader.decompress(changes, int(2 * starts[-1]))
        if len(raw) != 2 * starts[-1] or reader.unconsumed_tail or not reader.eof:
            raise ModelError("the patch is damaged: its changes are not those of its tensors", hint=AGAIN)
        return np.frombuffer(raw, "<u2")

    held: list[np.ndarray] = []

    def changed(number: int, bits: np.ndarray) -> np.ndarray:
        if not held:
            held.append(unpacked())
        new: np.ndarray = bits + held[0][starts[number] : starts[number + 1]]
        return new

    file = _encoded(base, result, places, {}, {"changes": np.frombuffer(changes, np.uint8)})
    return Patch(base, result, places, changed, file)


def _encoded(
    base: str, result: str, places: tuple[Place, ...], head: dict[str, Any], arrays: dict[str, np.ndarray]
) -> bytes:
    stated = {"format": FORMAT, "base": base, "result": result, "places": places, **head}
    raw: bytes = save(arrays, {"patch": json.dumps(stated, sort_keys=True, separators=(",", ":"))})
    return raw


def load(path: Path) -> Patch:
    """Read a patch; ModelError for a file that is none or is damaged."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            head = json.loads((file.metadata() or {})["patch"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if head["format"] != FORMAT:
            raise ModelError(
                f"{path} is a patch of format {head['format']}, this program reads {FORMAT}",
                hint="apply it with the version of Fleetune that made it",
            )
        places = tuple(_place(row) for row in head["places"])
        _check_order(places)
        base, result = (str(head[name]) for name in ("base", "result"))
        if set(arrays) == {"changes"}:
            return with_changes(base, result, places, arrays["changes"].tobytes())
        return with_entries(
            base, result, places, run_key=int(head["run_key"], 16), law=str(head["law"]), K=int(head["K"]),
            grid=float(head["grid"]), ids=arrays["id"], coefficients=arrays["coefficient"],
        )  # fmt: skip
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, UsageError) as error:
        raise ModelError(f"{path} is no patch, or is damaged ({error!r:.120})", hint=AGAIN) from error


def _place(row: Any) -> Place:
    place = Place(*row)
    numbers = (place.offset, place.rows, place.blocks)
    if not all(type(n) is int and 0 < n < 1 << 48 for n in numbers) or place.kind not in BYTES:
        raise ValueError(f"no place of a tensor: {row!r:.80}")
    if type(place.heads) is not int or type(place.start) is not int or min(place.heads, place.start) < 0:
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


def patched(
    path: Path, patch: Patch, seen: Callable[[np.ndarray, np.ndarray], None] | None = None
) -> Iterator[bytes]:
    """Yield the new file a piece at a time; `seen` gets the bits of the scales of each place before and after.

    ModelError where the file is too short.
    """
    with open(path, "rb") as file:
        at = 0
        for number, place in enumerate(patch.places):
            yield from _copied(file, place.offset - at, path)
            raw = np.frombuffer(bytearray(_read(file, place.size, path)), np.uint8).reshape(
                -1, BYTES[place.kind]
            )
            halves = raw[:, : 2 * HALVES[place.kind]]
            old = np.ascontiguousarray(halves).view("<u2").reshape(-1)
            new = patch.changed(number, old)
            if seen is not None:
                seen(old, new)
            halves[:] = new.astype("<u2").view(np.uint8).reshape(halves.shape)
            yield raw.tobytes()
            at = place.offset + place.size
        while rest := file.read(PIECE):
            yield rest


def _copied(file: Any, size: int, path: Path) -> Iterator[bytes]:
    while size > 0:
        part = _read(file, min(size, PIECE), path)
        size -= len(part)
        yield part


def _read(file: Any, size: int, path: Path) -> bytes:
    part: bytes = file.read(size)
    if len(part) != size:
        raise ModelError(f"{path} is shorter than the patch's tensors", hint="the patch is for another file")
    return part


def apply(path: Path, patch: Patch, out: Path | None = None) -> Path | None:
    """Write the patched file to `out`, or in the place of `path`; return the file that undoes it, None with an `out`.

    ModelError, with nothing changed, where the file is not the patch's base or the result is not what the patch states;
    UsageError where `out` exists; StorageError where it cannot be written.
    """
    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", hint="choose a new name: nothing is overwritten")
    require_base(path, patch)
    if out is not None:
        _write(path, patch, out)
        return None
    changes: list[np.ndarray] = []
    back = undo_file(path)

    def keep_undo() -> None:
        packed = zlib.compress(np.concatenate(changes).astype("<u2").tobytes(), 1)
        write_atomic(back, with_changes(patch.result, patch.base, patch.places, packed).file)

    _write(path, patch, path, lambda old, new: changes.append(old - new), keep_undo)
    return back


def _write(
    path: Path,
    patch: Patch,
    target: Path,
    seen: Callable[[np.ndarray, np.ndarray], None] | None = None,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Write the patched file beside `target`, check it, call `before`, and rename it into place."""
    sha, temporary = hashlib.sha256(), None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            for part in patched(path, patch, seen):
                file.write(part)
                sha.update(part)
            file.flush()
            os.fsync(file.fileno())
        if sha.hexdigest() != patch.result:
            raise ModelError(
                f"the patched file would have SHA-256 {sha.hexdigest()[:16]}.., the patch states {patch.result[:16]}..",
                hint=AGAIN,
            )
        before()
        os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise storage_error(error, target) from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


def require_base(path: Path, patch: Patch) -> None:
    """Raise ModelError unless a file is the one that a patch is for."""
    if not path.is_file():
        raise ModelError(f"there is no file {path}", hint="give the GGUF file on the device")
    found = sha256(path)
    if found == patch.base:
        return
    if found == patch.result:
        raise ModelError(
            f"{path} has this patch already", hint=f"take it back: fleetune patch undo {quoted(path)}"
        )
    raise ModelError(
        f"the patch is for a file with SHA-256 {patch.base[:16]}.., {path} has {found[:16]}..",
        hint="get the file that the model was tuned on; nothing was changed",
    )


def undo(path: Path) -> None:
    """Take back the last patch that was applied in place; ModelError where there is none."""
    back = undo_file(path)
    if not back.is_file():
        raise ModelError(f"there is no {back}", hint="a patch that was applied in place leaves one")
    patch = load(back)
    if (
        not path.is_file() or sha256(path) != patch.result
    ):  # else it was killed before the patch took its place
        require_base(path, patch)
        _write(path, patch, path)
    back.unlink()


def undo_file(path: Path) -> Path:
    """Return the name of the file that undoes a patch."""
    return path.with_name(path.name + ".undo")
