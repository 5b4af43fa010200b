"""Correct each weight matrix for the errors of the layers before it, then quantise it as OPTQ does (Qronos).

Zhang, Zhang, Colbert, Saab: "Qronos: Correcting the Past by Shaping the Future... in Post-Training Quantization", ICLR 2026,
arXiv 2505.11695 (in its equivalent form with a Cholesky factor).

## Algorithm

Let X be the inputs of a layer in the dense model, and Y those in the model as compressed so far; the calibration windows go
through both, a block at a time.  OPTQ makes Q Y close to W Y.  Qronos makes it close to W X, what the layer returns in the dense
model: it minimises ||W X - Q Y||^2 + λ ||W - Q||^2 / 2.  With H = 2 Y Y^T + λ and D = 2 (X - Y) Y^T (`layerwise/activations.py`):

1. Choose the value of the first column with all others as they are: w_1 + (W D)_1 / H_11.
2. Move the other columns to the least-squares solution for this value.  (Without it the solution is W + W D H^-1.)
3. Run `optq` on these weights: round a column to its grid, correct the later ones.

The paper states it as steps 1 and 2 for every column, with its rounding between them.  After the first column the others are at
their optimum already, and what is left of the steps is the loop of OPTQ.

Layers are solved in turn, each on the outputs of those before it in its block (GPTQ calls that true sequential).  With the dense
weights there, two layers in a row would both correct the same error: on SmolLM2-135M (Q4_0, damping 0.01) the KL divergence was
then 15 times that of OPTQ.

## Differences from the paper

- Activations are not quantised: X and Y differ by the compressed weights alone.
- H and D are added up instead of H and the cross-covariance: where nothing has drifted, D is 0 and the result is that of
  OPTQ with the same damping, bit for bit.
- λ is `damping` times the mean of H's diagonal, in all steps.  The reference code takes 1e-6 of H's largest eigenvalue, and 0 in
  step 1.
- Where H has no Cholesky factor even with more damping, and where inputs are not of the same tokens in both models (routed
  experts), nothing is corrected.  Nor are embedding and head, where a budget chooses their grids.

The error that is reported is that of the quantisation alone: relative to the corrected weights.

## Options

Those of `optq`.  With little damping the correction fits the calibration tokens alone.  The default was chosen by the KL
divergence on held-out text, 12 windows of WikiText-2 (SmolLM2-135M, calibrated on 16 others of 256 tokens):

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
