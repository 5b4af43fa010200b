"""Quantise each weight matrix column by column, and correct later columns for the error of earlier ones (OPTQ, GPTQ).

Frantar, Ashkboos, Hoefler, Alistarh: "OPTQ: Accurate Quantization for Generative Pre-trained Transformers", ICLR 2023,
arXiv 2210.17323 (algorithm 1; section 4).

## Algorithm

H = 2 X X^T is the Hessian of a layer's squared output error on the calibration tokens X, and U the upper Cholesky factor of H^-1.
The columns are taken in order:

1. At the first column of a group, fit a grid to the group's weights as updated so far (`layerwise/grids.py`).
2. Round column i to its group's grid: w_i becomes q_i.
3. Move all later columns: w_j <- w_j - (w_i - q_i) U_ij / U_ii.

## Differences from the paper

- The reference code fits a group's grid to the weights from before the current block of 128 columns: of smaller groups all but
  the first see stale ones.  Its symmetric grid clips one of the extremes (`grid=symmetric`).
- The default grid is that of the runtime that will read the file.  Scales are rounded to fp16 before codes are chosen.  Those of
  `ggml`, `iq4_nl` and the super-blocks are fitted: an error in column i weighs 1 / U_ii^2 (`layerwise/fits.py`).
- Where H has no Cholesky factor, the reference code stops.  Here damping grows tenfold, up to 1; then the layer is rounded to
  nearest, and the report says so.
- Weights of inputs that are always zero become 0, and weights that are exactly 0 stay 0.  Grids without a 0 (`iq4_nl`, `iq4_xs`,
  `q5_k`, `q4_k`, `q2_k`) give them the value nearest to it, and refuse a pruned matrix.
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
