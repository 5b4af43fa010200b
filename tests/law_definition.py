"""The places of a pool's law as docs/ledger.md defines them, one Python integer at a time."""

from __future__ import annotations

from functools import cache

import numpy as np

MULTIPLIER = 0x9E3779B97F4A7C15


def mixed(x: int) -> int:
    return (x ^ (x >> 32)) * MULTIPLIER % 2**64


def place(K: int, i: int) -> int:
    """The row of the K x K matrix that element i takes."""
    return ((mixed(mixed(i // 128)) >> 40) + i % 128) % K


@cache
def slow_places(K: int, start: int, count: int) -> np.ndarray:
    """`noise.places`, slowly: int64 [count]."""
    return np.array([place(K, i) for i in range(start, start + count)], np.int64)
