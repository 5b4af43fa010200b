# SPDX-License-Identifier: Apache-2.0
"""Update a quantised model on a device by a patch (`patch_file.py`), and take it back.

Applying needs numpy, no torch, and a few MB beside the patch.  The file is checked before and after, written beside the old one
and renamed into its place, so at any instant there is the old file or the new one.  A patch in place leaves `FILE.undo`, a patch
that leads back.  A patch says what it makes; who made it it does not say: get it from where you get models.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from fleetune.common.files import regular, storage_error, sync_folder
from fleetune.common.folders import locked
from fleetune.common.ggml import BYTES
from fleetune.common.shell import command, quoted
from fleetune.common.sums import sha256
from fleetune.common.undo import undo_file
from fleetune.deploy.changes_file import ChangesFile
from fleetune.deploy.patch_file import AGAIN, PARTS, Patch, difference
from fleetune.deploy.patch_file import load as load
from fleetune.errors import Interrupted, ModelError, UsageError
from fleetune.runs.listener import Listener, Silent

PIECE: Final = 1 << 20  # bytes that are copied, or of blocks that are moved, at a time
GGUF: Final = b"GGUF"  # what such a file begins with

SILENT: Final = Silent()

Seen = Callable[[np.ndarray, np.ndarray], None]


def patched(path: Path, patch: Patch, seen: Seen | None = None) -> Iterator[bytes]:
    """Yield the new file a piece at a time; `seen` gets what moves before and after, in the file's order.

    ModelError where the file is too short.
    """
    end = patch.places[-1].offset + patch.places[-1].size
    if path.stat().st_size < end:
        raise ModelError(f"{path} is shorter than the patch's tensors", hint="the patch is for another file")
    moves, part = patch.moves(), PARTS[patch.trains]
    with open(path, "rb") as file:
        at = 0
        for number, place in enumerate(patch.places):
            yield from _copied(file, place.offset - at, path)
            step = max(1, PIECE // (place.together * place.row_bytes)) * place.together
            for first in range(0, place.rows, step):
                rows = min(step, place.rows - first)
                raw = np.frombuffer(bytearray(_read(file, rows * place.row_bytes, path)), np.uint8)
                blocks = raw.reshape(-1, BYTES[place.kind])
                new = moves(number, first, blocks)
                if seen is not None:
                    seen(part.read(blocks, place.kind), new)
                part.write(blocks, place.kind, new)
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
        raise ModelError(f"{path} was cut while it was read", hint="repeat the command")
    return part


class Packed:
    """Differences of scales or codes, compressed as they come."""

    def __init__(self, trains: str, level: int) -> None:
        self._trains, self._packer, self._parts = trains, zlib.compressobj(level), list[bytes]()

    def add(self, old: np.ndarray, new: np.ndarray) -> None:
        """Add what leads from old to new."""
        self._parts.append(self._packer.compress(difference(old, new, self._trains)))

    def all(self) -> np.ndarray:
        """Return all of it, uint8 [n]; nothing can be added afterwards."""
        self._parts.append(self._packer.flush())
        found, self._parts = b"".join(self._parts), []
        return np.frombuffer(found, np.uint8)


def apply(path: Path, patch: Patch, out: Path | None = None, listener: Listener = SILENT) -> Path | None:
    """Write the patched file to `out`, or in the place of `path`; return the file that undoes it, None with an `out`.

    ModelError, with nothing changed, where the file is not the patch's base or the result is not what the patch states;
    UsageError where `out` exists or its folder does not; StorageError where it cannot be written; Interrupted where the
    listener asks to stop.
    """
    path = path.resolve()  # a link stays one
    if out is not None:
        require_folder(out)
        with _alone(out):
            if os.path.lexists(out):
                raise UsageError(f"{out} exists already", hint="choose a new name: nothing is overwritten")
            require_base(path, patch, listener)
            write(path, patch, out, listener=listener)
        return None
    _require_file(path)
    with _alone(path):
        require_base(path, patch, listener)
        return _in_place(path, patch, listener)


def require_folder(out: Path) -> None:
    """Raise UsageError where the folder of a file to write does not exist."""
    if not out.parent.is_dir():
        raise UsageError(
            f"there is no folder {out.parent} for {out.name}",
            hint=f"make it first: mkdir -p {quoted(out.parent)}",
        )


def check_order(path: Path, patch: Path, out: Path | None) -> None:
    """Raise UsageError where the model and the patch of `apply` are given the wrong way round."""
    if _begins(patch, GGUF) and path.is_file() and not _begins(path, GGUF):
        raise UsageError(
            f"{patch} is a GGUF file and {path} is none: the model comes first, then the patch",
            hint=command("patch", "apply", patch, path, *(["--to", out] if out else [])),
        )


def _begins(path: Path, mark: bytes) -> bool:
    """Tell whether a file begins with these bytes; False for one that cannot be read."""
    try:
        with open(path, "rb", opener=regular) as file:
            return file.read(len(mark)) == mark
    except OSError:
        return False


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Wait for other processes that write a file, and remove what killed ones have left beside it."""
    with locked(target):
        own = re.compile(rf"\.{re.escape(target.name)}(\.undo\.new)?\.[^.]+\.tmp")
        for left in target.parent.iterdir():
            if own.fullmatch(left.name):
                left.unlink(missing_ok=True)
        yield


