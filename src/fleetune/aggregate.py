# SPDX-License-Identifier: Apache-2.0
"""How a server makes one update out of many: one function an idea, numpy only.

Replies are taken one at a time, so that memory does not grow with the number of devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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


def cut(tensors: Mapping[str, np.ndarray], pairs: Mapping[str, tuple[str, str]], rank: int) -> Tensors:
    """An adapter with only the first `rank` directions of every layer; tensors outside `pairs` as they are."""
    b_names, a_names = ({pair[i] for pair in pairs.values()} for i in (0, 1))
    return {
        n: np.ascontiguousarray(t[:, :rank] if n in b_names else t[:rank] if n in a_names else t)
        for n, t in tensors.items()
    }


def product_mean(
    weighted: Iterable[tuple[float, Mapping[str, np.ndarray]]],
    pairs: Mapping[str, tuple[str, str]],
    start: Mapping[str, np.ndarray],
) -> tuple[Tensors, float]:
    """LoRA averaged as what it means: per layer the B', A' nearest to sum_k p_k B_k A_k (exact before the cut).

    The plain average of A and of B is not the average of the products: (mean B)(mean A) != mean(B A).
    `pairs` maps a layer to the names of its (B [out, r], A [r, in]), `start` is the adapter that the devices
    began with.  A device may have a lower rank r_k than `start`: it was sent the first r_k directions (`cut`),
    and the others stay as they were for it,

        G = sum_k p_k (B_k A_k + B[:, r_k:] A[r_k:])        p_k = n_k / sum n

    The mean is kept as stacked factors `[p_1 B_1 .. p_m B_m, B t] [A_1; ..; A_m; A]`, t_i the share of those
    who were not sent direction i.  Its SVD needs only two thin QRs and an SVD of the stack's size (never out x
    in); the best factors are B' = U sqrt(S), A' = sqrt(S) V'.  It is exact when G has rank <= r.  Directions
    that G does not need get back the row of A that they had, with zeros in B, so that they can still learn.

    Tensors outside `pairs` (a head's) are averaged plainly.  Returns the tensors and the share of the squared
    norm that the cut left out.  FlexLoRA (Bai et al. 2024, arXiv 2402.11505) does the same with the dense
    product, and without what low ranks were not sent.
    """
    taken = [(n, dict(tensors)) for n, tensors in weighted]
    total = sum(n for n, _ in taken)
    factors = {name for pair in pairs.values() for name in pair}
    result = weighted_mean((n, {k: v for k, v in t.items() if k not in factors}) for n, t in taken)
    lost = kept = 0.0
    for b_name, a_name in pairs.values():
        stack = [(n / total, t[b_name].astype(np.float64), t[a_name].astype(np.float64)) for n, t in taken]
        b, a, s = _best(*_stacked(stack, start[b_name], start[a_name]), start[a_name])
        result[b_name], result[a_name] = b.astype(np.float32), a.astype(np.float32)
        kept += float((s[: len(a)] ** 2).sum())
        lost += float((s[len(a) :] ** 2).sum())
    return result, lost / (kept + lost) if kept + lost else 0.0


def _stacked(
    stack: Sequence[tuple[float, np.ndarray, np.ndarray]], b: np.ndarray, a: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(left, right) whose product is the mean of (p_k, B_k, A_k), with what is left of B A where r_k is lower."""
    left = np.concatenate([p * b_k for p, b_k, _ in stack], axis=1)
    right = np.concatenate([a_k for _, _, a_k in stack], axis=0)
    away = np.array([sum(p for p, _, a_k in stack if i >= len(a_k)) for i in range(len(a))])
    if not away.any():
        return left, right
    return np.concatenate([left, b * away], axis=1), np.concatenate([right, a], axis=0)


def _best(
    left: np.ndarray, right: np.ndarray, spare: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B', A' of `spare`'s rank, and all singular values of left right; `spare` [r, in] fills idle directions."""
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    used = int((s[: len(spare)] > 1e-12 * s[0]).sum())  # the rest is float64's rounding
    root = np.sqrt(s[:used])
    b, a = np.zeros((len(left), len(spare))), spare.astype(np.float64)
    b[:, :used] = (q_left @ u[:, :used]) * root
    a[:used] = root[:, None] * (vt[:used] @ q_right.T)
    return b, a, s
