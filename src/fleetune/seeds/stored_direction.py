# SPDX-License-Identifier: Apache-2.0
"""Write a direction out in full, as classical zeroth-order methods do, at the price of one more copy of the weights.

It is here to be measured (`methods/zosgd.py`): a seed saves that memory.  The numbers are those that the
kernels compute on the fly, rounded to the weights' type: exact for directions of +1 and -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fleetune.seeds.noise import EMPTY

if TYPE_CHECKING:
    from fleetune.seeds.slots import Direction, WeightSlot


class StoredDirection:
    """One direction at a time, z[i] for every weight i, in the weights' dtype and on their device."""

    def __init__(
        self, slots: Sequence[WeightSlot], run_key: int, law: str, kernels: ModuleType, threads: int | None
    ) -> None:
        self.slots, self.run_key, self.law = slots, run_key, law
        self.kernels, self.threads = kernels, threads
        self.z: dict[str, Tensor] = {}
        self.direction: Direction | None = None
        self.eps = 0.0

    def write(self, direction: Direction, eps: float) -> None:
        """Write `direction` out, unless it is stored already; `eps` is the factor that `add` takes."""
        self.eps = float(np.float32(eps))
        last = self.direction
        if last is not None and last[0] == direction[0] and np.array_equal(last[1], direction[1]):
            return
        for slot in self.slots:
            if slot.name not in self.z:
                like = slot.tensor
                self.z[slot.name] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
            self._write(self.z[slot.name].zero_(), slot.start, direction)
        self.direction = direction

    def add(self, x: Tensor, name: str, first: int) -> None:
        """Add eps z to x: float32 elements from `first` on of the tensor `name`."""
        x.add_(self.z[name][first : first + x.numel()].float() * self.eps)

    def _write(self, z: Tensor, start: int, direction: Direction) -> None:
        id, table = direction
        if self.law == "gaussian":
            none = np.zeros(0, np.float32)
            self.kernels.sweep_gaussian(z, z, start, self.run_key, EMPTY.ids, none, 1.0, (id, 1.0))
        else:
            probe = (id, table.astype(np.float32))
            self.kernels.sweep(
                z, z, start, self.run_key, EMPTY, 1.0, probe, law=self.law, threads=self.threads
            )
