# mypy: allow-untyped-defs, allow-untyped-calls
"""Compress a matrix column by column, and correct later columns for the error of each (the optimal brain surgeon).

For column i, with q its compressed values and U from `hessian.inverse_cholesky`, for all rows at once,

    e = (w_i - q) / U_ii            w_j <- w_j - e U_ij  for all j > i

(Frantar et al. 2023, arXiv 2210.17323, equation 2 and algorithm 1).  The update is immediate within a block of columns, and one
matrix product for all columns after it.  The compiled loop stores columns as rows of W^T and runs along them.  Together, Q = W -
E U and U H U^T = I, so tr((W - Q) H (W - Q)^T) = sum e^2 is the loss, without another product.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fleetune.common.numba_cache import cached_njit
from fleetune.compression.layerwise.hessian import Factor

BLOCK = 128


class Segment(NamedTuple):
    """Rule for the next columns: round them to a grid or leave them; masked weights become 0.

    A codebook, and a grid with an offset, round all of their columns: they have no mask, and their zero is 0.
    """

    end: int  # the column after the last one
    scale: Tensor | None  # [R]; None for no grid
    zero: Tensor | None  # [R]
    top: int  # the largest code
    mask: Tensor | None  # bool [end - begin, R]: True is pruned
    levels: Tensor | None = None  # the values of the codes of a codebook, rising; None for 0, 1 .. top
    offset: Tensor | None = None  # [R], taken off every value; None for 0


ChooseSegment = Callable[[Tensor, int, int], Segment]
ColumnLoop = Callable[[Tensor, ChooseSegment], tuple[Tensor, Tensor]]  # `CompensatedLoop` or `nearest`


def sweep(W: Tensor, U: Tensor, choose: ChooseSegment, block: int = BLOCK) -> tuple[Tensor, Tensor, float]:
    """Compress W [R, C], float32 or float64: (values [R, C], codes uint8 [R, C], sum e^2).

    `choose(Wt, begin, block_end)` returns the next segment.  Wt [C, R] are the weights as updated so far: those of the
    block by all earlier columns, those after it by all earlier blocks.  W is left unchanged.
    """
    # a copy in any layout of W: `contiguous` is none where W is the transpose of a contiguous matrix
    Wt, C = W.T.clone(memory_format=torch.contiguous_format), W.shape[1]
    codes = torch.zeros_like(Wt, dtype=torch.uint8)
    U, squares = U.contiguous(), 0.0
    for first in range(0, C, block):
        last = min(first + block, C)
        E = torch.zeros((last - first, len(W)), dtype=W.dtype)
        begin = first
        while begin < last:
            part = choose(Wt, begin, last)
            _process_columns(Wt, U, E, codes, first, begin, last, part)
            begin = min(part.end, last)
        if (later := U[first:last, last:]).any():  # none where nothing is corrected
            Wt[last:].addmm_(later.T, E, alpha=-1.0)
        squares += torch.linalg.vector_norm(E).item() ** 2
    return Wt.T.contiguous(), codes.T.contiguous(), squares


def nearest(W: Tensor, choose: ChooseSegment) -> tuple[Tensor, Tensor]:
    """Run `sweep` without correcting later columns: round to nearest, or prune by magnitude."""
    return sweep(W, torch.eye(W.shape[1], dtype=W.dtype), choose)[:2]


class CompensatedLoop:
    """Run `sweep` with the factor of a Hessian, or `nearest` where there is no factor."""

    def __init__(self, factor: Factor) -> None:
        self.factor = factor
        # tr((W - Q) H (W - Q)^T) of the last matrix, H before damping; None without a factor
        self.loss: float | None = None

    def __call__(self, W: Tensor, choose: ChooseSegment) -> tuple[Tensor, Tensor]:
        """Return (values, codes) of W [R, C]."""
        if self.factor.U is None:
            return nearest(W, choose)
        values, codes, squares = sweep(W, self.factor.U, choose)
        self.loss = max(0.0, squares - self._added(W - values))
        return values, codes

    def _added(self, error: Tensor) -> float:
        """Return the part of the loss that is of what was added to H: the damping, and 1 for inputs that are always zero."""
        norm = torch.linalg.vector_norm
        of_dead = norm(error[:, self.factor.dead]).item() ** 2
        return float(self.factor.damping * norm(error).item() ** 2 + of_dead)


def _process_columns(
    Wt: Any, U: Any, E: Any, codes: Any, first: int, begin: int, last: int, part: Segment
) -> None:
    none = np.zeros(0, Wt.numpy().dtype)
    scale = none if part.scale is None else part.scale.contiguous().numpy()
    zero = none if part.zero is None else part.zero.contiguous().numpy()
    mask = np.zeros((0, 0), np.bool_) if part.mask is None else part.mask.contiguous().numpy()
    end = min(part.end, last)
    ends = np.array([0, part.top], none.dtype)
    levels = none if part.levels is None else part.levels.numpy().astype(none.dtype)
    offset = none if part.offset is None else part.offset.contiguous().numpy()
    divisor = np.where(scale == 0, ends.dtype.type(np.inf), scale)  # so that a scale of 0 gives the code of 0
    grid = (scale, divisor, zero, ends, mask, levels, (levels[1:] + levels[:-1]) / 2, offset)
    _loop(Wt.numpy(), U.numpy(), E.numpy(), codes.numpy(), first, begin, end, last, *grid)


@cached_njit
def _loop(
    Wt, U, E, codes, first, begin, end, last, scale, divisor, zero, ends, mask, levels, middles, offset
):
    # `ends` (0 and the largest code) has the dtype of the weights: a constant would widen the arithmetic.
    R = Wt.shape[1]
    for j in range(begin, end):
        w, e, code = Wt[j], E[j - first], codes[j]
        if len(levels):
            for r in range(R):
                e[r] = w[r] / scale[r]
                code[r] = 0
            for middle in middles:
                for r in range(R):
                    code[r] += e[r] > middle
            for r in range(R):
                q = scale[r] * levels[code[r]]
                e[r] = (w[r] - q) / U[j, j]
                w[r] = q
        elif len(offset):
            for r in range(R):
                c = np.rint((w[r] + offset[r]) / divisor[r])
                c = min(max(c, ends[0]), ends[1])
                q = scale[r] * c - offset[r]
                code[r] = np.uint8(c)
                e[r] = (w[r] - q) / U[j, j]
                w[r] = q
        elif len(scale):
            for r in range(R):
                c = np.rint(w[r] / divisor[r]) + zero[r]
                c = min(max(c, ends[0]), ends[1])
                if len(mask) and mask[j - begin, r]:
                    c = zero[r]
                q = scale[r] * (c - zero[r])
                code[r] = np.uint8(c)
                e[r] = (w[r] - q) / U[j, j]
                w[r] = q
        else:
            for r in range(R):
                q = w[r]
                if len(mask) and mask[j - begin, r]:
                    q = ends[0]
                e[r] = (w[r] - q) / U[j, j]
                w[r] = q
        for k in range(j + 1, last):
            u, later = U[j, k], Wt[k]
            if u != 0.0:
                for r in range(R):
                    later[r] -= e[r] * u
