"""Correct each weight matrix for the errors of the layers before it, then quantise it as OPTQ does (Qronos).

Zhang, Zhang, Colbert, Saab: "Qronos: Correcting the Past by Shaping the Future... in Post-Training Quantization", ICLR 2026,
arXiv 2505.11695 (in its equivalent form with a Cholesky factor).

## Algorithm

X are the inputs of a layer in the dense model, Y those in the model as compressed so far.  OPTQ makes Q Y close to W Y; Qronos
makes it close to W X, and minimises ||W X - Q Y||^2 + λ ||W - Q||^2 / 2.  With H = 2 Y Y^T + λ and D = 2 (X - Y) Y^T:

1. Choose the value of the first column with all others as they are: w_1 + (W D)_1 / H_11.
2. Move the other columns to the least-squares solution for this value.  (Without it the solution is W + W D H^-1.)
3. Run `optq` on these weights.

The paper takes steps 1 and 2 for every column, with its rounding between them.  After the first column the others are at their
optimum already, and what is left of the steps is the loop of OPTQ.  Layers are solved in turn (`layerwise/driver.py`): with its
block's dense weights before each, the KL divergence was 15 times that of OPTQ (SmolLM2-135M, Q4_0, damping 0.01).

## Differences from the paper

- Activations are not quantised: X and Y differ by the compressed weights alone.
- D is added up in place of the cross-covariance: where nothing has drifted, the result is that of OPTQ, bit for bit.
- λ is `damping` times the mean of H's diagonal (the code: 1e-6 of H's largest eigenvalue, and 0 in step 1).
- Nothing is corrected where H has no Cholesky factor, where the tokens differ in the two models (routed experts), or in the
  embedding and the head.

The reported error is that of the quantisation alone: relative to the corrected weights.  With little damping the correction fits
the calibration tokens alone.  KL divergence on 12 held-out windows of WikiText-2 (SmolLM2-135M, calibrated on 16 of 256 tokens):

| damping | 0.01 | 0.1 | 0.3 | 1 | `optq`, 0.01 | `optq`, 0.1 |
|---|---|---|---|---|---|---|
| Q4_0 | 0.083 | 0.063 | 0.060 | 0.061 | 0.091 | 0.105 |
| 3 bits, asymmetric | | 0.286 | 0.277 | | 0.497 | |
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fleetune.common.settings import setting
from fleetune.compression.layerwise.grids import Grid, refuse_pruned
from fleetune.compression.layerwise.hessian import inverse_cholesky
from fleetune.compression.methods import optq

PAPER = "Zhang et al., ICLR 2026, arXiv 2505.11695"


@dataclass(frozen=True)
class Solver(optq.Solver):
    """OPTQ's settings, with a damping of its own; step 3 is OPTQ's `solve`."""

    damping: float = setting(0.3, "λ", "added to H's diagonal, of its mean")

    def correct(self, W: Tensor, H: Tensor, D: Tensor) -> Tensor:
        """Return the weights to quantise: steps 1 and 2.  W itself where H has no factor."""
        refuse_pruned(W, Grid(self.grid, self.bits))
        U, dead, damping, _ = inverse_cholesky(H, self.damping)
        if U is None:
            return W
        drift = W @ D
        corrected = W + (drift @ U.T) @ U
        value = W[:, 0] + drift[:, 0] / (H[0, 0] + damping + dead[0])
        inverse = U[:, 0] @ U  # the first column's row of H^-1
        corrected += torch.outer((value - corrected[:, 0]) / inverse[0], inverse)
        return corrected.masked_fill_(W == 0, 0.0)
