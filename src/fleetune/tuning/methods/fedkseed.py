# SPDX-License-Identifier: Apache-2.0
"""FedKSeed: full-parameter federated tuning with K seeds and one scalar a step.

Qin, Chen, Qian, Ding, Li, Deng: "Federated Full-Parameter Tuning of Billion-Sized Language Models with
Communication Cost under 18 Kilobytes", ICML 2024, arXiv 2312.06353 (Algorithm 1; Pro: section 3.3).

A pool of K directions is fixed.  A device takes tau two-point steps along directions drawn from the pool
and reports the scalars; the server averages them per direction.  So the global model is always

    w = w0 - eta * sum_k A_k z_k

whatever the number of rounds, and K numbers carry it.

What differs from the paper's code, and why:
- The K directions are the orthogonal +1/-1 directions of the pooled law (one pass over the weights replays
  them all; the paper's way is K passes).  `law=rademacher` gives independent ones, `gaussian` the paper's.
- Devices draw from the pool with a sampler that the server seeds, so a step is one byte (`wire=byte`) and
  the directions cost nothing; what is decoded is what the device itself steps by.
- Pro weights a scalar with 1/(K p_k).  The reference does not, so its estimate is biased towards the
  directions that it favours.
- `epoch_rounds` renews the pool every so many rounds, so that training is not confined to one
  K-dimensional space.
- `server` lets the server step with momentum or Adam over the K sums (K or 2 K numbers of state).

Mixed fleets (ours): `backprop` is the share of devices that can back-propagate.  Such a device reports its
gradient projected on the K directions, p_k = z_k . g (`seeds/project.py`), after `backprop_steps` steps

    a_k <- a_k - eta_b p_k / K

which is the mean of K two-point steps, one along each direction.  Both kinds of reply are K sums and enter one
ledger, weighted by their precision.  Of a gradient in d dimensions, n two-point samples along directions
drawn from the pool have, over the draw of the pool, the variance d (1/K + (1 - 1/K) / n) |g|^2, the whole
pool (n = infinity) d/K |g|^2.  So with rows n_c, a device that back-propagated weighs n_c, and one that took n
two-point steps n_c / (1 + (K - 1) / n).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from fleetune.common.settings import setting
from fleetune.data import Batches
from fleetune.evaluation import objectives
from fleetune.models.model import Model
from fleetune.seeds import project
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.spsa import Position, descend, uniforms
from fleetune.seeds.view import View
from fleetune.tuning import server_rules
from fleetune.tuning.messages import LogCode, Payload, ReplySpec
from fleetune.tuning.methods import Reply
from fleetune.tuning.methods._zeroth import (
    INT32,
    UNITS,
    check_pool,
    draw,
    ledger_payload,
    new_ledger,
    open_view,
    place_at,
    pool_ids,
    rounded,
)

# The adaptive rules' own learning rate in units of lr: how far a direction's A_k moves a round, at most.
ADAPTIVE_LR = {"adagrad": 0.1, "yogi": 0.1, "adam": 0.1}

KIND = "ledger"
PAPER = "Qin et al., ICML 2024, arXiv 2312.06353"
SENDS = "one byte a local step up; K integers down"


class State(NamedTuple):
    """The ledger, the rounds done, (for Pro) the size of the scalars seen on each direction, the server's moments."""

    ledger: Ledger
    round: int
    size: np.ndarray  # float64[K] sum of |g|
    seen: np.ndarray  # int64[K] how many
    moments: dict[str, np.ndarray]  # the server rule's, float64[K] each


