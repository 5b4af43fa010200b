"""Define the `Listener` through which tuning, compression, export and measurement report; none of them prints.

Subclass `Silent`, which ignores every call, and override the calls you need.
"""

import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

from fleetune.common import events, files
from fleetune.common.display import changes, human_bytes, human_time, message_text, show, single_spaced
from fleetune.common.events import Event, RoundEvaluated, TuneDone
from fleetune.errors import FleetuneError, UsageError

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Callbacks of a job.  Any call may raise `Interrupted`: finished work stays on disk, to resume from."""

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show what is about to run, as (label, value) rows under a title."""

    def event(self, event: events.Event) -> None:
        """Take one event (a class of `common/events.py`)."""

    def note(self, text: str) -> None:
        """Show a remark."""

    def step(self, client: int, step: int) -> None:
        """Note that a client of a round is about to take a local step, or goes on with it: a long one is told several times."""

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Note that `done` of `total` parts (`what`: "blocks", "steps", "rows") are finished."""

    @property
    def stop_requested(self) -> bool:
        """Whether the job should stop at the next point from which it can be resumed."""


class Silent:
    """A listener that shows nothing; remarks go to the log."""

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Do nothing."""

    def event(self, event: events.Event) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Log the remark."""
        log.info("%s", text)

    def step(self, client: int, step: int) -> None:
        """Do nothing."""

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Do nothing."""

    @property
    def stop_requested(self) -> bool:
        """False."""
        return False


class Relay:
    """A listener that passes every call on to another one; the base of those that add to it."""

    def __init__(self, inner: Listener) -> None:
        self.inner = inner

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self.inner.header(title, rows)

    def event(self, event: events.Event) -> None:
        self.inner.event(event)

    def note(self, text: str) -> None:
        self.inner.note(text)

    def step(self, client: int, step: int) -> None:
        self.inner.step(client, step)

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        self.inner.progress(what, done, total, text)

    @property
    def stop_requested(self) -> bool:
        return self.inner.stop_requested


def checked_listener(listener: Listener | None) -> Listener:
    """Return the listener to call, a `Silent` one for None; UsageError, before any work, for an object that is none."""
    found = Silent() if listener is None else listener
    if missing := [n for n in vars(Silent) if not n.startswith("_") and not hasattr(found, n)]:
        raise UsageError(
            f"a {type(found).__name__} is no listener: it has no {', '.join(missing)}",
            hint="inherit from fleetune.Silent, and override what you want to hear",
        )
    return found


PAUSE: Final = 10.0  # seconds between two lines of one count


class Progress(Silent):
    """A listener that prints: what runs, a line for each round, remarks, and how far a count is every ten seconds.

    `stream` is where (default: standard output, as it is at each line).  Inherit from it to hear more than it prints.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._rounds, self._before = 0, None  # type: int, float | None
        self._last: events.RoundDone | None = None
        self._in_sweep = False
        self._spoke = clock()

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print what is about to run."""
        wide = max((len(label) for label, _ in rows), default=0)
        self._say(title, *(f" {label:{wide}}   {FleetuneError.spoken(value)}" for label, value in rows))

    def note(self, text: str) -> None:
        """Print a remark."""
        self._say(FleetuneError.spoken(text))

    def event(self, event: events.Event) -> None:
        """Print a finished round, a run of a sweep, and the end."""
        if isinstance(event, events.RoundDone):
            self._last = event
        elif isinstance(event, events.RoundEvaluated) and not self._in_sweep:
            self._round(event)
        elif isinstance(event, events.SweepStart):
            self._in_sweep = True
        elif isinstance(event, events.SweepRun):
            self._say(run_words(event))
        elif isinstance(event, events.TuneDone) and not self._in_sweep:
            ended = ["done", *changes(event.base, event.tuned), f"time {human_time(event.wall)}"]
            self._say(
                "  ".join(ended),
                *map(FleetuneError.spoken, event.remarks),
                f"report {event.report or event.run}",
            )
        elif isinstance(event, events.Serving):
            self._say(f"{event.model} with {event.engine} at {event.url}")

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Print how far a count is, at most every ten seconds."""
        if what == "rounds":
            self._rounds = total
        elif what != "clients" and self._clock() - self._spoke >= PAUSE:
            self._say(f"{what} {done:,}/{total:,}  {text}".rstrip() if total else f"{what} {text}".rstrip())

    def _round(self, event: events.RoundEvaluated) -> None:
        last = self._last if event.round else None
        self._before = self._before if event.round else None
        parts = [f"round {event.round}" + (f"/{self._rounds}" if self._rounds else "")]
        parts += [f"val loss {show('loss', event.loss)}"]
        if event.loss is not None:
            parts += [f"change {event.loss - self._before:+.3f}"] if self._before is not None else []
            self._before = event.loss
        parts += [f"accuracy {show('accuracy', event.accuracy)}"] if event.accuracy is not None else []
        spent = ((last and last.report) or {}).get("epsilon")
        parts += [f"epsilon {spent:.3g}"] if spent is not None else []
        if last is not None:
            parts += [f"sent {human_bytes(last.bytes_up)}", f"received {human_bytes(last.bytes_down)}"]
            parts += [f"time {human_time(last.seconds)}"]
            parts += [f"{last.accepted} of {last.clients} clients"] if last.accepted < last.clients else []
        self._say("  ".join(parts))

    def _say(self, *lines: str) -> None:
        stream = self._stream or sys.stdout
        self._spoke = self._clock()
        if stream is not None:  # a process without a console has none
            print("\n".join(message_text(line) for line in lines), file=stream, flush=True)


class Bars(Progress):
    """A listener for notebooks: counts are bars, the rest is printed."""

    def __init__(self) -> None:
        super().__init__()
        self._bars: dict[str, Any] = {}

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Move the bar of a count; a full one goes."""
        from tqdm.auto import tqdm

        self._rounds = total if what == "rounds" else self._rounds
        self._close(*(name for name, bar in self._bars.items() if name != what and not bar.total))
        if what not in self._bars or self._bars[what].total != (total or None):
            self._close(what)
            self._bars[what] = tqdm(total=total or None, desc=what, leave=False)
        self._bars[what].set_postfix_str(text, refresh=False)
        self._bars[what].update(done - self._bars[what].n)
        if done >= total > 0:
            self._close(what)

    def event(self, event: events.Event) -> None:
        """Count rounds and clients' replies, take all bars away at the end, and print what `Progress` does."""
        if isinstance(event, events.ClientReply) and "clients" in self._bars:
            self._bars["clients"].update()
        elif isinstance(event, events.RoundDone):
            if "clients" in self._bars:
                self._bars["clients"].reset()
            if "rounds" in self._bars and not self._in_sweep:
                self._bars["rounds"].update(event.round - self._bars["rounds"].n)
        elif event.event == "done":
            self._close(*self._bars)
        super().event(event)

    def _close(self, *names: str) -> None:
        for name in names:
            if (bar := self._bars.pop(name, None)) is not None:
                bar.close()


