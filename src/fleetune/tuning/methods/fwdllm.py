# SPDX-License-Identifier: Apache-2.0
"""FwdLLM: forward gradients of an adapter; devices run inference only and send one number a direction.

Xu, Cai, Wu, Li, Wang: "FwdLLM: Efficient Federated Finetuning of Large Language Models with Perturbed
Inferences", USENIX ATC 2024, arXiv 2308.13894 (section 3: forward gradients on PEFT modules, variance-controlled
perturbation pacing, discriminative perturbation sampling).

A device evaluates its batch on both sides of its point along random directions v ~ N(0, I),

    g = (L(w + h v; B) - L(w - h v; B)) / (2 h)          w: the adapter alone

and the server makes the forward gradient of all of them, (1/n) sum_k g_k v_k, whose mean is the gradient.

Pacing.  The server keeps w and asks for more directions on the same batches until the variance of what it
has is at most a threshold.  The code splits the g_k v_k of one tensor into two halves and takes the unbiased
variance of the two half means, averaged over elements.  Its expectation is 2 s^2 / n with s^2 the variance of
an element of g v, and s^2 = E[g^2] for such v (less the square of an element of the gradient: one part in
d).  So `2 sum g^2 / n^2 <= threshold` is the same test, less noisy, of the whole adapter, from scalars alone.

Discriminative sampling.  On every second batch the server draws ten times as many seeds as it needs, ranks
them by the cosine of their v with the last accepted gradient, and sends the best tenth.  The component a of such
a v along the unit vector u of the old gradient is then a normal cut off below at 1.28 (mean 1.755, E[a^2] =
3.25), and all else is as before.  So the estimate is biased: its mean is grad + (E[a^2] - 1) <grad, u> u.  What
the gradient has in common with the old one counts 3.25 times, which works like momentum.

What differs from the paper's code, and why:
- A direction is a seed, so a reply is 4 bytes a direction; the code sends the dense gradient, and has no seeds.
- Rows weigh (a scalar counts n_c); the code says that it weighs and does not.
- Seeds are ranked as whole directions; the code ranks each tensor's part apart, and above 1000 candidates keeps
  the wrong ones (it returns its last chunk).
- Devices draw from the list that was sent, four times as long as what they use, so that few draw the same one.
  Where two do, the direction's share of the mean is that of both, and the variance counts it as one.
- The variance test ends after `patience` rounds on a batch; in the code it may ask for ever.
- No half precision in the two inferences beyond the model's own: their difference is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fleetune import adapters
from fleetune.common.settings import setting
from fleetune.data import Batches, keyed_order
from fleetune.evaluation import objectives
from fleetune.models.model import Model
from fleetune.seeds.noise import Passes, derive, passes, probe
from fleetune.seeds.slots import WeightSlot, layout
from fleetune.seeds.spsa import two_point
from fleetune.seeds.view import CHUNK, View
from fleetune.tuning.messages import Payload, ReplySpec
from fleetune.tuning.methods import Reply

KIND = "adapter"
PAPER = "Xu et al., USENIX ATC 2024, arXiv 2308.13894"
SENDS = "the adapter down; one number a direction up"
CLIENTS = 100

LAWS = ("gaussian", "rademacher")
UNITS = 1 << 20  # a coefficient's grid is lr / 2^20
LIMIT = 1 << 40  # and at most 2^20 in size: whatever a device says, sums are exact
SPARE = 4  # seeds sent for each that is used


class State(NamedTuple):
    """The adapter, and what is known of its gradient so far: scalars of the batch in hand, and the last step."""

    tensors: dict[str, np.ndarray]  # float32, by parameter name
    last: dict[str, np.ndarray]  # lr times the last accepted gradient (empty before the first)
    seeds: np.ndarray  # uint64, the ranked directions that the coming round draws from (none: each its own)
    ids: np.ndarray  # uint64[m] the directions asked on this batch so far,
    g: np.ndarray  # float64[m] their scalars,
    rows: np.ndarray  # float64[m] and the rows of the device that each is from
    batch: int  # the batch in hand
    asked: int  # rounds on it so far
    round: int
    seed: int
    n: int  # of the last round: directions on its batch, their variance, and whether the server moved,
    variance: float
    moved: int
    along: float  # how far along the last gradient its directions went, in the mean (not ranked: about 0),
    cosine: float  # and where it moved, the cosine of the gradient accepted with the one before (else 0)
    offer: float  # `along` of the coming round


@dataclass(frozen=True)
class Method:
    """Hyper-parameters with the paper's symbols and the defaults of its code (DistilBERT, AG News)."""

    module: str = setting("lora", "module", "what is trained: lora, adapter or bitfit")
    r: int = setting(8, "r", "lora: rank; adapter: numbers between its two layers")
    alpha: int = setting(16, "α", "lora: the update is (alpha / r) B A")
    targets: str = setting("query-value", "W", "lora: query-value, all-linear, or the layers' names")
    P: int = setting(1, "P", "directions a device tries in a round")
    h: float = setting(0.01, "h", "size of the perturbation")
    lr: float = setting(0.01, "η", "learning rate of the server's SGD")
    decay: int = setting(3000, "T", "rounds over which the rate falls linearly to 0 (0: stays)")
    batch_size: int = setting(8, "B", "rows a device evaluates")
    variance_gate: bool = setting(True, "gate", "ask for more directions until they agree")
    threshold: float = setting(0.1, "σ²", "variance at which the server moves")
    patience: int = setting(10, "R", "rounds on one batch after which it moves anyway")
    discriminative: bool = setting(True, "rank", "every second batch, directions like the last gradient")
    candidates: int = setting(10, "c", "directions ranked for each that is sent")
    clip: float = setting(0.0, "C", "cut |g| to this (0: not)")
    law: str = setting("gaussian", "law", "gaussian or rademacher")
    objective: str = setting("loss", "f", "loss, accuracy, rouge_l, f1 or package.module:function")

    def __post_init__(self) -> None:
        whole = {n: getattr(self, n) for n in ("r", "alpha", "P", "batch_size", "patience", "candidates")}
        if low := [f"{name} = {value}" for name, value in whole.items() if value < 1]:
            raise ValueError(f"{', '.join(low)} must be at least 1")
        if not (0 < self.h < 1e3 and 0 < self.lr < 1e3 and self.threshold > 0):
            raise ValueError("h, lr and threshold must be positive (and sane)")
        if self.decay < 0 or self.clip < 0:
            raise ValueError("decay and clip must be 0 or more")
        if self.module == "bitfit" and (self.r, self.alpha) != (8, 16):
            raise ValueError("r and alpha are sizes of an adapter; bitfit has none")
        if self.module != "lora" and self.targets != "query-value":
            raise ValueError(f"targets = {self.targets!r} are layers for LoRA; it needs module=lora")
        for name, choices in (("law", LAWS), ("module", tuple(MODULES))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r} is none of {', '.join(choices)}")

    def init(self, model: Model, key: int) -> State:
        seed = key >> 1  # fits a signed 64-bit scalar
        self.attach(model, seed)
        none = np.zeros(0)
        ids = np.zeros(0, np.uint64)
        return State(
            adapters.export(model), {}, ids, ids, none, none, 0, 0, 0, seed, 0, 0.0, 0, 0.0, 0.0, 0.0
        )

    def attach(self, model: Model, seed: int) -> None:
        """Give `model` its adapter, unless it has it; every device derives the same start from the seed."""
        if model.attachment is None:
            adapters.attach(model, MODULES[self.module](self), seed=seed)

    def rate(self, round: int) -> float:
        """The learning rate after so many rounds."""
        return self.lr * (max(0.0, 1.0 - round / self.decay) if self.decay else 1.0)

    def broadcast(self, state: State) -> Payload:
        arrays = state.tensors | ({"seeds": state.seeds} if len(state.seeds) else {})
        return Payload(arrays, {"seed": state.seed, "batch": state.batch, "rate": self.rate(state.round)})

    def expects(self, state: State) -> ReplySpec:
        return ReplySpec({"g": ("float32", (self.P,))}, {"n": (int, 1, 1 << 31), "loss": (float, -1e9, 1e9)})

    def directions(self, seeds: np.ndarray | None, key: int) -> np.ndarray:
        """uint64[P]: a device's directions of a round, drawn with its key; the server draws them again."""
        if seeds is None or not len(seeds):
            return np.array([derive(key, "direction", j) for j in range(self.P)], np.uint64)
        return seeds[keyed_order(derive(key, "pick"), 0, len(seeds))[: self.P]]

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """P central differences on one batch; afterwards the adapter is where these alone would lead."""
        seed = payload.int("seed")
        self.attach(model, seed)
        parameters = adapters.trainable(model)
        tensors = {n: payload.array(n) for n in parameters}
        view = self.view(tensors, seed, payload.float("rate"), model.device)
        measure = objectives.get(self.objective)
        ids = self.directions(payload.arrays.get("seeds"), key)
        g, losses = np.zeros(self.P, np.float32), np.full(self.P, np.inf)
        held = batches.repeat_batch(payload.int("batch"), self.batch_size, self.P)
        for j, batch in enumerate(held):

            def seen(batch: Any = batch) -> float:
                stand(parameters, view)
                return measure(model, batch)

            plus, minus = two_point(view, probe(self.law, 1, int(ids[j])), self.h, seen)
            if math.isfinite(plus) and math.isfinite(minus):  # else no step; with none at all it is refused
                g[j], losses[j] = self.cut((plus - minus) / (2 * self.h)), (plus + minus) / 2
        view.place(self.step(ids, g.astype(np.float64), np.full(self.P, float(batches.n)))[0])
        stand(parameters, view)
        return Payload({"g": g}, {"n": batches.n, "loss": mean_loss(losses)})

    def cut(self, g: Any) -> Any:
        """A scalar or array of slopes with |g| at most `clip`."""
        return np.clip(g, -self.clip, self.clip) if self.clip else g

    def view(self, tensors: Mapping[str, np.ndarray], seed: int, rate: float, device: str = "cpu") -> View:
        """The adapter's tensors, to be seen from other points."""
        named = [(n, torch.from_numpy(t.copy()).to(device)) for n, t in tensors.items()]
        return View(named, nn.Module(), run_key=run_key(seed), law=self.law, grid=rate / UNITS)

    def step(self, ids: np.ndarray, g: np.ndarray, rows: np.ndarray) -> tuple[Passes, float]:
        """-(sum_k rows_k g_k v_k) / (sum_k rows_k) as passes, and the variance 2 sum_k a_k^2 of that mean.

        a_k is the share of direction k in the mean (all its scalars together): g_k / n where rows are equal.
        """
        unique, where = np.unique(ids, return_inverse=True)
        a = np.bincount(where, rows * g) / rows.sum()
        units = np.rint(np.clip(-a * UNITS, -LIMIT, LIMIT)).astype(np.int64)
        return passes(self.law, 1, unique, units), float(2 * (a @ a))

    def aggregate(self, state: State, replies: Iterable[Reply]) -> State:
        """Move along all directions asked on this batch, or keep the adapter and ask for more."""
        ids, g, rows = [state.ids], [state.g], [state.rows]
        for reply in replies:
            ids.append(self.directions(state.seeds, reply.key))
            g.append(self.cut(reply.payload.array("g").astype(np.float64)))
            rows.append(np.full(self.P, float(reply.payload.int("n"))))
        if len(ids) == 1:
            return state._replace(round=state.round + 1, moved=0, cosine=0.0)
        fresh = sum(map(len, ids[1:]))
        state = state._replace(
            ids=np.concatenate(ids),
            g=np.concatenate(g),
            rows=np.concatenate(rows),
            along=state.offer,
            cosine=0.0,
        )
        total, variance = self.step(state.ids, state.g, state.rows)
        state = state._replace(n=len(np.unique(state.ids)), variance=variance, asked=state.asked + 1, moved=0)
        if not self.variance_gate or variance <= self.threshold or state.asked >= self.patience:
            state = self.move(state, total)
        ranked = self.discriminative and state.batch % 2 and state.last
        seeds, offer = self.rank(state, fresh) if ranked else (NONE, 0.0)
        return state._replace(seeds=seeds, offer=offer, round=state.round + 1)

    def move(self, state: State, total: Passes) -> State:
        """The state after a step of SGD, on to the next batch."""
        view = self.view(state.tensors, state.seed, self.rate(state.round))
        view.place(total, fold=False)
        tensors = {name: t.numpy() for name, t in view.tensors()}
        last = {name: state.tensors[name] - t for name, t in tensors.items()}
        if not any(t.any() for t in last.values()):
            last = {}
        none = np.zeros(0)
        return state._replace(
            tensors=tensors, last=last, ids=NONE, g=none, rows=none, batch=state.batch + 1, asked=0, moved=1,
            cosine=cosine(last, state.last),
        )  # fmt: skip

    def rank(self, state: State, used: int) -> tuple[np.ndarray, float]:
        """Of fresh candidates the share 1 / `candidates` that is most like the last gradient: uint64, best first.

        And how far along it they go in the mean.
        """
        keep = SPARE * used
        first = np.uint64((state.round + 1) << 32)
        ids = first + np.arange(keep * self.candidates, dtype=np.uint64)
        found = cosines(state.last, ids, run_key(state.seed), self.law)
        best = np.argsort(-found, kind="stable")[:keep]
        return ids[best], float(found[best].mean()) * math.sqrt(sum(t.size for t in state.last.values()))

    def apply(self, model: Model, state: State) -> None:
        self.attach(model, state.seed)
        adapters.load_(model, state.tensors)

    def report(self, state: State) -> dict[str, float]:
        """What the gate and the ranking did in the round: see `State`."""
        names = ("n", "variance", "moved", "batch", "along", "cosine")
        return {name: float(getattr(state, name)) for name in names}


