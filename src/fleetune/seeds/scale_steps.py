# SPDX-License-Identifier: Apache-2.0
"""Move fp16 scales on the grid of fp16 in torch, and differentiate through the rounding.

With b the bits of |d| as a whole number, p = b / 1024 is about log2 |d| (`scale_grid.py`).  A scale at p has the bits
floor(1024 p + u).  For back-propagation the rounding is passed over (straight-through):

    dL/dp = 2^e sign(d) sum_q q dL/dw        of an offset m: 2^e sign(m) sum_q dL/dw        e the exponent of d or m
"""

from __future__ import annotations

import torch
from torch import Tensor

from fleetune.common.ggml import BLOCK
from fleetune.models.mapped.quants import write_codes
from fleetune.seeds.scale_grid import LARGEST, STEPS


def place_of(bits: Tensor) -> Tensor:
    """Return p of scales by their bits int16: float32 of the same shape."""
    return (bits & 0x7FFF).float().div_(STEPS)


def on_grid(p: Tensor, bits: Tensor, u: Tensor | float) -> Tensor:
    """Return the bits of the scales at p, which is overwritten: int16, in the sign of the file's `bits`; a scale of 0 stays."""
    whole = p.mul_(STEPS).add_(u).floor_().clamp_(0, LARGEST)
    found = whole.to(torch.int16) | (bits & -0x8000)
    return torch.where((bits & 0x7FFF) == 0, bits, found)


def slope(bits: Tensor) -> Tensor:
    """Return dd/dp of scales: 2^(e - 15) in the sign of d, with e the exponent's bits (0: as 1)."""
    power = (bits & -0x400).view(torch.float16).float()
    return torch.where((bits & 0x7C00) == 0, (1.0 - 2.0 * (bits < 0)) * 2.0**-14, power)


def gradient_of_places(of_weights: Tensor, blocks: Tensor, bits: Tensor, kind: str) -> Tensor:
    """Return dL/dp from dL/dw [n, 32] of blocks uint8 [n, bytes] whose scales have the bits int16 [n, 1 or 2]."""
    g = of_weights.reshape(-1, BLOCK).float()
    codes = torch.empty_like(g)
    write_codes(codes, blocks, kind)
    parts = [codes.mul_(g).sum(1)] + [g.sum(1)] * (bits.shape[1] - 1)
    return torch.stack(parts, 1).mul_(slope(bits))
