# SPDX-License-Identifier: Apache-2.0
"""Handle Ctrl-C and SIGTERM: the first stops a job at the next point that it can resume from, the second at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from fleetune.cli.console import Ui

STOPS = (signal.SIGINT, signal.SIGTERM)


class InterruptHandler:
    """While a `with` block runs, Ctrl-C or SIGTERM sets `requested` and says so; a second one raises KeyboardInterrupt.

    So does the first one while `at_once` is set: as long as there is nothing to lose.
    """

    at_once = False

    def __init__(self, ui: Ui) -> None:
        self.ui = ui
        self.requested = False

    def __enter__(self) -> InterruptHandler:
        self.before = {number: signal.signal(number, self._request) for number in STOPS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested or self.at_once:
            raise KeyboardInterrupt
        self.requested = True
        again = "Ctrl-C" if signum == signal.SIGINT else "the signal"
        self.ui.note(f"stopping after this step ({again} again: at once)")
