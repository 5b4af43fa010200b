# SPDX-License-Identifier: Apache-2.0
"""Tune prompts in every layer in a federation, where only the layers that matter travel (FedPepTAO).

Che, Liu, Zhou, Ren, Zhou, Sheng, Dai, Dou: "Federated Learning of Large Language Models with Parameter-Efficient
Prompt Tuning and Adaptive Optimization", EMNLP 2023, arXiv 2310.15080 (section 4; Algorithm 1).

## Algorithm

Every layer has a prompt of its own: keys and values that its attention finds in front of the text (P-Tuning v2).

1. Partial prompt tuning.  The first `warmup` rounds are FedAvg of all prompts; a device also tells how alike its
   rows look to each layer (the score), and which share of the layers the curvature of its loss needs.  The means
   over devices, weighted by rows, choose the layers; from then on only their prompts exist and travel.
2. Adaptive optimization, at no extra traffic.  A device trains with AdamW from zero moments; the server keeps a
   momentum v and a control variate c_k of every device (SCAFFOLD's).  With p_k = n_k / sum n, D_k = w - w_k,
   wbar = sum_k p_k w_k and D = w - wbar, every device's step starts at the same wbar:

       c_k' = c_k - c + D_k / (sum of the steps' eta)       c <- c + rho sum_k (K_k / sum K) (c_k' - c_k)
       v_k  = beta v + (1 - beta) D + (c - c_k')            w <- sum_k p_k (wbar - eta_s v_k)

   The last two are linear in k, so their mean is one step with v = beta v + (1 - beta) D + (c - sum_k p_k c_k').

## Differences from the paper

- The code has neither the Lipschitz rule nor a gap: its plateau rule is `layers_rule=plateau`, and the user copies
  the outcome by hand into a list of half of the layers (`half`).  Here the paper's rule is the default, and the run
  itself applies it.  Scores and curvature come from the devices of the warm-up rounds (the code: all devices; after
  10 rounds, 5 for LLaMA); the trained prompts of the chosen layers are kept (the code starts again).
- Scores leave padding out (the code compares padded outputs) and use `eigvalsh` (the code's eigenvalues may come
  out complex); the last layer can be chosen too.  The Hessian is of the loss on the answer (the code: on all ids).
- In the code the devices' server steps share one momentum and one live model, so they pile up; here they do not.
  Its momentum takes the change of the pseudo-gradient, D before - D now: `momentum_input=delta_diff`.
- AdamW starts anew each round and its rate falls to 0 within the round (paper; the code keeps one AdamW a device
  for the whole run).  So eta K_k, the way that a device could go, is the sum of the rates that it used.
- rho is the share of the devices seen so far that answered, and a new device starts at c_k = c.  With rho fixed and
  c_k = 0 (`rho=0.1` fixes it), c starts far too small, and the correction pulls back what was just learned.
- Prompts have no dropout.  They start small, yet the model with untrained ones is not the base: a run reports both.
- Curvature is measured with 20 Hessian products on two rows (the code: 50 on a batch, which is
  `lanczos=50 curvature_rows=0`).

## Options

- `layers_rule` is how many layers travel: by the gap in the Hessian's spectrum (`lipschitz`), by the published code's
  `plateau`, `half`, `all` or a number.
- `lanczos` and `curvature_rows` decide what the choice costs, once, in the warm-up (`lipschitz` takes twice as many products as
  `plateau`; `half`, `all` and a number take none).  A device that will need more than 10 s says so.
- `personalise` trains the other layers' prompts on every device too, but they stay there.  What the run evaluates is
  always the global model: the chosen layers' prompts alone.  Beside it the round event reports `personal_loss`, of each
  device's own model on rows that it never trains on, with `global_loss` on the same rows.

## What the choice costs

Layers that travel, of 5, for six seeds; processor seconds of the Lipschitz rule on a device of 16 rows, and as a multiple of
its training in that round (0.21 s).

| rows | products | lipschitz | plateau | seconds | of training |
|---|---|---|---|---|---|
| 8 (`curvature_rows=0`) | 50 | 5, 5, 5, 5, 5, 5 | 3, 3, 3, 3, 3, 3 | 9.02 | 43.3 |
| 8 | 20 | 5, 5, 5, 5, 5, 5 | 3, 3, 3, 3, 3, 3 | 3.61 | 17.3 |
| 2 | 20 (default) | 5, 5, 5, 5, 5, 5 | 2, 3, 3, 3, 3, 3 | 1.12 | 5.4 |
| 2 | 10 | 5, 5, 5, 5, 5, 5 | 2, 1, 2, 3, 3, 2 | 0.56 | 2.7 |
| 2 | 5 | 5, 5, 5, 5, 5, 5 | 4, 1, 4, 3, 1, 4 | 0.28 | 1.3 |

The Lipschitz rule finds no gap here, however it is measured, so all layers travel; equal choices give equal models.
After five rounds of four clients (40 rows each, base 4.800, six seeds) the loss is 3.746 by this rule, for 1.0 MB, and
3.783 by `half`, for 0.71 MB; the noise of such a mean is 0.005.  The recipe has `clients = 4`, `rounds = 5`, `limit = 220`,
`max_length = 64`, `held_out = 60`: `fleetune sweep choice.toml --vary layers_rule=half,lipschitz --seeds 6`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np

from fleetune import adapters
from fleetune.common.settings import setting
from fleetune.data import Batches
from fleetune.evaluation.losses import batch_loss
from fleetune.models.net.layers import check_separate, layers_of
from fleetune.models.net.model import Model
from fleetune.models.shapes import Shape
from fleetune.tuning import methods
from fleetune.tuning.exchange.footprint import WIDE, Footprint, Module, placeholders
from fleetune.tuning.exchange.messages import Payload, ReplySpec
from fleetune.tuning.exchange.robust import MEAN, Rule
from fleetune.tuning.exchange.server_rules import Tensors, control
from fleetune.tuning.methods import Reply, _adapter, _layers
from fleetune.tuning.methods._adapter import NOTHING

KIND = "adapter"
PAPER = "Che et al., EMNLP 2023, arXiv 2310.15080"
SENDS = "the prompts of the layers that matter, up and down"


class State(NamedTuple):
    """The prompts that travel, what the warm-up has found out so far, and the server's momentum and variates."""

    tensors: Tensors  # float32, by parameter name: w
    seed: int
    layers: np.ndarray  # int64: the layers whose prompts travel
    warmup: int  # rounds until they are chosen
    rows: int  # rows of the devices that have measured:
    scores: np.ndarray  # float64[L]: sum_k n_k s_k
    kept: float  # sum_k n_k (share of the layers that device k needs)
    steps: int = 0  # rounds of adaptive optimization so far
    eta_s: float = 0.0
    v: Tensors = NOTHING  # float64
    c: Tensors = NOTHING  # float64
    D: Tensors = NOTHING  # float64: the last pseudo-gradient
    c_k: Tensors = NOTHING  # float32, by "device/parameter name": it alone grows with the devices
    personal: float = 0.0  # mean losses on rows that devices set apart (0: none), of their own models:
    common: float = 0.0  # and of the global one


