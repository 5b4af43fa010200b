"""The papers' way, plainly: what ours is measured against.

MeZO (arXiv 2305.17333, Algorithm 1 and the code its authors published): a step is four passes over all
weights, +eps, -2 eps, +eps and the update.  Each seeds torch's global generator anew, walks the trainable
tensors in order and draws one `torch.normal` a tensor, in the weights' own type.  The published code writes
out of place (`p.data = p.data + ...`) and computes a weight-decay term even when it is zero; `in_place=True`
leaves both off, so that what is left of our gain is not only that.

FedKSeed (arXiv 2312.06353): to catch up, one such update pass for each of the K seeds.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Named = Sequence[tuple[str, Tensor]]  # `named_parameters`: in the order of the modules, tied ones once


def direction(like: Tensor) -> Tensor:
    """The next normals of the global generator."""
    return torch.normal(mean=0.0, std=1.0, size=like.size(), dtype=like.dtype, device=like.device)


@torch.no_grad()
def perturb(named: Named, seed: int, scale: float, eps: float, *, in_place: bool = False) -> None:
    """w <- w + scale * eps * z(seed): one pass."""
    torch.manual_seed(seed)
    for _, p in named:
        z = direction(p)
        if in_place:
            p.add_(z, alpha=scale * eps)
        else:
            p.data = p.data + scale * z * eps


@torch.no_grad()
def update(named: Named, seed: int, g: float, lr: float, *, in_place: bool = False) -> None:
    """w <- w - lr * (g * z(seed) + 0 * w): one pass; no decay on biases and layer norms."""
    torch.manual_seed(seed)
    for name, p in named:
        z = direction(p)
        if in_place:
            p.add_(z, alpha=-lr * g)
        elif any(part in name for part in ("bias", "layer_norm", "layernorm")):
            p.data = p.data - lr * (g * z)
        else:
            p.data = p.data - lr * (g * z + 0.0 * p.data)


def step(
    named: Named, loss: Callable[[], float], seed: int, eps: float, lr: float, *, in_place: bool = False
) -> float:
    """One step of MeZO: four passes and two forwards.  The scalar gradient."""
    perturb(named, seed, +1, eps, in_place=in_place)
    plus = loss()
    perturb(named, seed, -2, eps, in_place=in_place)
    minus = loss()
    perturb(named, seed, +1, eps, in_place=in_place)
    g = (plus - minus) / (2 * eps)
    update(named, seed, g, lr, in_place=in_place)
    return g
