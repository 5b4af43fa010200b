# SPDX-License-Identifier: Apache-2.0
"""Cache the integer sum of many independent directions, so that a forward computes few of them.

A view computes every pass of its point anew in each forward.  For a pool that is one pass whatever
K is.  Independent directions are a pass each, so beyond `FOLD` of them their sum is cached, 4 bytes a weight,
and only what changed since is computed.  The sums are integers in float32, exact below 2^24; where they could
reach that, nothing is cached and the view is slow but still exact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fleetune.seeds.noise import Passes

if TYPE_CHECKING:
    from fleetune.seeds.slots import WeightSlot

log = logging.getLogger(__name__)

FOLD = 16  # passes that are computed in each forward before they are folded
PIECE = 1 << 20  # elements that are folded at a time
EXACT = 1 << 24  # integers below this are exact in float32


class FoldedSums:
    """The integer sums of some passes over the elements of tensors, and which passes were summed."""

    def __init__(
        self, slots: Sequence[WeightSlot], run_key: int, law: str, kernels: ModuleType, threads: int | None
    ) -> None:
        self.slots, self.run_key, self.law = slots, run_key, law
        self.kernels, self.threads = kernels, threads
        self.folded: Passes | None = None
        self.reach = 0  # the largest sum anywhere
        self.sums: dict[str, Tensor] = {}

    def rest(self, point: Passes | None, heard: Callable[[], None]) -> Passes | None:
        """Return the passes that `point` has beside the sums; fold them in first when they are many.

        `heard()` is called before each piece of that work; what it raises leaves no sums.
        """
        if self.folded is None and (point is None or len(point.ids) <= FOLD):
            return point
        left = difference(point, self.folded)
        if len(left.ids) <= FOLD and self.reach + _most(left) < EXACT:
            return left
        if self.reach + _most(left) >= EXACT:
            log.warning(
                "slow: the sums of %d directions could pass 2^24: they are computed anew each time",
                len(left.ids),
            )
            self.forget()
            return point
        try:
            self._fold(left, heard)
        except BaseException:
            self.forget()
            raise
        self.folded = point
        return None

    def forget(self) -> None:
        """Drop the sums and their memory."""
        self.folded, self.reach, self.sums = None, 0, {}

    def _fold(self, passes: Passes, heard: Callable[[], None]) -> None:
        """Add passes to the sums, and measure the largest sum."""
        self.reach = 0
        for slot in self.slots:
            if slot.name not in self.sums:
                self.sums[slot.name] = torch.zeros(slot.tensor.numel(), device=slot.tensor.device)
            sums = self.sums[slot.name]
            for first in range(0, sums.numel(), PIECE):
                heard()
                part = sums[first : first + PIECE]
                self.kernels.sweep(
                    part, part, slot.start + first, self.run_key, passes, 1.0,
                    law=self.law, threads=self.threads,
                )  # fmt: skip
            low, high = torch.aminmax(sums)
            self.reach = max(self.reach, int(-low), int(high))


def difference(new: Passes | None, old: Passes | None) -> Passes:
    """Return the passes that lead from `old` to `new`, without those that cancel."""
    sides = [(p, sign) for p, sign in ((new, 1), (old, -1)) if p is not None]
    K = max(p.tables.shape[1] for p, _ in sides)
    ids, where = np.unique(np.concatenate([p.ids for p, _ in sides]), return_inverse=True)
    tables = np.zeros((len(ids), K), np.int64)
    first = 0
    for p, sign in sides:
        np.add.at(tables, where[first : first + len(p.ids)], sign * p.tables.astype(np.int64))
        first += len(p.ids)
    nonzero = tables.any(axis=1)
    left = Passes(ids[nonzero], tables[nonzero])
    return Passes(left.ids, left.tables.astype(np.int32)) if _most(left) < 1 << 31 else left


def _most(passes: Passes) -> int:
    """Return the largest sum that these passes can make at any element."""
    return int(np.abs(passes.tables.astype(np.int64)).max(axis=1, initial=0).sum())
