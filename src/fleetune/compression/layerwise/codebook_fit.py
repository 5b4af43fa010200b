# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-calls
"""Fit the scale of given values, a codebook's or whole numbers, to groups of weights: the least weighted squared error.

The element of largest |x| is put near either end of the values.  Where errors are weighed, the element of largest sqrt(h) |x|
is also put on each value but 0: where few errors count, its own must be small.  For each such scale the weights are rounded to
the nearest value, q, for which the best scale is known, and so is what it takes off the squared error:

    s = sum h q x / sum h q^2            sum h (x - s q)^2 = sum h x^2 - (sum h q x)^2 / sum h q^2

The scale that takes off most is kept.  In groups of 32 the error, summed over many, is above that of the best of 600 scales by
0.1 % where all errors weigh the same, and by 1 % (2 bits: 1.4 %) at most where h is lognormal with a sigma of 1 or 2.
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
    values = levels.to(x.dtype).numpy()
    unit = (values[-1] - values[0]) / (len(values) - 1)
    ends = np.array([values[end] + unit * offset for end in (0, -1) for offset in OFFSETS], columns.dtype)
    tried = [(sizes, ends)] if curvature is None else [(sizes, ends), (sizes * h.sqrt(), values[values != 0])]
    whole = bool((np.diff(values) == 1).all())
    scale, best = np.zeros(len(x), columns.dtype), np.zeros(len(x), columns.dtype)
    for counts, places in tried:
        element = x.gather(1, counts.argmax(1, keepdim=True))[:, 0].numpy()
        if whole:
            ends = np.array([values[0], values[-1], 0.5], columns.dtype)
            _fit_whole(columns, h.numpy(), element, places, ends, best, scale)
        else:
            _fit(columns, h.numpy(), element, places, values, (values[1:] + values[:-1]) / 2, best, scale)
    return torch.from_numpy(scale)


@cached_njit
def _fit(x, h, element, places, levels, middles, best, scale):
    # The inner loops run along the rows without a branch, so that they are compiled to vector instructions.
    n, R = x.shape
    v, q, num, den = np.empty_like(scale), np.empty_like(scale), np.empty_like(scale), np.empty_like(scale)
    for place in places:
        num[:] = 0
        den[:] = 0
        for j in range(n):
            for r in range(R):
                v[r] = x[j, r] * (place / element[r])
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


@cached_njit
def _fit_whole(x, h, element, places, ends, best, scale):
    # `_fit` for the whole numbers between the first two of `ends`; the third is 1/2, of their dtype.  Ties go down there too.
    n, R = x.shape
    num, den = np.empty_like(scale), np.empty_like(scale)
    for place in places:
        num[:] = 0
        den[:] = 0
        for j in range(n):
            w = h[j]
            for r in range(R):
                q = min(max(np.ceil(x[j, r] * (place / element[r]) - ends[2]), ends[0]), ends[1])
                num[r] += w * q * x[j, r]
                den[r] += w * q * q
        for r in range(R):
            s = num[r] / den[r]
            if num[r] * s > best[r]:
                best[r] = num[r] * s
                scale[r] = s
