# SPDX-License-Identifier: Apache-2.0
"""Move the codes of a quantised base, and leave its scales as they are.

With D the ledger's sum at a weight the code is floor(D / d + q + u), u a fixed number of each weight (`code_grid.py`).  QES
(arXiv 2602.03120) moves codes by evolution strategies and carries what rounding loses from step to step, or rebuilds it from the
last seeds approximately; here the ledger holds D whole, so nothing is carried and a point is a function of the ledger alone.
u is made anew for each block of rows, so nothing of the size of the model is kept.

For back-propagation the rounding is passed over (straight-through): dL/dD = dL/dw, as for weights.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from fleetune.common.ggml import BLOCK
from fleetune.models.mapped.lazy import LazyWeight
from fleetune.models.mapped.quants import apply_scales, scale_bits, write_codes
from fleetune.seeds import code_grid
from fleetune.seeds.block_view import BlockView, weight_of
from fleetune.seeds.slots import WeightSlot

TOGETHER: Final = 1 << 18  # weights whose codes are moved at a time: few for the cache
_VALUES: Final = torch.from_numpy(code_grid.VALUES)


class CodeView(BlockView):
    """Runs a net whose matrices lie in a GGUF file, with other codes than the file's."""

    part: ClassVar[str] = "codes"

    @staticmethod
    def shape_of(weight: LazyWeight) -> tuple[int, ...]:
        """Return the shape of the weight itself: it has a code for each number."""
        return tuple(weight.shape)

    def rows(self, slot: WeightSlot, top: int, end: int, signs: int) -> Tensor:
        """Return rows at the view's point: the file's scales times its codes, moved; as `BlockView.rows`."""
        codes, scales = self._codes(slot, top, end, signs)
        for out in codes:
            apply_scales(out, scales)
        return codes.view(signs, -1)

    def packed_rows(self, slot: WeightSlot, top: int, end: int) -> np.ndarray:
        """Return the bytes behind the scales of rows top..end at the view's point, uint8 [rows, bytes]."""
        (codes,), _ = self._codes(slot, top, end, signs=1)
        return code_grid.packed(codes.numpy(), weight_of(slot).stored.kind).reshape(end - top, -1)

    def _codes(self, slot: WeightSlot, top: int, end: int, signs: int) -> tuple[Tensor, Tensor]:
        """Return the codes of rows top..end for each sign, float32 [signs, n, 32], and their scales float32 [n, 1 or 2]."""
        stored = weight_of(slot).stored
        blocks, first = stored.blocks(top, end), slot.start + top * stored.width
        scales = scale_bits(blocks, stored.kind).view(torch.float16).float()
        count, most = len(blocks) * BLOCK, min(len(blocks) * BLOCK, TOGETHER)
        room = self._take(signs * count + 2 * most, torch.float32)
        moved, (codes, u) = room[: signs * count].view(signs, count), room[signs * count :].view(2, most)
        for lo in range(0, count, most):
            hi = min(lo + most, count)
            some, part = slice(lo // BLOCK, hi // BLOCK), moved[:, lo:hi]
            part[0].zero_()
            self._sweep(part[0], part[0], first + lo, None, self.direction, *part[1:])
            q, offsets = codes[: hi - lo].view(-1, BLOCK), u[: hi - lo]
            write_codes(q, blocks[some], stored.kind)
            self.kernels.offsets(offsets, first + lo, self.run_key, code_grid.OFFSETS, threads=self.threads)
            for D in part:
                step(D.view(-1, BLOCK), q, scales[some, :1], offsets.view(-1, BLOCK), stored.kind)
        return moved.view(signs, -1, BLOCK), scales


def step(D: Tensor, codes: Tensor, scales: Tensor, u: Tensor, kind: str) -> None:
    """Turn moves D of weights into the codes that they lead to, in place: `code_grid.stepped` to the bit."""
    still = (scales == 0) | ~scales.isfinite()
    D.div_(scales.masked_fill(still, torch.inf))
    if kind != "IQ4_NL":
        D.add_(codes + u).floor_().clamp_(*code_grid.RANGES[kind])
        return
    D.add_(codes)
    below = torch.bucketize(D, _VALUES[1:-1], right=True, out_int32=True)
    low, high = (_VALUES.index_select(0, at.view(-1)).view_as(D) for at in (below, below + 1))
    up = D.sub_(low).div_(high - low).add_(u).floor_().clamp_(0, 1)
    torch.where(up > 0, high, low, out=D)
