"""Fine-tune all weights in a federation, sending one byte a step along K shared random directions (FedKSeed).

Qin, Chen, Qian, Ding, Li, Deng: "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under
18 Kilobytes", ICML 2024, arXiv 2312.06353 (Algorithm 1; Pro: section 3.3).

## Algorithm

A pool of K directions is fixed.  A device takes tau two-point steps along directions drawn from the pool and reports the scalars;
the server averages them per direction.  So the global model is always w = w0 - eta * sum_k A_k z_k.

## Differences from the paper

- The +1/-1 directions of a pool are replayed in one pass over the weights.  `law=rademacher` gives independent ones, `gaussian`
  the paper's: a pass each in every forward.
- The server seeds the sampler by which devices draw, so a step is one byte (`messages.LogCode`, unbiased), and what is decoded is
  what the device itself steps by.
- Where neither `lr` nor `server_lr` is given, the server steps by their mean (the paper) times the root of the clients asked.
- Pro weights a scalar with 1/(K p_k).  The reference does not, so its estimate is biased towards the directions that it favours.

## Mixed fleets

`backprop` is the share of devices that back-propagate (ours): in a simulation every so many-th client, on real devices at most
this share, of those in whose memory it fits.  Such a device reports its gradient projected on the K directions, p_k = z_k . g,
after `backprop_steps` steps a_k <- a_k - eta_b p_k / K, each the mean of K two-point steps and with eta_b cut where it would lose
the model (`seeds/descent.py`), and replies weigh by their precision (`Method.weight`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, Final, NamedTuple, Self

import numpy as np

from fleetune.common.settings import setting
from fleetune.data import Batches
from fleetune.errors import MessageError
from fleetune.evaluation import objectives
from fleetune.models.net.model import Model
from fleetune.models.shapes import Shape
from fleetune.seeds import slopes
from fleetune.seeds.descent import descend, descend_projected, uniforms
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.noise import POOL
from fleetune.tuning.exchange.aggregation import FEWEST, MEAN, PRIVATE, Rule, Tensors
from fleetune.tuning.exchange.footprint import Footprint, placeholder_ledger
from fleetune.tuning.exchange.messages import LogCode, Payload, ReplySpec
from fleetune.tuning.methods import Reply, _zeroth, norm
from fleetune.tuning.methods._zeroth import UNITS, draw, pool_ids, rounded

KIND = "ledger"
PAPER = "Qin et al., ICML 2024, arXiv 2312.06353"
SENDS = "one byte a local step up; K integers down"
PASSES: Final = 4  # over a client's rows in a round, where the number of steps is not given
FEWEST_STEPS: Final = 50
KINDS: Final = ("two-point steps", "back-propagation")
MARK: Final = "backprop"  # a scalar of the message to a client that is to back-propagate


class State(NamedTuple):
    """The ledger and the rounds done."""

    ledger: Ledger
    round: int
    size: np.ndarray  # for Pro: float64[K] sum of |g| seen along each direction,
    seen: np.ndarray  # int64[K] and the number of these slopes


@dataclass(frozen=True)
class Method(_zeroth.OfLedger):
    """Hyper-parameters with the paper's symbols and defaults (README of the reference: Dolly, batch 1)."""

    steps_setting: ClassVar[str] = "tau"
    server_setting: ClassVar[str] = "server_lr"
    replies_by: ClassVar[tuple[str, ...]] = ("size", "seen")

    K: int = setting(
        0, "K", "directions in the pool, a power of two (0: 1024, or 4096 where clients back-propagate)"
    )
    tau: int = setting(200, "τ", "local steps per round (not given: four passes over the rows, 50 to 200)")
    lr: float = setting(3e-7, "η", "learning rate of two-point steps", found=True, only_if="backprop<1")
    eps: float = setting(5e-4, "ε", "size of the perturbation")
    batch_size: int = setting(1, "B", "rows a step")
    law: str = setting("hashed", "law", "directions: hashed, rademacher or gaussian")
    pro: bool = setting(False, "Pro", "draw directions by the size of their scalars")
    clip: float = setting(0.0, "C", "cut |g| to this (0: not)")
    objective: str = setting("loss", "f", "loss, accuracy, rouge_l, f1 or package.module:function")
    backprop: float = setting(0.0, "β", "share of the clients that back-propagate, in whole percent")
    backprop_lr: float = setting(
        5e-3, "η_b", "largest learning rate of a client that back-propagates", only_if="backprop", auto=True
    )
    backprop_steps: int = setting(
        10, "τ_b", "local steps of a client that back-propagates", only_if="backprop"
    )
    server_lr: float = setting(
        0.0,
        "η_s",
        "the server's step, times the mean of the clients (0: 1; with lr found: the root of the clients)",
    )

    def __post_init__(self) -> None:
        if self.K == 0:
            object.__setattr__(self, "K", 4096 if self.backprop else 1024)
        _zeroth.check_pool(
            self.law, self.K, lr=self.lr, eps=self.eps, tau=self.tau, batch_size=self.batch_size
        )
        if self.clip < 0 or not 0 <= self.server_lr < 1e3:
            raise ValueError("clip and server_lr must be 0 or more (and sane)")
        if not 0 <= self.backprop <= 1 or abs(self.share - Fraction(self.backprop)) > 1e-9:
            raise ValueError(f"backprop = {self.backprop} is not a share in whole percent, 0 to 1")
        if not 0 < self.backprop_lr < 1e3 or self.backprop_steps < 1:
            raise ValueError(
                f"backprop_lr = {self.backprop_lr} must be positive (and sane) and "
                f"backprop_steps = {self.backprop_steps} at least 1"
            )
        if self.backprop and (self.law, self.objective, self.pro) != (POOL, "loss", False):
            raise ValueError(
                "backprop projects the gradient of the loss on all directions of a pool: "
                "it needs law=hashed, objective=loss and pro=false"
            )

    def init(self, model: Model, key: int) -> State:
        how = "mean weighted by rows" + (" and precision" if self.backprop else "")
        return State(self.empty(model, key, aggregation=how), 0, np.zeros(self.K), np.zeros(self.K, np.int64))

    def broadcast(self, state: State) -> Payload:
        """Send the sums (and the probabilities, for Pro)."""
        payload, p = _zeroth.ledger_payload(state.ledger, self.K, 0), self.probabilities(state)
        return payload if p is None else Payload({**payload.arrays, "p": p}, payload.scalars)

    def probabilities(self, state: State) -> np.ndarray | None:
        """Return Pro's float32[K]; None is uniform."""
        return pro_probabilities(state.size, state.seen) if self.pro else None

    def expects(self, state: State) -> ReplySpec:
        """Return what client 0 sends; `kinds` has what every kind does."""
        return self.reply_spec(self.kind_of(0))

    @property
    def share(self) -> Fraction:
        """The share of the clients that back-propagate, exactly, in whole percent."""
        return Fraction(round(100 * self.backprop), 100)

    @property
    def kind_names(self) -> Sequence[str]:
        return KINDS if self.backprop else KINDS[:1]

    def kind_of(self, client: int) -> int:
        """Return 1 for a client that back-propagates, where all can: they are spread evenly over the numbers."""
        return math.floor((client + 1) * self.share) - math.floor(client * self.share)

    def kinds(self, state: State) -> list[tuple[Payload, ReplySpec]]:
        """Send the same sums to all; those that are to back-propagate are told so."""
        payload = self.broadcast(state)
        sent = [payload, Payload(payload.arrays, {**payload.scalars, MARK: True})]
        return [(sent[kind], self.reply_spec(kind)) for kind in range(len(self.kind_names))]

    def reply_spec(self, kind: int) -> ReplySpec:
        """Return what the reply of a kind must look like."""
        return ReplySpec({"projected": ("uint8", (self.K,))} if kind else {"codes": ("uint8", (-self.tau,))})

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Take tau two-point steps along drawn directions, or back-propagate where `payload` says so; reply with integers."""
        view, position = self.opened(model, payload)
        if payload.scalars.get(MARK) is True:
            taken = batches.steps(self.backprop_steps, self.batch_size)
            units = UNITS * self.backprop_lr / self.lr
            walked = descend_projected(model, view, position, 0, taken, units=units, clip=self.clip)
            projected = LogCode.encode(walked.moved, uniforms(key, "rounding", self.K))
            for k, c in enumerate(LogCode.decode(projected).tolist()):
                position.move(k, c)
            position.place(view)
            return Payload({"projected": projected}, {"n": batches.n, "loss": walked.loss})
        p = payload.array("p") if self.pro else None
        if p is not None and not (p.shape == (self.K,) and ((p > 0) & (p <= 1)).all()):
            raise MessageError(f"the probabilities are not of {self.K} directions")
        drawn, coins = draw(key, self.tau, self.K, p), uniforms(key, "rounding", self.tau)
        weights = pro_weights(p, self.K)[drawn]
        steps = descend(
            model,
            view,
            position,
            drawn.tolist(),
            batches.steps(self.tau, self.batch_size),
            objectives.get(self.objective),
            eps=self.eps,
            clip=self.clip,
            to_units=lambda j, g: int(
                LogCode.decode(LogCode.encode(np.array([-g * UNITS * weights[j]]), coins[j : j + 1]))[0]
            ),
        )
        # levels: nothing is rounded
        codes = LogCode.encode(steps.coefficients, np.zeros(len(steps.coefficients)))
        return Payload({"codes": codes}, {"n": batches.n, "loss": steps.loss})

    def walk(self, reply: Reply, p: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what a walk's reply stands for: its integers summed along each direction, and its steps (k, c).

        The directions follow from the client's key of the round, so they are never sent.
        """
        c, sums = LogCode.decode(reply.payload.array("codes")), np.zeros(self.K, np.int64)
        k = draw(reply.key, len(c), self.K, p)
        np.add.at(sums, k, c)
        return sums, k, c

    def distance(self, state: State, sent: Payload, reply: Reply) -> float:
        """Return the norm of the K sums in units of the expected one.

        A gradient g makes tau slopes of about |g|, or moves K sums by steps eta_b |g| / sqrt(K): either is |g| here, or less.
        """
        if "projected" in reply.payload.arrays:
            unit = self.backprop_steps * self.backprop_lr / self.lr / math.sqrt(self.K)
            return norm([LogCode.decode(reply.payload.array("projected"))]) / unit
        return norm([self.walk(reply, self.probabilities(state))[0]]) / math.sqrt(self.tau)

    def begins(self, sent: Payload) -> Tensors:
        return {"a": np.zeros(self.K)}

    def moved(self, sent: Payload, reply: Reply) -> Tensors:
        """Return a_k, the integers that a reply moves each direction by (without Pro)."""
        if "projected" in reply.payload.arrays:
            return {"a": LogCode.decode(reply.payload.array("projected"))}
        return {"a": self.walk(reply, None)[0]}

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        """Set A_k <- A_k + eta_s sum_c w_c a_{c,k} / sum_c w_c, rounded once.

        Another `rule` combines a_{c,k} over the clients that have drawn direction k.
        """
        ledger, combined = state.ledger, rule.combining({"a": np.zeros(self.K)})
        size, seen, p = state.size.copy(), state.seen.copy(), self.probabilities(state)
        units = UNITS * pro_weights(p, self.K)  # of a slope of 1 along each direction
        for reply in replies:
            if "projected" in reply.payload.arrays:
                sums = LogCode.decode(reply.payload.array("projected"))
            else:
                sums, k, c = self.walk(reply, p)
                drawn = np.bincount(k, minlength=self.K)
                if self.pro:  # in a checkpoint they tell what clients sent, without noise
                    np.add.at(size, k, np.abs(c / units[k]))
                    seen += drawn
                if rule.name != "mean":  # along directions that were not drawn: what the rule has for none
                    sums = np.where(drawn > 0, sums, rule.absent)
            combined.add(self.weight(reply.payload), {"a": sums})
        if combined.total:
            mean = combined.tensors()["a"] / UNITS  # the paper's: sums of slopes
            step = rounded((self.server_lr or 1.0) * mean * UNITS)
            ledger = ledger.append(pool_ids(0, np.arange(self.K)), step, state.round + 1)
        return State(ledger, state.round + 1, size, seen)

    def weight(self, payload: Payload) -> float:
        """Return what a reply weighs: its rows n; in a mixed fleet n / (1 + (K - 1) / steps) after two-point steps.

        Averaged over the draw of the pool, n two-point samples of a d-dimensional gradient g have variance
        d (1/K + (1 - 1/K) / n) |g|^2, the whole pool d/K |g|^2;
        a reply counts by the inverse.
        """
        n = payload.int("n")
        if not self.backprop or "projected" in payload.arrays:
            return float(n)
        steps = len(payload.array("codes"))
        return n * steps / (steps + self.K - 1) if steps else 0.0

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        if rule.name == PRIVATE and self.pro:
            return "pro draws directions by the sizes of all clients' slopes, which no noise hides; set pro=false"
        if 0 < self.backprop < 1:
            return "a mixed fleet has replies of two precisions, which do not compare; set backprop to 0 or 1"
        met = asked if self.backprop else asked * (1 - (1 - 1 / self.K) ** self.tau)
        if rule.name not in ("norm-clip", PRIVATE) and met < FEWEST:
            return (
                f"a direction of {self.K} is drawn by {met:.1f} of {asked} clients in a round, and {FEWEST} are needed "
                "to compare; lower K or raise tau, or use aggregation=norm-clip"
            )
        return ""

    def for_rows(self, rows: int) -> Self:
        """Return the method with `PASSES` passes over so many rows, at least `FEWEST_STEPS` steps and at most tau."""
        return replace(self, tau=min(self.tau, max(FEWEST_STEPS, PASSES * -(-rows // self.batch_size))))

    def for_clients(self, clients: int) -> Self:
        """Return the method with a server that steps by sqrt(clients) times their mean.

        Clients walk along directions of their own, which hardly meet, so that the mean of C walks is as long as one of them
        over sqrt(C).  A method with clients that back-propagate, whose steps agree, stays.
        """
        if self.backprop:
            return self
        return replace(self, server_lr=round(math.sqrt(clients), 3))

    def rate_from(self, points: Sequence[slopes.Slopes], clients: int) -> float:
        """Return the rate for the mean of clients that walk along directions of their own."""
        return slopes.rate(points, self.batch_size, averaged=clients)

    def sized(self, steps: int, batch_size: int) -> Self:
        walks = min(self.backprop_steps, steps) if self.backprop == 1 else self.backprop_steps
        return replace(self, tau=steps, backprop_steps=walks, batch_size=batch_size)

    def local_steps(self, rows: int) -> int:
        """Return the steps of a client that back-propagates where all do; in a mixed fleet, the most that a client takes."""
        if self.backprop == 1:
            return self.backprop_steps
        return max(self.tau, self.backprop_steps) if self.backprop else self.tau

    def footprint(self, shape: Shape) -> Footprint:
        none = np.zeros(self.K)
        return Footprint("two-point", state=State(placeholder_ledger(self.K), 0, none, none))

    def footprints(self, shape: Shape) -> Sequence[Footprint]:
        works = self.footprint(shape), Footprint("backward", moments=0, projects=True, checkpointing=True)
        return works[: len(self.kind_names)]


def pro_probabilities(size: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return float32[K]: the softmax of the min-max-scaled mean |g| of each direction (see `State`).

    The most favoured direction is at most e times as likely as the least.  Sizes are cut at the 95 % quantile first:
    in the reference one outlier flattens all other ones.
    """
    if not seen.any():
        return np.full(len(size), 1.0 / len(size), np.float32)
    mean = size / np.maximum(seen, 1)
    mean[seen == 0] = np.median(mean[seen > 0])
    mean = np.minimum(mean, np.quantile(mean, 0.95))
    scaled = (mean - mean.min()) / (np.ptp(mean) or 1.0)
    return np.asarray(np.exp(scaled) / np.exp(scaled).sum(), np.float32)


def pro_weights(p: np.ndarray | None, K: int) -> np.ndarray:
    """Return float64[K], 1/(K p_k): keeps the mean step what uniform drawing (p None) would give."""
    return np.ones(K) if p is None else 1.0 / (K * p.astype(np.float64))
