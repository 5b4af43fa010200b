# SPDX-License-Identifier: Apache-2.0
"""Compile with `numba.njit` and an on-disk cache that may fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


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
