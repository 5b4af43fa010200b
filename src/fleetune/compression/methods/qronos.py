# SPDX-License-Identifier: Apache-2.0
"""Correct each weight matrix for the errors of the blocks before it, then quantise it as OPTQ does (Qronos).

Zhang, Zhang, Colbert, Saab: "Qronos: Correcting the Past by Shaping the Future... in Post-Training Quantization", ICLR 2026,
arXiv 2505.11695 (algorithm 1; the equivalent form with a Cholesky factor).

## Algorithm

OPTQ solves each layer for the outputs W Y of the dense weights on the inputs Y that the compressed model gives it.  Qronos solves for
the outputs W X of the dense model, with X the layer's inputs there: minimise ||W X - Q Y||^2 + λ ||W - Q||^2.  The calibration
windows go through both models, a block at a time.  With H = 2 Y Y^T and D = 2 (X - Y) Y^T (`layerwise/activations.py`):

1. Choose the value of the first column with the others as they are: v = w_1 + (W D)_1 / (H_11 + λ).
2. Correct the other columns for that value and for X: least squares.  Without the first column held,
   the solution is W' = W + W D (H + λ)^-1.
3. Run OPTQ (`optq`) on the result: round a column, correct the later ones, and so on.

The paper alternates the same two steps for every column: choose the value of column i, then solve for all later columns.  After the
first column the later ones are at their optimum, so that what is left of a step is OPTQ's (the paper's theorem).

## Differences from the paper

- Quantised activations are left out: X and Y differ by the compressed weights of the blocks before.
- H and D are accumulated, instead of H and the cross-covariance Y X^T = (H + D^T) / 2: without drift D is exactly 0, and the result is
  OPTQ's bit for bit.
- λ is `damping` times the mean of H's diagonal, in all steps.  The reference code adds 1e-6 of H's largest eigenvalue, and nothing
  in the first step.
- Grids are fitted as in `optq`, to the corrected weights.  Weights that are exactly 0 stay 0.
- Embedding and head are solved without a correction where a budget chooses their grids.
- Inputs that are not of the same tokens in both models (those of routed experts) count as without drift.

The error that is reported is that of the quantisation alone: it is relative to the corrected weights, on Y.

## Options

Those of `optq`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fleetune.common.settings import setting
from fleetune.compression import Solved
from fleetune.compression.layerwise.grids import Grid
from fleetune.compression.layerwise.groups import refuse_pruned
from fleetune.compression.layerwise.hessian import inverse_cholesky
from fleetune.compression.methods import optq

PAPER = "Zhang et al., ICLR 2026, arXiv 2505.11695"


@dataclass(frozen=True)
class Solver:
    """OPTQ's settings, with the paper's symbols."""

    data: ClassVar[bool] = True

    bits: int = setting(4, "b", "bits of a code: 2, 3, 4, 5 or 8")
    group: int = setting(32, "g", "columns that share a scale (0: the whole row)")
    grid: str = setting(
        "ggml", "grid", "ggml, symmetric, asymmetric, universal, iq4_nl; q6_k, q5_k, q4_k, q3_k, q2_k, iq4_xs"
    )
    search: bool = setting(False, "mse", "try shrunken ranges, keep the best")
    order: str = setting("none", "act", "order of the columns: none, static or gar")
    damping: float = setting(0.01, "λ", "added to H's diagonal, of its mean")

    def __post_init__(self) -> None:
        settled = self._optq()
        object.__setattr__(self, "bits", settled.bits)  # what the grid says
        object.__setattr__(self, "group", settled.group)

    def _optq(self) -> optq.Solver:
        return optq.Solver(**asdict(self))

    def check(self, name: str, R: int, C: int) -> str:
        """Say why rows of C columns cannot be divided into groups, or "" when they can."""
        return self._optq().check(name, R, C)

    def correct(self, W: Tensor, H: Tensor, D: Tensor) -> Tensor:
        """Return the weights to quantise: steps 1 and 2.  W itself where H has no factor."""
        refuse_pruned(W, Grid(self.grid, self.bits))
        U, _, damping, _ = inverse_cholesky(H, self.damping)
        if U is None:
            return W
        drift = W @ D
        order = optq.column_order(H.diagonal(), self.group or W.shape[1], self.order)
        first = 0 if order is None else int(order[0])
        corrected = W + (drift @ U.T) @ U
        value = W[:, first] + drift[:, first] / (H[first, first] + damping)
        inverse = U[:, first] @ U  # the first column's row of H^-1
        corrected += torch.outer((value - corrected[:, first]) / inverse[first], inverse)
        return corrected.masked_fill_(W == 0, 0.0)

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        """Run step 3 on corrected weights."""
        return self._optq().solve(W, H)
