# SPDX-License-Identifier: Apache-2.0
"""State what a GGUF file of each family of decoders has, a record a family, on top of the gguf package's map of names.

llama.cpp fixes in its code what transformers has in a configuration: activations, biases, which blocks have a window.
So a record states, besides what is written,

    options     the values of configuration fields for which llama.cpp computes the same; any other value is refused
    scalings    the kinds of rescaled rotary frequencies that have a place
    misfit      what the two cannot say

Everything here was checked by running llama.cpp beside transformers (`tests/deploy/test_gguf_families.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from fleetune.models.families import deci, experts, gemma, rope, widths
from fleetune.models.families.limits import (
    ALL_EXPERTS,
    NO_WINDOW,
    OWN_HEAD,
    SILU,
    TANH,
    TIED,
    WINDOWS,
    Limits,
    only,
)

Value = int | float | str  # bool is an int


@dataclass(frozen=True)
class Family(Limits):
    """How llama.cpp holds a family; functions take a configuration."""

    architecture: str  # llama.cpp's name
    epsilon: str = "rms_norm_eps"  # the field that has the norms' epsilon
    layer_norm: bool = False  # norms subtract the mean
    interleaved: bool = False  # a head of the file's q and k has rows 0, d/2, 1, d/2 + 1, .. of the model's
    grouped: bool = False  # the model's fused matrix has a key head's q, k, v together, the file all q first
    shifted: bool = False  # norms multiply by 1 + w, and the file holds that
    transposed: tuple[str, ...] = ()  # tensors that the model stores as [in, out]
    paired: bool = False  # rows of an expert's gate and up alternate in the model
    window: str = ""  # a window that llama.cpp has not: the file states it as the longest context
    keys: Callable[[Any], Mapping[str, Value]] = lambda config: {}  # metadata beyond what all families have
    length: Callable[[Any], int] = lambda config: config.max_position_embeddings
    channels: Callable[[Any], int] = lambda config: config.intermediate_size
    key_heads: Callable[[Any], int | list[int]] = lambda config: config.num_key_value_heads


def _gemma(architecture: str) -> Family:
    return Family(
        architecture, shifted=True, square=False, scalings=("default", "linear"), keys=gemma.keys,
        misfit=gemma.misfit, layers=WINDOWS,
    )  # fmt: skip


def _granite_keys(config: Any) -> dict[str, Value]:
    return {
        "logit_scale": float(config.logits_scaling), "residual_scale": float(config.residual_multiplier),
        "embedding_scale": float(config.embedding_multiplier), "attention.scale": float(config.attention_multiplier),
    }  # fmt: skip


def _granite_experts_keys(config: Any) -> dict[str, Value]:
    shared = int(getattr(config, "shared_intermediate_size", 0))
    return _granite_keys(config) | experts.keys(config) | {"expert_shared_feed_forward_length": shared}


def _longrope_keys(config: Any) -> dict[str, Value]:
    if rope.kind(config) != "longrope":
        return {}
    return {
        "rope.scaling.original_context_length": rope.original_length(config),
        "rope.scaling.attn_factor": rope.attention_factor(config),
    }


def _smollm3_misfit(config: Any) -> str | None:
    usual = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    return None if list(config.no_rope_layers) == usual else "no_rope_layers other than each 4th"


def _cohere_misfit(config: Any) -> str | None:
    large = config.num_hidden_layers >= 64  # llama.cpp looks for these norms by the number of blocks
    if bool(config.use_qk_norm) != large:
        return f"use_qk_norm={config.use_qk_norm} with {config.num_hidden_layers} blocks"
    return None


def _cohere2_misfit(config: Any) -> str | None:
    if config.sliding_window is None:
        return "sliding_window=None in a cohere2"
    return None if _each_fourth(config) else "layer_types other than each 4th without a window"


def _exaone4_misfit(config: Any) -> str | None:
    large = config.num_hidden_layers == 64  # llama.cpp has windows by the number of blocks
    if (config.sliding_window is not None) != large:
        return f"sliding_window={config.sliding_window} with {config.num_hidden_layers} blocks"
    fine = _each_fourth(config) if large else set(config.layer_types) == {"full_attention"}
    return None if fine else "layer_types other than each 4th without a window"


def _exaone4_keys(config: Any) -> dict[str, Value]:
    return {} if config.sliding_window is None else {"attention.sliding_window": int(config.sliding_window)}


def _each_fourth(config: Any) -> bool:
    """Return whether each 4th block looks at everything, the others at a window."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    return list(config.layer_types) == [kinds[i % 4] for i in range(config.num_hidden_layers)]


