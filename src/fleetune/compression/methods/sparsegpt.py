# SPDX-License-Identifier: Apache-2.0
"""SparseGPT: prune a share of every layer's weights in one pass, and let those to come make up for them.

Frantar, Alistarh: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
arXiv 2301.00774 (algorithm 1; section 3).

OPTQ's loop (`columns`), where settling a weight means setting it to 0 if its saliency w^2 / [H_F^-1]_ii = w^2 / U_ii^2
is among the least:

- unstructured (`n=0`): the smallest share `sparsity` of each block of 128 columns over all rows, chosen from the
  weights as updated by the blocks before;
- n:m (`n=2 m=4`): in every row the n least of m neighbours, chosen when their first column comes;
- with `bits`, what is left is quantised in the same pass (section 3.5), so that later weights make up for both errors;
  a pruned weight is exactly 0 on every grid.

What differs from the reference code, and why: exactly the stated share is pruned (the reference cuts at a threshold,
one weight or more too many); the joint grid is per group and fitted to the weights that stay (the reference: per row,
to the dense ones); Cholesky failures and idle inputs are handled as in `optq`.

Sparsity saves download size, not time: no runtime for edge devices has kernels for it.  Speed comes from `bits`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fleetune.compression import Solved
from fleetune.compression.layerwise.column_loop import BLOCK, Loop, Segment
from fleetune.compression.layerwise.grids import Grid
from fleetune.compression.layerwise.hessian import inverse_cholesky
from fleetune.compression.methods.optq import check_damping, check_grid, check_groups, packed

PAPER = "Frantar and Alistarh, ICML 2023, arXiv 2301.00774"


@dataclass(frozen=True)
class Solver:
    """Settings with the paper's symbols."""

    data: ClassVar[bool] = True

    sparsity: float = field(default=0.5, metadata={"symbol": "p", "help": "share pruned, where n is 0"})
    n: int = field(default=0, metadata={"symbol": "n", "help": "prune n of every m in a row (0: no pattern)"})
    m: int = field(default=4, metadata={"symbol": "m", "help": "size of the pattern"})
    bits: int = field(
        default=0, metadata={"symbol": "b", "help": "also quantise to 2, 3, 4 or 8 bits (0: no)"}
    )
    group: int = field(
        default=32, metadata={"symbol": "g", "help": "columns that share a scale (0: the whole row)"}
    )
    grid: str = field(
        default="ggml", metadata={"symbol": "grid", "help": "ggml, symmetric, asymmetric or universal"}
    )
    damping: float = field(
        default=0.01, metadata={"symbol": "λ", "help": "added to H's diagonal, of its mean"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity = {self.sparsity} is not in [0, 1)")
        if self.n and not (0 < self.n < self.m and BLOCK % self.m == 0):
            raise ValueError(f"n = {self.n}, m = {self.m}: m must divide {BLOCK}, and 0 < n < m")
        if self.n < 0:
            raise ValueError(f"n = {self.n} is below 0")
        check_damping(self.damping)
        if self.bits:
            check_grid(self.grid, self.bits, self.group)
            if self.n and self.group % self.m:
                raise ValueError(f"groups of {self.group} are not whole patterns of {self.m}")

    def check(self, name: str, R: int, C: int) -> str:
        if self.n and C % self.m:
            return f"{name} has {C} columns, which patterns of {self.m} do not divide"
        return check_groups(name, C, self.group) if self.bits else ""

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        """Algorithm 1 of the paper on one matrix."""
        factor = inverse_cholesky(H, self.damping)
        U, loop = factor.U, Loop(factor)
        saliency = torch.ones(W.shape[1], dtype=W.dtype) if U is None else U.diagonal() ** 2
        walk = _Walk(self, saliency, Grid(self.grid, self.bits or 4), self.group or W.shape[1])
        settled, codes = loop(W.masked_fill(factor.dead, 0.0), walk.choose)
        if not self.bits:
            return Solved(settled, factor.notes, loop.loss)
        scale, zero = torch.stack(walk.scales, 1), torch.stack(walk.zeros, 1)
        return packed(walk.grid, walk.group, codes, scale, zero, factor.notes, loop.loss)


class _Walk:
    """What is pruned and on which grid, as the columns go by."""

    def __init__(self, how: Solver, spread: Tensor, grid: Grid, group: int) -> None:
        self.how, self.spread, self.grid, self.group = how, spread, grid, group  # spread[i] = U_ii^2
        self.scales, self.zeros = list[Tensor](), list[Tensor]()
        self.mask, self.first = torch.zeros(0, 0, dtype=torch.bool), 0  # of the block from column `first` on

    def choose(self, Wt: Tensor, begin: int, last: int) -> Segment:
        """The next columns: until the block, the pattern or the group ends."""
        if begin % BLOCK == 0:
            self.first, self.mask = begin, torch.zeros(last - begin, Wt.shape[1], dtype=torch.bool)
            if not self.how.n:
                self.mask = self._least(Wt[begin:last], begin)
        end = last
        if self.how.n:
            end = min(end, begin + self.how.m)
            if begin % self.how.m == 0:
                self.mask[begin - self.first : end - self.first] = self._pattern(Wt[begin:end], begin)
        if not self.how.bits:
            return Segment(end, None, None, 0, self.mask[begin - self.first : end - self.first])
        end = min(end, begin - begin % self.group + self.group)
        if begin % self.group == 0:
            self._fit(Wt, begin, last)
        mask = self.mask[begin - self.first : end - self.first]
        return Segment(end, self.scales[-1], self.zeros[-1], self.grid.top, mask)

    def _least(self, Wt: Tensor, begin: int) -> Tensor:
        score = Wt**2 / self.spread[begin : begin + len(Wt), None]
        count = int(score.numel() * self.how.sparsity)
        mask = torch.zeros(score.numel(), dtype=torch.bool)
        mask[score.reshape(-1).topk(count, largest=False, sorted=False).indices] = True
        return mask.view_as(score)

    def _pattern(self, Wt: Tensor, begin: int) -> Tensor:
        score = Wt**2 / self.spread[begin : begin + len(Wt), None]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(
            0, score.topk(self.how.n, dim=0, largest=False, sorted=False).indices, True
        )

    def _fit(self, Wt: Tensor, begin: int, last: int) -> None:
        """The grid of the group, fitted to what is known to stay of it."""
        stay = Wt[begin : begin + self.group].clone()
        known = self.mask[begin - self.first : min(begin + self.group, last) - self.first]
        stay[: len(known)].masked_fill_(known, 0.0)
        scale, zero = self.grid.find(stay.T)
        self.scales.append(scale)
        self.zeros.append(zero)
