"""Fit quantisation grids, w = scale * (code - zero), to groups of weights.

Scales are rounded to what the file holds (fp16, or multiples) *before* codes are chosen.  With a zero, pruned weights stay 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fleetune.compression import Solved
from fleetune.compression.layerwise.column_loop import ColumnLoop, Segment
from fleetune.compression.layerwise.fits import (
    SuperFit,
    fit_block,
    fit_scale,
    nearest_codes,
    refit_groups,
    to_half,
)
from fleetune.errors import RecipeError
from fleetune.models.artefact import Quantised, SuperBlocks, joined
from fleetune.models.families.number_types import CODEBOOKS, SUPER_TYPES, SUPER_WIDTH, SuperType

UNIFORM: Final = ("ggml", "symmetric", "asymmetric", "universal")
KINDS: Final = (*UNIFORM, *CODEBOOKS)  # whose groups have a scale of their own
ALL: Final = (*KINDS, *SUPER_TYPES)
BITS: Final = (2, 3, 4, 5, 8)
GROUPS: Final = (256, 128, 64, 32, 16, 8, 4)  # sizes that are suggested
HALF_BITS: Final = 11  # significant bits of fp16: those of a universal scale and of its zero together
SIGNIFICANT: Final = 7  # bits of a universal scale at most
DEFAULTS: Final = (4, 32)  # bits and group where neither is given
# for rows that super-blocks do not divide: the grid and bits of blocks of 32 columns
INSTEAD: Final[Mapping[str, tuple[str, int]]] = MappingProxyType(
    {
        "q6_k": ("ggml", 8),
        "q5_k": ("ggml", 5),
        **dict.fromkeys(("q4_k", "q3_k", "q2_k", "iq4_xs"), ("iq4_nl", 4)),
    }
)
# GGUF's smallest type for the codes of a grid, bytes of a block and its weights: by (grid, bits up to)
_BLOCKS: Final = {
    ("ggml", 4): (18, 32),
    ("ggml", 5): (22, 32),
    ("ggml", 8): (34, 32),
    ("symmetric", 4): (18, 32),
    ("symmetric", 5): (22, 32),
    ("symmetric", 8): (34, 32),
    ("universal", 3): (18, 32),
    ("universal", 4): (20, 32),
    ("universal", 5): (24, 32),
    ("asymmetric", 3): (18, 32),
    ("asymmetric", 4): (22, 32),
    ("asymmetric", 5): (34, 32),
    ("iq4_nl", 4): (18, 32),
    ("q6_k", 6): (210, SUPER_WIDTH),
    ("q5_k", 5): (176, SUPER_WIDTH),
    ("q4_k", 4): (144, SUPER_WIDTH),
    ("q3_k", 3): (110, SUPER_WIDTH),
    ("q2_k", 2): (84, SUPER_WIDTH),
    ("iq4_xs", 4): (136, SUPER_WIDTH),
}


@dataclass(frozen=True)
class Grid:
    r"""A kind of grid with 2^bits values.

    | grid | zero | scale and range |
    |---|---|---|
    | ggml | 2^(b-1) | of either sign.  With a Hessian of least error (`fits.py`), else ggml's: the largest is code 0 |
    | symmetric | 2^(b-1) | that of the GPTQ reference code, scale = 2 max\|w\| / (2^b - 1): it clips one of the extremes |
    | asymmetric | integer | from the smallest to the largest element; 0 is always exact |
    | universal | integer | as asymmetric; scales of 7 significant bits (6 if b = 5): scale * zero is exact in fp16 (Q4_1, Q5_1) |
    | iq4_nl | none | the 16 values of llama.cpp's IQ4_NL, denser about 0; the scale of least squared error (`fits.py`) |
    | q6_k, q3_k | 32, 4 | GGUF's super-blocks: the scales in 256 columns are multiples of one number (`fits.py`) |
    | q5_k, q4_k, q2_k | none | the same, with a minimum of each group, likewise a multiple |
    | iq4_xs | none | the same, without a minimum, with the values of iq4_nl |
    """

    kind: str
    bits: int

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def blocks(self) -> SuperType | None:
        """The super-block type; None for groups with a scale of their own."""
        return SUPER_TYPES.get(self.kind)

    @property
    def codebook(self) -> str:
        """The name of the codebook; "" for evenly spaced values."""
        return self.kind if self.kind in CODEBOOKS else self.blocks.codebook if self.blocks else ""

    @property
    def holds_zero(self) -> bool:
        """Whether 0 is on the grid of every group."""
        return not (self.codebook or (self.blocks and self.blocks.minimum))

    @property
    def block(self) -> tuple[int, int] | None:
        """Columns and bytes of a block of GGUF's smallest type that holds any codes of the grid; None where only floats do."""
        found = [block for (kind, bits), block in _BLOCKS.items() if kind == self.kind and self.bits <= bits]
        return (found[0][1], found[0][0]) if found else None

    @property
    def by_curvature(self) -> bool:
        """Whether a scale is fitted to the errors that count, where it is known which do."""
        return bool(self.codebook) or (self.kind == "ggml" and self.bits <= 5)

    @property
    def levels(self) -> Tensor | None:
        """The values of a codebook's codes; None for evenly spaced ones."""
        return torch.tensor(CODEBOOKS[self.codebook], dtype=torch.float64) if self.codebook else None

    def find(self, x: Tensor, curvature: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fit a grid to each row of x [.., R, n].

        curvature [.., n] says how much an error in a column counts; a codebook and ggml's grid are fitted by it.  Returns (scale,
        zero) [.., R] of x's dtype: scales are exact in fp16, zeros are integers.  ValueError for super-blocks, which are fitted
        as a whole (`fit_block`; `rounded` is for all grids).
        """
        if self.blocks is not None:
            raise ValueError(f"{self.kind} has no groups with a scale of their own")
        if self.by_curvature and not self.codebook and curvature is not None:
            half = 1 << (self.bits - 1)
            scale = _fp16(fit_scale(x, torch.arange(-half, half), curvature))
            return scale, torch.full_like(scale, float(half))
        if (levels := self.levels) is not None:
            scale = to_half(fit_scale(x, levels, curvature))
            return scale, torch.zeros_like(scale)
        return self._fit(x)

    def codes(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes of x [.., R, n], of x's dtype."""
        steps = x / scale[..., None]
        if (levels := self.levels) is not None:
            middles = (levels[1:] + levels[:-1]).to(x.dtype) / 2
            codes = torch.zeros_like(x, dtype=torch.uint8)
            for middle in middles:
                codes += steps > middle
            return codes.to(x.dtype)
        return (torch.round(steps) + zero[..., None]).clamp_(0, self.top)

    def _fit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = float(1 << (self.bits - 1))
        lo, hi = x.amin(-1), x.amax(-1)
        if self.kind == "ggml":
            extreme = _extreme(x, lo, hi)
            return _fp16(extreme / -half), torch.full_like(extreme, half)
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        if self.kind == "symmetric":
            return _fp16(2 * torch.maximum(-lo, hi) / self.top), torch.full_like(lo, half)
        scale = (hi - lo) / self.top
        if self.kind == "universal":
            scale = significant(scale, min(SIGNIFICANT, HALF_BITS - self.bits))
        scale = _fp16(scale)
        return scale, torch.round(-lo / scale).clamp(0, self.top)


