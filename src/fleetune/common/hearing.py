"""Report from inside long work, and stop it there.

Long work calls `heard` before each piece: a block of a model, a chunk of weights, a few rows.  `hearing` installs the callback
around the work; an exception that it raises ends the work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_told: ContextVar[Callable[[], None]] = ContextVar("told", default=lambda: None)


def heard() -> None:
    """Tell what hears of this thread's work that a piece of it begins."""
    _told.get()()


@contextmanager
def hearing(told: Callable[[], None]) -> Iterator[None]:
    """Call `told()`, which may raise, before each piece of the work of the block, in this thread."""
    before = _told.set(told)
    try:
        yield
    finally:
        _told.reset(before)
