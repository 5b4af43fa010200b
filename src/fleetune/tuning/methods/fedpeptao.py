"""Tune prompts in every layer in a federation, where only the layers that matter travel (FedPepTAO).

Che, Liu, Zhou, Ren, Zhou, Sheng, Dai, Dou: "Federated Learning of Large Language Models with Parameter-Efficient Prompt Tuning
and Adaptive Optimization", EMNLP 2023, arXiv 2310.15080 (section 4; Algorithm 1).

## Algorithm

Every layer has a prompt of its own: keys and values that its attention finds in front of the text (P-Tuning v2).

1. Partial prompt tuning.  The first `warmup` rounds are FedAvg of all prompts; a device also tells how alike its rows look to
   each layer (the score), and which share of the layers the curvature of its loss needs.  The means over devices, weighted by
   rows, choose the layers; from then on only their prompts exist and travel.
2. Adaptive optimization, at no extra traffic.  A device trains with AdamW from zero moments; the server keeps a momentum v and a
   control variate c_k of every device (SCAFFOLD's).  With p_k = n_k / sum n, D_k = w - w_k, wbar = sum_k p_k w_k and
   D = w - wbar, every device's step starts at the same wbar:

       c_k' = c_k - c + D_k / (sum of the steps' eta)       c <- c + rho sum_k (K_k / sum K) (c_k' - c_k)
       v_k  = beta v + (1 - beta) D + (c - c_k')            w <- sum_k p_k (wbar - eta_s v_k)

   The last two are linear in k, so their mean is one step with v = beta v + (1 - beta) D + (c - sum_k p_k c_k').

## Differences from the paper

- The run applies the paper's rule itself, after the warm-up, and keeps the trained prompts of the chosen layers.  The code has
  the user copy a list of half of the layers (`half`), measured on all devices after 10 rounds (LLaMA: 5), and starts again.
- Scores leave padding out, and the last layer can be chosen too.  The Hessian is of the loss on the answer (the code: on all
  ids), by 20 products on two rows (the code: 50 on a batch, which is `lanczos=50 curvature_rows=0`).
- In the code the devices' server steps share one momentum and one live model, so they pile up; here they do not.  Its momentum
  takes the change of the pseudo-gradient, D before - D now.
- AdamW starts anew each round and its rate falls to 0 within it (the code keeps one AdamW a device for the whole run).
- rho is the share of the devices seen so far that answered, and a new device starts at c_k = c.  With rho fixed and c_k = 0, c
  starts far too small, and the correction pulls back what was just learned.
- Under another rule than the mean, c_k = D_k / (sum of the steps' eta), and c moves by the combination of c_k - c: what a median
  leaves out would stay in the variates of its device, and add up.

The measurement costs a device of 16 rows 5.4 times the processor time of its training in that round (a model of 5 layers; 43
times with 50 products on 8 rows).  It finds no gap there, so all layers travel: after five rounds of four clients the loss is
3.746 for 1.0 MB, and 3.783 for 0.71 MB by `half` (noise 0.005).  `fleetune sweep choice.toml --vary layers_rule=half,lipschitz
--seeds 6` measures that, with `clients = 4`, `rounds = 5`, `limit = 220`, `max_length = 64` and `held_out = 60` in the recipe.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from fleetune import adapters
from fleetune.adapters.prefix import IMPLEMENTATIONS
from fleetune.common.hearing import heard
from fleetune.common.memory import give_back
from fleetune.common.settings import setting
from fleetune.data import Batch, Batches
from fleetune.errors import FleetError
from fleetune.evaluation.losses import eval_mode
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.net.layers import check_separate, layers_of
from fleetune.models.net.model import Model
from fleetune.models.shapes import Shape
from fleetune.seeds.descent import uniforms
from fleetune.tuning.exchange.aggregation import MEAN, PRIVATE, Rule, Tensors, client_variate
from fleetune.tuning.exchange.footprint import WIDE, Footprint, Module, placeholders
from fleetune.tuning.exchange.messages import REPORTED, Payload, ReplySpec
from fleetune.tuning.methods import Reply, _adapter

KIND = "adapter"
PAPER = "Che et al., EMNLP 2023, arXiv 2310.15080"
SENDS = "the prompts of the layers that matter, up and down"

LIPSCHITZ: Final = "lipschitz"  # the rule that needs the Hessian
MOST_PRODUCTS: Final = (
    300  # of a measurement of curvature: their eigenvalues are found in one step, which hears no stop
)
SCORED: Final = 256  # rows of a score, at most
SHIFT: Final = 1e-5  # added to a similarity's eigenvalues, so that 1/lambda stays below 1e5 (published code)
log = logging.getLogger(__name__)


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
    v: Tensors = _adapter.NOTHING  # float64
    c: Tensors = _adapter.NOTHING  # float64
    c_k: Tensors = _adapter.NOTHING  # float32, by "device/parameter name": it alone grows with the devices


@dataclass(frozen=True)
class Method(_adapter.Trained):
    """Hyper-parameters with the paper's symbols and its code's defaults."""

    tokens: int = setting(20, "T", "length of each layer's prompt (the code: 5 for decoders)")
    lr: float = setting(4e-2, "η", "AdamW learning rate, falling to 0 in a round", found=True)
    epochs: int = setting(2, "E", "local epochs a round", only_if="steps=0")
    steps: int = setting(0, "τ", "local steps a round instead of epochs (0: epochs)")
    batch_size: int = setting(8, "B", "rows a step, and of a score (256 at most)")
    weight_decay: float = setting(0.1, "λ", "AdamW weight decay")
    clip: float = setting(1.0, "C", "largest norm of a gradient (0: any)")
    layers_rule: str = setting("lipschitz", "rule", "lipschitz, half, all or a number of layers")
    warmup: int = setting(1, "t₀", "rounds with all layers before they are chosen")
    lanczos: int = setting(
        20, "q", "Hessian products of a measurement (twice; the code: 50)", only_if="layers_rule=lipschitz"
    )
    curvature_rows: int = setting(
        2,
        "b",
        "rows that curvature is measured on (0: batch_size, as in the paper)",
        only_if="layers_rule=lipschitz",
    )
    beta: float = setting(0.9, "β", "server momentum")
    server_lr: float = setting(0.05, "ηₛ", "server step, times 0.99 each round, 1e-4 at least (0: FedAvg)")
    checkpointing: str = setting("auto", "ckpt", "activations twice: auto (short memory), true or false")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1 or self.warmup < 1 or self.lanczos < 2 or self.curvature_rows < 0:
            raise ValueError(
                "tokens and warmup must be at least 1, lanczos at least 2, curvature_rows 0 or more"
            )
        if self.tokens > adapters.MOST_TOKENS or self.lanczos > MOST_PRODUCTS:
            raise ValueError(
                f"tokens may be {adapters.MOST_TOKENS} at most, and lanczos {MOST_PRODUCTS}: "
                f"{self.tokens} and {self.lanczos} are more"
            )
        if not (0 <= self.beta < 1 and 0 <= self.server_lr < 1e3):
            raise ValueError(
                f"beta = {self.beta} and server_lr = {self.server_lr} are not in [0, 1) and [0, 1000)"
            )
        if self.layers_rule not in (LIPSCHITZ, "half", "all") and not re.fullmatch(
            "[1-9][0-9]*", self.layers_rule
        ):
            raise ValueError(
                f"layers_rule = {self.layers_rule!r} is not one of lipschitz, half, all, nor a number"
            )

    @property
    def packs(self) -> bool:
        return False

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
        scalars = dict(REPORTED)
        if state.warmup:
            arrays["scores"] = ("float64", state.scores.shape)
            scalars |= {"kept": (float, 0.0, 1.0)} if self.layers_rule == LIPSCHITZ else {}
        return ReplySpec(arrays, scalars)

    # A device ------------------------------------------------------------------------------------------

    def local(
        self, model: Model, payload: Payload, batches: Batches, key: int, memory: dict[str, Any]
    ) -> Payload:
        """Train the prompts that came; in the warm-up, measure what the choice needs."""
        seed, warm, w = payload.int("seed"), payload.int("warmup") > 0, _adapter.group(payload.arrays)
        scores: Tensors = {}
        measured: dict[str, float] = {}
        if warm:
            if model.attachment is not None:
                adapters.detach(model)
            few = next(batches.repeat_batch(0, min(self.batch_size, SCORED), 1))
            scores["scores"] = layer_scores(model, few)
        self.attach(model, seed, sorted({i for i in map(layer_of, w) if i is not None}))
        adapters.load_(model, w)
        loss = self.train(model, batches, key, {})
        if warm and self.layers_rule == LIPSCHITZ:
            few = next(batches.repeat_batch(0, self.curvature_rows or self.batch_size, 1))
            curvature, L = spectrum_and_change(model, few, w, lanczos=self.lanczos, key=key)
            measured["kept"] = share_by_gap(curvature, L)
        trained = adapters.export(model)
        return Payload({n: trained[n] for n in w} | scores, {"n": batches.n, "loss": loss} | measured)

    # The server ----------------------------------------------------------------------------------------

    def aggregate(self, state: State, replies: Iterable[Reply], rule: Rule = MEAN) -> State:
        """Do a round of warm-up, or of adaptive optimization."""
        return self.warm(state, replies, rule) if state.warmup else self.step(state, replies, rule)

    def warm(self, state: State, replies: Iterable[Reply], rule: Rule) -> State:
        """Average, and add the devices' measurements up; the layers are chosen after the last such round."""
        w, measured = rule.combining(state.tensors), rule.combining()
        for reply in replies:
            n = float(reply.payload.int("n"))
            w.add(n, {name: reply.payload.array(name) for name in state.tensors})
            kept = np.array(reply.payload.scalars.get("kept", 1.0))
            scores = np.clip(reply.payload.array("scores"), 0.0, self.batch_size / SHIFT)
            measured.add(n, {"scores": scores, "kept": kept})
        if not w.total:
            return state
        means = measured.tensors()
        state = state._replace(
            tensors=_adapter.rounded(w.tensors()),
            warmup=state.warmup - 1,
            rows=state.rows + int(w.total),
            scores=state.scores + w.total * means["scores"],
            kept=state.kept + w.total * float(means["kept"]),
        )
        if state.warmup:
            return state
        return self.begin(state, choose_layers(state.scores, self.layers_rule, state.kept / state.rows))

    def begin(self, state: State, layers: Iterable[int]) -> State:
        """Return the state from which only these layers' prompts travel: momentum and variates are zero."""
        taken = np.array(sorted(layers), np.int64)
        tensors = {n: t for n, t in state.tensors.items() if layer_of(n) in (None, *taken.tolist())}
        zeros = {n: np.zeros(t.shape) for n, t in tensors.items()}
        return state._replace(tensors=tensors, layers=taken, warmup=0, v=zeros, c=zeros)

    def step(self, state: State, replies: Iterable[Reply], rule: Rule) -> State:
        """Take every device's momentum step from wbar, averaged (section 4.2; no momentum in the first round)."""
        w, answered, c_k = state.tensors, 0, dict(state.c_k)
        past = state.c_k if rule.name == "mean" else _adapter.NOTHING
        w_k, mean, changes = rule.combining(w), MEAN.combining(), rule.combining()
        for reply in replies:
            answered += 1
            n, sent = reply.payload.int("n"), reply.payload.arrays
            old = {x: past.get(f"{reply.client}/{x}", state.c[x]) for x in w}  # a new device starts at c
            new = _adapter.rounded(client_variate(old, state.c, w, sent, self.walked(reply.rows or n)[0]))
            c_k |= {f"{reply.client}/{x}": value for x, value in new.items()}
            w_k.add(n, {x: sent[x] for x in w})
            mean.add(n, new)
            changes.add(self.local_steps(n), {x: new[x] - old[x].astype(np.float64) for x in w})
        if not answered:
            return state
        rho = min(1.0, answered * len(w) / len(c_k))  # the share of the devices seen so far that answered
        moved, wbar, v, eta_s = changes.tensors(), w_k.tensors(), state.v, state.eta_s
        c = {x: state.c[x] + rho * change for x, change in moved.items()}
        own = mean.tensors() if rule.name == "mean" else {x: state.c[x] + moved[x] for x in w}
        if state.steps:
            eta_s = max(0.99 * eta_s, min(1e-4, self.server_lr))
            beta = self.beta
            v = {x: beta * v[x] + (1 - beta) * (w[x] - wbar[x]) + (c[x] - own[x]) for x in w}
        tensors = _adapter.rounded({x: wbar[x] - eta_s * v[x] for x in w})
        return state._replace(tensors=tensors, steps=state.steps + 1, eta_s=eta_s, v=v, c=c, c_k=c_k)

    def cannot_combine(self, rule: Rule, asked: int) -> str:
        if rule.name == PRIVATE:
            return (
                "it keeps a variate of every device, which no noise hides; use fedpetuning with module=prefix"
            )
        return super().cannot_combine(rule, asked)

    def cannot_hide_rows(self) -> str:
        return "it scores layers by rows, which no noise hides; use fedpetuning with module=prefix"

    def report(self, state: State) -> dict[str, float]:
        return {"layers": float(len(state.layers))}

    def apply(self, model: Model, state: State) -> None:
        self.attach(model, state.seed, state.layers)
        adapters.load_(model, state.tensors)

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
        products = self.lanczos if self.layers_rule == LIPSCHITZ else 0
        return Footprint(
            "backward",
            module,
            state,
            checkpointing=self.recomputes,
            hessian_products=products,
            hessian_rows=self.curvature_rows,
            whole_gradient=self.clip > 0,
        )