def _extreme(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Return the element of largest magnitude of each row of x [.., R, n], the first among equals as in ggml.

    lo and hi are the smallest and the largest element of each row.
    """
    extreme, tied = torch.where(hi > -lo, hi, lo), hi == -lo
    if tied.any():
        some = x[tied]
        extreme[tied] = some.gather(1, some.abs().argmax(1, keepdim=True))[:, 0]
    return extreme


def _fp16(scale: Tensor) -> Tensor:
    """Round to fp16 and back; 1 where that gives 0 (a group of zeros, or of numbers too small for fp16)."""
    rounded = to_half(scale)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def significant(scale: Tensor, bits: int) -> Tensor:
    """Round to so many significant bits."""
    _, exponent = torch.frexp(scale)
    # fp16's subnormals have fewer bits: there the step is that of fp16 (2^-24), and zero * step is exact as well
    step = torch.ldexp(torch.ones_like(scale), (exponent - bits).clamp(min=-24))
    return torch.round(scale / step) * step


def grid_problems(kind: str, bits: int, group: int) -> list[str]:
    """List what is wrong with the settings of a grid."""
    problems = []
    if (of := SUPER_TYPES.get(kind)) is not None:
        return _super_problems(kind, of, bits, group)
    if kind not in ALL:
        problems.append(f"grid = {kind!r} is not one of {', '.join(ALL)}")
    if bits not in BITS:
        problems.append(f"bits = {bits} is not one of {', '.join(map(str, BITS))}")
    if group < 0:
        problems.append(f"group = {group} is below 0")
    if kind == "universal" and bits > 5:
        problems.append(
            f"a universal grid has 5 bits at most, so that scale * zero is exact in fp16; bits = {bits}"
        )
    if kind in CODEBOOKS and len(CODEBOOKS[kind]) != 1 << bits:
        problems.append(f"grid = {kind!r} has {len(CODEBOOKS[kind])} values: bits = 4, not {bits}")
    return problems


def _super_problems(kind: str, of: SuperType, bits: int, group: int) -> list[str]:
    problems = []
    if bits not in (DEFAULTS[0], of.bits):
        problems.append(f"grid = {kind!r} has codes of {of.bits} bits, not of {bits}: leave bits out")
    if group not in (DEFAULTS[1], of.group):
        problems.append(f"grid = {kind!r} has groups of {of.group}, not of {group}: leave group out")
    return problems


def settled(kind: str, bits: int, group: int) -> tuple[int, int]:
    """Return the bits and the group of a grid, which a super-block type has of its own."""
    of = SUPER_TYPES.get(kind)
    return (bits, group) if of is None else (of.bits, of.group)


def row_problem(name: str, C: int, kind: str, group: int) -> str:
    """Say why rows of C columns cannot be divided as the grid has to, or "" when they can."""
    if kind not in SUPER_TYPES:
        return group_problem(name, C, group)
    if C % SUPER_WIDTH == 0:
        return ""
    instead, bits = INSTEAD[kind]
    return f"{name} has {C} columns, which super-blocks of {SUPER_WIDTH} do not divide" + (
        f" (grid={instead} with bits={bits} is for groups of 32)" if C % DEFAULTS[1] == 0 else ""
    )


def group_problem(name: str, C: int, group: int) -> str:
    """Say why rows of C columns cannot be divided into groups of this size, or "" when they can."""
    if not group or C % group == 0:
        return ""
    fits = [g for g in GROUPS if C % g == 0]
    return f"{name} has {C} columns, which groups of {group} do not divide" + (
        f" (groups of {fits[0]} do)" if fits else " (group=0 takes the whole row)"
    )


PART: Final = 1 << 18  # weights that are rounded at once
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
        g = inside // of.group
        if begin % of.group == 0:
            h = None if curvature is None else curvature[begin - inside : begin - inside + SUPER_WIDTH]
            if not inside:
                fits.append(fit_block(Wt[begin : begin + SUPER_WIDTH].T, of, h))
            else:
                own, fit = None if h is None else h[inside : inside + of.group], fits[-1]
                one = fit._replace(k=fit.k[g : g + 1], m=fit.m[g : g + 1])
                again = refit_groups(Wt[begin : begin + of.group].T, of, own, one)
                fit.k[g], fit.m[g] = again.k[0], again.m[0]
        mask, fit = None if zeros is None else zeros[begin:end], fits[-1]
        zero, offset = torch.full_like(fit.d, float(of.middle)), fit.offset()[g] if of.minimum else None
        return Segment(end, fit.scale()[g], zero, grid.top, mask, grid.levels, offset)

    _, codes = loop(W, choose)
    return _of_blocks(
        codes, grid.kind, of, SuperFit(*(torch.stack(each) for each in zip(*fits, strict=True)))
    )


def _of_blocks(codes: Tensor, kind: str, of: SuperType, fit: SuperFit) -> Codes:
    """Return codes [R, C] of blocks with a fit [B, .., R]."""
    d, dmin = fit.d.T.to(torch.float16), fit.dmin.T.to(torch.float16)
    multiples, minima = (part.flatten(0, 1).T for part in (fit.k, fit.m))
    kept = None if of.minimum else 0  # columns of what a minimum has
    whole = multiples.to(torch.int8).contiguous(), minima.to(torch.int8)[:, :kept].contiguous()
    blocks = SuperBlocks(kind, d.contiguous(), whole[0], dmin[:, :kept].contiguous(), whole[1])
    return Codes(codes, multiples, minima, blocks)


def rounded(W: Tensor, grid: Grid, group: int, curvature: Tensor | None = None) -> Quantised:
    """Return W [R, C] rounded to the nearest values of a grid that is fitted by `curvature` [C], without corrections.

    In a GGUF file it takes blocks of `grid.block`.
    """
    h = None if curvature is None else curvature.view(-1, group if grid.blocks is None else SUPER_WIDTH)
    parts = [_rounded(rows, grid, group, h) for rows in W.split(max(1, PART // W.shape[1]))]  # type: ignore[no-untyped-call]
    weight = joined([part.solved(grid, group).weight for part in parts])
    assert isinstance(weight, Quantised)
    return weight


def _rounded(W: Tensor, grid: Grid, group: int, curvature: Tensor | None) -> Codes:
    """Round all groups to nearest at once; curvature is [C / width, width], a group's or a super-block's."""
    of = grid.blocks
    x = W.view(len(W), -1, group if of is None else SUPER_WIDTH).transpose(0, 1)
    if of is None:
        scale, zero = grid.find(x, curvature)
        codes = grid.codes(x, scale, zero).to(torch.uint8)
        return Codes(codes.transpose(0, 1).reshape(W.shape), scale.T, zero.T)
    fit, x, scale = nearest_codes(x, of, curvature)
    scale = scale if of.codebook else scale.masked_fill(scale == 0, torch.inf)
    zero = torch.full_like(scale, 0.0 if of.minimum else float(of.middle))
    codes = grid.codes(x, scale, zero).to(torch.uint8)  # [blocks, groups, R, group]
    return _of_blocks(codes.permute(2, 0, 1, 3).reshape(W.shape), grid.kind, of, fit)