def run_words(event: events.SweepRun) -> str:
    """Return a run of a sweep that is over, as one line."""
    name = event.run.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if event.failed:
        return f"{name}  failed: {event.failed}"
    return "  ".join([name, *changes(event.base, event.tuned), *(["done before"] if event.skipped else [])])


def in_notebook() -> bool:
    """Whether standard output is a notebook's."""
    return type(sys.stdout).__module__.startswith("ipykernel")


def is_read() -> bool:
    """Whether a person reads standard output along: it is a terminal, or a notebook's."""
    return sys.stdout is not None and (bool(sys.stdout.isatty()) or in_notebook())


def heard_by(listener: Listener | None, progress: bool | None) -> Listener:
    """Return what hears a job of the library: the caller's listener, lines on standard output, or nothing.

    `progress` True prints, False does not, None prints where it is read.  UsageError for a listener that is none, and
    for a listener beside `progress=True`.
    """
    if listener is not None:
        if progress:
            raise UsageError(
                "a listener is given, and progress=True asks for another",
                hint="leave out progress; or inherit from fleetune.Progress",
            )
        return checked_listener(listener)
    if progress is False or (progress is None and not is_read()):
        return Silent()
    return Bars() if in_notebook() and importlib.util.find_spec("ipywidgets") else Progress()


LOG: Final = "log.txt"  # what happened when, for its owner alone; full ones are log.txt.1 to log.txt.3
LOG_BYTES: Final = 1 << 20
OLDER_LOGS: Final = 3
TIME: Final = "%Y-%m-%d %H:%M:%S"


class LogFile(RotatingFileHandler):
    """The log.txt of a folder, made with its first line; one that cannot be written stops nothing."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder / LOG,
            maxBytes=LOG_BYTES,
            backupCount=OLDER_LOGS,
            encoding="utf-8",
            delay=True,
            errors="replace",
        )
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", TIME))
        self.over = False  # whether it is closed

    def close(self) -> None:
        """Close the file, after each line from now on."""
        self.over = True
        super().close()

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", errors="replace", opener=files.regular_private)

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on: the disk is full, or a pipe is in its place."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without what could drive a terminal."""
        return message_text(super().format(record))

    def write(self, text: str) -> None:
        """Add a line with the time, also when it is closed: a finished run's page is still served."""
        self.handle(logging.LogRecord("", logging.INFO, "", 0, single_spaced(text), None, None))
        if self.over:
            self.close()

    @contextmanager
    def warned(self) -> Iterator[None]:
        """Take the package's warnings too, while the block runs."""
        logger = logging.getLogger("fleetune")
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)


class Logged(Relay):
    """A listener that passes every call on to another one, and writes what is said, and how rounds end, into a log."""

    def __init__(self, inner: Listener, log: LogFile) -> None:
        super().__init__(inner)
        self._log = log

    def note(self, text: str) -> None:
        """Pass it on, and write it down."""
        super().note(text)
        self._log.write(text)

    def event(self, event: Event) -> None:
        """Pass it on; the log has evaluated rounds and the end."""
        super().event(event)
        if isinstance(event, RoundEvaluated):
            self._log.write(f"round {event.round}: val loss {show('loss', event.loss)}")
        elif isinstance(event, TuneDone):
            self._log.write(f"done, digest {event.digest}")
