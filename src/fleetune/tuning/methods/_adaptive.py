# SPDX-License-Identifier: Apache-2.0
"""Step on the server with momentum and a control variate of every device (FedPepTAO's adaptive optimization).

Che et al. 2023, arXiv 2310.15080, section 4.2; the variates are SCAFFOLD's (`server_rules.control`).  With
p_k = n_k / sum n, D_k = w - w_k, wbar = sum_k p_k w_k and D = w - wbar, every device's step starts at the same wbar:

    c_k' = c_k - c + D_k / (sum of the steps' eta)       c <- c + rho sum_k (K_k / sum K) (c_k' - c_k)
    v_k  = beta v + (1 - beta) D + (c - c_k')            w <- sum_k p_k (wbar - eta_s v_k)

The last two are linear in k, so their mean is one step with v = beta v + (1 - beta) D + (c - sum_k p_k c_k').
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fleetune.tuning.methods import Reply
from fleetune.tuning.robust import MEAN, Rule
from fleetune.tuning.server_rules import Tensors, control


class LayerControl:
    """The mean of a round's tensors, and the devices' variates before and after it."""

    def __init__(self, w: Tensors, c: Tensors, c_k: Tensors, rule: Rule = MEAN) -> None:
        """`c_k` holds the devices' variates by "device/tensor name"; a new device starts at `c`."""
        self.w, self.c, self.before = w, c, c_k
        self.c_k, self.answered = dict(c_k), 0
        self._w_k, self._variates, self._changes = rule.combining(w), rule.combining(), rule.combining()

    def add(self, reply: Reply, steps: int, walked: float) -> None:
        """Count a device's reply after so many steps; `walked` is the sum of their learning rates."""
        self.answered += 1
        n, arrays = reply.payload.int("n"), reply.payload.arrays
        old = {x: self.before.get(f"{reply.client}/{x}", self.c[x]) for x in self.w}
        new = rounded(control(old, self.c, self.w, arrays, walked))
        self.c_k |= {f"{reply.client}/{x}": value for x, value in new.items()}
        self._w_k.add(n, {x: arrays[x] for x in self.w})
        self._variates.add(n, new)
        self._changes.add(steps, {x: new[x] - old[x].astype(np.float64) for x in new})

    def mean(self) -> Tensors:
        """Return wbar, float64."""
        return self._w_k.tensors()

    def pull(self, rho: float) -> tuple[Tensors, Tensors]:
        """Return the new c, and c - sum_k p_k c_k'; rho 0 is the share of the devices seen so far that answered."""
        rho = rho or min(1.0, self.answered * len(self.w) / len(self.c_k))
        c = {x: self.c[x] + rho * change for x, change in self._changes.tensors().items()}
        mean = self._variates.tensors()
        return c, {x: c[x] - mean[x] for x in self.w}


class Momentum(NamedTuple):
    """The server's momentum and the last pseudo-gradient, float64."""

    v: Tensors
    D: Tensors


def step(
    w: Tensors,
    wbar: Mapping[str, np.ndarray],
    pull: Mapping[str, np.ndarray],
    old: Momentum,
    *,
    beta: float,
    eta_s: float,
    difference: bool,
    first: bool,
) -> tuple[Tensors, Momentum]:
    """Return w and momentum after a step from wbar; `difference` takes D before - D for D, the first step adds none."""
    moved: Tensors = {}
    new = Momentum({}, {})
    for name, before in w.items():
        D = new.D[name] = before - wbar[name]
        g = old.D[name] - D if difference else D
        v = old.v[name] if first else beta * old.v[name] + (1 - beta) * g + pull[name]
        new.v[name] = v
        moved[name] = wbar[name] - eta_s * v
    return rounded(moved), new


def rounded(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Return float32, what travels."""
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
