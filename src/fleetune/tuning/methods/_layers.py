# SPDX-License-Identifier: Apache-2.0
"""Choose the layers whose prompts are sent: score each layer, and find how many the curvature of the loss needs.

Che et al. 2023, arXiv 2310.15080, section 4.1 (partial prompt tuning).  Two measurements on one batch of a device:

    scores     how alike the rows' outputs of a layer are, with no prompts anywhere (needs only forwards)
    curvature  the eigenvalues theta of the Hessian H of the loss in all prompts, each with its share of all R
               eigenvalues, and how much H changes on the way that the device went (L, for the Lipschitz rule)

H is never formed: a product H v is a gradient of (gradient . v).  `lanczos` of them span a subspace Q, whose
eigenvalues are good estimates of the extreme ones; the share of each is its squared first component (stochastic
Lanczos quadrature).  With R <= lanczos prompts numbers Q is everything and the result is exact.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fleetune import adapters
from fleetune.adapters.prefix import IMPLEMENTATIONS
from fleetune.common.display import human_time
from fleetune.common.memory import give_back
from fleetune.data import Batch
from fleetune.errors import FleetError
from fleetune.evaluation.losses import eval_mode
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.net.layers import layers_of
from fleetune.models.net.model import Model
from fleetune.seeds.descent import uniforms

log = logging.getLogger(__name__)

CURVED = ("lipschitz", "plateau")  # rules that need the Hessian
LONG = 10.0  # seconds of a device's measurement that are worth a warning
SHIFT = 1e-5  # added to the eigenvalues of a similarity, so that 1/lambda stays below 1e5 (published code)
SMOOTH = 1e-5  # variance of a node of the spectral density, times its range where over 1 (published code)


def layer_of(name: str) -> int | None:
    """Return the layer whose prompt has this parameter name; None for what is no prompt (a classification head's)."""
    found = re.search(r"\.(\d+)\..*\.prefix\.", name)
    return int(found[1]) if found else None


def prompts(model: Model) -> list[nn.Parameter]:
    """Return the parameters that H is taken in: every prompt that the model carries, in name order."""
    return [p for name, p in adapters.trainable(model).items() if layer_of(name) is not None]


# The score of a layer ---------------------------------------------------------------------------------


def score(outputs: Tensor, mask: Tensor) -> float:
    """Return s = sum_i ln(lambda_i) + 1/lambda_i of the b rows' similarity S_ij = cos(h_i, h_j).

    `outputs` [b, T, d] of a layer, `mask` [b, T] 1 on real tokens: padding counts as zero, so that S compares
    texts and not the amount of padding.  1/lambda rules: the more alike the rows, the higher the score.
    """
    h = (outputs.double() * mask.unsqueeze(-1)).flatten(1)
    h = nn.functional.normalize(h, dim=1)
    eigenvalues = torch.linalg.eigvalsh(h @ h.T).clamp(min=0) + SHIFT
    return float((eigenvalues.log() + 1 / eigenvalues).sum())


def highest(rows: int) -> float:
    """Return a bound on the score of a layer on so many rows; the least is above 0, since ln(x) + 1/x is at least 1."""
    return rows / SHIFT


def scores(model: Model, batch: Batch) -> np.ndarray:
    """Return float64[L], the score of every layer on one batch; `model` must carry no prompts.

    A layer's output is what it hands on, also the last one's (which a decoder's list of hidden states has normed).
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
    return np.array([score(h, mask) for h in outputs])


# The spectrum of the Hessian --------------------------------------------------------------------------


class Spectrum(NamedTuple):
    """Eigenvalues, ascending, and each one's share of all (their sum is 1)."""

    theta: np.ndarray
    share: np.ndarray


def unheard() -> None:
    """Nobody wants to know."""


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


def spectrum(
    model: Model, batch: Batch, *, lanczos: int, key: int, heard: Callable[[], None] = unheard
) -> Spectrum:
    """Return the spectrum of H at the model's prompts, on one batch, in eval mode; `heard()` as in `products`."""
    with eager(model.net), torch.enable_grad():
        here, start = products(model, batch, heard), _start(model, key)
        _announce(here, start, min(lanczos, len(start)))
        return ritz(*subspace(here, start, lanczos))


def spectrum_and_change(
    model: Model,
    batch: Batch,
    came: dict[str, np.ndarray],
    *,
    lanczos: int,
    key: int,
    heard: Callable[[], None] = unheard,
) -> tuple[Spectrum, float]:
    """Return (spectrum of H at the model's prompts P, L), on one batch, in eval mode.

    The paper's base function is B(D) = H D - grad F(P + D).  Its slope at D is H - H(P + D): L is the norm of
    that on the subspace, with P + D = `came`, the prompts that the device's round began from.  As a sample of
    the Lipschitz constant it is a lower bound.
    """
    here = adapters.export(model)
    with eager(model.net), torch.enable_grad():
        product, start = products(model, batch, heard), _start(model, key)
        _announce(product, start, 2 * min(lanczos, len(start)))
        Q, HQ = subspace(product, start, lanczos)
        del product  # its graph is as large as the one of the next
        give_back()
        adapters.load_(model, came)
        there = products(model, batch, heard)
        moved = np.stack([there(q) for q in Q.T], axis=1)
    adapters.load_(model, here)
    return ritz(Q, HQ), float(np.linalg.norm(HQ - moved, 2))


def _announce(product: Product, start: np.ndarray, count: int) -> None:
    """Warn before `count` products that will take long, by the time of one."""
    began = time.monotonic()
    product(start)
    seconds = count * (time.monotonic() - began)
    if seconds > LONG:
        log.warning(
            "measuring curvature takes about %s on this device: %d Hessian products on %d prompt numbers; "
            "layers_rule=half needs none, a smaller lanczos fewer",
            human_time(seconds),
            count,
            len(start),
        )


def _start(model: Model, key: int) -> np.ndarray:
    """Return +1/-1 float64[R], keyed: where Lanczos begins."""
    size = sum(p.numel() for p in prompts(model))
    return np.where(uniforms(key, "lanczos", size) < 0.5, -1.0, 1.0)


def products(model: Model, batch: Batch, heard: Callable[[], None] = unheard) -> Product:
    """Return v -> H v for the loss of `batch` in all prompts: one forward, then a double backward each.

    `heard()` is called before each of these, and may raise: a device may have to stop.
    """
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


# How many layers --------------------------------------------------------------------------------------


def check_rule(rule: str) -> None:
    """Raise ValueError for a rule that there is not."""
    if rule not in (*CURVED, "half", "all") and not re.fullmatch("[1-9][0-9]*", rule):
        raise ValueError(f"layers_rule = {rule!r} is none of lipschitz, plateau, half, all, nor a number")


def needed_share(
    model: Model,
    batch: Batch,
    came: dict[str, np.ndarray],
    *,
    rule: str,
    lanczos: int,
    key: int,
    heard: Callable[[], None] = unheard,
) -> float:
    """Return the share of the layers that the curvature at the trained prompts needs, by one of the `CURVED` rules."""
    if rule == "plateau":
        return share_by_plateau(spectrum(model, batch, lanczos=lanczos, key=key, heard=heard))
    found, L = spectrum_and_change(model, batch, came, lanczos=lanczos, key=key, heard=heard)
    return share_by_gap(found, L)


def share_by_gap(spectrum: Spectrum, L: float) -> float:
    """Return the share by the paper's rule: 1 - m/R, with m the first place where theta[m+1] - theta[m] > 4 L (ascending).

    The m flat directions below the gap cannot mix with those above it, so they may go.  No gap: all stay.
    """
    gaps = np.flatnonzero(np.diff(spectrum.theta) > 4 * L)
    return max(0.0, 1.0 - float(spectrum.share[: gaps[0] + 1].sum())) if len(gaps) else 1.0


def share_by_plateau(spectrum: Spectrum) -> float:
    """Return the share by the published code's rule: r(t) of the (smoothed) spectrum above t, where it stops falling.

    t goes up from 0 in steps of 0.1; the plateau is four values within 0.005 of their neighbours; the steps
    are halved and t begins anew when r falls below half of r(0) first.  (The code's grid ends 0.01 beyond the
    outermost nodes and so cuts their tails, where the range is wide; here they are whole.)
    """
    theta, share = spectrum
    width = math.sqrt(2 * SMOOTH * max(1.0, float(np.ptp(theta))))

    def above(t: float) -> float:
        return float(sum(w * math.erfc((t - x) / width) / 2 for x, w in zip(theta, share, strict=True)))

    step = 0.1
    while True:
        r = [above(0.0)]
        while r[-1] >= r[0] / 2:
            r.append(above(len(r) * step))
            if len(r) >= 4 and np.abs(np.diff(r[-4:])).max() < 0.005:
                return min(1.0, r[-1])  # shares add up to 1 but for rounding
        step /= 2


def count(share: float, layers: int) -> int:
    """Return so many layers that their share is at least `share`; one at least."""
    return max(1, min(layers, math.ceil(round(share * layers, 9))))


def choose(scores: np.ndarray, rule: str, share: float) -> np.ndarray:
    """Return the best layers by score in order, as many as the rule says; `share` is what the curvature needs."""
    L = len(scores)
    number = count(share, L) if rule in CURVED else min(L, -(-L // 2) if rule == "half" else int(rule))
    order = np.argsort(-scores, kind="stable")
    log.info("prompts of %d of %d layers travel; by score: %s", number, L, order.tolist())
    return np.sort(order[:number])
