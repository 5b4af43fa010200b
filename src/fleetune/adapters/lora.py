# SPDX-License-Identifier: Apache-2.0
"""LoRA, by PEFT.

Hu et al. 2021, arXiv 2106.09685: a frozen layer `W0` becomes `W0 x + (alpha / r) B A x` with `A` [r, in] and
`B` [out, r]; `B` starts at zero, so the model starts as it was.

What PEFT leaves to chance is fixed here.  `A` starts as in PEFT (Kaiming-uniform with a = sqrt(5), that is
uniform in +-1/sqrt(in)) but is drawn from Philox words keyed by (seed, tensor name).  Names are PEFT's file
names without the "base_model.model." in front, e.g. `model.layers.0.self_attn.q_proj.lora_A.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from peft import LoraConfig, LoraModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fleetune import models
from fleetune.adapters.core import attach, private_rng
from fleetune.adapters.layers import head_of, layers_of
from fleetune.errors import ModelError
from fleetune.models import Model

ADAPTER: Final = "default"  # PEFT's name for a model's only adapter
ALL_LINEAR: Final = "all-linear"
QUERY_VALUE: Final = "query-value"
INITS: Final = ("default",)


@dataclass(frozen=True)
class Lora:
    """LoRA of rank `r` on the linear layers `targets`.

    `targets` is "all-linear" (every linear layer but the output head), "query-value" (these projections of
    attention, the LoRA paper's choice) or the last parts of module names, as a sequence or separated by commas.
    `init` is "default".
    """

    r: int
    alpha: float
    dropout: float = 0.0
    targets: str | Sequence[str] = ALL_LINEAR
    init: str = "default"

    def put_on(self, model: Model, seed: int) -> LoraPart:
        """Give the linear layers of `model.net` adapters."""
        if self.init not in INITS:
            raise ModelError(f"no LoRA start named '{self.init}'", hint="choose one of " + ", ".join(INITS))
        if self.r < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ModelError(
                f"r = {self.r}, alpha = {self.alpha}, dropout = {self.dropout} cannot be",
                hint="r >= 1, alpha > 0, 0 <= dropout < 1",
            )
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=_targets(model.net, self.targets),
            task_type=TaskType.SEQ_CLS if head_of(model.net) else TaskType.CAUSAL_LM,
        )
        with private_rng(model.device):
            tuner = LoraModel(model.net, config, ADAPTER)
        parameters = {}
        for name, parameter in sorted(model.net.named_parameters(), key=lambda item: item[0]):
            if f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name:
                short = name.replace(f".{ADAPTER}.", ".")
                parameter.data = _start(short, parameter, seed)
                parameters[short] = parameter
        return LoraPart(tuner, parameters)


@dataclass(frozen=True)
class LoraPart:
    """The factors that PEFT has put beside the linear layers of a net."""

    tuner: LoraModel
    parameters: Mapping[str, nn.Parameter]

    def remove(self) -> None:
        """Put the plain layers back."""
        self.tuner.unload()

    def fold(self) -> None:
        """w <- round(w + (alpha / r) B A), added in fp32, rounded once."""
        with torch.no_grad():
            for layer in self.tuner.model.modules():
                if isinstance(layer, BaseTunerLayer):
                    weight = layer.get_base_layer().weight
                    weight.copy_(weight.float().add_(layer.get_delta_weight(ADAPTER).float()))


def attach_lora(
    model: Model,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ALL_LINEAR,
    init: str = "default",
    seed: int,
) -> None:
    """`attach(model, Lora(..), seed=seed)`."""
    attach(model, Lora(r, alpha, dropout, targets, init), seed=seed)


def _targets(net: Any, targets: str | Sequence[str]) -> list[str]:
    head = net.get_output_embeddings()
    apart = {n.rpartition(".")[0] for n in head_of(net)}  # trained itself, in full
    linear = {
        n
        for n, m in net.named_modules()
        if m is not head and n not in apart and (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
    }
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    if targets == ALL_LINEAR:
        return leaves
    if targets == QUERY_VALUE:
        return sorted({n.rpartition(".")[2] for layer in layers_of(net) for n in (layer.query, layer.value)})
    wanted = [t.strip() for t in targets.split(",")] if isinstance(targets, str) else list(targets)
    unknown = [t for t in wanted if not any(n == t or n.endswith("." + t) for n in linear)]
    if unknown or not wanted:
        raise ModelError(
            f"the model has no linear layer named '{', '.join(unknown)}'",
            hint="choose from " + ", ".join(leaves),
        )
    return wanted


def _start(name: str, parameter: Tensor, seed: int) -> Tensor:
    shape = tuple(parameter.shape)
    if ".lora_B." in name:
        return torch.zeros(shape, dtype=torch.float32, device=parameter.device)
    values = models.uniform(f"lora/{seed}/{name}", shape, 1 / math.sqrt(shape[1]))
    return torch.from_numpy(values).to(parameter.device)


def pairs(tensors: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Layer -> the names of its (B [out, r], A [r, in]) among an adapter's tensor names."""
    layers = sorted(n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight"))
    return {layer: (f"{layer}.lora_B.weight", f"{layer}.lora_A.weight") for layer in layers}