MODULES: Final[Mapping[str, Callable[[Method], adapters.AdapterSpec]]] = MappingProxyType(
    {
        "lora": lambda method: adapters.Lora(method.r, method.alpha, targets=method.targets),
        "adapter": lambda method: adapters.Bottleneck(method.r),
        "bitfit": lambda method: adapters.Bitfit(),
    }
)
NONE = np.zeros(0, np.uint64)


def run_key(seed: int) -> int:
    """The key of the directions of a run."""
    return derive(seed, "fwdllm")


def stand(parameters: Mapping[str, nn.Parameter], view: View) -> None:
    """Set the adapter to what the view shows."""
    with torch.no_grad():
        for name, seen in view.tensors():
            parameters[name].copy_(seen)


def mean_loss(losses: np.ndarray) -> float:
    """The mean of those that are finite; infinite, which the door refuses, where none is."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if len(finite) else math.inf


def cosine(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """The cosine of two gradients in float64; 0 where one is nothing."""

    def dot(x: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray]) -> float:
        return sum(float(np.vdot(x[n].astype(np.float64), y[n].astype(np.float64))) for n in x)

    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) if a and b else 0.0


def cosines(tensors: Mapping[str, np.ndarray], ids: np.ndarray, key: int, law: str) -> np.ndarray:
    """float64[len(ids)]: the cosine of each direction with `tensors`, in the memory of one chunk of a direction."""
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
