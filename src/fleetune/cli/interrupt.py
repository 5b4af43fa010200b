# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C: the first is heard between two steps, so that nothing finished is lost; the second stops at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from fleetune.cli.console import Ui


class Brake:
    """While a `with` block runs, Ctrl-C sets `pulled` and says so; a second one raises KeyboardInterrupt."""

    def __init__(self, ui: Ui) -> None:
        self.ui = ui
        self.pulled = False

    def __enter__(self) -> Brake:
        self.before = signal.signal(signal.SIGINT, self._pull)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _pull(self, signum: int, frame: FrameType | None) -> None:
        if self.pulled:
            raise KeyboardInterrupt
        self.pulled = True
        self.ui.note("stopping after this step (Ctrl-C again: at once)")
