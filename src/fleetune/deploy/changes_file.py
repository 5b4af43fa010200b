# SPDX-License-Identifier: Apache-2.0
"""Write a patch of differences while they come, in the memory of a piece of them (`patch_file.py` has the format)."""

from __future__ import annotations

import os
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from fleetune.common.files import default_mode, storage_error, sync_folder
from fleetune.deploy.patch_file import Place, difference, header_of_changes


class ChangesFile:
    """The file of a patch from `base` to `result`: hidden beside `path` while it grows, until `keep` renames it.

    It is removed where the block ends before that.
    """

    def __init__(self, path: Path, base: str, result: str, trains: str, places: tuple[Place, ...]) -> None:
        self._path, self._stated = path, (base, result, trains, places)
        self._packer, self._size = zlib.compressobj(1), 0

    def __enter__(self) -> Self:
        try:
            handle, self._temporary = tempfile.mkstemp(
                dir=self._path.parent, prefix=f".{self._path.name}.", suffix=".tmp"
            )
        except OSError as error:
            raise storage_error(error, self._path) from error
        self._file = os.fdopen(handle, "wb")
        self._file.write(header_of_changes(*self._stated, 0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk, which was told before
            self._file.close()
        with suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def add(self, old: np.ndarray, new: np.ndarray) -> None:
        """Add what leads from old to new numbers; they come in the file's order.  OSError as the system gives."""
        self._write(self._packer.compress(difference(old, new, self._stated[2])))

    def keep(self) -> None:
        """Finish the file and rename it into place.  OSError as the system gives."""
        self._write(self._packer.flush())
        self._file.seek(0)
        self._file.write(header_of_changes(*self._stated, self._size))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.chmod(self._temporary, default_mode())
        os.replace(self._temporary, self._path)
        sync_folder(self._path.parent)

    def _write(self, part: bytes) -> None:
        self._file.write(part)
        self._size += len(part)
