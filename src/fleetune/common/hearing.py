# SPDX-License-Identifier: Apache-2.0
"""Hear of long work between its pieces, and end it there.

How long work lasts, the rows or a server decide.  So whatever takes long calls `heard` before each piece: every block of a
model before it runs (`models/net/model.py`), weights while they are moved, rows while they are read and encoded.  Who wants
to hear says so once, around the work, and may raise.
"""

from __future__ import annotations

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