def _falcon_key_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _lfm2_channels(config: Any) -> int:
    """Return the width that transformers' Lfm2MLP has."""
    width = int(config.intermediate_size)
    if config.block_auto_adjust_ff_dim:
        width, step = int(2 * width / 3), int(config.block_multiple_of)
        if config.block_ffn_dim_multiplier is not None:
            width = step * -(-int(config.block_ffn_dim_multiplier * width) // step)
    return width


def _lfm2_misfit(config: Any) -> str | None:
    kinds = set(config.layer_types)  # llama.cpp makes room for both
    return (
        None
        if kinds == {"conv", "full_attention"}
        else f"layer_types of {' and '.join(kinds)} alone in a lfm2"
    )


def _lfm2_key_heads(config: Any) -> list[int]:
    return [0 if kind == "conv" else config.num_key_value_heads for kind in config.layer_types]


_PLAIN: Final = only(SILU, attention_bias=(False,), mlp_bias=(False,))
# llama.cpp approximates the exact GELU by tanh, for every family that has it
_GELU: Final = (*TANH, "gelu")

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {  # by transformers' model type
        "llama": Family(
            "llama", interleaved=True, square=False, scalings=("default", "llama3"), options=SILU
        ),
        "mistral": Family(
            "llama", interleaved=True, square=False, scalings=("default", "llama3"), options=SILU,
            window="sliding_window",
        ),
        "qwen2": Family("qwen2", options=only(SILU, NO_WINDOW)),
        "qwen3": Family("qwen3", square=False, options=only(SILU, NO_WINDOW, attention_bias=(False,))),
        "gemma": _gemma("gemma"),
        "gemma2": _gemma("gemma2"),
        "gemma3_text": _gemma("gemma3"),
        "smollm3": Family(
            "smollm3", interleaved=True, options=only(_PLAIN, NO_WINDOW), misfit=_smollm3_misfit
        ),
        "phi3": Family(
            "phi3", partial=True, options=SILU, window="sliding_window", scalings=("default", "longrope"), keys=_longrope_keys
        ),
        "phi": Family(
            "phi2", epsilon="layer_norm_eps", layer_norm=True, partial=True,
            options=only(OWN_HEAD, hidden_act=TANH, qk_layernorm=(False,)),
        ),
        "olmo2": Family("olmo2", options=only(_PLAIN, OWN_HEAD)),
        "granite": Family("granite", interleaved=True, options=SILU, keys=_granite_keys),
        "stablelm": Family(
            "stablelm", epsilon="layer_norm_eps", layer_norm=True, partial=True,
            options=only(SILU, OWN_HEAD, qk_layernorm=(False,)),
        ),
        "starcoder2": Family(
            "starcoder2", epsilon="norm_epsilon", layer_norm=True, window="sliding_window",
            options=only(hidden_act=_GELU, use_bias=(True,)),
        ),
        "gpt2": Family(
            "gpt2", epsilon="layer_norm_epsilon", layer_norm=True, rotary=False,
            transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
            options=only(
                activation_function=_GELU, scale_attn_weights=(True,), add_cross_attention=(False,),
                scale_attn_by_inverse_layer_idx=(False,),
            ),
            channels=lambda config: config.n_inner or 4 * config.hidden_size,
            key_heads=lambda config: config.num_attention_heads,
        ),
        "gpt_neox": Family(
            "gptneox", epsilon="layer_norm_eps", layer_norm=True, partial=True, grouped=True,
            options=only(OWN_HEAD, hidden_act=_GELU, attention_bias=(True,)),
            keys=lambda config: {"use_parallel_residual": bool(config.use_parallel_residual)},
            key_heads=lambda config: config.num_attention_heads,
        ),
        "falcon": Family(
            "falcon", epsilon="layer_norm_epsilon", layer_norm=True, grouped=True,
            options=only(activation=_GELU, alibi=(False,), bias=(False,), parallel_attn=(True,)),
            channels=lambda config: config.ffn_hidden_size, key_heads=_falcon_key_heads,
        ),
        "bloom": Family(
            "bloom", epsilon="layer_norm_epsilon", layer_norm=True, grouped=True, rotary=False,
            options=only(apply_residual_connection_post_layernorm=(False,)),
            length=lambda config: 2048,  # what Bloom was trained on; the configuration has none
            channels=lambda config: 4 * config.hidden_size,
            key_heads=lambda config: config.num_attention_heads,
        ),
        "glm4": Family("glm4", partial=True, square=False, options=SILU),
        "ernie4_5": Family("ernie4_5", square=False, options=only(SILU, use_bias=(False,))),
        "cohere": Family(
            "command-r", epsilon="layer_norm_eps", layer_norm=True, options=only(_PLAIN, TIED),
            keys=lambda config: {"logit_scale": float(config.logit_scale)}, misfit=_cohere_misfit,
        ),
        "cohere2": Family(
            "cohere2", epsilon="layer_norm_eps", layer_norm=True, options=only(_PLAIN, TIED),
            keys=lambda config: {
                "logit_scale": float(config.logit_scale), "attention.sliding_window": config.sliding_window,
            },
            misfit=_cohere2_misfit, layers=WINDOWS,
        ),
        "nemotron": Family(
            "nemotron", epsilon="norm_eps", layer_norm=True, partial=True, shifted=True,
            options=only(OWN_HEAD, hidden_act=("relu2",), attention_bias=(False,), mlp_bias=(False,)),
        ),
        "lfm2": Family(
            "lfm2", epsilon="norm_eps", layers=("full_attention", "conv"), options=only(conv_bias=(False,)),
            keys=lambda config: {"shortconv.l_cache": int(config.conv_L_cache)},
            channels=_lfm2_channels, key_heads=_lfm2_key_heads, misfit=_lfm2_misfit,
        ),
        "exaone4": Family(
            "exaone4", layers=WINDOWS, options=SILU, keys=_exaone4_keys, misfit=_exaone4_misfit
        ),
        "seed_oss": Family(
            "seed_oss", square=False,
            options=only(SILU, attention_bias=(True,), attention_out_bias=(False,), mlp_bias=(False,)),
        ),
        "arcee": Family(
            "arcee", interleaved=True, square=False,
            options=only(hidden_act=("relu2",), attention_bias=(False,), mlp_bias=(False,)),
        ),
        "hunyuan_v1_dense": Family("hunyuan-dense", square=False, options=only(SILU, attention_bias=(False,))),
        "gpt_bigcode": Family(
            "starcoder", epsilon="layer_norm_epsilon", layer_norm=True, rotary=False,
            options=only(
                activation_function=_GELU, scale_attn_weights=(True,), add_cross_attention=(False,),
                multi_query=(True,),
            ),
            channels=lambda config: config.n_inner or 4 * config.hidden_size, key_heads=lambda config: 1,
        ),
        "glm": Family("chatglm", partial=True, options=SILU),
        "mixtral": Family(
            "llama", interleaved=True, square=False, options=SILU, window="sliding_window", keys=experts.keys,
        ),
        "qwen3_moe": Family(
            "qwen3moe", square=False, keys=experts.narrow_keys,
            options=only(SILU, NO_WINDOW, ALL_EXPERTS, attention_bias=(False,), norm_topk_prob=(True,)),
        ),
        "qwen2_moe": Family(
            "qwen2moe", options=only(SILU, NO_WINDOW, OWN_HEAD, ALL_EXPERTS, norm_topk_prob=(False,)),
            keys=lambda config: experts.narrow_keys(config)
            | {"expert_shared_feed_forward_length": int(config.shared_expert_intermediate_size)},
        ),
        "olmoe": Family(
            "olmoe", keys=experts.keys, misfit=experts.olmoe_misfit,
            options=only(SILU, OWN_HEAD, attention_bias=(False,), clip_qkv=(None,), norm_topk_prob=(False,)),
        ),
        "granitemoe": Family("granitemoe", interleaved=True, options=SILU, keys=_granite_experts_keys),
        "granitemoeshared": Family("granitemoe", interleaved=True, options=SILU, keys=_granite_experts_keys),
        "ernie4_5_moe": Family(
            "ernie4_5-moe", square=False, keys=experts.ernie_keys, misfit=experts.ernie_misfit,
            options=only(SILU, use_bias=(False,), moe_layer_interval=(1,)),
        ),
        "gpt_oss": Family(
            "gpt-oss", square=False, paired=True, transposed=experts.STACKED, layers=WINDOWS,
            scalings=("default", "yarn"), keys=experts.gpt_oss_keys, misfit=experts.gpt_oss_misfit,
            options=only(OWN_HEAD, attention_bias=(True,), swiglu_alpha=(1.702,), swiglu_limit=(7.0,)),
        ),
    }
)  # fmt: skip


