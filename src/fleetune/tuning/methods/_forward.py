# SPDX-License-Identifier: Apache-2.0
"""Combine slopes along random directions of a module into a forward gradient, and rank directions by an old one.

A forward gradient is (1/n) sum_k g_k v_k, g_k the slope of the loss along the direction v_k.  A direction is an id: its
numbers follow from the run's key, so that whoever has ids and slopes has the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from fleetune.data import Batch
from fleetune.seeds.moved_modules import WeightSlot, layout
from fleetune.seeds.noise import LAWS, POOL, Passes, passes, probe
from fleetune.seeds.spsa import two_point
from fleetune.seeds.view import CHUNK, View
from fleetune.tuning.server_rules import Tensors

INDEPENDENT_LAWS: Final = tuple(sorted(law for law in LAWS if law != POOL))
UNITS: Final = 1 << 20  # a coefficient's grid is lr / 2^20
LIMIT: Final = 1 << 40  # and at most 2^20 in size: whatever a device says, sums are exact


def view_of(tensors: Mapping[str, np.ndarray], key: int, law: str, rate: float, device: str = "cpu") -> View:
    """Return a view of the module's tensors from other points; its grid is the learning rate over 2^20."""
    named = [(n, torch.from_numpy(t.copy()).to(device)) for n, t in tensors.items()]
    return View(named, nn.Module(), run_key=key, law=law, grid=rate / UNITS)


def write_to(parameters: Mapping[str, nn.Parameter], view: View) -> None:
    """Set a module's parameters to what the view shows."""
    with torch.no_grad():
        for name, seen in view.tensors():
            parameters[name].copy_(seen)


def slopes(
    parameters: Mapping[str, nn.Parameter],
    view: View,
    ids: np.ndarray,
    h: float,
    batches: Iterable[Batch],
    loss: Callable[[Batch], float],
) -> tuple[np.ndarray, float]:
    """Return central differences float64[len(ids)], 0 where a loss was not finite, and the mean of the finite losses.

    The mean is infinite, and the reply will be refused, where no loss was finite.
    """
    g, losses = np.zeros(len(ids)), []
    for j, batch in enumerate(batches):

        def seen(batch: Batch = batch) -> float:
            write_to(parameters, view)
            return loss(batch)

        plus, minus = two_point(view, probe(view.law, 1, int(ids[j])), h, seen)
        if math.isfinite(plus) and math.isfinite(minus):
            g[j] = (plus - minus) / (2 * h)
            losses.append((plus + minus) / 2)
    finite = [x for x in losses if math.isfinite(x)]
    return g, float(np.mean(finite)) if finite else math.inf


def descent(law: str, ids: np.ndarray, g: np.ndarray, rows: np.ndarray) -> tuple[Passes, float]:
    """Return -(sum_k rows_k g_k v_k) / (sum_k rows_k) as passes, and the variance 2 sum_k a_k^2 of that mean.

    a_k is the share of direction k in the mean (all its slopes together): g_k / n where rows are equal.
    """
    unique, where = np.unique(ids, return_inverse=True)
    a = np.bincount(where, rows * g) / rows.sum()
    units = np.rint(np.clip(-a * UNITS, -LIMIT, LIMIT)).astype(np.int64)
    return passes(law, 1, unique, units), float(2 * (a @ a))


def moved(tensors: Mapping[str, np.ndarray], view: View, step: Passes) -> tuple[Tensors, Tensors]:
    """Return the tensors after a step, and how far each went down ({} where nothing moved)."""
    view.place(step, fold=False)
    new = {name: t.numpy() for name, t in view.tensors()}
    last = {name: tensors[name] - t for name, t in new.items()}
    return new, last if any(t.any() for t in last.values()) else {}


def cosine(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Return the cosine of two gradients in float64; 0 where one is nothing."""

    def dot(x: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray]) -> float:
        return sum(float(np.vdot(x[n].astype(np.float64), y[n].astype(np.float64))) for n in x)

    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) if a and b else 0.0


def most_alike(
    tensors: Mapping[str, np.ndarray], ids: np.ndarray, keep: int, *, key: int, law: str
) -> tuple[np.ndarray, float]:
    """Return the `keep` directions most like `tensors`, best first, and how far along it they go in the mean."""
    found = _cosines(tensors, ids, key, law)
    best = np.argsort(-found, kind="stable")[:keep]
    return ids[best], float(found[best].mean()) * math.sqrt(sum(t.size for t in tensors.values()))


def _cosines(tensors: Mapping[str, np.ndarray], ids: np.ndarray, key: int, law: str) -> np.ndarray:
    """Return float64[len(ids)], the cosine of each direction with `tensors`, in the memory of one chunk of a direction."""
    slots = layout((n, torch.from_numpy(t)) for n, t in tensors.items())
    size = slots[-1].start + slots[-1].tensor.numel()
    flat, real = torch.zeros(size), torch.zeros(size)
    for slot in slots:
        where = slice(slot.start, slot.start + slot.tensor.numel())
        flat[where], real[where] = slot.tensor.view(-1), 1.0
    zeros = torch.zeros(min(size, CHUNK))

    def nothing(slot: WeightSlot, first: int, last: int) -> Tensor:
        return zeros[: last - first]

    view = View([("all", flat)], nn.Module(), run_key=key, law=law, grid=0.0, read=nothing)
    dots, norms = np.zeros(len(ids)), np.zeros(len(ids))
    for first in range(0, size, CHUNK):
        last = min(first + CHUNK, size)
        for k, id in enumerate(ids.tolist()):
            view.probe(probe(law, 1, id), 1.0)
            v = view.piece(view.slots[0], first, last)
            dots[k] += float(v @ flat[first:last])
            norms[k] += float(v.square() @ real[first:last])
    return dots / np.sqrt(norms * float(flat.double().square().sum()))
