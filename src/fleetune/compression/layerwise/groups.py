# SPDX-License-Identifier: Apache-2.0
"""Quantise a matrix group by group: fit each group's grid when the column loop reaches its first column.

A codebook that has no 0 (`iq4_nl`) cannot keep weights at exactly 0.  A matrix with so many of them that it was pruned is
refused; a few are there by chance (3 in 10,000 of SmolLM2-135M's) and get the nearest value.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from fleetune.compression import Solved
from fleetune.compression.layerwise.column_loop import ColumnLoop, Segment
from fleetune.compression.layerwise.grids import Grid
from fleetune.errors import RecipeError
from fleetune.models.artefact import Quantised

PRUNED: Final = 0.05  # share of weights that are exactly 0 from which a matrix counts as pruned


class Codes(NamedTuple):
    """The codes of a matrix with R rows, C columns and G groups of columns."""

    codes: Tensor  # uint8 [R, C]
    scale: Tensor  # [R, G]
    zero: Tensor  # [R, G]

    def solved(
        self, grid: Grid, group: int, notes: tuple[str, ...] = (), loss: float | None = None
    ) -> Solved:
        """Return the codes as a solver's answer."""
        scale, zero = self.scale.to(torch.float16), self.zero.to(torch.uint8)
        return Solved(Quantised(self.codes, scale, zero, grid.bits, group, grid.codebook), notes, loss)


def refuse_pruned(W: Tensor, grid: Grid) -> None:
    """Raise RecipeError when W was pruned and the grid has no 0."""
    zeros = int((W == 0).sum()) if grid.codebook else 0
    if zeros >= PRUNED * W.numel() > 0:
        raise RecipeError(
            [f"{zeros / W.numel():.0%} of a matrix is exactly 0, and the grid {grid.kind} has no 0"],
            hint="choose another grid for a pruned model: --set grid=ggml",
        )


def quantise(
    W: Tensor,
    grid: Grid,
    group: int,
    loop: ColumnLoop,
    zeros: Tensor | None = None,
    curvature: Tensor | None = None,
) -> Codes:
    """Quantise W [R, C]; each group's grid is fitted to the weights as they are when the loop reaches it.

    `zeros` bool [C, R] marks the weights that must stay zero, on a grid that has a 0; `curvature` [C] says how much an
    error in a column counts in the fit.
    """
    scales, zero_points, levels = list[Tensor](), list[Tensor](), grid.levels

    def choose(Wt: Tensor, begin: int, last: int) -> Segment:
        if begin % group == 0:  # the part of a group beyond the block is fitted as it is so far
            h = None if curvature is None else curvature[begin : begin + group]
            scale, zero = grid.find(Wt[begin : begin + group].T, h)
            scales.append(scale)
            zero_points.append(zero)
        end = min(begin - begin % group + group, last)
        mask = None if zeros is None else zeros[begin:end]
        return Segment(end, scales[-1], zero_points[-1], grid.top, mask, levels)

    _, codes = loop(W, choose)
    return Codes(codes, torch.stack(scales, 1), torch.stack(zero_points, 1))
