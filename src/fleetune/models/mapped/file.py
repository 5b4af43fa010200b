# SPDX-License-Identifier: Apache-2.0
"""Map a file of weights into memory, and give its pages back as reading goes on.

What a process has read of a mapped file counts as its memory until the system takes it back.  Here it is given back every
`KEPT` bytes.  The system keeps the file in its cache as long as there is room, so reading it again is no disk access then.

A file that is written to while it is mapped would change the weights of a run under way, and one that is cut would kill the
process.  So size and time are compared at every read.  (A new file in its place under the same name does no harm.)
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path
from typing import Final

import numpy as np

from fleetune.errors import ModelError

KEPT: Final = 32 << 20  # bytes read after which all pages are given back


class MappedFile:
    """A file's bytes.  Nobody may write to the arrays of them: what is written is lost when pages are given back."""

    def __init__(self, path: Path) -> None:
        """Map a file; ModelError for one that is gone or empty."""
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            weakref.finalize(self, os.close, self._file)
            self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{path} cannot be mapped into memory: {error}", hint="check the path"
            ) from error
        self._stated = self._state()
        self._read = 0

    def __len__(self) -> int:
        return len(self._map)

    def bytes(self, offset: int, size: int, used: int | None = None) -> np.ndarray:
        """Return uint8 [size] of the mapping itself; the values stay valid, whenever pages are given back.

        `used` is how many of them will be read (None: all).  ModelError when the file was written to since it was mapped.
        """
        if self._state() != self._stated:
            raise ModelError(
                f"{self.path} was changed while its weights were in use",
                hint="put the file back as it was, and repeat the command or resume the run",
            )
        used = size if used is None else used
        self._read += used
        if self._read > KEPT:
            self._read = used
            self.give_back()
        return np.frombuffer(self._map, np.uint8, size, offset)

    def give_back(self) -> None:
        """Give all pages back to the system, where it takes them (not on Windows)."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns
