"""Fine-tune all weights with two forward passes a step, in the memory of inference (MeZO).

Malladi, Gao, Nichani, Damian, Lee, Chen, Arora: "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023,
arXiv 2305.17333 (Algorithm 1).

    g = (L(w + eps z; B) - L(w - eps z; B)) / (2 eps),   w <- w - eta g z,   z fresh every step

By default a fleet of one: this machine.  With more clients every device walks the same directions on its own data, and the server
takes the mean of their scalars, direction by direction.  Differences from the paper: stored weights are never written
(`seeds/view.py`), so a run in bf16 is bit-equal to a replay of its own ledger; and the directions are those of a pool of K nearly
orthogonal ones, a new pool every K steps.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from fleetune.common.settings import setting
from fleetune.data import Batches
from fleetune.evaluation import objectives
from fleetune.models.net.model import Model
from fleetune.models.shapes import Shape
from fleetune.seeds import slopes
from fleetune.seeds.descent import descend
from fleetune.seeds.ledger import Ledger
from fleetune.tuning.exchange.aggregation import MEAN, Rule, Tensors
from fleetune.tuning.exchange.footprint import Footprint, placeholder_ledger
from fleetune.tuning.exchange.messages import Payload, ReplySpec
from fleetune.tuning.methods import Reply, _zeroth, norm
from fleetune.tuning.methods._zeroth import INT32, UNITS, rounded

KIND = "ledger"
PAPER = "Malladi et al., NeurIPS 2023, arXiv 2305.17333"
SENDS = "one integer a step up; the ledger's sums down"
CLIENTS = 1


class State(NamedTuple):
    """The ledger and the number of steps taken so far."""

    ledger: Ledger
    step: int
    round: int


@dataclass(frozen=True)
class Method(_zeroth.OfLedger):
    """Hyper-parameters with the paper's symbols and defaults (full-parameter setting, Table 15)."""

    replies_by: ClassVar[tuple[str, ...]] = ("step",)

    lr: float = setting(1e-6, "η", "learning rate", found=True)
    eps: float = setting(1e-3, "ε", "size of the perturbation")
    batch_size: int = setting(16, "B", "rows a step")
    tau: int = setting(50, "τ", "steps a round (between two evaluations)")
    decay: int = setting(0, "T", "steps over which the rate falls linearly to 0 (0: constant)")
    K: int = setting(4096, "K", "directions before a new pool is drawn")
    law: str = setting("hashed", "law", "directions: hashed, rademacher or gaussian")
    clip: float = setting(0.0, "C", "cut |g| to this (0: not)")
    objective: str = setting("loss", "L", "loss, accuracy, rouge_l, f1 or package.module:function")

    def __post_init__(self) -> None:
        _zeroth.check_pool(
            self.law, self.K, lr=self.lr, eps=self.eps, tau=self.tau, batch_size=self.batch_size
        )
        if self.clip < 0 or self.decay < 0:
            raise ValueError("clip and decay must be 0 or more")

    def init(self, model: Model, key: int) -> State:
        ledger = self.empty(model, key, rule="linear to 0" if self.decay else "constant")
        return State(ledger, 0, 0)

    def ids(self, step: int) -> np.ndarray:
        """Return the direction ids u64[tau] of the steps from `step` on: (pool, place in the pool)."""
        steps = np.arange(step, step + self.tau, dtype=np.uint64)
        return (steps // np.uint64(self.K) << np.uint64(32)) | steps % np.uint64(self.K)

    def rate(self, step: int) -> float:
        """Return the learning rate at a step, as a share of `lr`."""
        return max(0.0, 1.0 - step / self.decay) if self.decay else 1.0

    def broadcast(self, state: State) -> Payload:
        payload = _zeroth.ledger_payload(state.ledger, self.K, max(0, state.step - 1) // self.K)
        return Payload(payload.arrays, {**payload.scalars, "step": state.step})

    def expects(self, state: State) -> ReplySpec:
        return ReplySpec({"c": ("int32", (self.tau,))})

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Take tau steps along fresh directions; reply with the integers that were stepped by."""
        view, position = self.opened(model, payload)
        first = payload.int("step")
        steps = descend(
            model,
            view,
            position,
            self.ids(first).tolist(),
            batches.steps(self.tau, self.batch_size),
            objectives.get(self.objective),
            eps=self.eps,
            clip=self.clip,
            to_units=lambda step, g: max(-INT32, min(INT32, round(-g * UNITS * self.rate(first + step)))),
        )
        return Payload({"c": steps.coefficients.astype(np.int32)}, {"n": batches.n, "loss": steps.loss})

    def distance(self, state: State, sent: Payload, reply: Reply) -> float:
        return norm([reply.payload.array("c")])

    def begins(self, sent: Payload) -> Tensors:
        return {"c": np.zeros(self.tau)}

    def moved(self, sent: Payload, reply: Reply) -> Tensors:
        return {"c": reply.payload.array("c")}

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        """Take the mean over devices of each step's integer, weighted by rows (or what `rule` makes of them)."""
        sent = Payload()
        combined = rule.combining(self.begins(sent))
        for reply in replies:
            combined.add(float(reply.payload.int("n")), self.moved(sent, reply))
        if not combined.total:
            return state._replace(round=state.round + 1)
        ledger = state.ledger.append(self.ids(state.step), rounded(combined.tensors()["c"]), state.round + 1)
        return State(ledger, state.step + self.tau, state.round + 1)

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        return ""

    def rate_from(self, points: Sequence[slopes.Slopes], clients: int) -> float:
        """Return the rate for batches of all clients together: they walk along the same directions."""
        return slopes.rate(points, self.batch_size * clients)

    def sized(self, steps: int, batch_size: int) -> Self:
        return replace(self, tau=steps, batch_size=batch_size)

    def local_steps(self, rows: int) -> int:
        return self.tau

    def footprint(self, shape: Shape) -> Footprint:
        return Footprint("two-point", state=State(placeholder_ledger(self.K), self.K, 0))
