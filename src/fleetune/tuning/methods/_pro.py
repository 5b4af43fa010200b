# SPDX-License-Identifier: Apache-2.0
"""Draw directions by the size of the slopes seen along them: FedKSeed-Pro (arXiv 2312.06353, section 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Sizes(NamedTuple):
    """Sums and counts of the slopes seen along each direction."""

    size: np.ndarray  # float64[K] sum of |g|
    seen: np.ndarray  # int64[K] number of slopes

    def add(self, k: np.ndarray, g: np.ndarray) -> None:
        """Count slopes g, seen along the directions k, in place."""
        np.add.at(self.size, k, np.abs(g))
        np.add.at(self.seen, k, 1)


def probabilities(size: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return float32[K]: the softmax of the min-max-scaled mean |g| of each direction (see `Sizes`).

    The most favoured direction is at most e times as likely as the least.  Sizes are cut at the 95 % quantile first:
    in the reference one outlier flattens all other ones.
    """
    K = len(size)
    if not seen.any():  # nothing is known of a new pool
        return np.full(K, 1.0 / K, np.float32)
    mean = size / np.maximum(seen, 1)
    mean[seen == 0] = np.median(mean[seen > 0])
    mean = np.minimum(mean, np.quantile(mean, 0.95))
    scaled = (mean - mean.min()) / (np.ptp(mean) or 1.0)
    p: np.ndarray = (np.exp(scaled) / np.exp(scaled).sum()).astype(np.float32)
    return p


def weights(p: np.ndarray | None, K: int) -> np.ndarray:
    """Return float64[K], 1/(K p_k): keeps the mean step what uniform drawing (p None) would give."""
    return np.ones(K) if p is None else 1.0 / (K * p.astype(np.float64))
