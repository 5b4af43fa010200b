"""Create folders that appear whole or not at all, and lock them against other processes.

A folder is made under a hidden name beside its place, locked by its process, and renamed.  What a killed process leaves is
unlocked, and `sweep` removes it.
"""

import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fleetune.common.files import PRIVATE, default_mode, lock, still_names, storage_error
from fleetune.errors import StorageError

log = logging.getLogger(__name__)

# how a file is opened to be flushed: Windows wants it open for writing
FLUSH: Final = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY
SUFFIX: Final = ".fleetune.tmp"  # of a hidden folder that is being written


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Give a new hidden folder `.NAME.*.fleetune.tmp` in `parent`, which goes when the block ends; sweep `parent` first.

    A killed process leaves it behind, until another one makes a hidden folder there.  OSError as the system gives.
    """
    sweep(parent)
    folder, handle = _held(parent, name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def sweep(parent: Path) -> int:
    """Remove the hidden folders in `parent` that killed processes left, and count them; one that a process still holds stays."""
    swept = 0
    for folder in parent.glob(f".*{SUFFIX}"):
        try:
            handle = _lock_folder(folder)
        except OSError as error:  # gone meanwhile, or folders cannot be locked here
            log.debug("%s is left alone: %s", folder, error)
            continue
        if handle is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)
            swept += 1
    return swept


def _held(parent: Path, name: str) -> tuple[Path, int | None]:
    """Make a hidden folder and lock it: (folder, open handle); without a handle where folders cannot be locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=SUFFIX, dir=parent))
        try:
            handle = _lock_folder(folder)
        except OSError:
            if folder.exists():
                return folder, None
            continue  # swept before it was locked
        if handle is not None:
            return folder, handle


def _lock_folder(folder: Path) -> int | None:
    """Lock a folder and return its open handle; None where another process has it.  OSError where it cannot be locked."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if lock(handle) and still_names(folder, handle):
            return handle
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return None


@contextmanager
def staged(target: Path, *, replace: str | None = None, private: bool = False) -> Iterator[Path]:
    """Give a hidden folder beside `target` that becomes `target` when the block ends without an error.

    Files and folders get the mode that the umask gives (`private`: the owner's alone) and are flushed to the disk before
    the rename.  An existing `target` stays: StorageError (another process was faster).  With `replace`, a file's
    name, a target that is empty or holds that file is replaced; StorageError if it is something else.  An
    operating-system error in the block becomes a StorageError; `target` is as it was.
    A killed process leaves at most a folder that the next `scratch` there removes.
    """
    _check_replace(target, replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch(target.parent, target.name) as temporary:
            yield temporary
            _flush_tree(temporary, PRIVATE if private else default_mode())
            _rename(temporary, target, replace)
    except OSError as error:
        raise storage_error(error, target) from error


def _check_replace(target: Path, replace: str | None) -> None:
    if replace is None or not target.exists() or (target / replace).is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise StorageError(
            f"{target} exists and holds something else; it is left alone",
            hint="choose a new folder with --out",
        )


def _flush_tree(folder: Path, mode: int) -> None:
    """Give files this mode and folders the one that goes with it, and flush them to the disk."""
    enter = mode | (mode & 0o444) >> 2  # who may read a folder may enter it
    for path in [*folder.rglob("*"), folder]:
        path.chmod(enter if path.is_dir() else mode)
        if path.is_dir() and sys.platform == "win32":
            continue  # folders cannot be flushed there
        handle = os.open(path, FLUSH)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rename(temporary: Path, target: Path, replace: str | None) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    if replace is None:
        raise appeared(target)
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def appeared(target: Path) -> StorageError:
    """Return the error for a place that was free when the work began, and is taken at its end."""
    return StorageError(
        f"{target} has appeared meanwhile; it is left alone, and what was to be written there is dropped",
        hint="choose a new place",
    )


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold `target`'s lock file, waiting for another process; remove what a killed process left behind.

    The lock's file goes at the end, whatever became of the block; one that a kill leaves behind is nobody's.
    Where the system has no file locks the block runs without one: `staged` alone is already safe.
    """
    place = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, alone = _acquired(place, target)
    except OSError as error:
        raise storage_error(error, target) from error
    try:
        if alone:
            for stale in target.parent.glob(f".{target.name}.*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
        yield
    finally:
        if alone:
            with suppress(OSError):  # Windows removes no file that is open
                place.unlink()
        os.close(handle)


def _acquired(place: Path, target: Path) -> tuple[int, bool]:
    """Open a lock file and take its lock, waiting for it: (open handle, whether the file system has locks)."""
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock(handle):
                log.info("another process is preparing %s; waiting for it", target)
                lock(handle, wait=True)
        except OSError as error:
            log.debug("no file lock for %s (%s)", target, error)
            return handle, False
        if still_names(place, handle):
            return handle, True
        os.close(handle)  # who had it has removed it meanwhile