# Which layers, and how many (section 4.1) --------------------------------------------------------------
#
# Two measurements on one batch of a device:
#
#     scores     how alike the rows' outputs of a layer are, with no prompts anywhere (needs only forwards)
#     curvature  the eigenvalues theta of the Hessian H of the loss in all prompts, each with its share of all R
#                eigenvalues, and how much H changes on the way that the device went (L, for the Lipschitz rule)
#
# H is never formed: a product H v is a gradient of (gradient . v).  `lanczos` of them span a subspace Q, whose
# eigenvalues are good estimates of the extreme ones; the share of each is its squared first component (stochastic
# Lanczos quadrature).  With R <= lanczos numbers of prompts Q is everything and the result is exact.


def layer_of(name: str) -> int | None:
    """Return the layer whose prompt has this parameter name; None for what is no prompt (a classification head's)."""
    match = re.search(r"\.(\d+)\..*\.prefix\.", name)
    return int(match[1]) if match else None


def prompts(model: Model) -> list[nn.Parameter]:
    """Return the parameters that H is taken in: every prompt that the model carries, in name order."""
    return [p for name, p in adapters.trainable(model).items() if layer_of(name) is not None]


def score(outputs: Tensor, mask: Tensor) -> float:
    """Return s = sum_i ln(lambda_i) + 1/lambda_i of the b rows' similarity S_ij = cos(h_i, h_j).

    `outputs` [b, T, d] of a layer, `mask` [b, T] 1 on real tokens: padding counts as zero, so that S compares
    texts and not the amount of padding.  1/lambda rules: the more alike the rows, the higher the score, b / SHIFT at most;
    the least is above 0, since ln(x) + 1/x is at least 1.
    """
    h = (outputs.double() * mask.unsqueeze(-1)).flatten(1)
    h = nn.functional.normalize(h, dim=1)
    eigenvalues = torch.linalg.eigvalsh(h @ h.T).clamp(min=0) + SHIFT
    return float((eigenvalues.log() + 1 / eigenvalues).sum())


