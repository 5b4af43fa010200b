# SPDX-License-Identifier: Apache-2.0
"""Find the layers of a transformer, and within each its attention, projections and block outputs.

Trainable modules are attached there.  A family is known by the names of its modules, which its relatives share:
llama's are those of Mistral, Qwen, SmolLM and Gemma, BERT's those of RoBERTa, XLM-R and Electra.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from torch import nn

from fleetune.errors import ModelError


class Names(NamedTuple):
    """Module names within one layer."""

    attention: str  # the module that calls the attention function
    query: str  # within it
    key: str
    value: str
    ends: tuple[str, str]  # what attention and feed-forward block hand to the residual stream
    stream: str  # the layer's own name ends in this list's name and a number


FAMILIES: Final = (
    Names("self_attn", "q_proj", "k_proj", "v_proj", ("self_attn.o_proj", "mlp.down_proj"), "layers"),
    Names("attention.self", "query", "key", "value", ("attention.output.dense", "output.dense"), "layer"),
    Names("attention", "q_lin", "k_lin", "v_lin", ("attention.out_lin", "ffn.lin2"), "layer"),  # DistilBERT
)


class Layer(NamedTuple):
    """One layer of a net: names in full, and the sizes of its keys and values."""

    name: str
    attention: str
    query: str
    value: str
    ends: tuple[str, str]
    heads: int  # of keys and values: fewer than the queries' under grouped-query attention
    width: int  # of one head


def layers_of(net: nn.Module) -> list[Layer]:
    """Return the layers of a net, in order.  ModelError for a family whose names are not known."""
    modules = dict(net.named_modules())
    for family in FAMILIES:
        suffix = "." + family.attention
        names = [n.removesuffix(suffix) for n in modules if n.endswith(suffix)]
        found = [n for n in names if n.split(".")[-2:-1] == [family.stream]]
        if found and hasattr(modules[found[0] + suffix], family.key):
            return [_layer(name, family, modules) for name in found]
    raise ModelError(
        f"the layers of a {type(net).__name__} are named in a way that is not known here",
        hint="llama-like decoders and BERT-like encoders are; LoRA and full tuning fit any model",
    )


def is_causal(net: nn.Module) -> bool:
    """Return whether this is a decoder: each token sees only those before it."""
    return any(getattr(module, "is_causal", False) for module in net.modules())


def head_of(net: Any) -> list[str]:
    """Return the names of a classifier's own parameters, all that come after the encoder's layers; [] if none."""
    if not type(net).__name__.endswith("ForSequenceClassification"):
        return []
    inside = net.base_model_prefix + "."
    return [n for n, _ in net.named_parameters() if not n.startswith(inside) or ".pooler." in n]


def _layer(name: str, family: Names, modules: dict[str, Any]) -> Layer:
    attention = f"{name}.{family.attention}"
    module = modules[attention]
    width = next(
        (int(getattr(module, n)) for n in ("head_dim", "attention_head_size") if hasattr(module, n)), 0
    )
    width = width or int(module.config.hidden_size) // int(module.config.num_attention_heads)
    out = int(getattr(module, family.key).out_features)
    return Layer(
        name,
        attention,
        f"{attention}.{family.query}",
        f"{attention}.{family.value}",
        (f"{name}.{family.ends[0]}", f"{name}.{family.ends[1]}"),
        out // width,
        width,
    )
