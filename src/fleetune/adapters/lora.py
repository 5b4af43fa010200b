"""Attach LoRA (by PEFT) with reproducible starts, also those that subtract a part of the base.

Hu et al. 2021, arXiv 2106.09685: a frozen layer `W0` becomes `W0 x + (alpha / r) B A x` with `A` [r, in] and `B` [out, r].  A
start that is a part of the base (pissa, olora) is subtracted from it, W0 x + (alpha / r) (B A - B0 A0) x, with B0, A0 stored
beside the layer.  Names are PEFT's file names without "base_model.model." in front.

Factors may stay as they started.  FFA-LoRA (Sun et al., arXiv 2403.12313) trains B alone.  Fed-SB (Singhal et al., arXiv
2502.15436; LoRA-XS, Balazy et al., arXiv 2405.17604) trains R [r, r] between A and B: the layer is W0 x + (alpha / r) B R A x,
which is saved as the LoRA of B R and A.  B of the first and R start at 0, so that nothing has to be subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Self, cast

import numpy as np
import torch
from peft import LoraConfig, LoraModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from fleetune.adapters.attachment import Part, attachment_of, private_rng
from fleetune.adapters.lora_init import FROM_SEED, FROM_WEIGHTS
from fleetune.errors import MessageError, ModelError
from fleetune.models.families.foreign import short_error
from fleetune.models.lazy import into_memory
from fleetune.models.net.layers import head_of, is_linear, layers_of, read_past
from fleetune.models.net.model import Model

ADAPTER: Final = "default"  # PEFT's name for a model's only adapter
ALL_LINEAR: Final = "all-linear"
QUERY_VALUE: Final = "query-value"
INITS: Final = (*FROM_SEED, *FROM_WEIGHTS)
# by variant: what is trained, and what stays
VARIANTS: Final = MappingProxyType({"lora": ("AB", ""), "ffa": ("B", "A"), "sb": ("R", "AB")})


@dataclass(frozen=True)
class Lora:
    """LoRA of rank `r` on the linear layers `targets`.

    `targets` is "all-linear" (every linear layer but the output head), "query-value" (these projections of
    attention, the LoRA paper's choice) or the last parts of module names, as a sequence or separated by commas.
    `init` is one of `INITS` (`lora_init.py`), `variant` one of `VARIANTS`.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    targets: str | Sequence[str] = ALL_LINEAR
    init: str = "default"
    variant: str = "lora"

    def put_on(self, model: Model, seed: int) -> LoraPart:
        """Attach LoRA to the linear layers of `model.net`."""
        if self.init not in INITS:
            raise ModelError(f"no LoRA start named '{self.init}'", hint="choose one of " + ", ".join(INITS))
        if self.r < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ModelError(
                f"r = {self.r}, alpha = {self.alpha}, dropout = {self.dropout} is not possible",
                hint="r >= 1, alpha > 0, 0 <= dropout < 1",
            )
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=_targets(model.net, self.targets),
            # a leaf's name may be that of a head's module, too
            exclude_modules=[*_head_modules(model.net), *sorted(read_past(model.net))] or None,
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.net.modules()),
            task_type=TaskType.SEQ_CLS if head_of(model.net) else TaskType.CAUSAL_LM,
        )
        try:
            with private_rng(model.device):
                tuner = LoraModel(model.net, config, ADAPTER)
        except ValueError as error:  # a layer that PEFT does not take
            raise ModelError(
                f"PEFT puts no LoRA on a {type(model.net).__name__}: {short_error(error)}",
                hint="name other layers: targets=...",
            ) from error
        part = LoraPart(tuner, seed)
        _check_linear(part, type(model.net).__name__)
        if self.dropout and model.device == "cpu":
            _drop_lean(part, self.dropout)
        try:
            _initialise(part, self, seed)
        except ModelError:
            part.remove()
            raise
        return part


