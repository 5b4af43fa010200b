# SPDX-License-Identifier: Apache-2.0
"""Compile with `numba.njit` and an on-disk cache that may fail."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numba

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

    known = False

    def call(*args: Any) -> None:
        nonlocal known
        if known:
            compiled(*args)
            return
        with said_when_slow():
            try:
                compiled(*args)
            except OSError:  # compiled, but not written; nothing has been computed yet
                compiled(*args)
        known = True

    return call


@contextmanager
def said_when_slow() -> Iterator[None]:
    """Say that kernels are being compiled where the body takes more than some seconds."""
    words = "compiling the kernels for this processor: once per installation, minutes on a small machine"
    timer = threading.Timer(SILENT, log.warning, [words])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
