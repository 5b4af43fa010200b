"""Tune an adapter in a federation by forward gradients: devices run inference only (FwdLLM).

Xu, Cai, Wu, Li, Wang: "FwdLLM: Efficient Federated Finetuning of Large Language Models with Perturbed Inferences",
USENIX ATC 2024, arXiv 2308.13894 (section 3).

## Algorithm

A device evaluates its batch on both sides of its point w (the adapter alone) along random directions v ~ N(0, I); the server
makes the forward gradient of all of them, whose mean is the gradient:

    g = (L(w + h v; B) - L(w - h v; B)) / (2 h)          (1/n) sum_k g_k v_k

Pacing.  The server keeps w and asks for more directions on the same batches until the variance of what it has is at most a
threshold (the code: that of the means of two halves of the g_k v_k; here `2 sum g^2 / n^2`, see `descent`).

Discriminative sampling.  On every second batch the server draws ten times as many seeds as it needs, ranks them by the cosine of
their v with the last accepted gradient, and sends the best tenth, which works like momentum (`rank`).

## Differences from the paper

- A direction is a seed, so a reply is 4 bytes a direction; the code sends the dense gradient, and has no seeds.
- Rows weigh (a scalar counts n_c); the code says that it weighs and does not.
- Seeds are ranked as whole directions; the code ranks each tensor's part apart, and above 1000 returns its last chunk alone.
- Devices draw from the list that was sent, four times as long as what they use, so that few draw the same one.  Where two do, the
  direction's share of the mean is that of both, and the variance counts it as one.
- The variance test ends after `patience` rounds on a batch; in the code it may ask for ever.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Final, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from fleetune import adapters
from fleetune.common.settings import setting
from fleetune.data import Batch, Batches, keyed_order
from fleetune.errors import MessageError
from fleetune.evaluation import objectives
from fleetune.models.net.model import Model
from fleetune.models.shapes import Shape
from fleetune.seeds.descent import two_point
from fleetune.seeds.noise import EMPTY, Passes, derive, passes, probe
from fleetune.seeds.view import View
from fleetune.seeds.weights import CHUNK, kernels, layout
from fleetune.tuning import methods
from fleetune.tuning.exchange.aggregation import MEAN, PRIVATE, Rule, Tensors, clipped, size_of
from fleetune.tuning.exchange.footprint import WIDE, Footprint, lora_layers, lora_module, placeholders
from fleetune.tuning.exchange.messages import Payload, ReplySpec
from fleetune.tuning.methods._adapter import check_targets
from fleetune.tuning.methods._zeroth import MOST_SWEEPS

KIND = "adapter"
PAPER = "Xu et al., USENIX ATC 2024, arXiv 2308.13894"
SENDS = "the adapter down; one number a direction up"
CLIENTS = 100

SPARE = 4  # seeds sent for each that is used
MOST_SEEDS: Final = 1 << 20  # in a message
IDS: Final = np.zeros(0, np.uint64)
NUMBERS: Final = np.zeros(0)
CANDIDATES: Final = 10  # directions ranked for each that is sent
LAW: Final = "gaussian"  # of the directions
UNITS: Final = 1 << 20  # a coefficient's grid is lr / 2^20
LIMIT: Final = 1 << 40  # and at most 2^20 in size: whatever a device says, sums are exact


class State(NamedTuple):
    """The adapter, and what is known of its gradient so far: scalars of the current batch, and the last step."""

    tensors: Tensors  # float32, by parameter name
    last: Tensors  # lr times the last accepted gradient (empty before the first)
    seeds: np.ndarray  # uint64, the ranked directions that the coming round draws from (none: each its own)
    ids: np.ndarray  # uint64[m] the directions asked on this batch so far,
    g: np.ndarray  # float64[m] their scalars,
    rows: np.ndarray  # float64[m] and the rows of the device that each is from
    batch: int  # number of the current batch
    asked: int  # rounds on it so far
    round: int
    seed: int
    n: int = 0  # of the last round: directions on its batch, their variance, and whether the server moved,
    variance: float = 0.0
    moved: int = 0


@dataclass(frozen=True)
class Method(methods.Method):
    """Hyper-parameters with the paper's symbols and the defaults of its code (DistilBERT, AG News)."""

    rate_at_server: ClassVar[bool] = True

    module: str = setting("lora", "module", "what is trained: lora, adapter or bitfit")
    r: int = setting(
        8, "r", "lora: rank; adapter: numbers between its two layers", only_if="module=lora|adapter"
    )
    alpha: int = setting(16, "α", "lora: the update is (alpha / r) B A", only_if="module=lora")
    targets: str = setting(
        "query-value", "W", "lora: query-value, all-linear, or the layers' names", only_if="module=lora"
    )
    P: int = setting(1, "P", "directions a device tries in a round")
    h: float = setting(0.01, "h", "size of the perturbation")
    lr: float = setting(0.01, "η", "learning rate of the server's SGD", found=True)
    decay: int = setting(3000, "T", "rounds over which the rate falls linearly to 0 (0: stays)")
    batch_size: int = setting(8, "B", "rows a device evaluates")
    threshold: float = setting(0.1, "σ²", "variance at which the server moves")
    patience: int = setting(10, "R", "rounds on one batch after which it moves anyway")
    discriminative: bool = setting(True, "rank", "every second batch, directions like the last gradient")
    clip: float = setting(0.0, "C", "cut |g| to this (0: not)")
    objective: str = setting("loss", "f", "loss, accuracy, rouge_l, f1 or package.module:function")

    def __post_init__(self) -> None:
        whole = {n: getattr(self, n) for n in ("r", "alpha", "P", "batch_size", "patience")}
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
        check_targets(self.targets)
        if self.module not in MODULES:
            raise ValueError(f"module = {self.module!r} is not one of {', '.join(MODULES)}")

    def init(self, model: Model, key: int) -> State:
        seed = key >> 1  # fits a signed 64-bit scalar
        self.attach(model, seed)
        return State(adapters.export(model), {}, IDS, IDS, NUMBERS, NUMBERS, 0, 0, 0, seed)

    def attach(self, model: Model, seed: int) -> None:
        """Give `model` its adapter, unless it has it; every device derives the same start from the seed."""
        if model.attachment is None:
            adapters.attach(model, MODULES[self.module](self), seed=seed)

    def rate(self, round: int) -> float:
        """Return the learning rate after so many rounds."""
        return self.lr * (max(0.0, 1.0 - round / self.decay) if self.decay else 1.0)

    def broadcast(self, state: State) -> Payload:
        arrays = state.tensors | ({"seeds": state.seeds} if len(state.seeds) else {})
        return Payload(arrays, {"seed": state.seed, "batch": state.batch, "rate": self.rate(state.round)})

    def expects(self, state: State) -> ReplySpec:
        return ReplySpec({"g": ("float32", (self.P,))})

    def directions(self, seeds: np.ndarray | None, key: int) -> np.ndarray:
        """Draw uint64[P], a device's directions of a round, with its key; the server draws them again."""
        if seeds is None or not len(seeds):
            return np.array([derive(key, "direction", j) for j in range(self.P)], np.uint64)
        return seeds[keyed_order(derive(key, "pick"), 0, len(seeds))[: self.P]]

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Measure P central differences on one batch; leave the adapter where these alone would lead."""
        self.attach(model, payload.int("seed"))
        parameters, measure = adapters.trainable(model), objectives.get(self.objective)
        tensors = {n: payload.array(n) for n in parameters}
        adapters.check_form(model, tensors)
        view = self.view(tensors, payload.int("seed"), payload.float("rate"), model.device)
        view.limit(MOST_SWEEPS)
        seeds = payload.arrays.get("seeds", IDS)
        if seeds.dtype != np.uint64 or seeds.ndim != 1 or len(seeds) > MOST_SEEDS:
            raise MessageError(f"the seeds are {seeds.dtype} {list(seeds.shape)}, uint64 of one axis are")
        ids = self.directions(seeds, key)
        same = batches.repeat_batch(payload.int("batch"), self.batch_size, self.P)
        measured, loss = slopes_along(parameters, view, ids, self.h, same, lambda b: measure(model, b))
        g = self.cut(measured).astype(np.float32)
        step, _ = descent(ids, g.astype(np.float64), np.full(self.P, float(batches.n)))
        view.place(step)
        write_to(parameters, view)
        return Payload({"g": g}, {"n": batches.n, "loss": loss})

    def cut(self, g: np.ndarray) -> np.ndarray:
        """Return slopes with |g| at most `clip`."""
        return np.clip(g, -self.clip, self.clip) if self.clip else g

    def view(self, tensors: Mapping[str, np.ndarray], seed: int, rate: float, device: str = "cpu") -> View:
        """Return a view of the adapter from other points; its grid is the learning rate over 2^20."""
        named = [(n, torch.from_numpy(t.copy()).to(device)) for n, t in tensors.items()]
        return View(named, nn.Module(), run_key=run_key(seed), law=LAW, grid=rate / UNITS)

    def distance(self, state: State, sent: Payload, reply: methods.Reply) -> float:
        return methods.norm([self.cut(reply.payload.array("g"))])

    def aggregate(self, state: State, replies: Iterable[methods.Reply], rule: Rule = MEAN) -> State:
        """Move along all directions asked on this batch, or keep the adapter and ask for more."""
        parts = [
            (
                self.directions(state.seeds, reply.key),
                self.cut(reply.payload.array("g").astype(np.float64)),
                np.full(self.P, float(reply.payload.int("n"))),
            )
            for reply in replies
        ]
        if not parts:
            return state._replace(round=state.round + 1, moved=0)
        if rule.name == "norm-clip":
            told = np.stack([g for _, g, _ in parts])
            told = clipped(told, np.array([size_of(g) for g in told]))
            parts = [(ids, g, np.ones(self.P)) for (ids, _, _), g in zip(parts, told, strict=True)]
        parts.insert(0, (state.ids, state.g, state.rows))
        ids, g, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        fresh = len(ids) - len(state.ids)
        step, variance = descent(ids, g, rows)
        state = state._replace(
            ids=ids, g=g, rows=rows, n=len(np.unique(ids)), variance=variance, asked=state.asked + 1, moved=0
        )
        if variance <= self.threshold or state.asked >= self.patience:
            state = self.move(state, step)
        ranked = self.discriminative and state.batch % 2 and state.last
        seeds = self.rank(state, fresh) if ranked else IDS
        return state._replace(seeds=seeds, round=state.round + 1)

    def move(self, state: State, step: Passes) -> State:
        """Take a step of SGD and go on to the next batch."""
        view = self.view(state.tensors, state.seed, self.rate(state.round))
        view.place(step)
        tensors = {name: seen.numpy() for name, seen in view.tensors()}
        last = {name: state.tensors[name] - tensor for name, tensor in tensors.items()}
        return state._replace(
            tensors=tensors,
            last=last if any(tensor.any() for tensor in last.values()) else {},
            ids=IDS,
            g=NUMBERS,
            rows=NUMBERS,
            batch=state.batch + 1,
            asked=0,
            moved=1,
        )

    def rank(self, state: State, used: int) -> np.ndarray:
        """Return the fresh directions most like the last gradient, best first.

        The component a of such a v along the unit vector u of the old gradient is a normal cut off below at 1.28
        (E[a^2] = 3.25), so the mean of the estimate is grad + (E[a^2] - 1) <grad, u> u.
        """
        first, keep = np.uint64((state.round + 1) << 32), SPARE * used
        ids = first + np.arange(keep * CANDIDATES, dtype=np.uint64)
        alike = cosines(state.last, ids, run_key(state.seed))
        return ids[np.argsort(-alike, kind="stable")[:keep]]

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        if rule.name == PRIVATE:
            return methods.OWN_DIRECTIONS
        if rule.name != "norm-clip":
            return "every device tries directions of its own, so no two slopes compare; use aggregation=norm-clip"
        return ""

    def apply(self, model: Model, state: State) -> None:
        self.attach(model, state.seed)
        adapters.load_(model, state.tensors)

    def report(self, state: State) -> dict[str, float]:
        names = ("n", "variance", "moved", "batch")
        return {name: float(getattr(state, name)) for name in names}

    def stays(self, report: Mapping[str, float]) -> tuple[str, str]:
        if report["moved"]:
            return "", ""
        why = f"the server waits for a variance of {self.threshold:g}, for {self.patience} rounds at most"
        return f"{why}, and had {report['variance']:.2g}", "lower patience, or raise threshold or P"

    def local_steps(self, rows: int) -> int:
        return self.P

    def sized(self, steps: int, batch_size: int) -> Self:
        return replace(self, P=steps, batch_size=batch_size)

    def footprint(self, shape: Shape) -> Footprint | None:
        if self.module != "lora":
            return None  # the other modules are not counted yet
        if (module := lora_module(lora_layers(shape, self.targets), shape.head, self.r)) is None:
            return None
        # ranked seeds, 3 kB in every second round, are left out
        state = State(placeholders(module), {}, IDS, IDS, NUMBERS, NUMBERS, 0, 0, 0, WIDE >> 1)
        return Footprint("two-point", module, state)


MODULES: Final[Mapping[str, Callable[[Method], adapters.AdapterSpec]]] = MappingProxyType(
    {
        "lora": lambda method: adapters.Lora(method.r, method.alpha, targets=method.targets),
        "adapter": lambda method: adapters.Bottleneck(method.r),
        "bitfit": lambda method: adapters.Bitfit(),
    }
)


def run_key(seed: int) -> int:
    """Return the key of the directions of a run."""
    return derive(seed, "fwdllm")


# Forward gradients ------------------------------------------------------------------------------------------
#
# A forward gradient is (1/n) sum_k g_k v_k, g_k the slope of the loss along the direction v_k.  A direction is an id: its
# numbers follow from the run's key, so that whoever has ids and slopes has the gradient.


def write_to(parameters: Mapping[str, nn.Parameter], view: View) -> None:
    """Set a module's parameters to what the view shows."""
    with torch.no_grad():
        for name, seen in view.tensors():
            parameters[name].copy_(seen)


