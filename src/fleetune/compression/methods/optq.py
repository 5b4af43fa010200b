# SPDX-License-Identifier: Apache-2.0
"""OPTQ (GPTQ): quantise column by column, and let the columns to come make up for each one's error.

Frantar, Ashkboos, Hoefler, Alistarh: "OPTQ: Accurate Quantization for Generative Pre-trained Transformers",
ICLR 2023, arXiv 2210.17323 (algorithm 1; section 4).

For each linear layer, with H from `hessian` and the loop of `columns`: the columns in order, every group of columns on
a grid (`grids`) that is fitted when its first column comes, to the weights as they have become by then.

What differs from the reference code, and why:
- Group parameters come from the updated weights of the *block* (the reference reads those from before the block, so for
  groups under 128 all but the first see stale ones).
- The grid is the one of the runtime that the file is for, with scales rounded to fp16 before codes are chosen (`grids`).
  The reference's symmetric grid clips one extreme: it is `grid=symmetric`.
- `order=static` takes columns by falling H_ii with grids fitted before the loop; `order=gar` sorts within groups and
  then the groups (GPTQModel's group-aware reordering) and fits them as they come.  In both the groups stay contiguous
  columns of the file: no index is ever written.  `order=none` is the default: the differences are within noise.
- Where H has no Cholesky factor the reference stops; here damping grows tenfold to 1, then the layer is rounded to
  nearest, and the report says so.  Inputs that are always zero are not an error: their weights become 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fleetune.compression import Solved
from fleetune.compression.layerwise.column_loop import Choose, Loop, Segment
from fleetune.compression.layerwise.grids import BITS, KINDS, Grid
from fleetune.compression.layerwise.hessian import inverse_cholesky
from fleetune.models.artefact import Quantised

PAPER = "Frantar et al., ICLR 2023, arXiv 2210.17323"

Settle = Callable[[Tensor, Choose], tuple[Tensor, Tensor]]  # `Loop` or `nearest`
Found = tuple[Tensor, Tensor, Tensor]  # codes uint8 [R, C], scale [R, G], zero [R, G]


@dataclass(frozen=True)
class Solver:
    """Settings with the paper's symbols; defaults are for 4-bit files of llama.cpp."""

    data: ClassVar[bool] = True

    bits: int = field(default=4, metadata={"symbol": "b", "help": "bits of a code: 2, 3, 4 or 8"})
    group: int = field(
        default=32, metadata={"symbol": "g", "help": "columns that share a scale (0: the whole row)"}
    )
    grid: str = field(
        default="ggml", metadata={"symbol": "grid", "help": "ggml, symmetric, asymmetric or universal"}
    )
    search: bool = field(
        default=False, metadata={"symbol": "mse", "help": "try shrunken ranges, keep the best"}
    )
    order: str = field(
        default="none", metadata={"symbol": "act", "help": "order of the columns: none, static or gar"}
    )
    damping: float = field(
        default=0.01, metadata={"symbol": "λ", "help": "added to H's diagonal, of its mean"}
    )

    def __post_init__(self) -> None:
        check_grid(self.grid, self.bits, self.group)
        check_damping(self.damping)
        if self.order not in ("none", "static", "gar"):
            raise ValueError(f"order = {self.order!r} is none of none, static, gar")

    def check(self, name: str, R: int, C: int) -> str:
        return check_groups(name, C, self.group)

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        """Algorithm 1 of the paper on one matrix; exact zeros of W stay zero."""
        grid, group = Grid(self.grid, self.bits, self.search), self.group or W.shape[1]
        kept = (W == 0).T if (W == 0).float().mean() > 0.05 else None  # a pruned matrix keeps its zeros
        order = ordered(H.diagonal(), group, self.order)
        if order is not None:
            W, H = W[:, order], H[order][:, order]
            kept = None if kept is None else kept[order]
        factor = inverse_cholesky(H, self.damping)
        loop, W = Loop(factor), W.masked_fill(factor.dead, 0.0)
        if self.order == "static":
            assert order is not None
            found = static(W, grid, group, loop, order, kept)
        else:
            found = dynamic(W, grid, group, loop, kept)
            if order is not None:
                found = _unsorted(found, group, order)
        return packed(grid, group, *found, factor.notes, loop.loss)


