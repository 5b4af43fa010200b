# SPDX-License-Identifier: Apache-2.0
"""A listener that writes down what it is told."""

from __future__ import annotations

from fleetune.runs.listener import Silent


class Heard(Silent):
    """Keeps notes and counts; asks to stop at once (`stop`), or when something of a name is counted (`stop_at`)."""

    def __init__(self, *, stop: bool = False, stop_at: str = "") -> None:
        self.notes, self.counts = list[str](), list[tuple[str, int, int, str]]()
        self.stop, self.stop_at = stop, stop_at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        self.counts.append((what, done, total, text))

    @property
    def stop_requested(self) -> bool:
        return self.stop or bool(self.counts and self.counts[-1][0] == self.stop_at)
