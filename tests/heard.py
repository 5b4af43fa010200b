"""A listener that writes down what it is told."""

from collections.abc import Callable
from typing import Any

from fleetune.runs.listener import Silent


class Heard(Silent):
    """Keeps events, notes and counts; `stop` is asked, with this listener, whether a stop is requested."""

    def __init__(self, stop: Callable[["Heard"], bool] = lambda heard: False) -> None:
        self.events, self.notes = list[Any](), list[str]()
        self.counts, self.stop = list[tuple[str, int, int, str]](), stop

    def event(self, event: Any) -> None:
        self.events.append(event)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        self.counts.append((what, done, total, text))

    @property
    def stop_requested(self) -> bool:
        return self.stop(self)

    def of(self, name: str) -> list[Any]:
        return [e for e in self.events if e.event == name]


def counting(what: str) -> Callable[["Heard"], bool]:
    """A `stop`: when something of this name is counted."""
    return lambda heard: bool(heard.counts and heard.counts[-1][0] == what)
