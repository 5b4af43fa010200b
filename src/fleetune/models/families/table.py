"""State what a GGUF file of each family of decoders has, a record a family, on top of the gguf package's map of names.

llama.cpp fixes in code what transformers reads from a configuration.  So a record also states for which configurations llama.cpp
computes the same (`Limits`); others are refused.  tests/deploy/formats/test_gguf_families.py runs llama.cpp beside transformers.

Gemma: norms multiply by 1 + w, and the file holds 1 + w; attention is scaled by query_pre_attn_scalar ** -0.5, which llama.cpp
takes for the head's width (in the 27B models, which it knows by their number of blocks, for width / heads).

Of experts transformers has [E, rows, columns] with the rows of an expert's gate and up together; llama.cpp and mlx-lm have three
tensors, of all experts' gates, ups and downs (`stacked`, `parts`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np

from fleetune.models.families import rope, widths

Options = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a configuration may say; any other value is refused."""

    options: Options = field(default_factory=dict)  # field -> values for which the runtime computes the same
    needed: tuple[str, ...] = ()  # fields that may not be None
    rotary: bool = True
    scalings: tuple[str, ...] = ("default",)  # kinds of rescaled rotary frequencies
    partial: bool = False  # a part of each head may be rotated
    square: bool = True  # heads must be as wide together as the model
    layers: tuple[str, ...] = ("full_attention",)  # what a block may be, where a configuration says
    mixed: bool = False  # there must be blocks of each of these kinds
    misfit: Callable[[Any], str | None] = lambda config: None  # what else has no place

    def unmet(self, config: Any) -> str | None:
        """Return what of a configuration has no place; None when all has one."""
        kind = str(config.model_type)
        for name, values in self.options.items():
            if (value := getattr(config, name, values[0])) not in values:
                return f"{name}={value!r} in a {kind}"
        for name in self.needed:
            if getattr(config, name) is None:
                return f"{name}=None in a {kind}"
        if self.rotary and (scaling := rope.kind(config)) not in self.scalings:
            return f"rotary scaling '{scaling}' in a {kind}"
        local = rope.in_windows(config)
        if local.get("rope_type", "default") != "default" or local.get("partial_rotary_factor", 1) != 1:
            return f"rescaled or partly rotated heads in the windows of a {kind}"
        if self.rotary and not self.partial and rope.width(config) != rope.head_dim(config):
            return f"partly rotated heads in a {kind}"
        found = getattr(config, "layer_types", None) or ()
        if other := [layer for layer in found if layer not in self.layers]:
            return f"layer_types with '{other[0]}' in a {kind}"
        if self.mixed and (lacking := [layer for layer in self.layers if layer not in found]):
            return f"layer_types without {lacking[0]} in a {kind}"
        if self.square and (wide := rope.head_dim(config) * config.num_attention_heads) != config.hidden_size:
            return f"a {kind} whose heads are {wide} wide together where the model is {config.hidden_size}"
        return self.misfit(config)


def irregular(config: Any, period: int) -> str | None:
    """Return a complaint unless the last of each `period` blocks looks at everything, and the others at a window; 0: always."""
    whole = [i + 1 for i, layer in enumerate(config.layer_types) if layer == "full_attention"]
    if period and whole == list(range(period, config.num_hidden_layers + 1, period)):
        return None
    return f"layer_types without a regular place for full_attention in a {config.model_type}"


def only(*others: Options, **fields: tuple[Any, ...]) -> Options:
    """Return options: those of others, and the values that fields may have."""
    return {name: values for options in (*others, fields) for name, values in options.items()}


SILU: Final = only(hidden_act=("silu",))
OWN_HEAD: Final = only(tie_word_embeddings=(False,))
TIED: Final = only(tie_word_embeddings=(True,))
ALL_EXPERTS: Final = only(decoder_sparse_step=(1,), mlp_only_layers=([],))  # in every block
NO_WINDOW: Final = only(use_sliding_window=(False,))
WINDOWS: Final = ("full_attention", "sliding_attention")
TANH: Final = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # transformers' names of the GELU by tanh

