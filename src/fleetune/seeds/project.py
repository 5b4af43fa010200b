# SPDX-License-Identifier: Apache-2.0
"""Project a back-propagated gradient on the K directions of a pool.

A direction of a pool is z_k[i] = D[i] H[place(i), k] (`noise`), so all K slopes of a gradient g are one
fold and one fast Walsh-Hadamard transform of length K:

    s[j] = sum over the i whose place is j of D[i] g[i],    p = H s,    p_k = z_k . g exactly

and (1/K) sum_k p_k z_k is the mean of K two-point estimates on one batch, without their error in eps.  Ferret
(Shu et al., ICML 2025, arXiv 2409.06277) projects first-order updates on seeded directions too; its
directions are independent, so it pays a pass over the weights for each.

A gradient never exists whole: as backward makes a tensor's, it is folded and freed (`Projection`).  The price
is one more copy of the weights (`WeightCopies`): backward needs the moved weights to stay in memory, where a
view computes them anew for each use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from fleetune.data import Batch
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.model import Model
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
    law: str,
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
        where = torch.from_numpy(places(law, K, start + lo, x.numel())).to(x.device)
        part = torch.zeros(K, device=x.device).index_add_(0, where, signs.mul_(x))
        sums += part.cpu().numpy()


class WeightCopies:
    """A context in which a view's net runs on copies of the weights that it sees, with gradients.

    One more copy of the weights, for as long as this object lives; `refresh` moves it to the view's point.
    `padding_idx` is off meanwhile: torch gives that token's embedding no gradient, though in many models it is
    the token that ends a turn as well, on which the loss does depend.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.parameters = {slot.name: nn.Parameter(torch.empty_like(slot.tensor)) for slot in view.slots}

    def refresh(self) -> None:
        """Compute the copies anew at the view's point."""
        for slot in self.view.slots:
            self.view.fill(slot, self.parameters[slot.name].detach().view(-1))

    def __enter__(self) -> Self:
        self._stored = []
        for module, own in self.view.owners:
            names: dict[str, Any] = {n: slot.tensor for n, slot in own.items()}
            self._stored.append((module, module.__dict__.pop("forward"), names))
            module._parameters.update({n: self.parameters[slot.name] for n, slot in own.items()})
        embeddings = [m for m, _ in self.view.owners if isinstance(m, nn.Embedding)]
        self._padding = [(m, m.padding_idx) for m in embeddings]
        for embedding in embeddings:
            embedding.padding_idx = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for module, forward, names in self._stored:
            module._parameters.update(names)
            module.forward = forward
        for embedding, index in self._padding:
            embedding.padding_idx = index


class Projection:
    """Folds the gradients of `copies` as backward makes them, each freed at once; `take` returns the result."""

    def __init__(self, copies: WeightCopies, K: int, epoch: int) -> None:
        self.view, self.epoch = copies.view, epoch
        self.sums = np.zeros(K)
        for slot in self.view.slots:
            parameter = copies.parameters[slot.name]
            parameter.register_post_accumulate_grad_hook(self._hook(slot.start))  # type: ignore[no-untyped-call]

    def _hook(self, start: int) -> Callable[[Tensor], None]:
        view = self.view

        def add(parameter: Tensor) -> None:
            if parameter.grad is not None:
                key, at = view.run_key, self.epoch
                fold(
                    self.sums,
                    parameter.grad,
                    start,
                    key,
                    at,
                    view.kernels,
                    law=view.law,
                    threads=view.threads,
                )
            parameter.grad = None

        return add

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
    copies = WeightCopies(view)
    projection = Projection(copies, K, epoch)
    with copies, torch.enable_grad():
        for batch in batches:
            view.place(passes(view.law, K, ids, np.concatenate([begun, np.rint(moved).astype(np.int64)])))
            copies.refresh()
            loss = loss_tensor(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            p = projection.take()
            if math.isfinite(value := loss.item()) and np.isfinite(p).all():
                losses.append(value)
                moved -= units / K * (np.clip(p, -clip, clip) if clip else p)
    position.place(view)
    return DescentResult(moved, len(losses), float(np.mean(losses)) if losses else math.inf)
