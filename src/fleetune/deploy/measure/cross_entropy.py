# SPDX-License-Identifier: Apache-2.0
"""Compute the cross-entropy of tokens from a runtime's logits, with numpy alone: engines run in processes without torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def of_tokens(logits: NDArray[np.float32], targets: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return -log softmax(logits)[target] in nats: logits [n, V], targets [n] -> float64 [n]."""
    wide = logits.astype(np.float64)
    top = wide.max(1)
    own = wide[np.arange(len(targets)), targets]
    found: NDArray[np.float64] = top + np.log(np.exp(wide - top[:, None]).sum(1)) - own
    return found
