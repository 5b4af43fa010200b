# SPDX-License-Identifier: Apache-2.0
"""Project a back-propagated gradient on the K directions of a pool.

A direction of a pool is z_k[i] = D[i] H[place(i), k] (`noise`), so all K slopes of a gradient g are one
fold and one fast Walsh-Hadamard transform of length K:

    s[j] = sum over the i whose place is j of D[i] g[i],    p = H s,    p_k = z_k . g exactly

and (1/K) sum_k p_k z_k is the mean of K two-point estimates on one batch, without their error in eps.  Ferret
(Shu et al., ICML 2025, arXiv 2409.06277) projects first-order updates on seeded directions too; its
directions are independent, so it pays a pass over the weights for each.

Neither the weights nor a gradient ever exist whole: backward makes both a row block at a time (`Tape`), and the gradient is
folded at once (`Projection`).  The activations are those of one layer (`models/checkpointing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fleetune.data import Batch
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.net.layers import by_layer
from fleetune.models.net.model import Model
from fleetune.seeds.moved_modules import Tape
from fleetune.seeds.noise import EMPTY, fwht, passes, places
from fleetune.seeds.spsa import Position
from fleetune.seeds.view import CHUNK, View

ONE = np.ones(1, np.float32)


def fold(
    sums: np.ndarray,
    g: Tensor,
    start: int,
    run_key: int,
    epoch: int,
    kernels: ModuleType,
    *,
    threads: int | None = None,
) -> None:
    """Add the fold of a gradient: sums[j] += sum over place(i) = j of D[i] g[i], D the signs of `epoch`, K = len(sums).

    sums: float64 [K]; g: a gradient of any shape and float type, row-major; start: the global index of its
    first element.  Sums within a chunk are float32, of chunks float64.
    """
    flat, K = g.detach().reshape(-1), len(sums)
    for lo in range(0, flat.numel(), CHUNK):
        x = flat[lo : lo + CHUNK].float()
        signs = torch.zeros_like(x)
        kernels.sweep(signs, signs, start + lo, run_key, EMPTY, 1.0, (epoch, ONE), threads=threads)
        where = torch.from_numpy(places(K, start + lo, x.numel())).to(x.device)
        part = torch.zeros(K, device=x.device).index_add_(0, where, signs.mul_(x))
        sums += part.cpu().numpy()


class Projection:
    """Folds gradients as backward makes them (the `sink` of a tape); `take` returns the slopes along the pool."""

    def __init__(self, view: View, K: int, epoch: int) -> None:
        self.view, self.epoch = view, epoch
        self.sums = np.zeros(K)

    def add(self, start: int, gradient: Tensor) -> None:
        """Fold the gradient of elements from `start` on."""
        view = self.view
        fold(self.sums, gradient, start, view.run_key, self.epoch, view.kernels, threads=view.threads)

    def take(self) -> np.ndarray:
        """Return p float64 [K], p_k = z_k . g of all gradients since the last call."""
        p = fwht(self.sums)
        self.sums[:] = 0.0
        return p


class DescentResult(NamedTuple):
    """The outcome of a device's back-propagation: how far along each direction, and the mean loss of its steps."""

    moved: np.ndarray  # float64 [K], in units of the grid
    steps: int
    loss: float


def descend(
    model: Model,
    view: View,
    position: Position,
    epoch: int,
    batches: Iterable[Batch],
    *,
    units: float,
    clip: float,
) -> DescentResult:
    """Descend in the K-dimensional space of a pool: a_k <- a_k - units p_k / K for every batch.

    `units` is the learning rate over the grid; |p_k| is cut to `clip` (0: not).  A step is taken in floats and
    seen rounded to the grid; a batch without a finite gradient is skipped.  The view ends where it began: the
    caller rounds `moved` once and places it there.
    """
    K = position.K
    moved, losses = np.zeros(K), []
    pool = (np.uint64(epoch) << np.uint64(32)) | np.arange(K, dtype=np.uint64)
    ids = np.concatenate([np.array(position.ids, np.uint64), pool])
    begun = np.array(position.coefficients, np.int64)
    projection = Projection(view, K, epoch)
    with Tape(view, projection.add), by_layer(model.net), torch.enable_grad():
        for batch in batches:
            view.place(passes(view.law, K, ids, np.concatenate([begun, np.rint(moved).astype(np.int64)])))
            loss = loss_tensor(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            p = projection.take()
            if math.isfinite(value := loss.item()) and np.isfinite(p).all():
                losses.append(value)
                moved -= units / K * (np.clip(p, -clip, clip) if clip else p)
    position.place(view)
    return DescentResult(moved, len(losses), float(np.mean(losses)) if losses else math.inf)
