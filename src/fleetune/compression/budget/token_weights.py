# SPDX-License-Identifier: Apache-2.0
"""Weigh the calibration tokens of each layer by how much its output there changes the model's predictions (GuidedQuant).

Kim, El Halabi, Park, Schaefer, Lee, Yeonhong Park, Jae W. Lee, Song: "GuidedQuant: Large Language Model Quantization via
Exploiting End Loss Guidance", ICML 2025, arXiv 2505.07004 (the objective with averaged Fisher blocks, one group of channels).

A layer's squared output error counts every token alike.  By the loss it counts by the square of the gradient by these outputs:

    H = sum of 2 s_t x_t x_t^T,   s_t = mean over the outputs i of g_ti^2, divided by its mean over all tokens

with g the gradient of -log p(y) for y drawn from the dense model's own distribution p, as for a budget
(`sensitivity.py`).  One pass forward and back through the dense model finds all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fleetune.compression.budget import sensitivity
from fleetune.compression.layerwise.activations import same_inputs
from fleetune.compression.layerwise.driver import linears_of
from fleetune.errors import FleetuneError
from fleetune.models.net.model import Model

PROBED = 8  # tokens that tell which layers read the same tensor


def measure(
    model: Model,
    windows: Tensor,
    seed: int,
    on_window: Callable[[int, int], None] = lambda number, count: None,
) -> dict[str, Tensor]:
    """Return what each token of windows int64 [n, length] counts, float32 [n, length] with mean 1, by layer.

    Layers that read the same tensor, as q, k and v do, have one Hessian and so the mean of their weights.  Layers that do not
    see every token once, and those without any gradient, are left out: their tokens count alike.  FleetuneError for gradients
    that are not finite.
    """
    linears = {name: linear for _, found in linears_of(model) for name, linear in found.items()}
    squares = sensitivity.of_tokens(model, windows, list(linears), seed, on_window)
    for name, of in squares.items():
        if not math.isfinite(float(of.sum())):
            raise FleetuneError(
                f"the gradient by the outputs of {name} is not finite: the text's activations overflow",
                hint="--set tokens=equal",
            )
    weights = {name: of / of.mean() for name, of in squares.items() if of.any()}
    found = dict[str, Tensor]()
    for readers in same_inputs(model, linears, windows[0, :PROBED]):
        if known := [weights[name] for name in readers if name in weights]:
            found |= dict.fromkeys(readers, torch.stack(known).mean(0))
    return found
