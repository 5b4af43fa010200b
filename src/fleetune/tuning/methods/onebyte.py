"""Fine-tune all weights on machines that share seeds, sending one byte for each direction tried (Just One Byte).

Zelikman, Huang, Liang, Haber, Goodman: "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model
Finetuning Using Shared Randomness", 2023, arXiv 2306.10015 (section 2, and its code).  With `wire=sign`: FeedSign,
arXiv 2501.17610 (Algorithm 1), one bit and a majority vote.

## Algorithm

A round is one step.  Each of N machines measures the slope g along n directions of its own (from the round's key) at the same
point, on its own data, and sends n bytes; then

    w <- w - eta / (n N) * sum over machines c and directions j of g_cj z_cj

With `wire=sign` all machines try the same n directions and send the sign of g (a coin's where g is 0); w moves by eta / n along
each, the way the majority says.  A vote weighs as much as its machine has rows (with `aggregation=sign-vote`, as in
FeedSign, all weigh the same).

## Differences from the paper

- Both sides step by the byte that travels (`messages.LogCode`).  The code computes one and drops it: floats are sent as text.
- The mean over all N n slopes.  The code divides their sum by sqrt(N n), so joining or leaving changes the learning rate.
- A machine has no history: each message holds the ledger's sums, so it joins late and leaves whenever it likes.  In the code a
  late machine loads the weights of a peer, and one that misses messages drifts away from the others.
- `eta` is the code's learning rate times its eps (0.1 and 1e-3), which its update multiplies in.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from fleetune.common.settings import setting
from fleetune.data import Batches, keyed_order
from fleetune.evaluation import objectives
from fleetune.models.net.model import Model
from fleetune.models.shapes import Shape
from fleetune.seeds.descent import slope, uniforms
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.noise import derive, probe
from fleetune.tuning.exchange.aggregation import MEAN, PRIVATE, Rule, Tensors
from fleetune.tuning.exchange.footprint import Footprint, placeholder_ledger
from fleetune.tuning.exchange.messages import LogCode, Payload, ReplySpec
from fleetune.tuning.methods import Reply, _zeroth, norm
from fleetune.tuning.methods._zeroth import UNITS, pool_ids, rounded

KIND = "ledger"
PAPER = "Zelikman et al., 2023, arXiv 2306.10015"
SENDS = "one byte (or one bit) a direction up; the ledger's sums down"

FINER = 16  # ledger units in a unit of a code, so that a mean over many machines is not rounded away


class State(NamedTuple):
    """The ledger and the rounds done."""

    ledger: Ledger
    round: int


@dataclass(frozen=True)
class Method(_zeroth.OfLedger):
    """Hyper-parameters with the defaults of the paper's code."""

    rate_at_server: ClassVar[bool] = True
    replies_by: ClassVar[tuple[str, ...]] = ()

    lr: float = setting(1e-4, "η", "learning rate", found=True)
    eps: float = setting(1e-3, "ε", "size of the perturbation")
    batch_size: int = setting(64, "B", "rows a direction")
    directions: int = setting(30, "n", "directions that a machine tries in a step")
    K: int = setting(4096, "K", "size of the pool; a new one when K have been tried")
    law: str = setting("hashed", "law", "directions: hashed, rademacher or gaussian")
    wire: str = setting("byte", "wire", "byte: a slope as one byte; sign: as one bit, majority vote")
    clip: float = setting(0.0, "C", "cut |g| to this (0: not)")
    objective: str = setting("loss", "L", "loss, accuracy, rouge_l, f1 or package.module:function")

    def __post_init__(self) -> None:
        n = self.directions
        _zeroth.check_pool(self.law, self.K, lr=self.lr, eps=self.eps, tau=1, batch_size=self.batch_size)
        if not 1 <= n <= self.K:
            raise ValueError(f"directions = {n} is not between 1 and the {self.K} of the pool")
        if self.wire not in ("byte", "sign"):
            raise ValueError(f"wire = {self.wire!r} is neither byte nor sign")
        if self.clip < 0:
            raise ValueError(f"clip = {self.clip} must be 0 or more")

    def init(self, model: Model, key: int) -> State:
        how = "mean" if self.wire == "byte" else "majority vote"
        return State(self.empty(model, key, aggregation=f"{how} weighted by rows"), 0)

    @property
    def grid_lr(self) -> float:
        """Return the rate of a slope of 1 in one of the directions."""
        return self.lr / (self.directions * FINER)

    def epoch(self, round: int) -> int:
        """Return the number of the pool that a round draws from."""
        return round * self.directions // self.K

    def draw(self, round: int, run_key: int, own: int) -> np.ndarray:
        """Draw int64[n] different members of the round's pool: a machine's own, or those that all vote on."""
        key = derive(own, "directions") if self.wire == "byte" else derive(run_key, "vote", round)
        return keyed_order(key, 0, self.K)[: self.directions]

    def broadcast(self, state: State) -> Payload:
        payload = _zeroth.ledger_payload(state.ledger, self.K, self.epoch(state.round))
        return Payload(payload.arrays, {**payload.scalars, "round": state.round})

    def expects(self, state: State) -> ReplySpec:
        size = self.directions if self.wire == "byte" else -(-self.directions // 8)
        return ReplySpec({"codes": ("uint8", (size,))})

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Measure n slopes at one point; then step by what is sent, as if this machine were alone."""
        view, position = self.opened(model, payload)
        position.place(view)
        round = payload.int("round")
        ids = pool_ids(self.epoch(round), self.draw(round, payload.int("run_key"), key)).tolist()
        f, slopes, losses = objectives.get(self.objective), np.zeros(self.directions), []
        for j, batch in enumerate(batches.steps(self.directions, self.batch_size)):
            direction = probe(view.law, position.K, ids[j])
            g, loss = slope(model, view, direction, batch, f, eps=self.eps, clip=self.clip)
            if math.isfinite(g):
                slopes[j] = g
                losses.append(loss)
        codes = self.encode(slopes, uniforms(key, "rounding", self.directions))
        for id, c in zip(ids, self.decode(codes).tolist(), strict=True):
            position.move(id, FINER * c)
        position.place(view)
        view.warn_unreached()
        return Payload({"codes": codes}, {"n": batches.n, "loss": float(np.mean(losses or [math.inf]))})

    def encode(self, slopes: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return uint8, what is sent for slopes float64[n]; u[n], uniform in [0, 1), are this machine's coins."""
        if self.wire == "byte":
            return LogCode.encode(-slopes * UNITS, u)
        return np.packbits(np.where(slopes == 0, u < 0.5, slopes < 0))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return int64[n], the steps that codes stand for, a slope of -1 being UNITS."""
        if self.wire == "byte":
            return LogCode.decode(codes)
        return UNITS * (2 * np.unpackbits(codes, count=self.directions).astype(np.int64) - 1)

    def distance(self, state: State, sent: Payload, reply: Reply) -> float:
        return norm([self.decode(reply.payload.array("codes"))])

    def begins(self, sent: Payload) -> Tensors:
        return {"slopes": np.zeros(self.K)}

    def moved(self, sent: Payload, reply: Reply, absent: float = 0.0) -> Tensors:
        """Return the steps along all directions of the pool, `absent` along those that it did not try."""
        slopes = np.full(self.K, absent)
        tried = self.draw(sent.int("round"), sent.int("run_key"), reply.key)
        slopes[tried] = self.decode(reply.payload.array("codes"))
        return {"slopes": slopes}

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        """Take the mean over whoever answered, or their majority, for each direction of the pool."""
        run_key = state.ledger.head.run_key
        sent = Payload({}, {"round": state.round, "run_key": run_key})
        combined = rule.combining(self.begins(sent))
        for reply in replies:
            combined.add(float(reply.payload.int("n")), self.moved(sent, reply, rule.absent))
        if not combined.total:
            return State(state.ledger, state.round + 1)
        mean = combined.tensors()["slopes"]
        voted = np.zeros(self.K)
        voted[self.draw(state.round, run_key, 0)] = UNITS  # in a vote all machines draw the same
        steps = mean if self.wire == "byte" else voted * np.sign(mean)
        ids = pool_ids(self.epoch(state.round), np.arange(self.K))
        return State(state.ledger.append(ids, rounded(FINER * steps), state.round + 1), state.round + 1)

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        if rule.name == PRIVATE:
            return ""
        if self.wire == "byte" and rule.name != "norm-clip":
            return (
                "every machine tries directions of its own, so that no two slopes compare; "
                "use aggregation=norm-clip, or wire=sign, where all try the same"
            )
        if self.wire == "sign" and rule.name != "sign-vote":
            return "wire=sign is a vote; use aggregation=sign-vote, which gives every machine one vote"
        return ""

    def local_steps(self, rows: int) -> int:
        return self.directions

    def sized(self, steps: int, batch_size: int) -> Self:
        pool = max(self.K, 1 << (steps - 1).bit_length())  # holds at least the directions of a step
        return replace(self, directions=steps, batch_size=batch_size, K=pool)

    def footprint(self, shape: Shape) -> Footprint:
        return Footprint("two-point", state=State(placeholder_ledger(self.K), 0))