Value = int | float | str  # bool is an int
# key -> the field of a configuration, or what is computed from it
Keys = Mapping[str, str | Callable[[Any], int]]


@dataclass(frozen=True)
class Family(Limits):
    """How llama.cpp holds a family."""

    architecture: str  # llama.cpp's name
    layer_norm: bool = False  # norms subtract the mean
    interleaved: bool = False  # a head of the file's q and k has rows 0, d/2, 1, d/2 + 1, .. of the model's
    shifted: bool = False  # norms multiply by 1 + w, and the file holds that
    transposed: tuple[str, ...] = ()  # tensors that the model stores as [in, out]
    paired: bool = False  # rows of an expert's gate and up alternate in the model
    windowless: bool = False  # llama.cpp has no window: the file states the model's as the longest context
    keys: Keys = field(default_factory=dict)  # metadata beyond what all families have


OF_27B: Final[Mapping[str, int]] = MappingProxyType({"gemma2": 46, "gemma3_text": 62})  # blocks


# what the configurations call the number of experts
COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# the end of a parameter's name -> the ends of its parts' names
_ENDS: Final = {
    "experts.gate_up_proj": ("experts.gate_proj.weight", "experts.up_proj.weight"),
    "experts.gate_up_proj_bias": ("experts.gate_proj.bias", "experts.up_proj.bias"),
    "experts.down_proj": ("experts.down_proj.weight",),
    "experts.down_proj_bias": ("experts.down_proj.bias",),
}
# the same of what has another name in the gguf package's map
_ENDS_IN_GGUF: Final = _ENDS | {
    ".shared_mlp.input_linear.weight": (
        ".mlp.shared_experts.gate_proj.weight",
        ".mlp.shared_experts.up_proj.weight",
    ),
    ".gate.moe_statics.e_score_correction_bias": (".moe_statics.e_score_correction.bias",),
    ".self_attn.sinks": (".self_attn.sinks.weight",),
}
STACKED: Final = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")  # the file's tensors
_ONE_ROW: Final = ("ffn_gate_inp_shexp.weight", "exp_probs_b.bias")  # a vector in the file


class ParameterPart(NamedTuple):
    """A part of a parameter."""

    name: str
    number: int
    of: int  # the number of the parameter's parts

    def order(self, shape: tuple[int, ...], matrix: bool, paired: bool) -> np.ndarray | None:
        """Return which of all rows of the parameter each row of the part is, int64; None: all of them, as they are.

        `shape` is the parameter's, [.., rows, columns] of a matrix and [.., rows] of a bias; `paired`: gates and ups alternate.
        """
        if self.of == 1:
            return None
        before, rows = (shape[:-2], shape[-2]) if matrix else (shape[:-1], shape[-1])
        own = np.arange(rows).reshape((-1, self.of) if paired else (self.of, -1))
        taken = own[:, self.number] if paired else own[self.number]
        found: np.ndarray = (np.arange(math.prod(before))[:, None] * rows + taken).reshape(-1)
        return found


def stacked(parameter: str) -> list[ParameterPart]:
    """Return the parts of a parameter; one, under the parameter's own name, of those that are no experts'."""
    return _split(parameter, _ENDS)


def parts(parameter: str) -> list[ParameterPart]:
    """Return the parts of a parameter as `stacked` does, under names of the gguf package's map."""
    return _split(parameter.replace(".block_sparse_moe.", ".mlp."), _ENDS_IN_GGUF)


def _split(name: str, ends: Mapping[str, tuple[str, ...]]) -> list[ParameterPart]:
    for end, found in ends.items():
        if name.endswith(end):
            front = name.removesuffix(end)
            return [ParameterPart(front + part, i, len(found)) for i, part in enumerate(found)]
    return [ParameterPart(name, 0, 1)]


