# SPDX-License-Identifier: Apache-2.0
"""Quantise a matrix group by group: fit each group's grid when the column loop reaches its first column."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fleetune.compression import Solved
from fleetune.compression.layerwise.column_loop import ColumnLoop, Segment
from fleetune.compression.layerwise.grids import Grid
from fleetune.models.artefact import Quantised


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
        return Solved(Quantised(self.codes, scale, zero, grid.bits, group), notes, loss)


def quantise(W: Tensor, grid: Grid, group: int, loop: ColumnLoop, zeros: Tensor | None = None) -> Codes:
    """Quantise W [R, C]; each group's grid is fitted to the weights as they are when the loop reaches it.

    `zeros` bool [C, R] marks the weights that must stay zero.
    """
    scales, zero_points = list[Tensor](), list[Tensor]()

    def choose(Wt: Tensor, begin: int, last: int) -> Segment:
        if begin % group == 0:  # the part of a group beyond the block is fitted as it is so far
            scale, zero = grid.find(Wt[begin : begin + group].T)
            scales.append(scale)
            zero_points.append(zero)
        end = min(begin - begin % group + group, last)
        mask = None if zeros is None else zeros[begin:end]
        return Segment(end, scales[-1], zero_points[-1], grid.top, mask)

    _, codes = loop(W, choose)
    return Codes(codes, torch.stack(scales, 1), torch.stack(zero_points, 1))
