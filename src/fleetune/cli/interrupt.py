# SPDX-License-Identifier: Apache-2.0
"""Handle Ctrl-C: the first press stops a job at the next point that it can resume from, the second at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from fleetune.cli.console import Ui


class InterruptHandler:
    """While a `with` block runs, Ctrl-C sets `requested` and says so; a second one raises KeyboardInterrupt."""

    def __init__(self, ui: Ui) -> None:
        self.ui = ui
        self.requested = False

    def __enter__(self) -> InterruptHandler:
        self.before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.ui.note("stopping after this step (Ctrl-C again: at once)")
