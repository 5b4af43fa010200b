# SPDX-License-Identifier: Apache-2.0
"""Quantise a matrix group by group: fit each group's grid when the column loop reaches its first column.

A grid that has no 0 (`iq4_nl`, `q4_k`) cannot keep weights at exactly 0.  A matrix with so many of them that it was pruned is
refused; a few are there by chance (3 in 10,000 of SmolLM2-135M's) and get the nearest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fleetune.compression import Solved
from fleetune.compression.layerwise import superblock_fit
from fleetune.compression.layerwise.column_loop import ColumnLoop, Segment, nearest
from fleetune.compression.layerwise.grids import Grid
from fleetune.compression.layerwise.superblock_fit import SuperFit
from fleetune.errors import RecipeError
from fleetune.models.artefact import Quantised, SuperBlocks
from fleetune.models.families.number_types import SUPER_WIDTH

PRUNED: Final = 0.05  # share of weights that are exactly 0 from which a matrix counts as pruned


class Codes(NamedTuple):
    """The codes of a matrix with R rows, C columns and G groups of columns."""

    codes: Tensor  # uint8 [R, C]
    scale: Tensor  # [R, G]
    zero: Tensor  # [R, G]
    blocks: SuperBlocks | None = None  # of a super-block type, whose scales and zeros follow from it

    def solved(
        self, grid: Grid, group: int, notes: tuple[str, ...] = (), loss: float | None = None
    ) -> Solved:
        """Return the codes as a solver's answer."""
        if self.blocks is not None:
            return Solved(Quantised.of_blocks(self.codes, self.blocks), notes, loss)
        scale, zero = self.scale.to(torch.float16), self.zero.to(torch.uint8)
        return Solved(Quantised(self.codes, scale, zero, grid.bits, group, grid.codebook), notes, loss)


def refuse_pruned(W: Tensor, grid: Grid) -> None:
    """Raise RecipeError when W was pruned and the grid has no 0."""
    zeros = 0 if grid.holds_zero else int((W == 0).sum())
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
    if grid.blocks is not None:
        return _quantise_blocks(W, grid, loop, zeros, curvature)
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


def _quantise_blocks(
    W: Tensor, grid: Grid, loop: ColumnLoop, zeros: Tensor | None, curvature: Tensor | None
) -> Codes:
    """Quantise W [R, C] in super-blocks: each is fitted when the loop reaches it, each of its groups again when it does."""
    of, fits = grid.blocks, list[SuperFit]()
    assert of is not None

    def choose(Wt: Tensor, begin: int, last: int) -> Segment:
        inside, end = begin % SUPER_WIDTH, min(begin - begin % of.group + of.group, last)
        if begin % of.group == 0:
            h = None if curvature is None else curvature[begin - inside : begin - inside + SUPER_WIDTH]
            if not inside:
                fits.append(superblock_fit.fit(Wt[begin : begin + SUPER_WIDTH].T, of, h))
            else:
                own = None if h is None else h[inside : inside + of.group]
                superblock_fit.refit(Wt[begin : begin + of.group].T, of, own, fits[-1], inside // of.group)
        mask = None if zeros is None else zeros[begin:end]
        return segment(end, grid, fits[-1], inside // of.group, mask)

    _, codes = loop(W, choose)
    return codes_of(codes, grid, fits)


def segment(end: int, grid: Grid, found: SuperFit, g: int, mask: Tensor | None) -> Segment:
    """Return the rule for columns up to `end`, of group g of a super-block."""
    of, scale = grid.blocks, found.scale(g)
    assert of is not None
    zero = torch.full_like(scale, float(of.middle))
    return Segment(end, scale, zero, grid.top, mask, grid.levels, found.offset(g) if of.minimum else None)


def codes_of(codes: Tensor, grid: Grid, fits: Sequence[SuperFit]) -> Codes:
    """Put together the codes [R, C] of super-blocks, with the scales of each in turn."""
    d, multiples = torch.stack([f.d for f in fits], 1), torch.cat([f.k for f in fits]).T
    dmin, minima = torch.stack([f.dmin for f in fits], 1), torch.cat([f.m for f in fits]).T
    kept = None if grid.blocks and grid.blocks.minimum else 0  # columns of what a minimum has
    blocks = SuperBlocks(
        grid.kind,
        d.to(torch.float16),
        multiples.to(torch.int8).contiguous(),
        dmin.to(torch.float16)[:, :kept],
        minima.to(torch.int8)[:, :kept].contiguous(),
    )
    return Codes(codes, multiples, minima, blocks)


def rounded(W: Tensor, grid: Grid, group: int, curvature: Tensor | None = None) -> Quantised:
    """Return W [R, C] rounded to the nearest values of a grid that is fitted by `curvature` [C], without corrections.

    The bytes of a GGUF file for it are `grid.bits_per_weight` R C / 8.
    """
    weight = quantise(W, grid, group, nearest, None, curvature).solved(grid, group).weight
    assert isinstance(weight, Quantised)
    return weight
