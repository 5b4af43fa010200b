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
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fleetune import objectives
from fleetune.data import Batches
from fleetune.messages import LogCode, Payload, Spec
from fleetune.methods import Reply
from fleetune.methods._zeroth import (
    INT32,
    UNITS,
    announce,
    arrive,
    check_pool,
    draw,
    new_ledger,
    pool_ids,
    stand,
)
from fleetune.models import Model
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.spsa import descend, uniforms

KIND = "ledger"
PAPER = "Qin et al., ICML 2024, arXiv 2312.06353"
SENDS = "one byte a local step up; K integers down"


class State(NamedTuple):
    """The ledger, the rounds done, and (for Pro) the mean size of the scalars seen on each direction."""

    ledger: Ledger
    round: int
    size: np.ndarray  # float64[K] sum of |g|
    seen: np.ndarray  # int64[K] how many


@dataclass(frozen=True)
class Method:
    """Hyper-parameters with the paper's symbols and defaults (README of the reference: Dolly, batch 1)."""

    K: int = field(
        default=1024,
        metadata={"symbol": "K", "help": "directions in the pool (a power of two for law=pooled)"},
    )
    tau: int = field(default=200, metadata={"symbol": "τ", "help": "local steps a round"})
    lr: float = field(default=3e-7, metadata={"symbol": "η", "help": "learning rate"})
    eps: float = field(default=5e-4, metadata={"symbol": "ε", "help": "size of the perturbation"})
    batch_size: int = field(default=1, metadata={"symbol": "B", "help": "rows a step"})
    law: str = field(
        default="pooled", metadata={"symbol": "law", "help": "directions: pooled, rademacher or gaussian"}
    )
    epoch_rounds: int = field(
        default=0, metadata={"symbol": "E", "help": "renew the pool every so many rounds (0: never)"}
    )
    pro: bool = field(
        default=False, metadata={"symbol": "Pro", "help": "draw directions by the size of their scalars"}
    )
    clip: float = field(default=0.0, metadata={"symbol": "C", "help": "cut |g| to this (0: not)"})
    wire: str = field(
        default="byte",
        metadata={"symbol": "wire", "help": "byte: one byte a step; sums: exact sums, 4 bytes a direction"},
    )
    objective: str = field(
        default="loss",
        metadata={"symbol": "f", "help": "loss, accuracy, rouge_l, f1 or package.module:function"},
    )

    def __post_init__(self) -> None:
        check_pool(self.law, self.K, lr=self.lr, eps=self.eps, tau=self.tau, batch_size=self.batch_size)
        if self.wire not in ("byte", "sums"):
            raise ValueError(f"wire = {self.wire!r} is neither byte nor sums")
        if self.epoch_rounds < 0 or self.clip < 0:
            raise ValueError("epoch_rounds and clip must be 0 or more")

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
            aggregation="mean weighted by rows",
        )
        return State(ledger, 0, np.zeros(self.K), np.zeros(self.K, np.int64))

    def epoch(self, state: State) -> int:
        """The epoch of the pool that the coming round draws from."""
        return state.round // self.epoch_rounds if self.epoch_rounds else 0

    def broadcast(self, state: State) -> Payload:
        """The sums of every epoch so far (and the probabilities, for Pro)."""
        payload = announce(state.ledger, self.K, self.epoch(state))
        arrays = {**payload.arrays, "p": self.probabilities(state)} if self.pro else payload.arrays
        return Payload(arrays, payload.scalars)

    def probabilities(self, state: State) -> np.ndarray:
        """float32[K], Pro: softmax of the min-max-scaled mean |g| of each direction (section 3.3).

        The most favoured is at most e times as likely as the least.  Sizes are cut at the 95 % quantile
        first: in the reference one outlier flattens all the others.
        """
        fresh = self.epoch_rounds and state.round % self.epoch_rounds == 0
        if fresh or not state.seen.any():  # nothing is known of a new pool
            return np.full(self.K, 1.0 / self.K, np.float32)
        mean = state.size / np.maximum(state.seen, 1)
        mean[state.seen == 0] = np.median(mean[state.seen > 0])
        mean = np.minimum(mean, np.quantile(mean, 0.95))
        scaled = (mean - mean.min()) / (np.ptp(mean) or 1.0)
        p: np.ndarray = (np.exp(scaled) / np.exp(scaled).sum()).astype(np.float32)
        return p

    def expects(self, state: State) -> Spec:
        reply = {"codes": ("uint8", (-self.tau,))} if self.wire == "byte" else {"sums": ("int32", (self.K,))}
        return Spec(reply, {"n": (int, 1, 1 << 31), "steps": (int, 0, self.tau), "loss": (float, -1e9, 1e9)})

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """tau steps along drawn directions; what is sent is what was stepped by."""
        view, position = arrive(model, payload)
        p = payload.arrays.get("p")
        picks = draw(key, self.tau, p, self.K)
        rounding = uniforms(key, "rounding", self.tau)
        ids = pool_ids(len(payload.array("a")) - 1, picks)
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
            ids.tolist(),
            batches.steps(self.tau, self.batch_size),
            objectives.get(self.objective),
            eps=self.eps,
            clip=self.clip,
            to_units=to_units,
        )
        scalars = {"n": batches.n, "steps": len(steps.coefficients), "loss": steps.loss}
        if self.wire == "byte":
            return Payload({"codes": codes[: len(steps.coefficients)]}, scalars)
        return Payload({"sums": self.fold(picks, steps.coefficients).astype(np.int32)}, scalars)

    def weight(self, p: np.ndarray | None, k: int) -> float:
        """1/(K p_k): keeps the mean step what uniform drawing would give."""
        return 1.0 if p is None else 1.0 / (self.K * float(p[k]))

    def fold(self, picks: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """int64[K]: a walk's coefficients summed per direction."""
        sums = np.zeros(self.K, np.int64)
        np.add.at(sums, picks[: len(coefficients)], coefficients)
        return sums

    def aggregate(self, state: State, replies: Iterable[Reply]) -> State:
        """A_k <- A_k + sum_c (n_c / n) a_{c,k}, rounded to the grid once."""
        p = self.probabilities(state) if self.pro else None
        total, rows = np.zeros(self.K, np.float64), 0
        fresh = self.epoch_rounds and state.round % self.epoch_rounds == 0
        size, seen = state.size * (not fresh), state.seen * (not fresh)
        unit = np.full(self.K, UNITS) if p is None else UNITS / (self.K * p.astype(np.float64))
        for reply in replies:
            picks = draw(reply.key, self.tau, p, self.K)
            n = reply.payload.int("n")
            if self.wire == "byte":
                c = LogCode.decode(reply.payload.array("codes"))
                sums = self.fold(picks, c)
                np.add.at(size, picks[: len(c)], np.abs(c) / unit[picks[: len(c)]])
                np.add.at(seen, picks[: len(c)], 1)
            else:
                sums = reply.payload.array("sums").astype(np.int64)
                size += np.abs(sums) / unit
                seen += sums != 0
            total += float(n) * sums
            rows += n
        if rows == 0:
            return state._replace(round=state.round + 1)
        mean = np.rint(total / rows).astype(np.int64)
        ledger = state.ledger.append(pool_ids(self.epoch(state), np.arange(self.K)), mean, state.round + 1)
        return State(ledger, state.round + 1, size, seen)

    def apply(self, model: Model, state: State) -> None:
        stand(model, state.ledger)
