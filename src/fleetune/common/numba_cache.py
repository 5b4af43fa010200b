# SPDX-License-Identifier: Apache-2.0
"""Compile with `numba.njit` and an on-disk cache that may fail; of processes that need the same kernel at once, one compiles."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numba
from numba.core.event import Listener, install_listener

from fleetune.common import files

log = logging.getLogger(__name__)

SILENT: Final = 5.0  # seconds of compiling after which it is said
LOCK: Final = "fleetune-compiles.lock"  # beside the cache
_IN_TURN: Final = threading.Lock()  # first calls of this process's threads


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
        if not known:
            with _IN_TURN:
                _first_call(compiled, args)
            known = True
        else:
            compiled(*args)

    return call


class _NotCachedError(Exception):
    """A kernel is not in the cache."""


class _Refusal(Listener):  # type: ignore[misc]  # numba has no types
    """Raises `_NotCachedError` before one kernel is compiled."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled

    def on_start(self, event: Any) -> None:
        if event.data["dispatcher"] is self.compiled:
            raise _NotCachedError

    def on_end(self, event: Any) -> None:
        pass


def _first_call(compiled: Any, args: tuple[Any, ...]) -> None:
    """Call a kernel: from the cache, also where another process is just filling it, else compiled here."""

    def cached() -> bool:
        with suppress(_NotCachedError), install_listener("numba:compile", _Refusal(compiled)):
            compiled(*args)
            return True
        return False

    if cached():
        return
    with _alone(compiled.stats.cache_path):
        if cached():
            return
        with said_when_slow():
            try:
                compiled(*args)
            except OSError:  # compiled, but not written; nothing has been computed yet
                compiled(*args)


@contextmanager
def _alone(folder: str | None) -> Iterator[None]:
    """Run the body in one process at a time, where the folder of the cache can hold a lock; who waits says so."""
    handle = None
    try:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            handle = os.open(Path(folder) / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            if not files.lock(handle):
                log.warning("another process compiles the kernels for this processor: waiting for it")
                files.lock(handle, wait=True)
    except OSError as error:
        log.info("kernels are compiled without a lock: %s", error)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


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
