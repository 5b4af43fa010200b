"""Compile with `numba.njit` and an on-disk cache that may fail, and say when that takes long."""

import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import numba
from numba.core.event import Listener, register

log = logging.getLogger(__name__)

SILENT: Final = 5.0  # seconds of compiling after which it is said


def cached_njit(function: Callable[..., None]) -> Callable[..., None]:
    """Compile `function` without the interpreter's lock and with numpy's division; the cache key is its own file's text.

    In a read-only home, or on a full disk, it is compiled in every process.
    """
    try:
        compiled = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no folder for it
        compiled = numba.njit(nogil=True, error_model="numpy")(function)

    def call(*args: Any) -> None:
        try:
            compiled(*args)
        except OSError:  # compiled, but not written; nothing has been computed yet
            compiled(*args)

    return call


class _Announcer(Listener):  # type: ignore[misc]  # numba has no types
    """Says that kernels are being compiled, where that takes more than some seconds."""

    def __init__(self) -> None:
        self.depth = 0  # a kernel that calls another compiles it within

    def on_start(self, event: Any) -> None:
        self.depth += 1
        if self.depth == 1:
            words = (
                "compiling the kernels for this processor: once per installation, minutes on a small machine"
            )
            self.timer = threading.Timer(SILENT, log.warning, [words])
            self.timer.daemon = True
            self.timer.start()

    def on_end(self, event: Any) -> None:
        self.depth -= 1
        if not self.depth:
            self.timer.cancel()


register("numba:compile", _Announcer())