def is_bias(tensor: str) -> bool:
    """Return whether a tensor of the file is a bias, of one layer or of all experts'."""
    return tensor.endswith(".bias")


def part_shape(shape: tuple[int, ...], part: ParameterPart, tensor: str) -> tuple[int, ...]:
    """Return the shape in the file of a part of a parameter of this shape (with the rows of a matrix last but one)."""
    if tensor.endswith(_ONE_ROW):
        return shape[-1:]
    rows = -1 if is_bias(tensor) or len(shape) == 1 else -2
    whole = list(shape)
    whole[rows] //= part.of
    return tuple(whole)


def count_experts(config: Any) -> int:
    """Return the number of experts of a layer; 0 where a configuration has none."""
    return next((int(n) for name in COUNTS if (n := getattr(config, name, None))), 0)


def query_scalar(config: Any) -> int:
    """Return the number by whose root llama.cpp divides the scores of a gemma2 or gemma3_text."""
    if config.num_hidden_layers == OF_27B[config.model_type]:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def _gemma_misfit(config: Any, period: int) -> str | None:
    if config.query_pre_attn_scalar != query_scalar(config):
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar} with heads of {config.head_dim}"
    return irregular(config, period)


def _smollm3_misfit(config: Any) -> str | None:
    usual = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    return None if list(config.no_rope_layers) == usual else "no_rope_layers other than each 4th"


def _olmoe_misfit(config: Any) -> str | None:
    # llama.cpp wants a key for each query
    heads, of_keys = config.num_attention_heads, config.num_key_value_heads
    return None if of_keys == heads else f"num_key_value_heads={of_keys} of {heads} heads in a olmoe"


def _ernie_misfit(config: Any) -> str | None:
    # llama.cpp has experts up to the last block
    last, blocks = config.moe_layer_end_index, config.num_hidden_layers
    return None if last == blocks - 1 else f"moe_layer_end_index={last} of {blocks} blocks"


