"""Keep log.txt in a folder: what happened when, for its owner alone; full ones are kept as log.txt.1 to log.txt.3."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final

from fleetune.common import files
from fleetune.common.display import message_text, show, single_spaced
from fleetune.common.events import ClientReply, Event, RoundEvaluated, TuneDone
from fleetune.runs.listener import Listener, Relay

FILE: Final = "log.txt"
SIZE: Final = 1 << 20  # bytes of one
OLDER: Final = 3  # that are kept
TIME: Final = "%Y-%m-%d %H:%M:%S"


class LogFile(RotatingFileHandler):
    """The log.txt of a folder, made with its first line; one that cannot be written stops nothing."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder / FILE, maxBytes=SIZE, backupCount=OLDER, encoding="utf-8", delay=True, errors="replace"
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
        """Pass it on; the log has evaluated rounds, replies that do not count, and the end."""
        super().event(event)
        if isinstance(event, RoundEvaluated):
            self._log.write(f"round {event.round}: val loss {show('loss', event.loss)}")
        elif isinstance(event, ClientReply) and event.status != "ok":
            self._log.write(f"round {event.round}: client {event.client} {event.status}: {event.reason}")
        elif isinstance(event, TuneDone):
            self._log.write(f"done, digest {event.digest}")
