# SPDX-License-Identifier: Apache-2.0
"""Train some of the model's own parameters (BitFit, norms, or all) as fp32 copies.

BitFit (Ben Zaken, Ravfogel, Goldberg, ACL 2022, arXiv 2106.10199) trains the biases alone.  Models without
biases (llama and its relatives) train the weights of the norms instead, also one number a channel and layer.  A bias by which
a router only chooses experts (ERNIE 4.5's) has no gradient and counts as none.
`Full` trains every tensor.

The stored tensors are put aside, untouched, and restored when the part is removed.  On a 16-bit base the copies
are still fp32, and each module sees them rounded to its dtype while it runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from fleetune.errors import ModelError
from fleetune.models.lazy import into_memory
from fleetune.models.net.model import Model, named_tensors

CHOOSING: Final = "e_score_correction_bias"


class ParameterCopies:
    """fp32 copies in place of the parameters `names` of `net` (of tied ones: under the first of their names)."""

    def __init__(self, net: Any, names: Collection[str]) -> None:
        into_memory(net, names)
        stored = {n: p for n, p in named_tensors(net) if n in names}
        self.parameters: Mapping[str, nn.Parameter] = {
            n: nn.Parameter(p.detach().to(torch.float32, copy=True)) for n, p in stored.items()
        }
        self._pairs = [(p, self.parameters[n]) for n, p in stored.items()]
        self._places: list[tuple[nn.Module, str, Tensor]] = []
        self._hooks: list[Any] = []
        self._reads: list[tuple[nn.Module, dict[str, Any]]] = []
        copies = {id(p): copy for p, copy in self._pairs}
        for module in net.modules():
            own = {n: p for n, p in module._parameters.items() if p is not None and id(p) in copies}
            wide = {n: copies[id(p)] for n, p in own.items()}
            if any(p.dtype != torch.float32 for p in own.values()):
                self._reads.append((module, module._parameters))
                module._parameters = _RoundedReads(module._parameters, {n: p.dtype for n, p in own.items()})
                self._hooks += _rounded_once(module, wide, {n: p.dtype for n, p in own.items()})
            self._places += [(module, n, p) for n, p in own.items()]
            module._parameters.update(wide)

    def remove(self) -> None:
        """Put the stored tensors back."""
        for hook in self._hooks:
            hook.remove()
        for module, parameters in self._reads:
            module._parameters = parameters
        for module, name, parameter in self._places:
            module._parameters[name] = parameter  # type: ignore[assignment]

    def fold(self) -> None:
        """Write the copies into the stored tensors, rounded once."""
        with torch.no_grad():
            for stored, copy in self._pairs:
                stored.copy_(copy)


class _RoundedReads(dict[str, Any]):
    """A module's parameters, each rounded to a dtype for whoever reads it: its parent may (a Mamba mixer does)."""

    def __init__(self, before: dict[str, Any], dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__(before.items())
        self.dtypes: dict[str, torch.dtype] = {**getattr(before, "dtypes", {}), **dtypes}

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        return found.to(self.dtypes[name]) if name in self.dtypes else found


def _rounded_once(
    module: nn.Module, wide: Mapping[str, nn.Parameter], dtypes: Mapping[str, torch.dtype]
) -> list[Any]:
    """Register hooks that round the parameters `wide` of a module once each time it runs, however often it reads them."""

    def before(module: nn.Module, args: Any) -> None:
        module._parameters.update({n: p.to(dtypes[n]) for n, p in wide.items()})  # type: ignore[misc]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(wide)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


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
        biases = [n for n, _ in named_tensors(model.net) if n.endswith("bias") and not n.endswith(CHOOSING)]
        names = biases or norms(model.net)
        if not names:
            raise ModelError("the model has neither biases nor norms to tune", hint="choose another module")
        return ParameterCopies(model.net, names)


@dataclass(frozen=True)
class Full:
    """Every tensor of the model."""

    def put_on(self, model: Model, seed: int) -> ParameterCopies:
        """Replace all by copies, which start at their values whatever the seed."""
        return ParameterCopies(model.net, {n for n, _ in named_tensors(model.net)})
