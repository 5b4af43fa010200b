# SPDX-License-Identifier: Apache-2.0
"""Move fp16 scales along directions, on the grid of fp16 itself: the readable reference, in numpy alone.

    b    the bits of |d| as a whole number, 0 to 31743: a step of 1 is fp16's next number
    p    = b / 1024, which is about log2 |d|: equal steps are equal shares of the scale
    b'   = floor(1024 (p + grid * sum_k c_k z_k) + u)

u in (0, 1) is a fixed number of each scale, from Philox, so a move of a tenth of a step moves a tenth of the scales: the mean
is exact, and the point is a function of the ledger alone.  A sign never changes, a scale of 0 stays, and none leaves fp16's
range.  All operations are float32's, each rounded, so the bits are the same everywhere.  `scale_view.py` does the same for a
net that runs, and a patch for a file (`deploy/patch.py`).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetune.seeds import noise
from fleetune.seeds.noise import WIDTH, Passes

STEPS: Final = 1024  # steps of fp16 from one power of two to the next
LARGEST: Final = 0x7BFF  # bits of fp16's largest number
ROUNDING: Final = (
    1 << 64
) - 1  # the direction whose words are the fixed offsets of rounding: no ledger has it
RUN: Final = 4 * WIDTH  # bytes of a row of words


def rounding(run_key: int, start: int, count: int) -> NDArray[np.uint8]:
    """Return the fixed offsets of rounding of the scales from number `start` on, as 256 u - 0.5: uint8 [count].

    Of `noise.words` of the direction `ROUNDING` they are the bytes, 512 of each row, least significant first.
    """
    first, last = start // RUN, -(-(start + count) // RUN)
    words = noise.words(run_key, ROUNDING, np.arange(first, last, dtype=np.uint64) * np.uint64(32))
    every: NDArray[np.uint8] = words.astype("<u4").reshape(-1).view(np.uint8)
    return every[start - RUN * first :][:count].copy()


def summed(passes: Passes, run_key: int, start: int, count: int) -> NDArray[np.int64]:
    """Return the integer sum of passes at elements start .. start+count-1: int64 [count]; not of the gaussian law."""
    total = np.zeros(count, np.int64)
    where = noise.places(passes.tables.shape[1], start, count)
    for id, table in zip(passes.ids.tolist(), passes.tables, strict=True):
        total += noise.signs(run_key, id, start, count) * table.astype(np.int64)[where]
    return total


def moved(
    bits: NDArray[np.uint16], start: int, run_key: int, passes: Passes, grid: float
) -> NDArray[np.uint16]:
    """Return the bits of scales after passes: uint16 [n] -> uint16 [n]; `start` is the global number of the first."""
    p = (bits & 0x7FFF).astype(np.float32) / np.float32(STEPS)
    if len(passes.ids):
        p = summed(passes, run_key, start, len(bits)).astype(np.float32) * np.float32(grid) + p
    u = (rounding(run_key, start, len(bits)).astype(np.float32) + np.float32(0.5)) / np.float32(256)
    whole = np.clip(np.floor(p * np.float32(STEPS) + u), 0, LARGEST).astype(np.uint16)
    return np.where(bits & 0x7FFF, whole | (bits & 0x8000), bits)
