# SPDX-License-Identifier: Apache-2.0
"""Move the codes of ggml's blocks along directions, and leave the scales: the readable reference, in numpy alone.

    D    the ledger's sum at a weight, in units of weights: grid * sum_k c_k z_k, and eps z of a probe
    q'   = floor(D / d + (q + u)), at least the lowest code and at most the highest

with q what the scale d is multiplied by, so w' = d q' (+ m).  u in (0, 1) is a fixed number of each weight, from Philox, so a
move of a tenth of d moves a tenth of the codes by one: the mean of w' is w + D, to 2^-16 of d, but at the ends.  The point is a
function of the ledger alone: nothing is carried from step to step, and there is no order in which the moves were made.

IQ4_NL has 16 values v that are not evenly spaced.  There a move leads from v to v + D / d, which is rounded to the value below
or above, in the shares of its place between them, by the same u.

A block whose scale is 0, or no number, stays.  All operations are float32's, each rounded, in the order that is written here,
so the bits are the same everywhere.  `code_view.py` does the same for a net that runs, and a patch for a file
(`deploy/patch.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetune.common.ggml import BLOCK, HALVES
from fleetune.models.codebooks import CODEBOOKS
from fleetune.seeds import noise, scale_grid
from fleetune.seeds.noise import WIDTH, Passes

OFFSETS: Final = (1 << 64) - 2  # the direction whose words are the fixed offsets u: no ledger has it
RUN: Final = 2 * WIDTH  # weights that take one row of words
RANGES: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q5_0": (-16, 15), "Q5_1": (0, 31), "Q8_0": (-128, 127)}
)  # of q
VALUES: Final = np.array(CODEBOOKS["iq4_nl"], np.float32)
TOGETHER: Final = 1 << 16  # weights that are moved at a time: few for the cache

Codes = NDArray[np.float32]


def offsets(run_key: int, start: int, count: int) -> NDArray[np.float32]:
    """Return the fixed offsets u of the weights from number `start` on: float32 [count], odd multiples of 2^-17.

    Of `noise.words` of the direction `OFFSETS` element e of a row's 256 takes word e mod 128: its low 16 bits, then its high.
    """
    first, last = start // RUN, -(-(start + count) // RUN)
    words = noise.words(run_key, OFFSETS, np.arange(first, last, dtype=np.uint64) * np.uint64(32))
    halves = (words[:, None, :] >> np.array([[0], [16]], np.uint32)) & np.uint32(0xFFFF)
    some = halves.reshape(-1)[start - RUN * first :][:count].astype(np.float32)
    u: NDArray[np.float32] = some * np.float32(2.0**-16) + np.float32(2.0**-17)
    return u


def unpacked(blocks: NDArray[np.uint8], kind: str) -> Codes:
    """Return what the scales are multiplied by: blocks uint8 [n, bytes] -> float32 [n, 32], whole numbers."""
    raw = blocks[:, 2 * HALVES[kind] :]
    q: Codes
    if kind == "Q8_0":
        q = raw.view(np.int8).astype(np.float32)
        return q
    nibbles = raw[:, -BLOCK // 2 :]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    if kind == "IQ4_NL":
        q = VALUES[codes]
        return q
    if kind in ("Q5_0", "Q5_1"):
        codes |= np.unpackbits(raw[:, :4], axis=1, bitorder="little") << 4
    q = codes.astype(np.float32) + np.float32(RANGES[kind][0])
    return q


def packed(codes: Codes, kind: str) -> NDArray[np.uint8]:
    """Return the bytes of blocks behind their scales, the inverse of `unpacked`: float32 [n, 32] -> uint8 [n, bytes]."""
    if kind == "Q8_0":
        return codes.astype(np.int8).view(np.uint8)
    if kind == "IQ4_NL":
        whole = np.searchsorted(VALUES, codes).astype(np.uint8)
    else:
        whole = (codes - np.float32(RANGES[kind][0])).astype(np.uint8)
    nibbles: NDArray[np.uint8] = whole[:, : BLOCK // 2] & np.uint8(15) | whole[:, BLOCK // 2 :] << np.uint8(4)
    if kind not in ("Q5_0", "Q5_1"):
        return nibbles
    return np.concatenate([np.packbits(whole >> 4, axis=1, bitorder="little"), nibbles], axis=1)


def stepped(codes: Codes, D: Codes, scales: NDArray[np.float32], u: Codes, kind: str) -> Codes:
    """Return q' of blocks: codes, D and u float32 [n, 32], scales float32 [n, 1]."""
    still = (scales == 0) | ~np.isfinite(scales)
    steps = D / np.where(still, np.float32(np.inf), scales)
    q: Codes
    if kind != "IQ4_NL":
        low, high = RANGES[kind]
        q = np.floor(steps + (codes + u)).clip(np.float32(low), np.float32(high))
        return q
    moved = steps + codes
    below = np.searchsorted(VALUES[1:-1], moved, side="right")
    place = (moved - VALUES[below]) / (VALUES[below + 1] - VALUES[below])
    up = np.floor(place + u).clip(0, 1).astype(np.int64)
    q = VALUES[below + up]
    return q


def moved(
    blocks: NDArray[np.uint8], kind: str, start: int, run_key: int, passes: Passes, law: str, grid: float
) -> NDArray[np.uint8]:
    """Return the bytes behind the scales after passes: uint8 [n, bytes] -> uint8 [n, fewer].

    `start` is the global number of the first weight.
    """
    size = 2 * HALVES[kind]
    new = blocks[:, size:].copy()
    if not len(passes.ids):
        return new
    for first in range(0, len(blocks), TOGETHER // BLOCK):
        part = blocks[first : first + TOGETHER // BLOCK]
        at, count = start + first * BLOCK, len(part) * BLOCK
        D = scale_grid.summed(passes, law, run_key, at, count).astype(np.float32) * np.float32(grid)
        scales = np.ascontiguousarray(part[:, :2]).view("<f2").astype(np.float32)
        u = offsets(run_key, at, count)
        codes = stepped(unpacked(part, kind), D.reshape(-1, BLOCK), scales, u.reshape(-1, BLOCK), kind)
        new[first : first + len(part)] = packed(codes, kind)
    return new