class LoraPart(Part):
    """The factors that PEFT has attached to the linear layers of a net, and those of the start that are subtracted or stay."""

    def __init__(self, tuner: LoraModel, seed: int) -> None:
        self.tuner, self.seed, self.hooks = tuner, seed, []
        self.subtracted: dict[str, Tensor] = {}  # B0, A0, fp32, under the parameters' names
        self.frozen: dict[str, Tensor] = {}  # fp32: those of A and B that are not trained
        # PEFT's, by the name of the linear layer
        self.layers: dict[str, Any] = {
            n: m for n, m in tuner.model.named_modules() if isinstance(m, BaseTunerLayer)
        }
        self.parameters: dict[str, nn.Parameter] = self.factors()

    def factors(self) -> dict[str, Any]:
        """Return B and A of every layer, of `sb` B R and A, by name."""
        both = {n: (m.lora_B[ADAPTER].weight, m.lora_A[ADAPTER].weight) for n, m in self.layers.items()}
        return dict(sorted(p for n, pair in both.items() for p in zip(factor_names(n), pair, strict=True)))

    def freeze(self, sides: str) -> None:
        """Let A stay, and B begin at 0; or both, with R from 0 between them."""
        for name, layer in self.layers.items() if sides else ():
            b, a = factor_names(name)
            self.frozen[a] = self.parameters.pop(a).requires_grad_(False)
            if "B" in sides:
                square = layer.lora_B[ADAPTER] = SquareLinear(self.parameters.pop(b).data)
                self.frozen[b], self.parameters[f"{name}.lora_R.weight"] = square.outer, square.core
            else:
                nn.init.zeros_(self.parameters[b])

    def subtract(self, factors: Mapping[str, Tensor]) -> None:
        """Subtract (alpha / r) B0 A0 from the base's layers, without writing to them; {} subtracts nothing."""
        self.subtracted.clear()
        self.subtracted.update(factors)
        if factors and not self.hooks:
            for name, layer in self.layers.items():
                hook = _subtracting_hook(self.subtracted, name, layer.scaling[ADAPTER])
                self.hooks.append(layer.get_base_layer().register_forward_hook(hook))

    def remove(self) -> None:
        """Restore the plain layers."""
        super().remove()
        self.tuner.unload()

    def fold(self) -> None:
        """Set w <- round(w + (alpha / r) (B A - B0 A0)), added in fp32, rounded once."""
        into_memory(self.tuner.model)  # of a mapped base
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.get_base_layer().weight.copy_(self._folded(name))

    def moved(self) -> dict[int, Callable[[], Tensor]]:
        """Return what makes the weight that `fold` writes, of each layer."""
        every = self.layers.items()
        return {m.get_base_layer().weight.data_ptr(): partial(self._folded, name) for name, m in every}

    @torch.no_grad()
    def _folded(self, name: str) -> Tensor:
        layer = self.layers[name]
        weight, delta = layer.get_base_layer().weight, layer.get_delta_weight(ADAPTER).float()
        if self.subtracted:
            b0, a0 = (self.subtracted[n] for n in factor_names(name))
            base_part = layer.scaling[ADAPTER] * (b0 @ a0)
            delta -= base_part.T if layer.fan_in_fan_out else base_part
        folded: Tensor = delta.add_(weight).to(weight.dtype).contiguous()
        return folded


class SquareLinear(nn.Module):
    """B R x, with R [r, r] trained, from 0 on."""

    outer: Tensor  # B

    def __init__(self, outer: Tensor) -> None:
        super().__init__()
        self.register_buffer("outer", outer)
        self.core = nn.Parameter(outer.new_zeros(outer.shape[1], outer.shape[1]))

    @property
    def weight(self) -> Tensor:
        return self.outer @ self.core

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def start_factors(model: Model) -> dict[str, np.ndarray]:
    """Return fp32 copies of the start's factors that are subtracted from the base, or that stay, by name; {} for none."""
    found = {
        n: t
        for part in attachment_of(model).parts
        if isinstance(part, LoraPart)
        for n, t in (part.frozen or part.subtracted).items()
    }
    return {n: t.cpu().numpy().copy() for n, t in sorted(found.items())}


