# SPDX-License-Identifier: Apache-2.0
"""Follow a job while it works: the calls that it makes to the console, or to an object of your own.

Tuning, compression, export and measurement take a `Listener`; none of them prints.  `Silent` ignores every call (it only
logs remarks); subclass it and override the calls you need.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from fleetune.common.events import Event
from fleetune.errors import UsageError

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Callbacks of a job.  Any call may raise `Interrupted`: finished work stays on disk, to resume from."""

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show what is about to run, as (label, value) rows under a title."""
        ...

    def event(self, event: Event) -> None:
        """Take one event (a class of `common/events.py`)."""
        ...

    def note(self, text: str) -> None:
        """Show a remark."""
        ...

    def step(self, client: int, step: int) -> None:
        """Note that a client of a round is about to take a local step."""
        ...

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Note that `done` of `total` parts (`what`: "blocks", "steps", "rows") are finished."""
        ...

    @property
    def stop_requested(self) -> bool:
        """Whether the job should stop at the next point from which it can be resumed."""
        ...


class Silent:
    """A listener that shows nothing; remarks go to the log."""

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Do nothing."""

    def event(self, event: Event) -> None:
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
        """Pass it on."""
        self.inner.header(title, rows)

    def event(self, event: Event) -> None:
        """Pass it on."""
        self.inner.event(event)

    def note(self, text: str) -> None:
        """Pass it on."""
        self.inner.note(text)

    def step(self, client: int, step: int) -> None:
        """Pass it on."""
        self.inner.step(client, step)

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Pass it on."""
        self.inner.progress(what, done, total, text)

    @property
    def stop_requested(self) -> bool:
        """Whether the other listener asks to stop."""
        return self.inner.stop_requested


def checked(listener: Listener | None) -> Listener:
    """Return the listener to call, a `Silent` one for None; UsageError, before any work, for an object that is none."""
    found = Silent() if listener is None else listener
    if missing := [n for n in vars(Silent) if not n.startswith("_") and not hasattr(found, n)]:
        raise UsageError(
            f"a {type(found).__name__} is no listener: it has no {', '.join(missing)}",
            hint="inherit from fleetune.Silent, and override what you want to hear",
        )
    return found
