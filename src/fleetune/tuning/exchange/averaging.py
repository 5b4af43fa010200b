# SPDX-License-Identifier: Apache-2.0
"""Average the updates of devices into one: FedAvg, and LoRA averaged as products; numpy only.

Replies are taken one at a time, so that memory does not grow with the number of devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np

Tensors = dict[str, np.ndarray]
NOTHING: Final[Mapping[str, np.ndarray]] = MappingProxyType({})


class Mean:
    """sum_k n_k w_k / sum_k n_k, tensor by tensor, float64; (n_k, tensors) are added one at a time."""

    def __init__(self, sums: Mapping[str, np.ndarray] = NOTHING) -> None:
        """`sums` is what the sums begin with, float64."""
        self.total = 0.0  # sum_k n_k
        self._sums: Tensors = {name: s.copy() for name, s in sums.items()}

    def sums(self) -> Tensors:
        """Return sum_k n_k w_k."""
        return dict(self._sums)

    def add(self, n: float, tensors: Mapping[str, np.ndarray]) -> None:
        """Count `tensors` with weight `n`."""
        for name, value in tensors.items():
            if name not in self._sums:
                self._sums[name] = np.zeros(value.shape, np.float64)
            self._sums[name] += n * value.astype(np.float64)
        self.total += n

    def tensors(self) -> Tensors:
        """Return the mean; {} when nothing was added."""
        return {name: s / self.total for name, s in self._sums.items()}


class Combination(Protocol):
    """What tensors are added to one at a time: the `Mean`, or another rule (`robust.py`)."""

    def add(self, n: float, tensors: Mapping[str, np.ndarray]) -> None:
        """Count `tensors` with weight `n`."""
        ...

    def tensors(self) -> Tensors:
        """Return what they combine to, float64; {} when nothing was added."""
        ...


def weighted_mean(
    weighted: Iterable[tuple[float, Mapping[str, np.ndarray]]], combination: Combination | None = None
) -> Tensors:
    """Average by FedAvg (McMahan et al. 2017, Algorithm 1): sum_k n_k w_k / sum_k n_k, tensor by tensor.

    Takes (n_k, tensors) pairs one at a time, sums in float64, gives float32; {} when there are none.  An empty
    `combination` takes the mean's place.
    """
    mean = combination or Mean()
    for n, tensors in weighted:
        mean.add(n, tensors)
    return {name: m.astype(np.float32) for name, m in mean.tensors().items()}


def cut(tensors: Mapping[str, np.ndarray], pairs: Mapping[str, tuple[str, str]], rank: int) -> Tensors:
    """Return an adapter with only the first `rank` directions of every layer; tensors outside `pairs` as they are."""
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
    """Average LoRA by its products: per layer the B', A' nearest to sum_k p_k B_k A_k (exact before the cut).

    The plain average of A and of B is not the average of the products: (mean B)(mean A) != mean(B A).
    `pairs` maps a layer to the names of its (B [out, r], A [r, in]), `start` is the adapter that the devices
    began with.  A device may have a lower rank r_k than `start`: it was sent the first r_k directions (`cut`),
    and the others stay as they were for it,

        G = sum_k p_k (B_k A_k + B[:, r_k:] A[r_k:])        p_k = n_k / sum n

    The mean is kept as stacked factors `[p_1 B_1 .. p_m B_m, B t] [A_1; ..; A_m; A]`, t_i the share of those
    who were not sent direction i, and as the dense product from where that is smaller.  Its SVD needs only two
    thin QRs and an SVD of the stack's size; the best factors are B' = U sqrt(S), A' = sqrt(S) V', exact when G
    has rank <= r.  Directions that G does not need get their row of A back, with zeros in B: they can still learn.

    Tensors outside `pairs` (a head's) are averaged plainly.  Returns the tensors and the share of the squared
    norm that the cut left out.  FlexLoRA (Bai et al. 2024, arXiv 2402.11505) does the same with the dense
    product, and without what low ranks were not sent.
    """
    factors = {name for pair in pairs.values() for name in pair}
    stacks = {pair: _Stack(start[pair[0]], start[pair[1]]) for pair in pairs.values()}
    plain = Mean()
    for n, tensors in weighted:
        plain.add(n, {k: v for k, v in tensors.items() if k not in factors})
        for (b_name, a_name), stack in stacks.items():
            stack.add(n, tensors[b_name], tensors[a_name])
    if not plain.total:
        return {}, 0.0
    result = {name: m.astype(np.float32) for name, m in plain.tensors().items()}
    lost = kept = 0.0
    for (b_name, a_name), stack in stacks.items():
        b, a, s = _best(*stack.factors(), start[a_name])
        result[b_name], result[a_name] = b.astype(np.float32), a.astype(np.float32)
        kept += float((s[: len(a)] ** 2).sum())
        lost += float((s[len(a) :] ** 2).sum())
    return result, lost / (kept + lost) if kept + lost else 0.0


class _Stack:
    """Factors of sum_k n_k (B_k A_k + B[:, r_k:] A[r_k:]) for one layer, never larger than that sum is dense."""

    def __init__(self, b: np.ndarray, a: np.ndarray) -> None:
        self.b, self.a = b.astype(np.float64), a.astype(np.float64)
        self.left, self.right = np.zeros((len(b), 0)), np.zeros((0, a.shape[1]))
        self.total, self.away = 0.0, np.zeros(len(a))  # away[i]: sum of n_k with r_k <= i

    def add(self, n: float, b_k: np.ndarray, a_k: np.ndarray) -> None:
        """Count a device's factors with weight `n`."""
        self.left = np.concatenate([self.left, n * b_k.astype(np.float64)], axis=1)
        self.right = np.concatenate([self.right, a_k.astype(np.float64)])
        self.total += n
        self.away[len(a_k) :] += n
        if len(self.right) > max(self.right.shape[1], len(self.left)):
            self.left, self.right = self.left @ self.right, np.eye(self.right.shape[1])

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (left, right) whose product is the mean."""
        left = np.concatenate([self.left, self.b * self.away], axis=1) / self.total
        right = np.concatenate([self.right, self.a])
        used = np.concatenate([np.ones(self.left.shape[1], bool), self.away > 0])
        return left[:, used], right[used]


def _best(
    left: np.ndarray, right: np.ndarray, spare: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return B', A' of `spare`'s rank, and all singular values of left right; `spare` [r, in] fills idle directions."""
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    used = int((s[: len(spare)] > 1e-12 * s[0]).sum())  # the rest is float64's rounding
    root = np.sqrt(s[:used])
    b, a = np.zeros((len(left), len(spare))), spare.astype(np.float64)
    b[:, :used] = (q_left @ u[:, :used]) * root
    a[:used] = root[:, None] * (vt[:used] @ q_right.T)
    return b, a, s
