# SPDX-License-Identifier: Apache-2.0
"""Fine-tune all weights by zeroth-order descent with every direction stored in memory (ZO-SGD).

Ghadimi, Lan: "Stochastic First- and Zeroth-Order Methods for Nonconvex Stochastic Programming", SIAM J. Optim.
2013, arXiv 1309.5549 (section 3, the RSGF method), with the two-sided estimate of Spall: "Multivariate
Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation", IEEE TAC 1992 (equation 2.2).

## Algorithm

    g = (L(w + eps z; B) - L(w - eps z; B)) / (2 eps),   w <- w - eta g z

The step of MeZO (arXiv 2305.17333, whose section 2 names this the baseline with twice the memory of
inference), and the same numbers bit for bit: but z, one number a weight in the weights' type, is written out
before the step and read from memory by both evaluations.  It is here so that the survey's memory table can be
measured instead of quoted; there is no reason to train with it.

## Differences from the paper

- Stored weights are not written and the step is a ledger entry, as for every zeroth-order method here; so the
  update itself is no pass over z.
- Rademacher directions (Spall's own) by default.

## Options

- `law=gaussian` is Ghadimi and Lan's; in a 16-bit model the z that is stored is rounded to 16 bits, the ledger's is not.
- `objective` is any function of the model and a batch, differentiable or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fleetune.common.settings import setting
from fleetune.data import Batches
from fleetune.models.model import Model
from fleetune.models.shapes import Shape
from fleetune.seeds.slopes import Slopes
from fleetune.tuning.footprint import Footprint
from fleetune.tuning.messages import Payload, ReplySpec
from fleetune.tuning.methods import Reply, mezo
from fleetune.tuning.methods._zeroth import open_view
from fleetune.tuning.robust import MEAN, Rule

KIND = "ledger"
PAPER = "Ghadimi and Lan, SIAM J. Optim. 2013, arXiv 1309.5549"
SENDS = "one integer a step up; the ledger's sums down"
CLIENTS = 1


@dataclass(frozen=True)
class Method:
    """Hyper-parameters, with MeZO's defaults, since the two are compared."""

    lr: float = setting(1e-6, "η", "learning rate", found=True)
    eps: float = setting(1e-3, "ε", "size of the perturbation")
    batch_size: int = setting(16, "B", "rows a step")
    tau: int = setting(50, "τ", "steps a round (between two evaluations)")
    K: int = setting(4096, "K", "directions before a new pool is drawn")
    law: str = setting("hashed", "law", "directions: hashed, rademacher or gaussian")
    clip: float = setting(0.0, "C", "cut |g| to this (0: not)")
    objective: str = setting("loss", "L", "loss, accuracy, rouge_l, f1 or package.module:function")

    def __post_init__(self) -> None:
        self.step()

    def step(self) -> mezo.Method:
        """Return MeZO with these settings: the same step, with z computed where it is used."""
        return mezo.Method(**asdict(self))

    def init(self, model: Model, key: int) -> mezo.State:
        state = self.step().init(model, key)
        head = replace(state.ledger.head, method="zosgd", hyper=asdict(self))
        return state._replace(ledger=replace(state.ledger, head=head))

    def broadcast(self, state: mezo.State) -> Payload:
        return self.step().broadcast(state)

    def expects(self, state: mezo.State) -> ReplySpec:
        return self.step().expects(state)

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Do MeZO's round with every direction stored."""
        view, _ = open_view(model, payload, law=self.law, K=self.K, lr=self.lr)
        with view.storing():
            return self.step().local(model, payload, batches, key, memory)

    def distance(self, state: mezo.State, reply: Reply) -> float:
        return self.step().distance(state, reply)

    def aggregate(self, state: mezo.State, replies: Iterable[Reply], rule: Rule = MEAN) -> mezo.State:
        return self.step().aggregate(state, replies, rule)

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        return self.step().cannot_combine(rule, asked)

    def check_late(self) -> None:
        self.step().check_late()

    def apply(self, model: Model, state: mezo.State) -> None:
        self.step().apply(model, state)

    def rate_from(self, points: Sequence[Slopes], clients: int) -> float:
        return self.step().rate_from(points, clients)

    def sized(self, steps: int, batch_size: int) -> Method:
        return replace(self, tau=steps, batch_size=batch_size)

    def local_steps(self, rows: int) -> int:
        return self.tau

    def footprint(self, shape: Shape) -> Footprint:
        return self.step().footprint(shape)._replace(stores_direction=True)
