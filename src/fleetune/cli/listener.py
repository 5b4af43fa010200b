"""Show a job on the console, and pass Ctrl-C on to it: the first stops it where it can resume, the second at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType

from fleetune.cli.console import Bar, Ui
from fleetune.common.events import Event

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


class ConsoleListener:
    """A `runs.listener.Listener` for jobs that count one thing at a time: blocks, steps, rows.

    From the first count on, Ctrl-C asks the job to stop where it can be resumed; before that, and where nothing `resumes`, it
    ends the command.
    """

    def __init__(self, ui: Ui, stack: ExitStack, *, resumes: bool, begins: str = "loading") -> None:
        self.resumes = resumes
        self.ui, self.stack, self.bars = ui, stack, stack.enter_context(ExitStack())
        self.interrupt: InterruptHandler | None = None
        self.what = begins
        self.bar: Bar | None = self.bars.enter_context(ui.bar(begins)) if begins else None
        self.last: Event | None = None

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show the panel over the job."""
        self.ui.header(title, rows)

    def event(self, event: Event) -> None:
        """Print the event in JSON mode, and keep it as the last."""
        self.last = event
        self.ui.event(event)

    def note(self, text: str) -> None:
        """Show a remark."""
        self.ui.note(text)

    def step(self, client: int, step: int) -> None:
        """Do nothing: these jobs have no rounds."""

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Move the bar of `what`; the bar of something else ends."""
        if self.resumes and self.interrupt is None:
            self.interrupt = self.stack.enter_context(InterruptHandler(self.ui))
        if self.bar is None or what != self.what:
            self.bars.close()
            self.what = what
            self.bar = self.bars.enter_context(self.ui.bar(what))
        self.bar.update(done, total, text)

    @property
    def stop_requested(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self.interrupt is not None and self.interrupt.requested


@contextmanager
def console_listener(ui: Ui, *, resumes: bool = True, begins: str = "loading") -> Iterator[ConsoleListener]:
    """A listener on `ui` for the time of the block; `resumes`: whether the job can be resumed where it is stopped.

    `begins` is what it does before something is counted, "" where a person is spoken with.
    """
    with ExitStack() as stack:
        yield ConsoleListener(ui, stack, resumes=resumes, begins=begins)
