# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-calls
"""Fit the scale of given values, a codebook's or whole numbers, to groups of weights: the least weighted squared error.

An extreme element is put near either end of the values: the one of largest |x|, and, where errors are weighed, the one of
largest sqrt(h) |x|.  For each such scale the weights are rounded to the nearest of them, q, for which the best scale is known,
and so is what it takes off the squared error:

    s = sum h q x / sum h q^2            sum h (x - s q)^2 = sum h x^2 - (sum h q x)^2 / sum h q^2

The scale that takes off most is kept.  With 18 of them the error is within 1 % of the least possible.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from fleetune.common.numba_cache import cached_njit

# of the largest element from an end, in mean distances of two values: beyond it, and inside
OFFSETS: Final = tuple(0.375 * k for k in range(-4, 5))


def fit_scale(x: Tensor, levels: Tensor, curvature: Tensor | None) -> Tensor:
    """Return the scale [R], of either sign, of each row of x [R, n]; 0 for a row of zeros.

    levels are the values, rising; curvature [n] are the weights h of the squared errors (None: 1).
    """
    columns, sizes = x.T.contiguous().numpy(), x.abs()
    h = torch.ones(x.shape[1], dtype=x.dtype) if curvature is None else curvature.to(x.dtype)
    ranked = [sizes] if curvature is None else [sizes, sizes * h.sqrt()]
    extremes = torch.cat([x.gather(1, by.argmax(1, keepdim=True)) for by in ranked], 1).T.contiguous()
    values = levels.to(x.dtype).numpy()
    unit = (values[-1] - values[0]) / (len(values) - 1)
    ends = np.array([values[end] + unit * offset for end in (0, -1) for offset in OFFSETS], columns.dtype)
    scale, best = np.zeros(len(x), columns.dtype), np.zeros(len(x), columns.dtype)
    for extreme in extremes.numpy():
        _fit(columns, h.numpy(), extreme, ends, values, (values[1:] + values[:-1]) / 2, best, scale)
    return torch.from_numpy(scale)


@cached_njit
def _fit(x, h, extreme, ends, levels, middles, best, scale):
    # The inner loops run along the rows without a branch, so that they are compiled to vector instructions.
    n, R = x.shape
    v, q, num, den = np.empty_like(scale), np.empty_like(scale), np.empty_like(scale), np.empty_like(scale)
    for end in ends:
        num[:] = 0
        den[:] = 0
        for j in range(n):
            for r in range(R):
                v[r] = x[j, r] * (end / extreme[r])
                q[r] = levels[0]
            for k in range(len(middles)):
                middle, gap = middles[k], levels[k + 1] - levels[k]
                for r in range(R):
                    q[r] = q[r] + gap if v[r] > middle else q[r]
            for r in range(R):
                num[r] += h[j] * q[r] * x[j, r]
                den[r] += h[j] * q[r] * q[r]
        for r in range(R):
            s = num[r] / den[r]
            if num[r] * s > best[r]:
                best[r] = num[r] * s
                scale[r] = s
