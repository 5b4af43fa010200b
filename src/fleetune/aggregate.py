# SPDX-License-Identifier: Apache-2.0
"""How a server makes one update out of many: one function an idea, numpy only.

Replies are taken one at a time, so that memory does not grow with the number of devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

Tensors = dict[str, np.ndarray]


def weighted_mean(weighted: Iterable[tuple[float, Mapping[str, np.ndarray]]]) -> Tensors:
    """FedAvg (McMahan et al. 2017, Algorithm 1): sum_k n_k w_k / sum_k n_k, tensor by tensor.

    Takes (n_k, tensors) pairs one at a time, sums in float64, gives float32; {} when there are none.
    """
    sums: dict[str, np.ndarray] = {}
    total = 0.0
    for n, tensors in weighted:
        for name, value in tensors.items():
            if name not in sums:
                sums[name] = np.zeros(value.shape, np.float64)
            sums[name] += n * value.astype(np.float64)
        total += n
    return {name: (s / total).astype(np.float32) for name, s in sums.items()}


def product_mean(
    weighted: Iterable[tuple[float, Mapping[str, np.ndarray]]], pairs: Mapping[str, tuple[str, str]]
) -> tuple[Tensors, float]:
    """LoRA averaged as what it means: per layer the B', A' nearest to sum_k p_k B_k A_k (exact before the cut).

    The plain average of A and of B is not the average of the products: (mean B)(mean A) != mean(B A).
    `pairs` maps a layer to the names of its (B [out, r], A [r, in]).  The mean product is kept as stacked
    factors `[p_1 B_1 .. p_m B_m] [A_1; ..; A_m]`, whose SVD needs only two thin QRs and an SVD of (m r)^2
    numbers (never out x in); the best rank-r factors are B' = U sqrt(S), A' = sqrt(S) V'.  It is exact when
    the mean has rank <= r.  Returns the tensors and the share of the squared norm that the cut left out.
    FlexLoRA (Bai et al. 2024, arXiv 2402.11505) does the same with the dense product.
    """
    taken = [(n, dict(tensors)) for n, tensors in weighted]
    total = sum(n for n, _ in taken)
    result: Tensors = {}
    lost = kept = 0.0
    for b_name, a_name in pairs.values():
        left = np.concatenate([n / total * t[b_name].astype(np.float64) for n, t in taken], axis=1)
        right = np.concatenate([t[a_name].astype(np.float64) for _, t in taken], axis=0)
        rank = taken[0][1][a_name].shape[0]
        q_left, r_left = np.linalg.qr(left)
        q_right, r_right = np.linalg.qr(right.T)
        u, s, vt = np.linalg.svd(r_left @ r_right.T)
        root = np.sqrt(s[:rank])
        kept_rank = len(root)  # below `rank` in a layer thinner than that; the rest is zeros
        b = (q_left @ u[:, :kept_rank]) * root
        a = root[:, None] * (vt[:kept_rank] @ q_right.T)
        short = rank - kept_rank
        result[b_name] = np.pad(b, ((0, 0), (0, short))).astype(np.float32)
        result[a_name] = np.pad(a, ((0, short), (0, 0))).astype(np.float32)
        kept += float((s[:rank] ** 2).sum())
        lost += float((s[rank:] ** 2).sum())
    return result, lost / (kept + lost) if kept + lost else 0.0
