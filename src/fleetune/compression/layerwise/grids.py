# SPDX-License-Identifier: Apache-2.0
"""Grids: the few values that a group of weights may take, w = scale * (code - zero), chosen for where they will run.

| name | zero | what it is for |
|---|---|---|
| ggml | 2^(b-1) | the grid of ggml's Q4_0: the element of largest magnitude, signed, is code 0; scales may be negative |
| symmetric | 2^(b-1) | the reference's symmetric grid, scale = 2 max\\|w\\| / (2^b - 1): it clips one of the extremes |
| asymmetric | integer | from the least to the largest element, and 0 always exact |
| universal | integer | the same with scales of 7 significant bits, so that scale * zero is exact in fp16 (Q4_1) |

All scales are rounded to fp16 *before* codes are chosen, so that no file format has to round them again, and zero is
on every grid: pruned weights stay zero, and small weights of a group share no error of one sign.  `search` tries
shrunken ranges and keeps the one with the least sum |err|^2.4 (the reference's `mse`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

KINDS: Final = ("ggml", "symmetric", "asymmetric", "universal")
BITS: Final = (2, 3, 4, 8)
NORM: Final = 2.4
SIGNIFICANT: Final = 7  # bits of a universal scale; with 4 bits of zero they are 11, what fp16 holds


@dataclass(frozen=True)
class Grid:
    """A kind of grid of 2^bits values; `find` fits one to every row of a group of columns."""

    kind: str
    bits: int
    search: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def find(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero) for each row of x [R, n], of x's type: scales exact in fp16, zeros whole numbers."""
        best = self._fit(x, 1.0)
        if not self.search:
            return best
        least = self._error(x, *best)
        for i in range(1, 40):
            tried = self._fit(x, 1.0 - i / 50)
            error = self._error(x, *tried)
            better = error < least
            least = torch.where(better, error, least)
            best = (torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1]))
        return best

    def codes(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes of x [R, n], of x's type."""
        return (torch.round(x / scale[:, None]) + zero[:, None]).clamp(0, self.top)

    def _error(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        near = (self.codes(x, scale, zero) - zero[:, None]) * scale[:, None]
        return (near - x).abs().pow(NORM).sum(1)

    def _fit(self, x: Tensor, share: float) -> tuple[Tensor, Tensor]:
        half = float(1 << (self.bits - 1))
        lo, hi = x.amin(1), x.amax(1)
        if self.kind == "ggml":
            extreme = _extreme(x, lo, hi)
            return _fp16(share * extreme / -half), torch.full_like(extreme, half)
        lo, hi = share * lo.clamp(max=0), share * hi.clamp(min=0)
        if self.kind == "symmetric":
            return _fp16(2 * torch.maximum(-lo, hi) / self.top), torch.full_like(lo, half)
        scale = (hi - lo) / self.top
        if self.kind == "universal":
            scale = _significant(scale)
        scale = _fp16(scale)
        return scale, torch.round(-lo / scale).clamp(0, self.top)


def _extreme(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """The element of largest magnitude of each row of x [R, n], the first of equals, as ggml takes it; lo and hi bound x."""
    extreme, tied = torch.where(hi > -lo, hi, lo), hi == -lo
    if tied.any():
        some = x[tied]
        extreme[tied] = some.gather(1, some.abs().argmax(1, keepdim=True))[:, 0]
    return extreme


def _fp16(scale: Tensor) -> Tensor:
    """Rounded to fp16 and back; 1 where nothing is left (an empty group, or one below fp16's numbers)."""
    rounded = scale.clamp(-65504, 65504).to(torch.float16).to(scale.dtype)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def _significant(scale: Tensor) -> Tensor:
    """Rounded to `SIGNIFICANT` bits."""
    _, exponent = torch.frexp(scale)
    # fp16's subnormals have fewer bits: there the step is that of fp16 (2^-24), and zero * step is exact as well
    step = torch.ldexp(torch.ones_like(scale), (exponent - SIGNIFICANT).clamp(min=-24))
    return torch.round(scale / step) * step
