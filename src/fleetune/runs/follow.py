# SPDX-License-Identifier: Apache-2.0
"""Follow a run's metrics.jsonl while it is written: every look reads only what was added since the last."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fleetune.common.files import regular
from fleetune.errors import StorageError
from fleetune.runs.metrics import FILE, event_of


class Follower:
    """Reads the events of a run folder, each once.

    `anew` counts the times that the file was written anew (a resumed run cuts it): all events then come again.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self.anew = 0
        self._inode, self._at = 0, 0

    def news(self) -> Iterator[dict[str, Any]]:
        """Yield the events that were added since the last look, one at a time.

        A line that cannot be read is left out, one without its end is left for the next look.  StorageError when the
        file cannot be read; one that is not there has no events.
        """
        try:
            with open(self.file, "rb", opener=regular) as file:
                self._find_place(os.fstat(file.fileno()))
                file.seek(self._at)
                while (line := file.readline()).endswith(b"\n"):
                    self._at += len(line)
                    if (event := event_of(line)) is not None:
                        yield event
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(
                f"cannot read {self.file}: {error.strerror}", hint="check the disk and the folder"
            ) from error

    def _find_place(self, found: os.stat_result) -> None:
        """Begin at the start again where this is another file than before, or a shorter one."""
        if found.st_ino != self._inode or found.st_size < self._at:
            self.anew += self._inode != 0
            self._inode, self._at = found.st_ino, 0