_PLAIN: Final = only(SILU, attention_bias=(False,), mlp_bias=(False,))
# llama.cpp approximates the exact GELU by tanh, for every family that has it
_GELU: Final = (*TANH, "gelu")
_GPT: Final = only(activation_function=_GELU, scale_attn_weights=(True,), add_cross_attention=(False,))
_OF_GEMMA: Final = only(TIED, attention_bias=(False,), use_bidirectional_attention=(False, None))
_TANH: Final = ("gelu_pytorch_tanh",)
_CAPS: Final = ("attn_logit_softcapping", "final_logit_softcapping")
_WINDOW: Final[Keys] = {"attention.sliding_window": "sliding_window"}
_GRANITE: Final[Keys] = {
    "logit_scale": "logits_scaling",
    "residual_scale": "residual_multiplier",
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
}
_EXPERTS: Final[Keys] = {"expert_count": count_experts, "expert_used_count": "num_experts_per_tok"}
_NARROW: Final[Keys] = {**_EXPERTS, "expert_feed_forward_length": "moe_intermediate_size"}
_GRANITE_EXPERTS: Final[Keys] = {
    **_GRANITE,
    **_EXPERTS,
    "expert_shared_feed_forward_length": "shared_intermediate_size",
}
_LLAMA: Final = ("default", "llama3")

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {  # by transformers' model type
        "llama": Family("llama", interleaved=True, square=False, scalings=_LLAMA, options=SILU),
        "mistral": Family(
            "llama", interleaved=True, square=False, scalings=_LLAMA, options=SILU, windowless=True
        ),
        "qwen2": Family("qwen2", options=only(SILU, NO_WINDOW)),
        "qwen3": Family("qwen3", square=False, options=only(SILU, NO_WINDOW, attention_bias=(False,))),
        "gemma": Family("gemma", shifted=True, square=False, options=only(_OF_GEMMA, hidden_act=_TANH)),
        "gemma2": Family(
            "gemma2",
            shifted=True,
            square=False,
            layers=WINDOWS,
            needed=(*_CAPS, "sliding_window"),
            options=only(_OF_GEMMA, hidden_activation=_TANH),
            keys={**_WINDOW, **{cap: cap for cap in _CAPS}},
            misfit=lambda config: _gemma_misfit(config, 2),
        ),
        "gemma3_text": Family(
            "gemma3",
            shifted=True,
            square=False,
            layers=WINDOWS,
            needed=("sliding_window",),
            scalings=("default", "linear"),
            keys=_WINDOW,
            misfit=lambda config: _gemma_misfit(config, 6),
            options=only(_OF_GEMMA, hidden_activation=_TANH, **dict.fromkeys(_CAPS, (None,))),
        ),
        "smollm3": Family(
            "smollm3", interleaved=True, options=only(_PLAIN, NO_WINDOW), misfit=_smollm3_misfit
        ),
        "phi3": Family("phi3", partial=True, options=SILU, windowless=True, scalings=("default", "longrope")),
        "phi": Family(
            "phi2",
            layer_norm=True,
            partial=True,
            options=only(OWN_HEAD, hidden_act=TANH, qk_layernorm=(False,)),
        ),
        "olmo2": Family("olmo2", options=only(_PLAIN, OWN_HEAD)),
        "granite": Family("granite", interleaved=True, options=SILU, keys=_GRANITE),
        "gpt2": Family(
            "gpt2",
            layer_norm=True,
            rotary=False,
            transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
            options=only(_GPT, scale_attn_by_inverse_layer_idx=(False,)),
        ),
        "glm4": Family("glm4", partial=True, square=False, options=SILU),
        "ernie4_5": Family("ernie4_5", square=False, options=only(SILU, use_bias=(False,))),
        "lfm2": Family(
            "lfm2",
            layers=("full_attention", "conv"),
            mixed=True,
            options=only(conv_bias=(False,)),
            keys={"shortconv.l_cache": "conv_L_cache"},
        ),
        "hunyuan_v1_dense": Family(
            "hunyuan-dense", square=False, options=only(SILU, attention_bias=(False,))
        ),
        "mixtral": Family(
            "llama", interleaved=True, square=False, options=SILU, windowless=True, keys=_EXPERTS
        ),
        "qwen3_moe": Family(
            "qwen3moe",
            square=False,
            keys=_NARROW,
            options=only(SILU, NO_WINDOW, ALL_EXPERTS, attention_bias=(False,), norm_topk_prob=(True,)),
        ),
        "qwen2_moe": Family(
            "qwen2moe",
            options=only(SILU, NO_WINDOW, OWN_HEAD, ALL_EXPERTS, norm_topk_prob=(False,)),
            keys={**_NARROW, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        ),
        "olmoe": Family(
            "olmoe",
            keys=_EXPERTS,
            misfit=_olmoe_misfit,
            options=only(SILU, OWN_HEAD, attention_bias=(False,), clip_qkv=(None,), norm_topk_prob=(False,)),
        ),
        "granitemoe": Family("granitemoe", interleaved=True, options=SILU, keys=_GRANITE_EXPERTS),
        "granitemoeshared": Family("granitemoe", interleaved=True, options=SILU, keys=_GRANITE_EXPERTS),
        "ernie4_5_moe": Family(
            "ernie4_5-moe",
            square=False,
            misfit=_ernie_misfit,
            options=only(SILU, use_bias=(False,), moe_layer_interval=(1,)),
            keys={
                **_NARROW,
                "expert_shared_count": "moe_num_shared_experts",
                "expert_shared_feed_forward_length": lambda c: (
                    c.moe_num_shared_experts * c.moe_intermediate_size
                ),
                "interleave_moe_layer_step": "moe_layer_interval",
                "leading_dense_block_count": "moe_layer_start_index",
            },
        ),
        "gpt_oss": Family(
            "gpt-oss",
            square=False,
            paired=True,
            transposed=STACKED,
            layers=WINDOWS,
            scalings=("default", "yarn"),
            misfit=lambda config: irregular(config, 2) or rope.yarn_misfit(config),
            keys={**_EXPERTS, "expert_feed_forward_length": "intermediate_size", **_WINDOW},
            options=only(OWN_HEAD, attention_bias=(True,), swiglu_alpha=(1.702,), swiglu_limit=(7.0,)),
        ),
    }
)


