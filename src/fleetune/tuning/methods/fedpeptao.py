# SPDX-License-Identifier: Apache-2.0
"""FedPepTAO: prompts in every layer, of which only the layers that matter travel, and a server with momentum.

Che, Liu, Zhou, Ren, Zhou, Sheng, Dai, Dou: "Federated Learning of Large Language Models with Parameter-Efficient
Prompt Tuning and Adaptive Optimization", EMNLP 2023, arXiv 2310.15080 (section 4; Algorithm 1).

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

What differs from the paper's code, and why:
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
- Prompts have no dropout and start small, so that the model starts nearly as it was.

With `personalise` the other layers' prompts train on every device too, but stay there.  What the run evaluates is
always the global model: the chosen layers' prompts alone.  Beside it the round event reports `personal_loss`, of each
device's own model on rows that it never trains on, with `global_loss` on the same rows.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fleetune import adapters
from fleetune.common.settings import setting
from fleetune.data import Batch, Batches
from fleetune.evaluation.losses import batch_loss
from fleetune.models.layers import layers_of
from fleetune.models.model import Model
from fleetune.tuning import server_rules
from fleetune.tuning.averaging import Mean
from fleetune.tuning.messages import Payload, ReplySpec
from fleetune.tuning.methods import Reply, _adapter, _layers
from fleetune.tuning.server_rules import Tensors

log = logging.getLogger(__name__)

KIND = "adapter"
PAPER = "Che et al., EMNLP 2023, arXiv 2310.15080"
SENDS = "the prompts of the layers that matter, up and down"

CURVED = ("lipschitz", "plateau")  # rules that need the Hessian


class State(NamedTuple):
    """The prompts that travel, what the warm-up has found out so far, and what the server keeps."""

    tensors: Tensors  # float32, by parameter name: w
    seed: int
    layers: np.ndarray  # int64: the layers whose prompts travel
    warmup: int  # rounds until they are chosen
    rows: int  # rows of the devices that have told:
    scores: np.ndarray  # float64[L]: sum_k n_k s_k
    kept: float  # sum_k n_k (share of the layers that device k needs)
    steps: int  # rounds of adaptive optimization so far
    eta_s: float
    v: Tensors  # float64
    c: Tensors  # float64
    D: Tensors  # float64: the last pseudo-gradient
    c_k: Tensors  # float32, by "device/parameter name": the one thing here that grows with the devices
    personal: float  # mean losses on rows that devices keep aside (0: not told), of their own models:
    common: float  # and of the global one


@dataclass(frozen=True)
class Method:
    """Hyper-parameters with the paper's symbols and its code's defaults."""

    tokens: int = setting(20, "T", "length of each layer's prompt (the code: 5 for decoders)")
    lr: float = setting(4e-2, "η", "AdamW learning rate, falling to 0 in a round")
    epochs: int = setting(2, "E", "local epochs a round")
    steps: int = setting(0, "τ", "local steps a round instead of epochs (0: epochs)")
    batch_size: int = setting(8, "B", "rows a step, and of a measurement")
    weight_decay: float = setting(0.1, "λ", "AdamW weight decay")
    clip: float = setting(1.0, "C", "largest norm of a gradient (0: any)")
    layers_rule: str = setting("lipschitz", "rule", "lipschitz, plateau, half, all or a number of layers")
    warmup: int = setting(1, "t₀", "rounds with all layers before they are chosen")
    lanczos: int = setting(50, "q", "Hessian products of a measurement (lipschitz: twice)")
    beta: float = setting(0.9, "β", "server momentum")
    server_lr: float = setting(0.05, "ηₛ", "server step, times 0.99 each round, 1e-4 at least (0: FedAvg)")
    momentum_input: str = setting("delta", "g", "delta: D of the round; delta_diff: D before - D (code)")
    rho: float = setting(0.0, "ρ", "weight of a round in c (0: the share of known devices)")
    personalise: bool = setting(False, "pFL", "the other layers' prompts stay on the device")

    def __post_init__(self) -> None:
        self.training().check()
        if self.tokens < 1 or self.warmup < 1 or self.lanczos < 2:
            raise ValueError("tokens and warmup must be at least 1, lanczos at least 2")
        if not (0 <= self.beta < 1 and 0 <= self.server_lr < 1e3 and 0 <= self.rho <= 1):
            raise ValueError(
                f"beta = {self.beta}, server_lr = {self.server_lr}, rho = {self.rho} are not in [0, 1), [0, 1000), [0, 1]"
            )
        if self.layers_rule not in (*CURVED, "half", "all") and not re.fullmatch(
            "[1-9][0-9]*", self.layers_rule
        ):
            raise ValueError(
                f"layers_rule = {self.layers_rule!r} is none of lipschitz, plateau, half, all, nor a number"
            )
        if self.momentum_input not in ("delta", "delta_diff"):
            raise ValueError(f"momentum_input = {self.momentum_input!r} is neither delta nor delta_diff")

    def training(self) -> _adapter.Training:
        """A device's training, as every adapter method's."""
        return _adapter.Training(
            lr=self.lr, epochs=self.epochs, steps=self.steps, batch_size=self.batch_size, decay=True,
            clip=self.clip, weight_decay=self.weight_decay,
        )  # fmt: skip

    def init(self, model: Model, key: int) -> State:
        seed, L = key >> 1, len(layers_of(model.net))
        self.attach(model, seed, range(L))
        tensors = adapters.export(model)
        state = State(
            tensors, seed, np.arange(L), self.warmup, 0, np.zeros(L), 0.0,
            0, self.server_lr, {}, {}, {}, {}, 0.0, 0.0,
        )  # fmt: skip
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
            scalars |= {"kept": (float, 0.0, 1.0)} if self.layers_rule in CURVED else {}
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
        told: dict[str, float] = {}
        scores: Tensors = {}
        if self.personalise:
            aside, batches = batches.split_off(self.batch_size)
        batch = next(batches.repeat_batch(0, self.batch_size, 1))
        if warm:
            clear(model)
            scores["scores"] = _layers.scores(model, batch)
        self.attach(model, seed, layers)
        adapters.load_(model, w)
        if self.personalise and not warm:
            told["common"] = batch_loss(model, aside)
            self.load_own(model, seed, w, memory)
            told["personal"] = batch_loss(model, aside)
        loss = _adapter.train(model, batches, key, self.training(), {})
        if warm and self.layers_rule in CURVED:
            told["kept"] = self.kept(model, batch, w, key)
        trained = adapters.export(model)
        if self.personalise and all(
            np.isfinite(a).all() for a in trained.values()
        ):  # else it keeps what it had
            memory.update(trained)
        sent = {name: trained[name] for name in w}
        return Payload(sent | scores, {"n": batches.n, "loss": loss} | told)

    def load_own(self, model: Model, seed: int, w: Tensors, memory: Mapping[str, np.ndarray]) -> None:
        """Prompts in every layer: the global ones, and where none came the device's own (at first: untrained)."""
        clear(model)
        self.attach(model, seed, range(len(layers_of(model.net))))
        adapters.load_(
            model, {name: w.get(name, memory.get(name, a)) for name, a in adapters.export(model).items()}
        )

    def kept(self, model: Model, batch: Batch, came: Tensors, key: int) -> float:
        """The share of the layers that the curvature at the trained prompts needs."""
        if self.layers_rule == "plateau":
            return _layers.kept_by_plateau(_layers.spectrum(model, batch, lanczos=self.lanczos, key=key))
        found, L = _layers.spectrum_and_change(model, batch, came, lanczos=self.lanczos, key=key)
        return _layers.kept_by_gap(found, L)

    # The server ----------------------------------------------------------------------------------------

    def aggregate(self, state: State, replies: Iterable[Reply]) -> State:
        """A round of warm-up, or of adaptive optimization."""
        return self.warm(state, replies) if state.warmup else self.step(state, replies)

    def warm(self, state: State, replies: Iterable[Reply]) -> State:
        """FedAvg, with the devices' measurements added up; the layers are chosen after the last such round."""
        w, told = Mean(), Mean()
        for reply in replies:
            n = float(reply.payload.int("n"))
            w.add(n, {name: reply.payload.array(name) for name in state.tensors})
            kept = np.array(reply.payload.scalars.get("kept", 1.0))
            told.add(n, {"scores": reply.payload.array("scores"), "kept": kept})
        if not w.total:
            return state
        found = told.tensors()
        state = state._replace(
            tensors=rounded(w.tensors()), warmup=state.warmup - 1, rows=state.rows + int(w.total),
            scores=state.scores + w.total * found["scores"],
            kept=state.kept + w.total * float(found["kept"]),
        )  # fmt: skip
        return state if state.warmup else self.begin(state, self.chosen(state))

    def chosen(self, state: State) -> np.ndarray:
        """The best layers by score, as many as the rule says, in order."""
        L = len(state.scores)
        if self.layers_rule in CURVED:
            number = _layers.count(state.kept / state.rows, L)
        else:
            number = min(L, -(-L // 2) if self.layers_rule == "half" else int(self.layers_rule))
        order = np.argsort(-state.scores, kind="stable")
        log.info("prompts of %d of %d layers travel; by score: %s", number, L, order.tolist())
        return np.sort(order[:number])

    def begin(self, state: State, layers: Iterable[int]) -> State:
        """The state from which only these layers' prompts travel: momentum and variates are zero."""
        taken = np.array(sorted(layers), np.int64)
        tensors = {n: t for n, t in state.tensors.items() if _layers.layer_of(n) in (None, *taken.tolist())}
        zeros = {n: np.zeros(t.shape) for n, t in tensors.items()}
        return state._replace(tensors=tensors, layers=taken, warmup=0, v=zeros, c=zeros, D=zeros)

    def step(self, state: State, replies: Iterable[Reply]) -> State:
        """Adaptive optimization: the momentum step of every device from wbar, averaged (none in the first round)."""
        w_k, variates, changes, told = Mean(), Mean(), Mean(), Mean()
        c_k, answered = dict(state.c_k), 0
        for reply in replies:
            answered += 1
            n, used = reply.payload.int("n"), self.training().rates(reply.payload.int("n"))
            old = {x: state.c_k.get(f"{reply.client}/{x}", state.c[x]) for x in state.tensors}
            new = rounded(server_rules.control(old, state.c, state.tensors, reply.payload.arrays, sum(used)))
            c_k |= {f"{reply.client}/{x}": value for x, value in new.items()}
            w_k.add(n, {x: reply.payload.array(x) for x in state.tensors})
            variates.add(n, new)
            changes.add(len(used), {x: new[x] - old[x].astype(np.float64) for x in new})
            told.add(n, {x: np.array(reply.payload.scalars.get(x, 0.0)) for x in ("personal", "common")})
        if not answered:
            return state
        rho = self.rho or min(1.0, answered * len(state.tensors) / len(c_k))
        c = {x: state.c[x] + rho * change for x, change in changes.tensors().items()}
        first = state.steps == 0
        eta_s = state.eta_s if first else max(0.99 * state.eta_s, min(1e-4, self.server_lr))
        wbar, mean_c_k, w, v, D = w_k.tensors(), variates.tensors(), {}, {}, {}
        for name, before in state.tensors.items():
            D[name] = before - wbar[name]
            g = D[name] if self.momentum_input == "delta" else state.D[name] - D[name]
            pull = c[name] - mean_c_k[name]
            v[name] = state.v[name] if first else self.beta * state.v[name] + (1 - self.beta) * g + pull
            w[name] = wbar[name] - eta_s * v[name]
        losses = told.tensors()
        return state._replace(
            tensors=rounded(w),
            steps=state.steps + 1,
            eta_s=eta_s,
            v=v,
            c=c,
            D=D,
            c_k=c_k,
            personal=float(losses["personal"]),
            common=float(losses["common"]),
        )

    def report(self, state: State) -> dict[str, float]:
        """How many layers travel, and what personal prompts gain."""
        told = {"layers": float(len(state.layers))}
        if self.personalise and state.steps:
            told |= {"personal_loss": state.personal, "global_loss": state.common}
        return told

    def apply(self, model: Model, state: State) -> None:
        self.attach(model, state.seed, state.layers)
        adapters.load_(model, state.tensors)


def clear(model: Model) -> None:
    """Take off whatever adapter the model carries."""
    if model.attachment is not None:
        adapters.detach(model)


def rounded(tensors: Tensors) -> Tensors:
    """float32, what travels."""
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
