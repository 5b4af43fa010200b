"""Count a model's parameters, linear layers and activations from its configuration alone.

Llama-like decoders are counted by formula, others on torch's meta device: their parameters exactly, their activations roughly.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fleetune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fleetune.models.net.layers import Layer


class Linear(NamedTuple):
    """A linear layer that LoRA adapts: its name in the model, and its weight's shape."""

    name: str
    out: int
    into: int


class Shape(NamedTuple):
    """The sizes that memory, traffic and time depend on.  Floats are counted a token, over all layers."""

    family: str
    params: int  # tied ones once
    vocab: int
    hidden: int
    linears: tuple[Linear, ...]
    layers: int
    widest: int  # floats alive at the widest point of one layer's forward
    kept: int  # floats that autograd keeps, but for norms and adapters
    norms: int  # floats that norms keep (in fp32 whatever the weights are)
    padded: int  # further floats kept when rows are padded (keys and values repeated for every head)
    largest: int  # elements of the largest tensor
    # each layer's attention module, and the numbers of a token's key; () where prefixes have no place
    attention: tuple[tuple[str, int], ...]
    query_value: tuple[Linear, ...]  # the projections that LoRA adapts by default
    labels: int = 0  # label words that an encoder's head chooses among (0: a causal language model)
    head: Mapping[str, tuple[int, ...]] = MappingProxyType({})  # of an encoder: trained with any module
    heads: int = 0  # of a layer's attention
    dropped: int = 0  # as many where attention is thinned out in training (0: the model has no dropout)
    experts: tuple[
        Linear, ...
    ] = ()  # parameters with the matrices of all experts of a layer, one below another
    # scales of a block by linear layer, where the model's file is known and has blocks with scales
    scales: Mapping[str, int] = MappingProxyType({})

    @property
    def outputs(self) -> int:
        """Numbers that the head gives at a scored position."""
        return self.labels or self.vocab


def shape_of(config: PretrainedConfig) -> Shape:
    """Return the shape of a configuration's model: by formula for a llama-like one, else counted on the meta device."""
    if config.model_type in BIASES and not hasattr(config, "fleetune_widths"):
        return _llama(config.to_dict(), config.model_type)
    return counted(config)


# Where each llama-like family has biases (q, k, v), (o), (mlp), or the key that says so; and norms on q and k.
BIASES: Final[Mapping[str, tuple[str | bool, str | bool, str | bool, bool]]] = {
    "llama": ("attention_bias", "attention_bias", "mlp_bias", False),
    "mistral": (False, False, False, False),
    "qwen2": (True, False, False, False),
    "qwen3": ("attention_bias", "attention_bias", False, True),
}


