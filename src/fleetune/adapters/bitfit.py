# SPDX-License-Identifier: Apache-2.0
"""Train some of the model's own parameters (BitFit, norms, or all) as fp32 copies.

BitFit (Ben Zaken, Ravfogel, Goldberg, ACL 2022, arXiv 2106.10199) trains the biases alone.  Models without
biases (llama and its relatives) train the weights of the norms instead, also one number a channel and layer.
`Full` trains every tensor.

The stored tensors are put aside, untouched, and restored when the part is removed.  On a 16-bit base the copies
are still fp32, and each module sees them rounded to its dtype while it runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fleetune.errors import ModelError
from fleetune.models.model import Model, named_tensors


class ParameterCopies:
    """fp32 copies in place of the parameters `names` of `net` (of tied ones: under the first of their names)."""

    def __init__(self, net: Any, names: Collection[str]) -> None:
        stored = {n: p for n, p in named_tensors(net) if n in names}
        self.parameters: Mapping[str, nn.Parameter] = {
            n: nn.Parameter(p.detach().to(torch.float32, copy=True)) for n, p in stored.items()
        }
        self._pairs = [(p, self.parameters[n]) for n, p in stored.items()]
        self._places: list[tuple[nn.Module, str, Tensor]] = []
        self._hooks: list[Any] = []
        copies = {id(p): copy for p, copy in self._pairs}
        for module in net.modules():
            own = {n: p for n, p in module._parameters.items() if p is not None and id(p) in copies}
            for name, parameter in own.items():
                self._places.append((module, name, parameter))
                module._parameters[name] = copies[id(parameter)]
            if any(p.dtype != torch.float32 for p in own.values()):
                self._hooks += _rounded(module, {n: p.dtype for n, p in own.items()})

    def remove(self) -> None:
        """Put the stored tensors back."""
        for hook in self._hooks:
            hook.remove()
        for module, name, parameter in self._places:
            module._parameters[name] = parameter  # type: ignore[assignment]

    def fold(self) -> None:
        """Write the copies into the stored tensors, rounded once."""
        with torch.no_grad():
            for stored, copy in self._pairs:
                stored.copy_(copy)


def _rounded(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> list[Any]:
    """Register hooks under which `module` sees its parameters in these dtypes while it runs."""
    originals: dict[str, nn.Parameter] = {}

    def before(module: nn.Module, args: Any) -> None:
        for name, dtype in dtypes.items():
            originals[name] = module._parameters[name]  # type: ignore[assignment]
            module._parameters[name] = originals[name].to(dtype)  # type: ignore[assignment]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(originals)

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]


def norms(net: Any) -> list[str]:
    """Return the names of the norms' parameters: of modules whose name or class says so (GPT-2 calls them `ln_1`)."""
    found = {name for name, module in net.named_modules() if "norm" in type(module).__name__.lower()}
    return [
        n
        for n, p in named_tensors(net)
        if p.dim() == 1 and ("norm" in n.lower() or n.rpartition(".")[0] in found)
    ]


@dataclass(frozen=True)
class Bitfit:
    """The biases; in a model that has none, the weights of its norms."""

    def put_on(self, model: Model, seed: int) -> ParameterCopies:
        """Replace them by copies, which start at their values whatever the seed."""
        names = [n for n, _ in named_tensors(model.net) if n.endswith("bias")] or norms(model.net)
        if not names:
            raise ModelError("the model has neither biases nor norms to tune", hint="choose another module")
        return ParameterCopies(model.net, names)


@dataclass(frozen=True)
class Full:
    """Every tensor of the model."""

    def put_on(self, model: Model, seed: int) -> ParameterCopies:
        """Replace all by copies, which start at their values whatever the seed."""
        return ParameterCopies(model.net, {n for n, _ in named_tensors(model.net)})
