# SPDX-License-Identifier: Apache-2.0
"""A lock on an open file that one process at a time has, by `flock` or, on Windows, by a lock on the first byte.

It ends when the file is closed, so also with its process, however that ended.
"""

from __future__ import annotations

import importlib
import os
import time
from typing import Final

SECONDS: Final = 0.1  # between two tries, where the system does not wait for us


def lock(handle: int, *, wait: bool = False) -> bool:
    """Lock an open file, by its descriptor; False where another has it (with `wait` never: it is waited for).

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
