# SPDX-License-Identifier: Apache-2.0
"""Lay trainable tensors end to end, and give each weight its global index.

The index decides which element of a direction a weight gets, so it must not depend on device, shards or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fleetune.models.mapped.lazy import LazyWeight
from fleetune.seeds.noise import TILE


class WeightSlot(NamedTuple):
    """A trainable tensor and the global index of its first element."""

    name: str
    tensor: Tensor
    start: int


Read = Callable[[WeightSlot, int, int], Tensor]


Direction = tuple[int, np.ndarray]  # Philox id, table


def read_stored(slot: WeightSlot, first: int, last: int) -> Tensor:
    """Return elements first..last of a tensor: the stored memory itself; of a mapped base scratch, which the next call reuses."""
    if isinstance(slot.tensor, LazyWeight):
        return slot.tensor.piece(first, last)
    return slot.tensor.detach().view(-1)[first:last]


def layout(named: Iterable[tuple[str, Tensor]]) -> list[WeightSlot]:
    """Lay name-ordered tensors end to end, each starting at a multiple of 4096 (the spec's index)."""
    slots, start = [], 0
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        slots.append(WeightSlot(name, tensor, start))
        start += -(-tensor.numel() // TILE) * TILE
    return slots
