"""Train prefixes: keys and values in front of a layer's own, which every token attends to.

Prefix-Tuning (Li and Liang, ACL 2021, arXiv 2101.00190), in the form of P-Tuning v2 (Liu et al., ACL 2022, arXiv 2110.07602,
section 3.2): the keys P_k and values P_v of T virtual tokens in each layer are trained directly.  For a query q and the layer's
own keys K and values V,

    softmax( q [P_k; K]^T / sqrt(d) ) [P_v; V]

where no mask hides the prefix; P_k is in the frame of rotated keys.  In a decoder the prefix is a past of T tokens, as in PEFT:
the first real token is at position T.  transformers refuses a past for encoders, whose positions do not move; so the attention
function itself is wrapped, for both kinds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fleetune import models
from fleetune.adapters.attachment import MOST_TOKENS, Part
from fleetune.errors import ModelError
from fleetune.models.net.layers import OTHER_MODULE, Layer, attention_layers, body_of, is_causal
from fleetune.models.net.model import Model

SPREAD: Final = 0.02
ATTRIBUTE: Final = "_fleetune_prefix"  # the attribute of an attention module that holds its prefix


@dataclass(frozen=True)
class Prefix:
    """`tokens` (T) virtual tokens in the layers `layers` (indices; None: all); `dropout` on both in training."""

    tokens: int = 20
    layers: Sequence[int] | None = None
    dropout: float = 0.0

    def put_on(self, model: Model, seed: int) -> PrefixPart:
        """Attach keys and values of their own to the attention of these layers."""
        every = _layers(model.net)
        wanted = range(len(every)) if self.layers is None else sorted(set(self.layers))
        if not 1 <= self.tokens <= MOST_TOKENS or not wanted or not set(wanted) <= set(range(len(every))):
            raise ModelError(
                f"a prefix of {self.tokens} tokens in layers {list(wanted)} is not possible",
                hint=f"1 to {MOST_TOKENS:,} tokens; layers among 0 to {len(every) - 1}",
            )
        parameters: dict[str, nn.Parameter] = {}
        for layer in (every[i] for i in wanted):
            for which in ("key", "value"):
                name = f"{layer.attention}.prefix.{which}"
                shape = (self.tokens, layer.heads * layer.width)
                values = models.uniform(f"prefix/{seed}/{name}", shape, SPREAD * 3**0.5)
                parameters[name] = nn.Parameter(torch.from_numpy(values).to(model.device))
        return PrefixPart(model.net, [every[i] for i in wanted], parameters, self.tokens, self.dropout)


def _layers(net: Any) -> list[Layer]:
    """Return the layers of a net; ModelError where its attention takes no prefix."""
    layers = attention_layers(net, "a prefix")
    if not net._supports_attention_backend:  # a class of transformers says so of itself
        raise ModelError(
            f"the attention of a {type(net).__name__} is no function that a prefix can be given to",
            hint=OTHER_MODULE,
        )
    if net.config._attn_implementation not in IMPLEMENTATIONS:
        raise ModelError(
            f"a prefix cannot be put on '{net.config._attn_implementation}' attention",
            hint="use sdpa or eager",
        )
    return layers


class PrefixPart(Part):
    """The prefixes of a net's layers."""

    what = "a prefix"

    def __init__(
        self,
        net: Any,
        layers: list[Layer],
        parameters: Mapping[str, nn.Parameter],
        tokens: int,
        dropout: float,
    ) -> None:
        self.parameters = parameters
        self._config = net.config
        self._before = net.config._attn_implementation
        net.config._attn_implementation = IMPLEMENTATIONS[self._before]
        self._modules = [net.get_submodule(layer.attention) for layer in layers]
        for layer, module in zip(layers, self._modules, strict=True):
            own = [parameters[f"{layer.attention}.prefix.{which}"] for which in ("key", "value")]
            setattr(module, ATTRIBUTE, LayerPrefix(own[0], own[1], layer.heads, dropout))
        move = _position_hook(tokens)
        causal = is_causal(net)
        self.hooks = [body_of(net).register_forward_pre_hook(move, with_kwargs=True)] if causal else []

    def remove(self) -> None:
        """Detach them."""
        for module in self._modules:
            delattr(module, ATTRIBUTE)
        self._config._attn_implementation = self._before
        super().remove()


@dataclass(frozen=True)
class LayerPrefix:
    """One layer's prefix: key and value [T, heads * width]."""

    key: Tensor
    value: Tensor
    heads: int
    dropout: float

    def heads_of(self, flat: Tensor, like: Tensor, training: bool) -> Tensor:
        """Return [T, heads * width] as [B, heads, T, width] in `like`'s dtype."""
        split = flat.view(flat.shape[0], self.heads, -1).transpose(0, 1).to(like.dtype)
        return nn.functional.dropout(split, self.dropout, training).expand(like.shape[0], -1, -1, -1)


def _position_hook(tokens: int) -> Any:
    """Return a hook that moves the positions of a decoder's tokens behind the prefix."""

    def move(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = kwargs.get("position_ids")
        if positions is None:
            ids = args[0] if args else kwargs.get("input_ids")
            shown = ids if ids is not None else kwargs["inputs_embeds"]
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            past = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(past, past + shown.shape[1], device=shown.device)[None]
        return args, {**kwargs, "position_ids": positions + tokens}

    return move


def _attend(
    inner: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
) -> Any:
    """Run an attention function with the module's prefix, if it has one, in front of keys and values."""
    own: LayerPrefix | None = getattr(module, ATTRIBUTE, None)
    if own is not None:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", False) if causal is None else causal
        if mask is None and causal and q.shape[2] > 1:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril(k.shape[2] - q.shape[2])[None, None]
        if mask is not None:  # nothing hides the prefix: True, or 0 in a mask that is added
            seen = mask.new_full((*mask.shape[:-1], own.key.shape[0]), mask.dtype == torch.bool)
            mask = torch.cat([seen, mask], dim=-1)
        k = torch.cat([own.heads_of(own.key, k, module.training), k], dim=2)
        v = torch.cat([own.heads_of(own.value, v, module.training), v], dim=2)
    return inner(module, q, k, v, mask, **options)


def _sdpa(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
    return _attend(ALL_ATTENTION_FUNCTIONS["sdpa"], module, q, k, v, mask, **options)


def _eager(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
    # a family's own function knows its sinks and caps
    family = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return _attend(_added_mask(family) if family else _plain, module, q, k, v, mask, **options)


def _added_mask(inner: Any) -> Any:
    """Return an attention function that is given its mask as numbers to add."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        return inner(module, q, k, v, mask, **options)

    return attend


def _plain(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention as written (twice differentiable), with keys and values repeated for grouped queries."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    wide = torch.promote_types(q.dtype, torch.float32)
    shares = nn.functional.dropout(scores.softmax(-1, wide).to(q.dtype), dropout, module.training)
    return (shares @ v).transpose(1, 2).contiguous(), shares


IMPLEMENTATIONS: Final = {"sdpa": "fleetune_prefix_sdpa", "eager": "fleetune_prefix_eager"}
for _before, _function in (("sdpa", _sdpa), ("eager", _eager)):
    AttentionInterface.register(IMPLEMENTATIONS[_before], _function)
    AttentionMaskInterface.register(IMPLEMENTATIONS[_before], ALL_MASK_ATTENTION_FUNCTIONS[_before])
