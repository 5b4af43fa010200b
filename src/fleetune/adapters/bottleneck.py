"""Insert bottleneck adapters: small two-layer networks in series with the blocks' outputs.

Houlsby et al., ICML 2019, arXiv 1902.00751 (section 2.1, figure 2): what the attention block and the feed-forward block hand to
the residual stream, `h`, becomes

    h + U gelu(D h + d) + u        D [m, h], U [h, m]; U and u start at zero

and the layer norms are trained too.  Pfeiffer et al., EACL 2021, arXiv 2005.00247, have only the adapter behind the
feed-forward block (`places="pfeiffer"`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fleetune import models
from fleetune.adapters.attachment import ParameterCopies, Part
from fleetune.adapters.bitfit import norms
from fleetune.errors import ModelError
from fleetune.models.net.layers import layers_of, outputs_of
from fleetune.models.net.model import Model


@dataclass(frozen=True)
class Bottleneck:
    """Adapters of inner size `size` (m); `places` is "houlsby" (two a layer) or "pfeiffer" (one)."""

    size: int = 16
    places: str = "houlsby"
    norms: bool = True

    def put_on(self, model: Model, seed: int) -> BottleneckPart:
        """Hook an adapter behind the blocks of every layer."""
        if self.size < 1 or self.places not in ("houlsby", "pfeiffer"):
            raise ModelError(
                f"adapters of size {self.size} at '{self.places}' are not possible",
                hint="size >= 1, places houlsby or pfeiffer",
            )
        layers = layers_of(model.net)
        ends = [n for layer in layers for n in (layer.ends[-1:] if self.places == "pfeiffer" else layer.ends)]
        parameters: dict[str, nn.Parameter] = {}
        hooks = []
        for end in ends:
            own = _start(f"{end}.adapter", outputs_of(model.net, end), self.size, seed, model.device)
            parameters |= own
            block = model.net.get_submodule(end)
            hooks.append(block.register_forward_hook(_behind(list(own.values()))))
        inside = tuple(f"{layer.name}." for layer in layers)
        trained = [n for n in norms(model.net) if n.startswith(inside)] if self.norms else []
        return BottleneckPart(parameters, hooks, ParameterCopies(model.net, trained))


class BottleneckPart(Part):
    """The adapters' parameters, the hooks that run them, and the norms."""

    what = "bottleneck adapters, layers of their own,"

    def __init__(self, own: Mapping[str, nn.Parameter], hooks: list[Any], norms: ParameterCopies) -> None:
        self.parameters, self.hooks, self._norms = {**own, **norms.parameters}, hooks, norms

    def remove(self) -> None:
        """Remove the hooks, and put the norms back."""
        super().remove()
        self._norms.remove()


def _start(name: str, width: int, size: int, seed: int, device: str) -> dict[str, nn.Parameter]:
    down = models.uniform(f"adapter/{seed}/{name}", (size, width), 1 / math.sqrt(width))
    tensors = {
        f"{name}.down.weight": torch.from_numpy(down),
        f"{name}.down.bias": torch.zeros(size),
        f"{name}.up.weight": torch.zeros(width, size),
        f"{name}.up.bias": torch.zeros(width),
    }
    return {n: nn.Parameter(t.to(device)) for n, t in tensors.items()}


def _behind(own: list[nn.Parameter]) -> Any:
    down, d, up, u = own

    def adapt(module: nn.Module, args: Any, out: Any) -> Any:
        h: Tensor = out[0] if isinstance(out, tuple) else out  # experts give their router's scores too
        h = h + F.linear(F.gelu(F.linear(h.float(), down, d)), up, u).to(h.dtype)
        return (h, *out[1:]) if isinstance(out, tuple) else h

    return adapt
