"""Quantise each weight matrix column by column, and correct later columns for the error of earlier ones (OPTQ, GPTQ).

Frantar, Ashkboos, Hoefler, Alistarh: "OPTQ: Accurate Quantization for Generative Pre-trained Transformers",
ICLR 2023, arXiv 2210.17323 (algorithm 1; section 4).

## Algorithm

Every linear layer is quantised on its own.  H = 2 X X^T is the Hessian of its squared output error on the calibration
tokens X, and U is the upper Cholesky factor of H^-1 (`layerwise/hessian.py`).  The columns are taken in order
(`layerwise/column_loop.py`):

1. At the first column of a group, fit a grid to the group's weights as updated so far (`layerwise/grids.py`).
2. Round column i to its group's grid: w_i becomes q_i.
3. Move all later columns: w_j <- w_j - (w_i - q_i) U_ij / U_ii.

## Differences from the paper

- The grid of a group is fitted to the weights as updated by all columns before it.  The reference code reads the
  weights from before the current block of 128 columns, so with smaller groups all but the first see stale ones.
- The default grid is that of the runtime that will read the file, with scales rounded to fp16 before codes are chosen.
  The reference's symmetric grid clips one of the extremes; it is `grid=symmetric`.
- The scales of `ggml`, `iq4_nl` and the super-blocks are fitted (`layerwise/fits.py`): the errors of column i weigh as its
  curvature given those before it, 1 / U_ii^2.
- Where H has no Cholesky factor, the reference code stops.  Here damping grows tenfold, up to 1; if there is still no
  factor, the layer is rounded to nearest and the report says so.
- Inputs that are always zero are not an error: their weights become 0.
- Weights that are exactly 0 stay 0: pruned weights are never moved by the corrections.  Grids without a 0 (`iq4_nl`, `iq4_xs`,
  `q5_k`, `q4_k`, `q2_k`) give the weights of the last two rules the value nearest to it, and refuse a pruned matrix.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fleetune.common.settings import setting
from fleetune.compression import Solved
from fleetune.compression.layerwise.column_loop import CompensatedLoop
from fleetune.compression.layerwise.grids import Grid, quantise, refuse_pruned
from fleetune.compression.layerwise.hessian import damping_problems, inverse_cholesky
from fleetune.compression.methods import rtn

PAPER = "Frantar et al., ICLR 2023, arXiv 2210.17323"


@dataclass(frozen=True)
class Solver(rtn.Solver):
    """The settings of rounding to nearest, and a damping; defaults are for 4-bit files of llama.cpp."""

    data: ClassVar[bool] = True

    damping: float = setting(0.01, "λ", "added to H's diagonal, of its mean")

    def problems(self) -> list[str]:
        """List what is wrong with the settings."""
        return [*super().problems(), *damping_problems(self.damping)]

    def solve(self, W: Tensor, H: Tensor) -> Solved:
        """Run algorithm 1 of the paper on one matrix."""
        grid, group = Grid(self.grid, self.bits), self.group or W.shape[1]
        refuse_pruned(W, grid)
        zeros = (W == 0).T if grid.holds_zero and bool((W == 0).any()) else None
        factor = inverse_cholesky(H, self.damping)
        loop = CompensatedLoop(factor)
        found = quantise(W.masked_fill(factor.dead, 0.0), grid, group, loop, zeros, factor.curvature)
        return found.solved(grid, group, factor.notes, loop.loss)