def ordered(importance: Tensor, group: int, order: str) -> Tensor | None:
    """The order in which columns are taken, int64 [C]; None for as they are."""
    if order == "none":
        return None
    if order == "static":
        return importance.argsort(stable=True, descending=True)
    groups = importance.view(-1, group)
    inside = groups.argsort(stable=True, dim=1, descending=True) + group * torch.arange(len(groups))[:, None]
    return inside[groups.amax(1).argsort(stable=True, descending=True)].reshape(-1)


def _unsorted(found: Found, group: int, order: Tensor) -> Found:
    codes, scale, zero = found
    back, groups = order.argsort(), (order.view(-1, group)[:, 0] // group).argsort()
    return codes[:, back], scale[:, groups], zero[:, groups]


def dynamic(W: Tensor, grid: Grid, group: int, loop: Settle, kept: Tensor | None = None) -> Found:
    """The loop with each group's grid fitted when its first column comes; `kept` bool [C, R] are zeros that stay."""
    scales, zeros = list[Tensor](), list[Tensor]()

    def choose(Wt: Tensor, begin: int, last: int) -> Segment:
        if begin % group == 0:  # a group that goes beyond the block is fitted to what is known by now
            scale, zero = grid.find(Wt[begin : begin + group].T)
            scales.append(scale)
            zeros.append(zero)
        end = min(begin - begin % group + group, last)
        mask = None if kept is None else kept[begin:end]
        return Segment(end, scales[-1], zeros[-1], grid.top, mask)

    _, codes = loop(W, choose)
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1)


def static(W: Tensor, grid: Grid, group: int, loop: Settle, order: Tensor, kept: Tensor | None) -> Found:
    """The loop over sorted columns with grids fitted to the weights as they were, by group of the file's order."""
    back = order.argsort()
    whole = W[:, back]
    fits = [grid.find(whole[:, first : first + group]) for first in range(0, W.shape[1], group)]
    scale, zero = (torch.stack([fit[i] for fit in fits], 1) for i in (0, 1))
    of = order // group

    def choose(Wt: Tensor, begin: int, last: int) -> Segment:
        g = int(of[begin])
        mask = None if kept is None else kept[begin : begin + 1]
        return Segment(begin + 1, scale[:, g], zero[:, g], grid.top, mask)

    _, codes = loop(W, choose)
    return codes[:, back], scale, zero


def packed(
    grid: Grid, group: int, codes: Tensor, scale: Tensor, zero: Tensor, notes: tuple[str, ...] = (),
    loss: float | None = None,
) -> Solved:  # fmt: skip
    """The solver's answer."""
    q = Quantised(codes, scale.to(torch.float16), zero.to(torch.uint8), grid.bits, group)
    return Solved(q, notes, loss)


def check_grid(kind: str, bits: int, group: int) -> None:
    """ValueError for a grid that does not exist."""
    if kind not in KINDS:
        raise ValueError(f"grid = {kind!r} is none of {', '.join(KINDS)}")
    if bits not in BITS:
        raise ValueError(f"bits = {bits} is none of {', '.join(map(str, BITS))}")
    if group < 0:
        raise ValueError(f"group = {group} is below 0")
    if kind == "universal" and bits > 4:
        raise ValueError(f"a universal grid has 4 bits at most, so that scale * zero is exact; bits = {bits}")


def check_groups(name: str, C: int, group: int) -> str:
    """What is wrong with groups of this size in rows of C columns, "" for nothing."""
    if not group or C % group == 0:
        return ""
    fits = [g for g in (256, 128, 64, 32, 16, 8, 4) if C % g == 0]
    return f"{name} has {C} columns, which groups of {group} do not divide" + (
        f" (groups of {fits[0]} do)" if fits else " (group=0 takes the whole row)"
    )


def check_damping(damping: float) -> None:
    """ValueError for a damping that makes no sense."""
    if not 0 <= damping <= 1:
        raise ValueError(f"damping = {damping} is not between 0 and 1")