def family_of(config: Any) -> Family:
    """Return the record of a configuration; KeyError for a family without one."""
    return FAMILIES[config.model_type]


def architecture(config: Any) -> str:
    """Return llama.cpp's name for the model; deci is a llama with numbers of heads and channels for every block."""
    return deci.ARCHITECTURE if widths.has_block_widths(config) else family_of(config).architecture


def misfit(config: Any) -> str | None:
    """Return why no GGUF file can be made of a configuration; None when one can."""
    if (kind := config.model_type) not in FAMILIES:
        return f"GGUF files are not written for a '{kind}' (docs/models.md lists the families)"
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
    family, part = family_of(config), tensor.split(".")
    if family.interleaved and part[-2] in ("attn_q", "attn_k"):
        width = widths.block_widths(config)[int(part[1])]
        heads = width.num_attention_heads if part[-2] == "attn_q" else width.num_key_value_heads
        return interleaved(rows, heads)
    if family.grouped and part[-2] == "attn_qkv":
        groups = family.key_heads(config)
        assert isinstance(groups, int)
        return ungrouped(rows, groups, rope.head_dim(config))
    return None


def interleaved(rows: int, heads: int) -> np.ndarray:
    """Return, for each row of the file's q or k, the row of the model that it is."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def ungrouped(rows: int, groups: int, width: int) -> np.ndarray:
    """Return the order that takes [groups][queries.., key, value][width] to all queries, all keys, all values."""
    parts = np.arange(rows).reshape(groups, -1, width)
    return np.concatenate([parts[:, :-2].reshape(-1), parts[:, -2].reshape(-1), parts[:, -1].reshape(-1)])
