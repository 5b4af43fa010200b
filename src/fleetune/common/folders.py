# SPDX-License-Identifier: Apache-2.0
"""Create folders that appear whole or not at all, and lock them against other processes.

A folder is made under a hidden name beside its place, flushed to the disk, given the umask's modes
(safetensors and tempfile make private files), and renamed.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fleetune.common.files import default_mode, storage_error
from fleetune.common.locks import lock
from fleetune.errors import StorageError

log = logging.getLogger(__name__)

# how a file is opened to be flushed: Windows wants it open for writing
FLUSH: Final = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY


@contextmanager
def staged(target: Path, *, replace: str | None = None) -> Iterator[Path]:
    """Give a hidden folder beside `target` that becomes `target` when the block ends without an error.

    Files and folders get the mode that the umask gives and are flushed to the disk before the rename.  An
    existing `target` stays and the new one is dropped (another process was faster).  With `replace`, a file's
    name, a target that is empty or holds that file is replaced; StorageError if it is something else.  An
    operating-system error in the block becomes a StorageError; `target` is as it was.
    A killed process leaves at most a folder named `.NAME.*.tmp`.
    """
    _check_replace(target, replace)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        yield temporary
        _flush_tree(temporary)
        _rename(temporary, target, replace)
    except OSError as error:
        raise storage_error(error, target) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_replace(target: Path, replace: str | None) -> None:
    if replace is None or not target.exists() or (target / replace).is_file():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise StorageError(
            f"{target} exists and holds something else; it is left alone",
            hint="choose a new folder with --out",
        )


def _flush_tree(folder: Path) -> None:
    """Give files and folders the umask's modes, and flush them to the disk."""
    mode = default_mode()
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
    elif replace is not None:
        old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold `target`'s lock file, waiting for another process; remove what a killed process left behind.

    Where the system has no file locks the block runs without one: `staged` alone is already safe.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise storage_error(error, target) from error
    try:
        if _acquire(handle, target):
            for stale in target.parent.glob(f".{target.name}.*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def _acquire(handle: int, target: Path) -> bool:
    """Take the lock, waiting for it; False where the file system has no locks."""
    try:
        if not lock(handle):
            log.info("another process is preparing %s; waiting for it", target)
            lock(handle, wait=True)
    except OSError as error:
        log.debug("no file lock for %s (%s)", target, error)
        return False
    return True