def slopes_along(
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

        plus, minus = two_point(view, probe(LAW, 1, int(ids[j])), h, seen)
        if math.isfinite(plus) and math.isfinite(minus):
            g[j] = (plus - minus) / (2 * h)
            losses.append((plus + minus) / 2)
    finite = [x for x in losses if math.isfinite(x)]
    return g, float(np.mean(finite)) if finite else math.inf


def descent(ids: np.ndarray, g: np.ndarray, rows: np.ndarray) -> tuple[Passes, float]:
    """Return -(sum_k rows_k g_k v_k) / (sum_k rows_k) as passes, and the variance 2 sum_k a_k^2 of that mean.

    a_k is the share of direction k in the mean (all its slopes together): g_k / n where rows are equal.  The code's variance
    of the means of two halves, tensor by tensor, has the expectation 2 s^2 / n with s^2 = E[g^2], the variance of an element of
    g v (less the square of an element of the gradient: one part in d).  So this is the same test, less noisy, from scalars alone.
    """
    unique, where = np.unique(ids, return_inverse=True)
    a = np.bincount(where, rows * g) / rows.sum()
    units = np.rint(np.clip(-a * UNITS, -LIMIT, LIMIT)).astype(np.int64)
    return passes(LAW, 1, unique, units), float(2 * (a @ a))


def cosines(tensors: Mapping[str, np.ndarray], ids: np.ndarray, key: int) -> np.ndarray:
    """Return float64[len(ids)], the cosine of each direction with `tensors`, in the memory of one chunk of a direction."""
    slots = layout((n, torch.from_numpy(t)) for n, t in tensors.items())
    size = slots[-1].start + slots[-1].tensor.numel()
    flat, real = torch.zeros(size), torch.zeros(size)
    for slot in slots:
        where = slice(slot.start, slot.start + slot.tensor.numel())
        flat[where], real[where] = slot.tensor.view(-1), 1.0
    sweep, direction = kernels(flat.device).sweep, torch.zeros(min(size, CHUNK))
    dots, norms = np.zeros(len(ids)), np.zeros(len(ids))
    for first in range(0, size, CHUNK):
        last = min(first + CHUNK, size)
        v = direction[: last - first]
        for k, id in enumerate(ids.tolist()):
            sweep(v.zero_(), v, first, key, EMPTY, 0.0, probe(LAW, 1, id), gaussian=True)
            dots[k] += float(v @ flat[first:last])
            norms[k] += float(v.square() @ real[first:last])
    return dots / np.sqrt(norms * float(flat.double().square().sum()))