def _llama(c: Mapping[str, Any], family: str) -> Shape:
    h, inner, layers, vocab, heads = (
        int(c[k])
        for k in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "vocab_size",
            "num_attention_heads",
        )
    )
    head = int(c.get("head_dim") or h // heads)
    q, kv = heads * head, int(c.get("num_key_value_heads") or heads) * head
    in_qkv, in_o, in_mlp, head_norms = BIASES[family]
    qkv_bias, o_bias, mlp_bias = (
        b if isinstance(b, bool) else bool(c.get(b)) for b in (in_qkv, in_o, in_mlp)
    )
    block = {
        "self_attn.q_proj": (q, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q),
        "mlp.gate_proj": (inner, h),
        "mlp.up_proj": (inner, h),
        "mlp.down_proj": (h, inner),
    }
    biases = (q + 2 * kv) * qkv_bias + h * o_bias + (2 * inner + h) * mlp_bias
    in_layer = sum(out * into for out, into in block.values()) + biases + 2 * h + 2 * head * head_norms
    ends = vocab * h * (1 if c.get("tie_word_embeddings") else 2) + h
    linears = [
        Linear(f"model.layers.{i}.{name}", *size) for i in range(layers) for name, size in block.items()
    ]
    return Shape(
        family,
        layers * in_layer + ends,
        vocab,
        h,
        tuple(linears),
        layers,
        widest=max(3 * inner + 2 * h, 5 * q + 2 * kv + 2 * h),
        kept=layers * (2 * q + 2 * kv + 3 * inner + heads),  # q, k, v, attention's output; gate, its silu, up
        norms=layers * (2 * h + (q + kv) * head_norms),
        padded=layers * 2 * (q - kv),
        largest=max(vocab * h, inner * h, q * h),
        attention=tuple((f"model.layers.{i}.self_attn", kv) for i in range(layers)),
        query_value=tuple(x for x in linears if x.name.endswith((".q_proj", ".v_proj"))),
        heads=heads,
    )


def counted(config: PretrainedConfig) -> Shape:
    """Count the shape of any causal language model or encoder, from its layers on the meta device."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.pytorch_utils import Conv1D

    from fleetune.models.checks import is_encoder
    from fleetune.models.families.widths import build
    from fleetune.models.net.layers import head_of, read_past

    encoder = is_encoder(config)
    with torch.device("meta"):
        net: Any = AutoModelForSequenceClassification.from_config(config) if encoder else build(config)
    head, table = net.get_output_embeddings(), net.get_input_embeddings().weight
    own = {name.rpartition(".")[0] for name in head_of(net)} | read_past(net)
    linears = []
    for name, module in net.named_modules():
        if module is not head and name not in own and isinstance(module, torch.nn.Linear | Conv1D):
            a, b = module.weight.shape
            linears.append(Linear(name, b, a) if isinstance(module, Conv1D) else Linear(name, a, b))
    places = _places(net)
    projections = {name for place in places for name in (place.query, place.value)}
    takes_prefix = (
        net._supports_attention_backend and len(places) == config.get_text_config().num_hidden_layers
    )
    vocab, h = table.shape
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    outs, heads = sum(linear.out for linear in linears), int(getattr(text, "num_attention_heads", 0))
    # An encoder keeps q, k, v, what its two norms and its activation work on, and a few numbers a token.
    kept, norms = outs + layers * (h + heads + 4), 0
    if not encoder:  # and its layers' inputs: one that several layers of one parent share is one tensor
        shared = {(linear.name.rpartition(".")[0], linear.into) for linear in linears}
        kept, norms = outs + sum(into for _, into in shared) - 2 * layers * h, 2 * layers * h
    thins = bool(getattr(text, "attention_probs_dropout_prob", 0.0)) and encoder
    return Shape(
        config.model_type,
        sum(p.numel() for p in net.parameters()),
        vocab,
        h,
        tuple(linears),
        layers,
        widest=2 * h + 3 * max((linear.out for linear in linears), default=h),
        kept=kept,
        norms=norms,
        padded=0,
        largest=max(p.numel() for p in net.parameters()),
        attention=tuple((place.attention, place.heads * place.width) for place in places)
        if takes_prefix
        else (),
        query_value=tuple(linear for linear in linears if linear.name in projections),
        labels=config.num_labels if encoder else 0,
        head={name: tuple(net.get_parameter(name).shape) for name in head_of(net)},
        heads=heads,
        dropped=heads if thins else 0,
        experts=_experts(net),
    )


def _experts(net: Any) -> tuple[Linear, ...]:
    found = []
    for name, p in net.named_parameters():
        if p.dim() == 3 and p.shape[1] > 1:
            count, out, into = p.shape
            if getattr(net.get_submodule(name.rpartition(".")[0]), "is_transposed", False):
                out, into = into, out
            found.append(Linear(name, count * out, into))
    return tuple(found)


def _places(net: Any) -> list[Layer]:
    """Return the layers that have attention; [] for a net without a list of layers."""
    from fleetune.models.net.layers import layers_of

    try:
        return [layer for layer in layers_of(net) if layer.attention]
    except ModelError:
        return []
