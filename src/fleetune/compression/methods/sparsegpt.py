"""Prune a share of the weights of each matrix in one pass, and correct the weights that stay (SparseGPT).

Frantar, Alistarh: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, arXiv 2301.00774
(algorithm 1; section 3).

## Algorithm

The column loop of OPTQ (`layerwise/column_loop.py`) sets a weight to 0 instead of rounding it, if its saliency
w^2 / [H_F^-1]_ii = w^2 / U_ii^2 is among the smallest, and moves all later columns to correct the error:

- unstructured (`n=0`): the smallest share `sparsity` of each block of 128 columns, over all rows, as earlier blocks left them;
- n:m (`n=2 m=4`): in every row the n smallest of m neighbours, chosen when the loop reaches the first of them;
- with `bits`, the weights that stay are quantised in the same pass (section 3.5), so that later weights correct both errors.

## Differences from the paper

- Exactly the stated share is pruned.  The reference code cuts at a threshold, which prunes one weight or more too many.
- With `bits`, grids are per group and fitted to the weights that stay (the reference: per row, to the dense weights).
- Missing Cholesky factors and inputs that are always zero are handled as in `optq`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fleetune.common.settings import setting
from fleetune.compression import Solved
from fleetune.compression.layerwise.column_loop import BLOCK, CompensatedLoop, Segment
from fleetune.compression.layerwise.grids import Codes, Grid, grid_problems, group_problem
from fleetune.compression.layerwise.hessian import damping_problems, inverse_cholesky
from fleetune.models.families.number_types import CODEBOOKS, SUPER_TYPES

PAPER = "Frantar and Alistarh, ICML 2023, arXiv 2301.00774"


@dataclass(frozen=True)
class Solver:
    """Settings with the paper's symbols."""

    data: ClassVar[bool] = True

    sparsity: float = setting(0.5, "p", "share pruned, where n is 0")
    n: int = setting(0, "n", "prune n of every m in a row (0: no pattern)")
    m: int = setting(4, "m", "size of the pattern")
    bits: int = setting(0, "b", "also quantise to 2, 3, 4, 5 or 8 bits (0: no)")
    group: int = setting(32, "g", "columns that share a scale (0: the whole row)")
    grid: str = setting("ggml", "grid", "ggml, symmetric, asymmetric or universal")
    damping: float = setting(0.01, "λ", "added to H's diagonal, of its mean")

    def __post_init__(self) -> None:
        problems = damping_problems(self.damping)
        if not 0 <= self.sparsity < 1:
            problems.append(f"sparsity = {self.sparsity} is not in [0, 1)")
        if self.n < 0:
            problems.append(f"n = {self.n} is below 0")
        elif self.n and not (0 < self.n < self.m and BLOCK % self.m == 0):
            problems.append(f"n = {self.n}, m = {self.m}: m must divide {BLOCK}, and 0 < n < m")
        elif self.n and self.bits and self.group % self.m:
            problems.append(f"groups of {self.group} are not whole patterns of {self.m}")
        if self.bits:
            problems += grid_problems(self.grid, self.bits, self.group)
            if self.grid in CODEBOOKS:
                problems.append(f"grid = {self.grid!r} has no 0, which pruned weights need")
            if self.grid in SUPER_TYPES:
                problems.append(f"grid = {self.grid!r} is for optq and rtn")
        if problems:
            raise ValueError(*problems)

    def check(self, name: str, R: int, C: int) -> str:
        """Say why rows of C columns cannot be divided into patterns or groups, or "" when they can."""
        if self.n and C % self.m:
            return f"{name} has {C} columns, which patterns of {self.m} do not divide"
        return group_problem(name, C, self.group) if self.bits else ""

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        """Run algorithm 1 of the paper on one matrix."""
        factor = inverse_cholesky(H, self.damping)
        U, loop = factor.U, CompensatedLoop(factor)
        spread = torch.ones(W.shape[1], dtype=W.dtype) if U is None else U.diagonal() ** 2
        chooser = _MaskChooser(self, spread, Grid(self.grid, self.bits or 4), self.group or W.shape[1])
        pruned, codes = loop(W.masked_fill(factor.dead, 0.0), chooser.choose)
        if not self.bits:
            return Solved(pruned, factor.notes, loop.loss)
        found = Codes(codes, torch.stack(chooser.scales, 1), torch.stack(chooser.zeros, 1))
        return found.solved(chooser.grid, chooser.group, factor.notes, loop.loss)


class _MaskChooser:
    """Choose which weights are pruned, and fit the grids of the others, as the loop reaches their columns."""

    def __init__(self, settings: Solver, spread: Tensor, grid: Grid, group: int) -> None:
        """spread [C]: U_ii^2."""
        self.settings, self.spread, self.grid, self.group = settings, spread, grid, group
        self.scales, self.zeros = list[Tensor](), list[Tensor]()
        self.mask, self.first = torch.zeros(0, 0, dtype=torch.bool), 0  # of the block from column `first` on

    def choose(self, Wt: Tensor, begin: int, last: int) -> Segment:
        """Return the next columns: up to the end of the block, the pattern or the group."""
        if begin % BLOCK == 0:
            self.first, self.mask = begin, torch.zeros(last - begin, Wt.shape[1], dtype=torch.bool)
            if not self.settings.n:
                self.mask = self._least_of_block(Wt[begin:last], begin)
        end = last
        if self.settings.n:
            end = min(end, begin + self.settings.m)
            if begin % self.settings.m == 0:
                self.mask[begin - self.first : end - self.first] = self._least_of_pattern(
                    Wt[begin:end], begin
                )
        if not self.settings.bits:
            return Segment(end, None, None, 0, self.mask[begin - self.first : end - self.first])
        end = min(end, begin - begin % self.group + self.group)
        if begin % self.group == 0:
            self._fit_group(Wt, begin, last)
        mask = self.mask[begin - self.first : end - self.first]
        return Segment(end, self.scales[-1], self.zeros[-1], self.grid.top, mask)

    def _least_of_block(self, Wt: Tensor, begin: int) -> Tensor:
        """Mark the share `sparsity` of a block that has the smallest saliency."""
        score = Wt**2 / self.spread[begin : begin + len(Wt), None]
        count = int(score.numel() * self.settings.sparsity)
        mask = torch.zeros(score.numel(), dtype=torch.bool)
        mask[score.reshape(-1).topk(count, largest=False, sorted=False).indices] = True
        return mask.view_as(score)

    def _least_of_pattern(self, Wt: Tensor, begin: int) -> Tensor:
        """Mark the n of every m neighbours that have the smallest saliency."""
        score = Wt**2 / self.spread[begin : begin + len(Wt), None]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(
            0, score.topk(self.settings.n, dim=0, largest=False, sorted=False).indices, True
        )

    def _fit_group(self, Wt: Tensor, begin: int, last: int) -> None:
        """Fit the grid of the group to those of its weights that stay, as far as the mask is known."""
        stay = Wt[begin : begin + self.group].clone()
        known = self.mask[begin - self.first : min(begin + self.group, last) - self.first]
        stay[: len(known)].masked_fill_(known, 0.0)
        scale, zero = self.grid.find(stay.T)
        self.scales.append(scale)
        self.zeros.append(zero)
