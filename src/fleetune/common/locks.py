# SPDX-License-Identifier: Apache-2.0
"""Lock an open file for one process, by `flock` or, on Windows, by a lock on its first byte.

The lock ends when the file is closed, and so with its process, however that ended.
"""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from typing import Final

SECONDS: Final = 0.1  # between two tries, where the system does not wait for us


def lock(handle: int, *, wait: bool = False) -> bool:
    """Lock an open file descriptor; False where another process has the lock.  With `wait`, wait for it instead.

    OSError where the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_byte(handle, wait)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def names(path: Path, handle: int) -> bool:
    """Tell whether `path` still names the open file: who had its lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _lock_byte(handle: int, wait: bool) -> bool:
    msvcrt = importlib.import_module("msvcrt")
    while True:
        os.lseek(handle, 0, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            if not wait:
                return False
            time.sleep(SECONDS)
        else:
            return True