def keys(config: Any) -> dict[str, Value]:
    """Return the metadata of a configuration beyond what all families have, without the architecture; no key for a None."""
    own = dict[str, Value]()
    for key, source in family_of(config).keys.items():
        value = getattr(config, source, 0) if isinstance(source, str) else source(config)
        if value is not None:
            own[key] = float(value) if key.endswith(("scale", "softcapping")) else value
    # the order in files: gemma3's window follows its rotary settings, gpt-oss's precedes them
    return rope.keys(config) | own if config.model_type == "gemma3_text" else own | rope.keys(config)


def epsilon(config: Any) -> float:
    """Return the epsilon of the norms."""
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
    return next(float(getattr(config, name)) for name in names if hasattr(config, name))


def channels(config: Any) -> int:
    """Return the channels of a block's MLP."""
    if getattr(config, "block_auto_adjust_ff_dim", False):  # as transformers' Lfm2MLP has them
        width, step = int(2 * config.intermediate_size / 3), int(config.block_multiple_of)
        if config.block_ffn_dim_multiplier is not None:
            width = step * -(-int(config.block_ffn_dim_multiplier * width) // step)
        return width
    width = config.intermediate_size if hasattr(config, "intermediate_size") else config.n_inner
    return int(width or 4 * config.hidden_size)


def key_heads(config: Any) -> int | list[int]:
    """Return the key heads of all blocks, or of each where some have a convolution in the place of attention."""
    heads = int(getattr(config, "num_key_value_heads", config.num_attention_heads))
    kinds = getattr(config, "layer_types", None) or ()
    return [0 if kind == "conv" else heads for kind in kinds] if "conv" in kinds else heads


def family_of(config: Any) -> Family:
    """Return the record of a configuration; KeyError for a family without one."""
    return FAMILIES[config.model_type]


def architecture(config: Any) -> str:
    """Return llama.cpp's name for the model; deci is a llama with numbers of heads and channels for every block."""
    return widths.DECI if widths.has_block_widths(config) else family_of(config).architecture


def misfit(config: Any) -> str | None:
    """Return why no GGUF file can be made of a configuration; None when one can."""
    if (kind := config.model_type) not in FAMILIES:
        return f"GGUF files are not written for a '{kind}' (fleetune help models lists the families)"
    narrow = widths.has_block_widths(config) and kind != "llama"
    what = f"blocks of different widths in a {kind}" if narrow else family_of(config).unmet(config)
    return what and f"GGUF has no place for {what}"


def is_shifted(config: Any, tensor: str) -> bool:
    """Return whether a tensor of the file is a norm's weights, stored as 1 + w."""
    return family_of(config).shifted and tensor.endswith("norm.weight")


def is_transposed(config: Any, tensor: str) -> bool:
    """Return whether a matrix of the model is [in, out], which the file holds as [out, in]."""
    family = family_of(config)
    return tensor.endswith(".weight") and any(f".{part}." in tensor for part in family.transposed)


def row_order(config: Any, tensor: str, rows: int) -> np.ndarray | None:
    """Return for each row of the file's tensor which row of the model's it is, int64 [rows]; None: as they are."""
    part = tensor.split(".")
    if not family_of(config).interleaved or part[-2] not in ("attn_q", "attn_k"):
        return None
    width = widths.block_widths(config)[int(part[1])]
    return interleaved(rows, width.num_attention_heads if part[-2] == "attn_q" else width.num_key_value_heads)


def interleaved(rows: int, heads: int) -> np.ndarray:
    """Return, for each row of the file's q or k, the row of the model that it is."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
