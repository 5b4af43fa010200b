# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-calls
"""The column loop that OPTQ and SparseGPT share: settle a column, let the columns to come make up for its error.

For column i, with q its settled values and U from `hessian.inverse_cholesky`,

    e = (w_i - q) / U_ii            w_j <- w_j - e U_ij  for all j > i

(the optimal-brain-surgeon update for all rows at once; Frantar et al. 2023, arXiv 2210.17323, equation 2 and
algorithm 1).  The update is applied at once within a block of columns and by one matrix product to those after it.
Rows are independent, so the compiled loop lays columns out as rows of W^T and runs along them.

In all, Q = W - E U, so with H the matrix of which U is, U H U^T = I and

    tr((W - Q) H (W - Q)^T) = tr(E E^T) = sum e^2

which is the loss, without a product of matrices (equation 3 of the paper, summed).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fleetune.common.numba_cache import cached_njit
from fleetune.compression.layerwise.hessian import Factor

BLOCK = 128


class Segment(NamedTuple):
    """How the next columns are settled: up to `end`; on a grid (scale, zero, top) or as they are; masked ones to 0."""

    end: int
    scale: Tensor | None  # [R]
    zero: Tensor | None  # [R]
    top: int
    mask: Tensor | None  # bool [end - begin, R]: True is pruned


Choose = Callable[[Tensor, int, int], Segment]


def sweep(W: Tensor, U: Tensor, choose: Choose, block: int = BLOCK) -> tuple[Tensor, Tensor, float]:
    """(settled values, codes, sum e^2) of W [R, C], float32 or float64: [R, C] and uint8 [R, C].

    `choose(Wt, begin, block_end)` is asked for every segment; Wt [C, R] are the weights as updated so far: those of
    the block by all columns before, those after the block by the blocks before.  W is left as it was.
    """
    Wt, C = W.T.contiguous(), W.shape[1]
    codes = torch.zeros_like(Wt, dtype=torch.uint8)
    U, squares = U.contiguous(), 0.0
    for first in range(0, C, block):
        last = min(first + block, C)
        E = torch.zeros((last - first, len(W)), dtype=W.dtype)
        begin = first
        while begin < last:
            part = choose(Wt, begin, last)
            _settle(Wt, U, E, codes, first, begin, last, part)
            begin = min(part.end, last)
        Wt[last:].addmm_(U[first:last, last:].T, E, alpha=-1.0)
        squares += torch.linalg.vector_norm(E).item() ** 2
    return Wt.T.contiguous(), codes.T.contiguous(), squares


def nearest(W: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
    """`sweep` without any making up for errors (round to nearest)."""
    return sweep(W, torch.eye(W.shape[1], dtype=W.dtype), choose)[:2]


class Loop:
    """`sweep` by a factor, or `nearest` where there is none; `loss` is then that of the last matrix."""

    def __init__(self, factor: Factor) -> None:
        self.factor = factor
        self.loss: float | None = None  # tr((W - Q) H (W - Q)^T) of the H before damping; None of `nearest`

    def __call__(self, W: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
        """(settled values, codes) of W [R, C]."""
        if self.factor.U is None:
            return nearest(W, choose)
        settled, codes, squares = sweep(W, self.factor.U, choose)
        self.loss = max(0.0, squares - self.factor.damping * torch.dist(W, settled).item() ** 2)
        return settled, codes


def _settle(Wt: Any, U: Any, E: Any, codes: Any, first: int, begin: int, last: int, part: Segment) -> None:
    none = np.zeros(0, Wt.numpy().dtype)
    scale = none if part.scale is None else part.scale.contiguous().numpy()
    zero = none if part.zero is None else part.zero.contiguous().numpy()
    mask = np.zeros((0, 0), np.bool_) if part.mask is None else part.mask.contiguous().numpy()
    end = min(part.end, last)
    ends = np.array([0, part.top], none.dtype)
    _loop(Wt.numpy(), U.numpy(), E.numpy(), codes.numpy(), first, begin, end, last, scale, zero, ends, mask)


@cached_njit
def _loop(Wt, U, E, codes, first, begin, end, last, scale, zero, ends, mask):
    # `ends` (0 and the largest code) has the type of the weights: a constant would widen the arithmetic.
    R = Wt.shape[1]
    for j in range(begin, end):
        w, e, code = Wt[j], E[j - first], codes[j]
        if len(scale):
            for r in range(R):
                c = np.rint(w[r] / scale[r]) + zero[r]
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