def _in_place(path: Path, patch: Patch, listener: Listener) -> Path:
    back = undo_file(path)
    with ChangesFile(_next(back), patch.result, patch.base, patch.trains, patch.places) as changes:
        write(path, patch, path, lambda old, new: changes.add(new, old), changes.keep, listener)
    os.replace(_next(back), back)
    return back


def told(listener: Listener, what: str, text: str = "") -> Callable[[int, int], None]:
    """Return a function that tells a listener how many bytes are done, and raises Interrupted when it asks to stop."""

    def tell(done: int, total: int) -> None:
        listener.progress(what, done, total, text)
        if listener.stop_requested:
            raise Interrupted("stopped before the new file was whole; nothing was changed")

    return tell


def write(
    path: Path,
    patch: Patch,
    target: Path,
    seen: Seen | None = None,
    before: Callable[[], None] = lambda: None,
    listener: Listener = SILENT,
) -> None:
    """Write the patched file beside `target`, check it, call `before`, and rename it into place; errors as of `apply`."""
    sha, temporary, done = hashlib.sha256(), None, 0
    tell, size = told(listener, "bytes written", patch.work), path.stat().st_size
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            for part in patched(path, patch, seen):
                file.write(part)
                sha.update(part)
                done += len(part)
                tell(done, size)
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


def require_base(path: Path, patch: Patch, listener: Listener = SILENT) -> None:
    """Raise ModelError unless a file is the one that a patch is for."""
    _require_file(path)
    if patch.work:
        listener.note(f"{patch.work} to compute")
    found = sha256(path, told(listener, "bytes compared"))
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


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"there is no file {path}", hint="give the GGUF file on the device")


def undo(path: Path, listener: Listener = SILENT) -> None:
    """Take back the last patch that was applied in place; ModelError, with nothing changed, where none is for this file.

    An undo file of a patch that never took its place (the device was stopped before) is removed.
    """
    path = path.resolve()
    _require_file(path)
    with _alone(path):
        _undo(path, listener)


def _undo(path: Path, listener: Listener) -> None:
    back = undo_file(path)
    found = sha256(path, told(listener, "bytes compared"))
    for candidate in (_next(back), back):
        if not candidate.is_file():
            continue
        patch = load(candidate)
        if patch.base == found:
            write(path, patch, path, listener=listener)
            candidate.unlink()
            return
        if candidate != back:
            candidate.unlink()
    raise ModelError(
        f"{path} has no patch that could be taken back",
        hint=f"a patch that is applied in place leaves {back.name}, for as long as the file is what it made",
    )


def _next(back: Path) -> Path:
    """Return the name that an undo file has until its patch is in place: the last patch's must not be lost before."""
    return back.with_name(back.name + ".new")