def layer_scores(model: Model, batch: Batch) -> np.ndarray:
    """Return float64[L], the score of every layer on one batch; `model` must carry no prompts.

    A layer's output is what it hands on: a decoder's list has the last normed.
    """
    outputs: list[Tensor] = []
    hooks = [
        model.net.get_submodule(layer.name).register_forward_hook(
            lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in layers_of(model.net)
    ]
    more = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    try:
        with eval_mode(model.net):
            model.net.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more)
    finally:
        for hook in hooks:
            hook.remove()
    mask = batch.attention_mask.double()
    scores = []
    for h in outputs:
        heard()
        scores.append(score(h, mask))
    return np.array(scores)


class Spectrum(NamedTuple):
    """Eigenvalues, ascending, and each one's share of all (their sum is 1)."""

    theta: np.ndarray
    share: np.ndarray


Product = Callable[[np.ndarray], np.ndarray]  # v float64[R] -> H v


def subspace(product: Product, start: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Run Lanczos with full reorthogonalisation: orthonormal Q [R, <=count] from `start`, and H Q.

    Everything (the identity) when R <= count.
    """
    size = len(start)
    if size <= count:
        Q = np.eye(size)
        return Q, np.stack([product(q) for q in Q], axis=1)
    q = start / np.linalg.norm(start)
    basis, images = [q], [product(q)]
    while len(basis) < count:
        r = images[-1].copy()
        for _ in range(2):  # twice is enough (Kahan)
            for b in basis:
                r -= (b @ r) * b
        if np.linalg.norm(r) <= 1e-6 * np.linalg.norm(images[-1]):
            break  # the subspace is invariant: nothing new to find
        basis.append(r / np.linalg.norm(r))
        images.append(product(basis[-1]))
    return np.stack(basis, axis=1), np.stack(images, axis=1)


def ritz(Q: np.ndarray, HQ: np.ndarray) -> Spectrum:
    """Return the eigenvalues of Q' H Q, with the share of the spectrum that each stands for."""
    T = Q.T @ HQ
    if not np.isfinite(T).all():
        raise FleetError(
            "the curvature of the loss is not finite at this device's prompts",
            hint="lower lr, or set layers_rule=half",
        )
    theta, U = np.linalg.eigh((T + T.T) / 2)
    whole = Q.shape[0] == Q.shape[1]
    return Spectrum(theta, np.full(len(theta), 1 / len(theta)) if whole else U[0] ** 2)


def spectrum_and_change(
    model: Model, batch: Batch, came: dict[str, np.ndarray], *, lanczos: int, key: int
) -> tuple[Spectrum, float]:
    """Return (spectrum of H at the model's prompts P, L), on one batch, in eval mode.

    The paper's base function is B(D) = H D - grad F(P + D).  Its slope at D is H - H(P + D): L is the norm of
    that on the subspace, with P + D = `came`, the prompts that the device's round began from.  As a sample of
    the Lipschitz constant it is a lower bound.
    """
    here = adapters.export(model)
    with eager(model.net), torch.enable_grad():
        product, size = products(model, batch), sum(p.numel() for p in prompts(model))
        start = np.where(uniforms(key, "lanczos", size) < 0.5, -1.0, 1.0)
        Q, HQ = subspace(product, start, lanczos)
        del product  # its graph is as large as the one of the next
        give_back()
        adapters.load_(model, came)
        there = products(model, batch)
        moved = np.stack([there(q) for q in Q.T], axis=1)
    adapters.load_(model, here)
    return ritz(Q, HQ), float(np.linalg.norm(HQ - moved, 2))


def products(model: Model, batch: Batch) -> Product:
    """Return v -> H v for the loss of `batch` in all prompts: one forward, then a double backward each."""
    parameters = prompts(model)
    gradients = torch.autograd.grad(loss_tensor(model, batch), parameters, create_graph=True)
    g = torch.cat([x.flatten() for x in gradients])

    def product(v: np.ndarray) -> np.ndarray:
        heard()
        w = torch.from_numpy(v).to(g)
        parts = torch.autograd.grad(g, parameters, w, retain_graph=True)
        return torch.cat([x.flatten() for x in parts]).double().cpu().numpy()

    return product


@contextmanager
def eager(net: Any) -> Iterator[None]:
    """Compute attention in plain operations while the block runs: the fused kernels cannot be differentiated twice."""
    usual = net.config._attn_implementation
    net.config._attn_implementation = (
        IMPLEMENTATIONS["eager"] if usual in IMPLEMENTATIONS.values() else "eager"
    )
    try:
        yield
    finally:
        net.config._attn_implementation = usual


def share_by_gap(spectrum: Spectrum, L: float) -> float:
    """Return the share by the paper's rule: 1 - m/R, with m the first place where theta[m+1] - theta[m] > 4 L (ascending).

    The m flat directions below the gap cannot mix with those above it, so they may go.  No gap: all stay.
    """
    gaps = np.flatnonzero(np.diff(spectrum.theta) > 4 * L)
    return max(0.0, 1.0 - float(spectrum.share[: gaps[0] + 1].sum())) if len(gaps) else 1.0


def layer_count(share: float, layers: int) -> int:
    """Return so many layers that their share is at least `share`; one at least."""
    return max(1, min(layers, math.ceil(round(share * layers, 9))))


def choose_layers(scores: np.ndarray, rule: str, share: float) -> np.ndarray:
    """Return the best layers by score in order, as many as the rule says; `share` is what the curvature needs."""
    L = len(scores)
    number = (
        layer_count(share, L) if rule == LIPSCHITZ else min(L, -(-L // 2) if rule == "half" else int(rule))
    )
    order = np.argsort(-scores, kind="stable")
    log.info("prompts of %d of %d layers travel; by score: %s", number, L, order.tolist())
    return np.sort(order[:number])