@dataclass(frozen=True)
class Method:
    """Hyper-parameters with the paper's symbols and defaults (README of the reference: Dolly, batch 1)."""

    K: int = setting(1024, "K", "directions in the pool (a power of two for law=pooled)")
    tau: int = setting(200, "τ", "local steps a round")
    lr: float = setting(3e-7, "η", "learning rate")
    eps: float = setting(5e-4, "ε", "size of the perturbation")
    batch_size: int = setting(1, "B", "rows a step")
    law: str = setting("pooled", "law", "directions: pooled, rademacher or gaussian")
    epoch_rounds: int = setting(0, "E", "renew the pool every so many rounds (0: never)")
    pro: bool = setting(False, "Pro", "draw directions by the size of their scalars")
    clip: float = setting(0.0, "C", "cut |g| to this (0: not)")
    wire: str = setting("byte", "wire", "byte: one byte a step; sums: exact sums, 4 bytes a direction")
    objective: str = setting("loss", "f", "loss, accuracy, rouge_l, f1 or package.module:function")
    backprop: float = setting(0.0, "β", "share of the clients that back-propagate, in whole percent")
    backprop_lr: float = setting(3e-4, "η_b", "learning rate of a client that back-propagates")
    backprop_steps: int = setting(10, "τ_b", "local steps of a client that back-propagates")
    server: str = setting("avg", "server", "the server's rule: avg, avgm, adagrad, yogi or adam")
    server_lr: float = setting(0.0, "η_s", "the server rule's learning rate, in units of lr (0: its own)")

    def __post_init__(self) -> None:
        check_pool(self.law, self.K, lr=self.lr, eps=self.eps, tau=self.tau, batch_size=self.batch_size)
        if self.wire not in ("byte", "sums"):
            raise ValueError(f"wire = {self.wire!r} is neither byte nor sums")
        if self.epoch_rounds < 0 or self.clip < 0:
            raise ValueError("epoch_rounds and clip must be 0 or more")
        if not 0 <= self.backprop <= 1 or abs(self.share - Fraction(self.backprop)) > 1e-9:
            raise ValueError(f"backprop = {self.backprop} is not a share in whole percent, 0 to 1")
        if not 0 < self.backprop_lr < 1e3 or self.backprop_steps < 1:
            raise ValueError(
                f"backprop_lr = {self.backprop_lr} must be positive (and sane) "
                f"and backprop_steps = {self.backprop_steps} at least 1"
            )
        if self.backprop and (self.law != "pooled" or self.objective != "loss" or self.pro):
            raise ValueError(
                "backprop projects the gradient of the loss on all directions of a pool: "
                "it needs law=pooled, objective=loss and pro=false"
            )
        server_rules.check(self.server, lr=self.server_lr)

    def init(self, model: Model, key: int) -> State:
        ledger = new_ledger(
            model,
            key,
            law=self.law,
            K=self.K,
            lr=self.lr,
            eps=self.eps,
            method="fedkseed",
            rule="constant",
            hyper=asdict(self),
            aggregation="mean weighted by rows" + (" and precision" if self.backprop else ""),
        )
        return State(ledger, 0, np.zeros(self.K), np.zeros(self.K, np.int64), {})

    def epoch(self, state: State) -> int:
        """The epoch of the pool that the coming round draws from."""
        return state.round // self.epoch_rounds if self.epoch_rounds else 0

    def broadcast(self, state: State) -> Payload:
        """The sums of every epoch so far (and the probabilities, for Pro)."""
        payload = ledger_payload(state.ledger, self.K, self.epoch(state))
        arrays = {**payload.arrays, "p": self.probabilities(state)} if self.pro else payload.arrays
        return Payload(arrays, payload.scalars)

    def probabilities(self, state: State) -> np.ndarray:
        """float32[K], Pro: softmax of the min-max-scaled mean |g| of each direction (section 3.3).

        The most favoured is at most e times as likely as the least.  Sizes are cut at the 95 % quantile
        first: in the reference one outlier flattens all the others.
        """
        if not state.seen.any():  # nothing is known of a new pool
            return np.full(self.K, 1.0 / self.K, np.float32)
        mean = state.size / np.maximum(state.seen, 1)
        mean[state.seen == 0] = np.median(mean[state.seen > 0])
        mean = np.minimum(mean, np.quantile(mean, 0.95))
        scaled = (mean - mean.min()) / (np.ptp(mean) or 1.0)
        p: np.ndarray = (np.exp(scaled) / np.exp(scaled).sum()).astype(np.float32)
        return p

    def expects(self, state: State) -> ReplySpec:
        """What client 0 sends; `kinds` has all of them."""
        return self.form(self.back_propagates(0))

    def form(self, back_propagates: bool) -> ReplySpec:
        """What a reply must look like."""
        scalars = {"n": (int, 1, 1 << 31), "loss": (float, -1e9, 1e9)}
        codes, dtype = self.wire == "byte", "uint8" if self.wire == "byte" else "int32"
        if back_propagates:
            return ReplySpec({"projected": (dtype, (self.K,))}, scalars)
        if codes:
            return ReplySpec({"codes": (dtype, (-self.tau,))}, scalars)
        return ReplySpec({"sums": (dtype, (self.K,))}, {**scalars, "steps": (int, 0, self.tau)})

    def kinds(self, state: State) -> list[tuple[Payload, ReplySpec]]:
        """The same message to all; what comes back depends on what a client can (client c: number c modulo all)."""
        payload = self.broadcast(state)
        return [(payload, self.form(self.back_propagates(c))) for c in range(self.share.denominator)]

    @property
    def share(self) -> Fraction:
        """`backprop` as an exact fraction."""
        return Fraction(round(100 * self.backprop), 100)

    def back_propagates(self, client: int) -> bool:
        """Whether this client is one of those that can: spread evenly over the numbers, so both sides know."""
        return math.floor((client + 1) * self.share) > math.floor(client * self.share)

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """A device's steps, by whichever way it has; what is sent is what was stepped by."""
        view, position = open_view(model, payload)
        epoch = len(payload.array("a")) - 1
        if self.back_propagates(batches.client):
            return self.project(model, view, position, epoch, batches, key)
        p = payload.arrays.get("p")
        picks = draw(key, self.tau, p, self.K)
        rounding = uniforms(key, "rounding", self.tau)
        codes = np.zeros(self.tau, np.uint8)
        top = INT32 // self.tau  # so that a sum of all steps fits its 32 bits

        def to_units(step: int, g: float) -> int:
            units = -g * UNITS * self.weight(p, picks[step])
            if self.wire == "sums":
                return max(-top, min(top, round(units)))
            codes[step : step + 1] = LogCode.encode(np.array([units]), rounding[step : step + 1])
            return int(LogCode.decode(codes[step : step + 1])[0])

        steps = descend(
            model,
            view,
            position,
            pool_ids(epoch, picks).tolist(),
            batches.steps(self.tau, self.batch_size),
            objectives.get(self.objective),
            eps=self.eps,
            clip=self.clip,
            to_units=to_units,
        )
        scalars = {"n": batches.n, "loss": steps.loss}
        taken = len(steps.coefficients)
        if self.wire == "byte":
            return Payload({"codes": codes[:taken]}, scalars)
        sums = self.fold(picks, steps.coefficients).astype(np.int32)
        return Payload({"sums": sums}, {**scalars, "steps": taken})

    def project(
        self, model: Model, view: View, position: Position, epoch: int, batches: Batches, key: int
    ) -> Payload:
        """The round of a device that back-propagates: steps in the space of the pool, as K integers."""
        walk = project.descend(
            model,
            view,
            position,
            epoch,
            batches.steps(self.backprop_steps, self.batch_size),
            units=UNITS * self.backprop_lr / self.lr,
            clip=self.clip,
        )
        if self.wire == "byte":
            reply = LogCode.encode(walk.moved, uniforms(key, "rounding", self.K))
        else:
            reply = np.clip(np.rint(walk.moved), -INT32, INT32).astype(np.int32)
        for id, c in zip(pool_ids(epoch, np.arange(self.K)), self.decoded(reply), strict=True):
            position.move(int(id), int(c))
        position.place(view)
        return Payload({"projected": reply}, {"n": batches.n, "loss": walk.loss})

    def weight(self, p: np.ndarray | None, k: int) -> float:
        """1/(K p_k): keeps the mean step what uniform drawing would give."""
        return 1.0 if p is None else 1.0 / (self.K * float(p[k]))

    def decoded(self, reply: np.ndarray) -> np.ndarray:
        """int64: the integers that a reply's array stands for."""
        return LogCode.decode(reply) if self.wire == "byte" else reply.astype(np.int64)

    def fold(self, picks: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """int64[K]: a walk's coefficients summed per direction."""
        sums = np.zeros(self.K, np.int64)
        np.add.at(sums, picks[: len(coefficients)], coefficients)
        return sums

    def precision(self, payload: Payload) -> float:
        """What a reply weighs: its rows, and in a mixed fleet its precision (see the module's text)."""
        n = payload.int("n")
        if not self.backprop or "projected" in payload.arrays:
            return float(n)
        steps = len(payload.array("codes")) if self.wire == "byte" else payload.int("steps")
        return n * steps / (steps + self.K - 1)

    def aggregate(self, state: State, replies: Iterable[Reply]) -> State:
        """A_k <- A_k + sum_c w_c a_{c,k} / sum_c w_c (or the server rule's step along it), rounded once."""
        p = self.probabilities(state) if self.pro else None
        total, weight = np.zeros(self.K, np.float64), 0.0
        size, seen = state.size.copy(), state.seen.copy()
        unit = np.full(self.K, UNITS) if p is None else UNITS / (self.K * p.astype(np.float64))
        for reply in replies:
            w = self.precision(reply.payload)
            ((name, array),) = reply.payload.arrays.items()
            sums = c = self.decoded(array)
            if name == "codes":
                picks = draw(reply.key, len(c), p, self.K)
                sums = self.fold(picks, c)
                np.add.at(size, picks, np.abs(c) / unit[picks])
                np.add.at(seen, picks, 1)
            elif name == "sums":
                size += np.abs(sums) / unit
                seen += sums != 0
            total += w * sums
            weight += w
        ledger, moments = state.ledger, state.moments
        if weight:
            step, moments = self.server_step(total / weight, moments)
            ids = pool_ids(self.epoch(state), np.arange(self.K))
            ledger = ledger.append(ids, step, state.round + 1)
        after = state.round + 1
        if self.epoch_rounds and after % self.epoch_rounds == 0:  # the next round draws from a new pool
            size, seen, moments = np.zeros_like(size), np.zeros_like(seen), {}
        return State(ledger, after, size, seen, moments)

    def server_step(
        self, mean: np.ndarray, moments: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """int64[K] and the new moments: the server rule on the mean reply, both in units of lr (1 = 256 of ours).

        In these units the numbers are the paper's A_k, sums of slopes, of the order of 1 whatever lr is.
        """
        lr = self.server_lr or ADAPTIVE_LR.get(self.server, 0.0)
        zero = {"a": np.zeros(self.K)}
        step, kept = server_rules.step(self.server, zero, {"a": mean / UNITS}, moments, lr=lr)
        return rounded(step["a"] * UNITS), kept

    def apply(self, model: Model, state: State) -> None:
        place_at(model, state.ledger)
