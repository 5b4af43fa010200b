# SPDX-License-Identifier: Apache-2.0
"""Move the scales of a quantised base, and leave its codes as they are.

Training the scales alone (PEQA, Kim et al. 2023, arXiv 2305.14152; EfficientQAT, Chen et al. 2024, arXiv 2407.11062) leaves a
file of the same codes.  Here a direction moves them on the grid of fp16 itself (`scale_grid.py`).  z has a number for each
scale, a 16th or a 32nd of what the weights would need, so a pass costs next to nothing.

For back-propagation the rounding is passed over (`scale_steps.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fleetune.common.ggml import BLOCK, HALVES
from fleetune.models.mapped.lazy import LazyWeight
from fleetune.models.mapped.quants import apply_scales, scale_bits, write_codes
from fleetune.seeds.block_view import BlockView, weight_of
from fleetune.seeds.scale_grid import rounding
from fleetune.seeds.scale_steps import gradient_of_places, on_grid, place_of
from fleetune.seeds.slots import WeightSlot


class ScaleView(BlockView):
    """Runs a net whose matrices lie in a GGUF file, with other scales than the file's."""

    part: ClassVar[str] = "scales"

    def __init__(self, named: Iterable[tuple[str, Tensor]], net: Any, **how: Any) -> None:
        super().__init__(named, net, **how)
        self.folds = True
        self._offsets: dict[str, Tensor] = {}

    @staticmethod
    def shape_of(weight: LazyWeight) -> tuple[int, ...]:
        """Return [rows, blocks, 1 or 2]: the shape of the scales of a weight."""
        return (weight.shape[0], weight.shape[1] // BLOCK, HALVES[weight.stored.kind])

    def moved_slots(self) -> list[WeightSlot]:
        """Return the scales."""
        return [s._replace(tensor=torch.zeros(()).expand(self.shape_of(weight_of(s)))) for s in self.slots]

    def pulled_back(self, slot: WeightSlot, first: int, gradient: Tensor) -> tuple[int, Tensor]:
        """Return the gradient of p, from that of whole rows from element `first` on."""
        stored = weight_of(slot).stored
        top, end = first // stored.width, (first + gradient.numel()) // stored.width
        blocks, (bits,) = self._bits(slot, top, end, signs=1)
        moved = gradient_of_places(gradient, blocks, bits, stored.kind)
        return slot.start + top * _per_row(slot), moved.view(-1)

    def packed_rows(self, slot: WeightSlot, top: int, end: int) -> np.ndarray:
        """Return the bits of the fp16 scales of rows top..end at the view's point, uint16 [rows, scales of a row]."""
        bits: np.ndarray = self._bits(slot, top, end, signs=1)[1][0].numpy()
        return bits.view(np.uint16).reshape(end - top, -1)

    def rows(self, slot: WeightSlot, top: int, end: int, signs: int) -> Tensor:
        """Return rows at the view's point: the file's codes times its scales, moved; as `BlockView.rows`."""
        weight = weight_of(slot)
        blocks, moved = self._bits(slot, top, end, signs)
        room = self._take(signs * (end - top) * weight.stored.width, torch.float32).view(signs, -1, BLOCK)
        write_codes(room[-1], blocks, weight.stored.kind)
        for number, (out, bits) in enumerate(zip(room, moved, strict=True)):
            if number < signs - 1:
                out.copy_(room[-1])
            apply_scales(out, bits.view(torch.float16).float())
        return room.view(signs, -1)

    def _bits(self, slot: WeightSlot, top: int, end: int, signs: int) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the blocks of some rows, uint8 [n, bytes], and for each sign the bits of their scales int16 [n, 1 or 2]."""
        stored, per_row = weight_of(slot).stored, _per_row(slot)
        blocks = stored.blocks(top, end)
        bits = scale_bits(blocks, stored.kind)
        flat = bits.view(-1)
        at = place_of(flat)
        sums = self.folded.sums.get(slot.name)
        lo, hi = top * per_row, end * per_row
        part = None if sums is None else sums[lo:hi]
        outs = [torch.empty_like(at) for _ in range(signs)]
        self._sweep(outs[0], at, slot.start + lo, part, self.direction, *outs[1:])
        offsets = self._offsets_of(slot)[lo:hi]
        return blocks, [on_grid(p, flat, offsets.float().add_(0.5).div_(256)).view_as(bits) for p in outs]

    def _offsets_of(self, slot: WeightSlot) -> Tensor:
        """Return 256 u - 0.5 of the scales of a matrix: uint8."""
        if slot.name not in self._offsets:
            count = slot.tensor.shape[0] * _per_row(slot)
            self._offsets[slot.name] = torch.from_numpy(rounding(self.run_key, slot.start, count))
        return self._offsets[slot.name]


def _per_row(slot: WeightSlot) -> int:
    stored = weight_of(slot).stored
    return stored.width // BLOCK * HALVES[stored.kind]
