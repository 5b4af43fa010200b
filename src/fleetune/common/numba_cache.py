# SPDX-License-Identifier: Apache-2.0
"""Numba functions whose compiled code is kept on the disk, where there is a folder for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def cached_njit(function: Callable[..., None]) -> Callable[..., None]:
    """`function` compiled without the interpreter's lock, as numpy computes; the cache knows its file's text alone.

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
