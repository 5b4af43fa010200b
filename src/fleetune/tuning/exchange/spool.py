# SPDX-License-Identifier: Apache-2.0
"""Keep a round's bytes out of memory: in an unnamed file of the run's folder once they are many."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from fleetune.common.files import storage_error

IN_MEMORY: Final = 1 << 22  # bytes; more lie on disk


class Spool:
    """Bytes that are read again by their offset; StorageError when the disk does not take them."""

    def __init__(self, folder: Path, in_memory: int = IN_MEMORY) -> None:
        self._folder = folder
        self._file = tempfile.SpooledTemporaryFile(in_memory, "w+b", dir=str(folder))  # noqa: SIM115

    def store(self, data: bytes) -> int:
        """Append `data`; return its offset."""
        try:
            offset = self._file.seek(0, 2)
            self._file.write(data)
        except OSError as error:
            raise storage_error(error, self._folder) from error
        return offset

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on."""
        try:
            self._file.seek(offset)
            return self._file.read(size)
        except OSError as error:
            raise storage_error(error, self._folder) from error

    def close(self) -> None:
        """Let go of the file, which is then gone."""
        self._file.close()
