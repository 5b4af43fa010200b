"""What the tests of mixtures share: random ones, and what their experts read and compute, written out."""

from typing import Any

import torch
from family_harness import build
from torch import Tensor
from torch.nn import functional as F

from fleetune.compression.layerwise.driver import experts_in
from fleetune.compression.layerwise.experts import Experts
from fleetune.models import Model, tiny_tokenizer
from tiny_families import model_of


def mixture(family: str, **changes: Any) -> Model:
    """A random mixture, whose predictions depend on its experts."""
    net = build(family, **changes).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if "experts." in name and p.dim() == 3:
            p.mul_(2.0)
    return model_of(net, tiny_tokenizer(), family)


def experts_of(model: Model) -> list[Experts]:
    return [each for inside in experts_in(model) for each in inside]


def matrices(each: Experts) -> dict[str, Tensor]:
    """Each parameter as [E, out, in]: gpt-oss's are [E, in, out]."""
    return {n: p.mT if "gate_up_proj_bias" in dir(each.module) else p for n, p in each.parameters.items()}


def gates_and_ups(each: Experts, number: int, x: Tensor) -> Tensor:
    """What an expert's first matrix returns [n, 2 F], in the type of x."""
    W = each.module.gate_up_proj[number].to(x)
    if "gate_up_proj_bias" in dir(each.module):  # gpt-oss
        return x @ W + each.module.gate_up_proj_bias[number].to(x)
    return x @ W.T


def activated(each: Experts, z: Tensor) -> Tensor:
    """What an expert's second matrix reads [n, F]."""
    if "gate_up_proj_bias" in dir(each.module):
        gate, up = z[:, ::2].clamp(max=7), z[:, 1::2].clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = z.chunk(2, -1)
    return F.silu(gate) * up


def downs(each: Experts, number: int, a: Tensor) -> Tensor:
    """What it returns [n, H]."""
    W = each.module.down_proj[number]
    if "gate_up_proj_bias" in dir(each.module):
        return a @ W + each.module.down_proj_bias[number]
    return a @ W.T


@torch.no_grad()
def read_by(model: Model, each: Experts, windows: Tensor) -> tuple[Tensor, Tensor]:
    """What reaches the experts of a layer, float64 [tokens, C], and which of them each token chose."""
    calls: list[tuple[Tensor, Tensor]] = []
    hook = each.module.register_forward_pre_hook(lambda module, args: calls.append((args[0], args[1])))
    for window in windows:
        model.net(input_ids=window[None], use_cache=False)
    hook.remove()
    return torch.cat([a for a, _ in calls]).double(), torch.cat([b for _, b in calls])


def inputs_of(model: Model, each: Experts, windows: Tensor) -> dict[str, list[Tensor]]:
    """What the matrices of each expert read, float64 [its tokens, C], by parameter."""
    x, chosen = read_by(model, each, windows)
    found: dict[str, list[Tensor]] = {name: [] for name in each.parameters}
    for number in range(len(each.module.gate_up_proj)):
        mine = x[(chosen == number).any(-1)]
        read = activated(each, gates_and_ups(each, number, mine))
        for name, of in zip(found, (mine, read), strict=True):
            found[name].append(of)
    return found
