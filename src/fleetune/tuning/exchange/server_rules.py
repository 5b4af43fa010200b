"""Step along the mean update of a round: plain averaging, momentum, FedAdam; numpy only.

A round moves the model w by `Delta = mean_k w_k - w`; -Delta serves as a gradient (a "pseudo-gradient"):

    avg      w <- w + eta Delta                                     McMahan et al. 2017, arXiv 1602.05629
    avgm     m <- beta m + Delta;  w <- w + eta m                   Hsu et al. 2019, arXiv 1909.06335
    adam     m <- beta_1 m + (1 - beta_1) Delta                     Reddi et al. 2021, arXiv 2003.00295, Algorithm 2
             v <- beta_2 v + (1 - beta_2) Delta^2
             w <- w + eta m / (sqrt(v) + tau)                       from m = 0, v = tau^2, no bias correction

Everything is float64; the caller rounds once.  The numbers are the papers', but for adam's eta: 1e-3 is what OpenFedLLM (arXiv
2402.06954) sets for LoRA.  SCAFFOLD is Karimireddy et al. 2020, arXiv 1910.06378, Algorithm 1, option II.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

Tensors = dict[str, np.ndarray]

BETA: Final = 0.9
BETA_2: Final = 0.99
TAU: Final = 1e-3

# Every rule, and its usual server learning rate
ETA: Final[Mapping[str, float]] = MappingProxyType({"avg": 1.0, "avgm": 1.0, "adam": 1e-3})


def rate(rule: str, lr: float) -> float:
    """Return a rule's own learning rate where `lr` is 0; 0 stays for avg, whose own is 1 and needs no word."""
    return lr if lr or rule == "avg" else ETA[rule]


def check(rule: str, *, lr: float) -> None:
    """Raise ValueError, in plain words, for a rule or rate that cannot be."""
    if rule not in ETA:
        raise ValueError(f"server = {rule!r} is none of {', '.join(ETA)}")
    if not 0 <= lr < 1e3:
        raise ValueError(f"server lr = {lr} must be 0 (the rule's own) or positive")


def step(
    rule: str,
    w: Mapping[str, np.ndarray],
    delta: Mapping[str, np.ndarray],
    moments: Mapping[str, np.ndarray],
    *,
    lr: float = 0.0,
) -> tuple[Tensors, Tensors]:
    """Return (w, moments) after one server step along `delta` = mean_k w_k - w, both by tensor name, float64.

    `moments` is {} before the first step; afterwards it holds "m/NAME" and "v/NAME" where the rule has them.
    `lr` 0 stands for the rule's own (`ETA`).
    """
    eta = lr or ETA[rule]
    moved: Tensors = {}
    kept: Tensors = {}
    for name, value in w.items():
        d = delta[name].astype(np.float64)
        if rule == "avg":
            change = d
        elif rule == "avgm":
            change = kept[f"m/{name}"] = BETA * moments.get(f"m/{name}", 0.0) + d
        else:
            m = BETA * moments.get(f"m/{name}", 0.0) + (1 - BETA) * d
            v = BETA_2 * moments.get(f"v/{name}", np.full(d.shape, TAU**2)) + (1 - BETA_2) * (d * d)
            kept[f"m/{name}"], kept[f"v/{name}"] = m, v
            change = m / (np.sqrt(v) + TAU)
        moved[name] = value.astype(np.float64) + eta * change
    return moved, kept


def client_variate(
    c_k: Mapping[str, np.ndarray],
    c: Mapping[str, np.ndarray],
    w: Mapping[str, np.ndarray],
    w_k: Mapping[str, np.ndarray],
    travelled: float,
) -> Tensors:
    """Return SCAFFOLD's c_k' = c_k - c + (w - w_k) / (tau eta), float64; `travelled` is tau eta, the sum of the steps' lr.

    A missing name of `c_k` or `c` counts as zeros (nobody has a variate before round 1).
    """
    return {
        name: c_k.get(name, 0.0)
        - np.asarray(c.get(name, 0.0), np.float64)
        + (value.astype(np.float64) - w_k[name].astype(np.float64)) / travelled
        for name, value in w.items()
    }