def set_start_factors(model: Model, factors: Mapping[str, np.ndarray]) -> None:
    """Subtract these factors from the base, or let them stay, as the server that started the adapter did ({}: nothing).

    MessageError, with nothing changed, unless they have the names, shapes and dtype (fp32) of the adapter's own.
    """
    part = next((part for part in attachment_of(model).parts if isinstance(part, LoraPart)), None)
    own: Mapping[str, Tensor] = (part.frozen or part.parameters) if part else {}
    odd = [
        name
        for name in sorted(factors.keys() | (own.keys() if factors else ()))
        if name not in factors
        or name not in own
        or factors[name].shape != tuple(own[name].shape)
        or factors[name].dtype != np.float32
    ]
    if odd:
        raise MessageError(
            f"the start's tensors differ in {len(odd)} from this model's adapter, e.g. '{odd[0]}'"
        )
    given = {n: torch.from_numpy(np.array(a)).to(own[n].device) for n, a in sorted(factors.items())}
    if part and not part.frozen:
        part.subtract(given)
    for name, factor in given.items() if part and part.frozen else ():
        own[name].data.copy_(factor)


def pairs(tensors: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return layer -> the names of its (B [out, r], A [r, in]) among an adapter's tensor names."""
    layers = sorted(n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight"))
    return {layer: factor_names(layer) for layer in layers}


def factor_names(layer: str) -> tuple[str, str]:
    return f"{layer}.lora_B.weight", f"{layer}.lora_A.weight"


def _check_linear(part: LoraPart, net: str) -> None:
    """Take LoRA off again and raise ModelError where PEFT has put it on experts, which are no linear layers.

    PEFT does so where linear layers beside the experts have the names of the experts' own (ERNIE's shared experts).
    """
    linear = {name for name, layer in part.layers.items() if is_linear(layer.get_base_layer())}
    if len(linear) == len(part.layers):
        return
    part.remove()
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    raise ModelError(
        f"PEFT takes targets of a {net} for its experts, which are no linear layers",
        hint=f"name the others: targets={','.join(leaves)}",
    )


def _drop_lean(part: LoraPart, share: float) -> None:
    """Leave the dropout of linear layers' inputs to A itself, which keeps less of them for backward."""
    for layer in part.layers.values():
        if type(layer.lora_A[ADAPTER]) is nn.Linear:
            layer.lora_A[ADAPTER] = DroppedLinear.around(layer.lora_A[ADAPTER], share)
            layer.lora_dropout[ADAPTER] = nn.Identity()


def _initialise(part: LoraPart, spec: Lora, seed: int) -> None:
    """Set the factors to their start, fp32; ModelError when the start does not fit a layer."""
    start: dict[str, Tensor] = {}
    for name, layer in part.layers.items():
        weight = layer.get_base_layer().weight
        weight = weight.T if layer.fan_in_fan_out else weight
        out, into = weight.shape
        square = spec.variant == "sb"
        if spec.r > min(out, into) and (square or spec.init in FROM_WEIGHTS):
            what = "variant=sb" if square else f"a {spec.init} start"
            raise ModelError(
                f"{what} needs a rank up to the smaller side of every layer, r is {spec.r}",
                hint=f"use r={min(out, into)} or less: {name} is {out} x {into}",
            )
        if spec.init in FROM_WEIGHTS:
            factors = FROM_WEIGHTS[spec.init](weight.detach().float(), spec.r, layer.scaling[ADAPTER])
        else:
            drawn = FROM_SEED[spec.init](name, out, into, spec.r, seed)
            factors = torch.from_numpy(drawn[0]), torch.from_numpy(drawn[1])
        start |= dict(zip(factor_names(name), factors, strict=True))
    for name, parameter in part.parameters.items():
        parameter.data = start[name].to(parameter.device, torch.float32).contiguous()
    part.freeze(VARIANTS[spec.variant][1])
    if spec.init in FROM_WEIGHTS and not part.frozen:
        part.subtract({n: p.detach().clone() for n, p in part.parameters.items()})


def _subtracting_hook(subtracted: Mapping[str, Tensor], layer: str, scale: float) -> Any:
    """Return a hook on the base's layer that subtracts scale B0 A0 x from its output, where `subtracted` has them."""
    b, a = factor_names(layer)

    def take(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not subtracted:
            return output
        base_part = F.linear(F.linear(args[0].float(), subtracted[a]), subtracted[b])
        return output - (scale * base_part).to(output.dtype)

    return take


def _head_modules(net: Any) -> list[str]:
    """Return the modules of a classification head, which is trained in full."""
    return sorted({n.rpartition(".")[0] for n in head_of(net)})


def _targets(net: Any, targets: str | Sequence[str]) -> list[str]:
    head, apart = net.get_output_embeddings(), {*_head_modules(net), *read_past(net)}
    linear = {n for n, m in net.named_modules() if m is not head and n not in apart and is_linear(m)}
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    if targets == ALL_LINEAR:
        return leaves
    if targets == QUERY_VALUE:
        return _query_value(net, leaves)
    given = [t.strip() for t in targets.split(",")] if isinstance(targets, str) else targets
    wanted = list(dict.fromkeys(given))  # each once: PEFT compares every module with every one
    ends = {".".join(parts[i:]) for parts in (name.split(".") for name in linear) for i in range(len(parts))}
    unknown = [t for t in wanted if t not in ends]
    if unknown or not wanted:
        raise ModelError(
            f"the model has no linear layer named '{', '.join(unknown[:5])}' that LoRA can be put on",
            hint="choose from " + ", ".join(leaves),
        )
    return wanted


def _query_value(net: Any, leaves: Sequence[str]) -> list[str]:
    """Return the last parts of the names of a net's query and value projections; ModelError when it has none."""
    layers = [layer for layer in layers_of(net) if layer.attention]
    if not layers:
        raise ModelError(
            f"a {type(net).__name__} has no query and value projections; its linear layers are "
            + ", ".join(leaves),
            hint=f"name some: --set targets={','.join(leaves)}, or all of them: --set targets=all-linear",
        )
    return sorted({n.rpartition(".")[2] for layer in layers for n in (layer.query, layer.value)})


# ---------------------------------------------------------------- dropout


class DroppedLinear(nn.Linear):
    """A linear layer without bias, with dropout of its input in training mode, on the CPU.

    Until backward one byte a number is kept: the input x and which numbers stayed, not x * noise and the noise.  PEFT computes
    A (x * noise), for which autograd keeps x * noise and the noise: 8 bytes a number, of every layer apart.  x is one array for
    all layers that read it.  Backward multiplies again, so values and gradients are the same, bit for bit, also in
    `torch.autocast`.  It drops the numbers that `F.dropout` would drop from a contiguous input; for another input, torch draws
    in memory order.
    """

    share: float  # of the input's numbers that are dropped

    @classmethod
    def around(cls, layer: nn.Linear, share: float) -> Self:
        """Return a layer with the same parameter."""
        made = cls(1, 1, bias=False, device="meta")
        made.weight, made.share = layer.weight, share
        made.in_features, made.out_features = layer.in_features, layer.out_features
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return A (x * noise) in training mode, A x otherwise."""
        if not self.training:
            return F.linear(x, self.weight)
        stayed = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1.0 - self.share)  # as `F.dropout` draws
        return cast(Tensor, _Dropped.apply(x, self.weight, stayed, self.share))  # type: ignore[no-untyped-call]


class _Dropped(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]  # backward in autocast where forward was
    def forward(ctx: Any, x: Tensor, weight: Tensor, stayed: Tensor, share: float) -> Tensor:
        ctx.share = share
        ctx.save_for_backward(x, weight, stayed)
        return F.linear(x * _noise(stayed, share, x.dtype), weight)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, stayed = ctx.saved_tensors
        noise, g = _noise(stayed, ctx.share, x.dtype), gradients[0].reshape(-1, len(weight))
        of_weight = g.t().mm((x * noise).reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        of_x = g.mm(weight).view(x.shape) * noise if ctx.needs_input_grad[0] else None
        return of_x, of_weight, None, None


def _noise(stayed: Tensor, share: float, dtype: torch.dtype) -> Tensor:
    """Return 1 / (1 - share) for what stays and 0 for the rest."""
    return stayed.to(dtype).div_(1.0 - share)