@dataclass(frozen=True)
class Method(methods.Method):
    """Hyper-parameters with the paper's symbols and its code's defaults."""

    tokens: int = setting(20, "T", "length of each layer's prompt (the code: 5 for decoders)")
    lr: float = setting(4e-2, "η", "AdamW learning rate, falling to 0 in a round", found=True)
    epochs: int = setting(2, "E", "local epochs a round", only_if="steps=0")
    steps: int = setting(0, "τ", "local steps a round instead of epochs (0: epochs)")
    batch_size: int = setting(8, "B", "rows a step, and of a score")
    weight_decay: float = setting(0.1, "λ", "AdamW weight decay")
    clip: float = setting(1.0, "C", "largest norm of a gradient (0: any)")
    layers_rule: str = setting("lipschitz", "rule", "lipschitz, plateau, half, all or a number of layers")
    warmup: int = setting(1, "t₀", "rounds with all layers before they are chosen")
    lanczos: int = setting(
        20,
        "q",
        "Hessian products of a measurement (lipschitz: twice; the code: 50)",
        only_if="layers_rule=lipschitz|plateau",
    )
    curvature_rows: int = setting(
        2,
        "b",
        "rows that curvature is measured on (0: batch_size, as in the paper)",
        only_if="layers_rule=lipschitz|plateau",
    )
    beta: float = setting(0.9, "β", "server momentum")
    server_lr: float = setting(0.05, "ηₛ", "server step, times 0.99 each round, 1e-4 at least (0: FedAvg)")
    momentum_input: str = setting("delta", "g", "delta: D of the round; delta_diff: D before - D (code)")
    rho: float = setting(0.0, "ρ", "weight of a round in c (0: the share of known devices)")
    checkpointing: bool = setting(True, "ckpt", "compute activations twice: less memory, more time")
    personalise: bool = setting(False, "pFL", "the other layers' prompts stay on the device")

    def __post_init__(self) -> None:
        self.training().check()
        if self.tokens < 1 or self.warmup < 1 or self.lanczos < 2 or self.curvature_rows < 0:
            raise ValueError(
                "tokens and warmup must be at least 1, lanczos at least 2, curvature_rows 0 or more"
            )
        if not (0 <= self.beta < 1 and 0 <= self.server_lr < 1e3 and 0 <= self.rho <= 1):
            raise ValueError(
                f"beta = {self.beta}, server_lr = {self.server_lr}, rho = {self.rho} are not in [0, 1), [0, 1000), [0, 1]"
            )
        _layers.check_rule(self.layers_rule)
        if self.momentum_input not in ("delta", "delta_diff"):
            raise ValueError(f"momentum_input = {self.momentum_input!r} is neither delta nor delta_diff")

    def training(self) -> _adapter.Training:
        """Return how a device trains."""
        return _adapter.Training(
            lr=self.lr,
            epochs=self.epochs,
            steps=self.steps,
            batch_size=self.batch_size,
            decay=True,
            clip=self.clip,
            weight_decay=self.weight_decay,
            checkpointing=self.checkpointing,
        )

    def init(self, model: Model, key: int) -> State:
        check_separate(model.net, "fedpeptao")
        seed, L = key >> 1, len(layers_of(model.net))
        self.attach(model, seed, range(L))
        tensors, none = adapters.export(model), np.zeros(L)
        state = State(tensors, seed, np.arange(L), self.warmup, 0, none, 0.0, eta_s=self.server_lr)
        return self.begin(state, range(L)) if self.layers_rule == "all" else state

    def attach(self, model: Model, seed: int, layers: Iterable[int]) -> None:
        """Give these layers prompts, and no others; every device derives the same start from the seed."""
        spec = adapters.Prefix(tokens=self.tokens, layers=tuple(int(i) for i in layers))
        if model.attachment is not None:
            if adapters.attachment_of(model).spec == spec:
                return
            adapters.detach(model)
        adapters.attach(model, spec, seed=seed)

    def broadcast(self, state: State) -> Payload:
        return Payload(state.tensors, {"seed": state.seed, "warmup": state.warmup})

    def expects(self, state: State) -> ReplySpec:
        arrays: dict[str, Any] = {n: ("float32", t.shape) for n, t in state.tensors.items()}
        scalars: dict[str, Any] = {"n": (int, 1, 1 << 31), "loss": (float, -1e9, 1e9)}
        if state.warmup:
            arrays["scores"] = ("float64", state.scores.shape)
            scalars |= {"kept": (float, 0.0, 1.0)} if self.layers_rule in _layers.CURVED else {}
        elif self.personalise:
            scalars |= {"personal": (float, -1e9, 1e9), "common": (float, -1e9, 1e9)}
        return ReplySpec(arrays, scalars)

    # A device ------------------------------------------------------------------------------------------

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Train the prompts that came (and the device's own); in the warm-up, measure what the choice needs."""
        seed, warm, w = payload.int("seed"), payload.int("warmup") > 0, _adapter.group(payload.arrays)
        layers = sorted({i for i in map(_layers.layer_of, w) if i is not None})
        measured: dict[str, float] = {}
        scores: Tensors = {}
        if self.personalise:
            aside, batches = batches.split_off(self.batch_size)
        batch = next(batches.repeat_batch(0, self.batch_size, 1))
        if warm:
            _adapter.clear(model)
            scores["scores"] = _layers.scores(model, batch)
        self.attach(model, seed, layers)
        adapters.load_(model, w)
        if self.personalise and not warm:
            measured["common"] = batch_loss(model, aside)
            self.load_own(model, seed, w, memory)
            measured["personal"] = batch_loss(model, aside)
        loss = _adapter.train(model, batches, key, self.training(), {})
        if warm and self.layers_rule in _layers.CURVED:
            few = next(batches.repeat_batch(0, self.curvature_rows or self.batch_size, 1))
            measured["kept"] = _layers.needed_share(
                model, few, w, rule=self.layers_rule, lanczos=self.lanczos, key=key, heard=batches.heard
            )
        trained = adapters.export(model)
        if self.personalise and all(np.isfinite(a).all() for a in trained.values()):
            memory.update(trained)
        sent = {name: trained[name] for name in w}
        return Payload(sent | scores, {"n": batches.n, "loss": loss} | measured)

    def load_own(self, model: Model, seed: int, w: Tensors, memory: Mapping[str, np.ndarray]) -> None:
        """Load the global prompts, and in layers where none came the device's own (at first: untrained)."""
        _adapter.clear(model)
        self.attach(model, seed, range(len(layers_of(model.net))))
        own = {name: w.get(name, memory.get(name, a)) for name, a in adapters.export(model).items()}
        adapters.load_(model, own)

    # The server ----------------------------------------------------------------------------------------

    def distance(self, state: State, sent: Payload, reply: Reply) -> float:
        return _adapter.distance(state.tensors, reply, self.training())

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        """Do a round of warm-up, or of adaptive optimization."""
        return self.warm(state, replies, rule) if state.warmup else self.step(state, replies, rule)

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        return _adapter.cannot_combine(rule)

    def warm(self, state: State, replies: Iterable[Reply], rule: Rule) -> State:
        """Average, and add the devices' measurements up; the layers are chosen after the last such round."""
        w, measured = rule.combining(state.tensors), rule.combining()
        for reply in replies:
            n = float(reply.payload.int("n"))
            w.add(n, {name: reply.payload.array(name) for name in state.tensors})
            kept = np.array(reply.payload.scalars.get("kept", 1.0))
            scores = np.clip(reply.payload.array("scores"), 0.0, _layers.highest(self.batch_size))
            measured.add(n, {"scores": scores, "kept": kept})
        if not w.total:
            return state
        found = measured.tensors()
        state = state._replace(
            tensors=rounded(w.tensors()),
            warmup=state.warmup - 1,
            rows=state.rows + int(w.total),
            scores=state.scores + w.total * found["scores"],
            kept=state.kept + w.total * float(found["kept"]),
        )
        if state.warmup:
            return state
        return self.begin(state, _layers.choose(state.scores, self.layers_rule, state.kept / state.rows))

    def begin(self, state: State, layers: Iterable[int]) -> State:
        """Return the state from which only these layers' prompts travel: momentum and variates are zero."""
        taken = np.array(sorted(layers), np.int64)
        tensors = {n: t for n, t in state.tensors.items() if _layers.layer_of(n) in (None, *taken.tolist())}
        zeros = {n: np.zeros(t.shape) for n, t in tensors.items()}
        return state._replace(tensors=tensors, layers=taken, warmup=0, v=zeros, c=zeros, D=zeros)

    def step(self, state: State, replies: Iterable[Reply], rule: Rule) -> State:
        """Take every device's momentum step from wbar, averaged (no momentum in the first round)."""
        variates = LayerControl(state.tensors, state.c, state.c_k, rule)
        measured = rule.combining()
        for reply in replies:
            n, scalars = reply.payload.int("n"), reply.payload.scalars
            how = self.training()
            variates.add(reply, how.count(n), how.walked(reply.rows or n)[0])
            measured.add(n, {x: np.array(scalars.get(x, 0.0)) for x in ("personal", "common")})
        if not variates.answered:
            return state
        first = state.steps == 0
        eta_s = state.eta_s if first else max(0.99 * state.eta_s, min(1e-4, self.server_lr))
        c, pull = variates.pull(self.rho)
        w, momentum = server_step(
            state.tensors,
            variates.mean(),
            pull,
            Momentum(state.v, state.D),
            beta=self.beta,
            eta_s=eta_s,
            difference=self.momentum_input == "delta_diff",
            first=first,
        )
        losses = measured.tensors()
        return state._replace(
            tensors=w,
            steps=state.steps + 1,
            eta_s=eta_s,
            v=momentum.v,
            D=momentum.D,
            c=c,
            c_k=variates.c_k,
            personal=float(losses["personal"]),
            common=float(losses["common"]),
        )

    def report(self, state: State) -> dict[str, float]:
        """Return how many layers travel, and what personal prompts gain."""
        figures = {"layers": float(len(state.layers))}
        if self.personalise and state.steps:
            figures |= {"personal_loss": state.personal, "global_loss": state.common}
        return figures

    def apply(self, model: Model, state: State) -> None:
        self.attach(model, state.seed, state.layers)
        adapters.load_(model, state.tensors)

    def local_steps(self, rows: int) -> int:
        return self.training().count(rows)

    def sized(self, steps: int, batch_size: int) -> Self:
        return replace(self, steps=steps, batch_size=batch_size)

    def footprint(self, shape: Shape) -> Footprint | None:
        """Count a round after the warm-up in which all layers travel, with the memory of a measurement of curvature."""
        if not shape.attention:
            return None
        tensors = dict(shape.head)
        for layer, width in shape.attention:
            tensors |= {f"{layer}.prefix.{which}": (self.tokens, width) for which in ("key", "value")}
        module, none = Module(f"T={self.tokens}", tensors, tokens=self.tokens), np.zeros(shape.layers)
        state = State(placeholders(module), WIDE >> 1, np.arange(shape.layers), 0, 0, none, 0.0)
        products = self.lanczos if self.layers_rule in _layers.CURVED else 0
        return Footprint(
            "backward",
            module,
            state,
            checkpointing=self.checkpointing,
            hessian_products=products,
            hessian_rows=self.curvature_rows,
            whole_gradient=self.clip > 0,
        )


# Adaptive optimization on the server --------------------------------------------------------------------
#
# Section 4.2; the variates are SCAFFOLD's (`server_rules.control`).  With p_k = n_k / sum n, D_k = w - w_k,
# wbar = sum_k p_k w_k and D = w - wbar, every device's step starts at the same wbar:
#
#     c_k' = c_k - c + D_k / (sum of the steps' eta)       c <- c + rho sum_k (K_k / sum K) (c_k' - c_k)
#     v_k  = beta v + (1 - beta) D + (c - c_k')            w <- sum_k p_k (wbar - eta_s v_k)
#
# The last two are linear in k, so their mean is one step with v = beta v + (1 - beta) D + (c - sum_k p_k c_k').


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


def server_step(
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
