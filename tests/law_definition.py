"""Directions as docs/ledger.md defines them: their signs and places are made one Python integer at a time."""

from functools import cache

import numpy as np

from fleetune.seeds import noise

MULTIPLIER = 0x9E3779B97F4A7C15


def slow_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper's figure has it, in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        h0, l0 = divmod(0xD2511F53 * c[0], 2**32)
        h1, l1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [h1 ^ c[1] ^ k[0], l1, h0 ^ c[3] ^ k[1], l0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def slow_sign(run_key: int, id: int, i: int) -> int:
    """The sign of one element, from the text of the format alone."""
    tile, e = divmod(i, 4096)
    c, j = divmod(e % 128, 32)
    block = tile * 32 + j
    counter = [block % 2**32, block >> 32, id % 2**32, id >> 32]
    word = slow_philox(counter, [run_key % 2**32, run_key >> 32])[c]
    return 1 - 2 * ((word >> (e // 128)) & 1)


def mixed(x: int) -> int:
    return (x ^ (x >> 32)) * MULTIPLIER % 2**64


def place(K: int, i: int) -> int:
    """The row of the K x K matrix that element i takes."""
    return ((mixed(mixed(i // 128)) >> 40) + i % 128) % K


@cache
def slow_places(K: int, start: int, count: int) -> np.ndarray:
    """`noise.places`, slowly: int64 [count]."""
    return np.array([place(K, i) for i in range(start, start + count)], np.int64)


@cache
def hadamard(K: int) -> np.ndarray:
    """int64 [K, K]: +1s and -1s, after Sylvester."""
    H = np.ones((1, 1), np.int64)
    while len(H) < K:
        H = np.block([[H, H], [H, -H]])
    return H


@cache
def direction(law: str, id: int, start: int, count: int, K: int, key: int) -> np.ndarray:
    """z, element by element of the definition: int64 [count], float64 of the gaussian law."""
    if law == "gaussian":
        return noise.normals(key, id, start, count).astype(np.float64)
    if law == "rademacher":
        return noise.signs(key, id, start, count).astype(np.int64)
    epoch, k = divmod(id, 1 << 32)
    column = np.array([(-1) ** bin(i & k).count("1") for i in range(K)])
    return noise.signs(key, epoch, start, count).astype(np.int64) * column[slow_places(K, start, count)]
