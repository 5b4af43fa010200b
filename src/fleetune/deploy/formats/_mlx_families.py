# SPDX-License-Identifier: Apache-2.0
"""State what mlx-lm (0.32) makes of each family of decoders, a record a family, as `models/families/table.py` does for GGUF.

mlx-lm has a model class a family, which reads some fields of config.json and fixes the rest in its code.  It does not know
where transformers 5 keeps the rotary settings ("rope_parameters"), and what config.json leaves out it fills with defaults
of its own.  So a record states

    options     the values of configuration fields for which mlx-lm computes the same; any other value is refused
    scalings    the kinds of rescaled rotary frequencies that have a place
    window      the field of a window that mlx-lm does not have: longer texts differ, which a note says
    gelu        the GELU of mlx-lm's code, where a configuration may have the other one; a note says when it has
    fields      what its class reads under names that transformers does not have
    names       parts of transformers' names of tensors, and what mlx-lm has in their place; the first that is found counts
    absent      how parameters end that its class does not have: a model where they are not 0 is refused
    misfit      what the two cannot say

The experts of a mixture are a layer of their own for gates, ups and downs (`SwitchLinear`), which `layers` splits transformers'
parameters into.

Families that are missing have no class in mlx-lm, or one that computes something else.  Everything here was checked by
running mlx-lm beside transformers (`python -m benchmarks.mlx_families`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from fleetune.models.artefact import Quantised
from fleetune.models.families import experts, rope
from fleetune.models.families.limits import (
    ALL_EXPERTS,
    NO_WINDOW,
    OWN_HEAD,
    SILU,
    TANH,
    TIED,
    WINDOWS,
    Limits,
    Options,
    only,
)

# fields of transformers that mlx-lm reads under the same name, and that config.json may leave to transformers' defaults
STATED: Final = (
    "head_dim", "num_key_value_heads", "tie_word_embeddings", "max_position_embeddings", "layer_types", "sliding_window",
    "attention_bias", "attention_out_bias", "mlp_bias", "conv_bias", "use_bias", "use_conv_bias", "use_qkv_bias",
    "use_qk_norm", "qk_layernorm", "use_parallel_residual", "multi_query", "no_rope_layers",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon",
    "logit_scale", "logits_scaling", "attention_multiplier", "embedding_multiplier", "residual_multiplier",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "intermediate_size", "hidden_act", "n_positions", "rotary_dim", "conv_kernel", "state_size", "time_step_rank",
    "conv_L_cache", "block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim",
    "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
    "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    "moe_num_experts", "moe_k", "moe_num_shared_experts",
    "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval",
)  # fmt: skip
EXACT: Final = ("gelu",)


@dataclass(frozen=True)
class Family(Limits):
    """How mlx-lm reads a family; functions take a configuration."""

    options: Options = field(default_factory=dict)
    window: str = ""
    gelu: tuple[str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    absent: tuple[str, ...] = ()
    paired: bool = False  # rows of an expert's gate and up alternate in the model
    transposed: bool = False  # the model has the matrices of experts as [in, out]
    fields: Callable[[Any], Mapping[str, Any]] = lambda config: {}


_SCALED: Final = ("default", "linear", "llama3")  # of mlx-lm's initialize_rope
_SWITCH: Final = ((".mlp.experts.", ".mlp.switch_mlp."),)
_GRANITE_SWITCH: Final = (
    (".block_sparse_moe.experts.", ".block_sparse_moe.switch_mlp."), (".router.", ".router.layer."),
)  # fmt: skip
_GEMMA: Final = only(hidden_activation=TANH, use_bidirectional_attention=(False, None))


def _pattern(config: Any) -> int:
    """Return each how manieth block looks at everything: the first that does."""
    return list(config.layer_types).index("full_attention") + 1


def _pattern_misfit(config: Any) -> str | None:
    kinds = list(config.layer_types)
    if "full_attention" in kinds:
        each = _pattern(config)
        if all((kind == "full_attention") == ((i + 1) % each == 0) for i, kind in enumerate(kinds)):
            return None
    return f"layer_types without a regular place for full_attention in a {config.model_type}"


def _gemma3_fields(config: Any) -> dict[str, Any]:
    local = config.rope_parameters["sliding_attention"]
    return {"sliding_window_pattern": _pattern(config), "rope_local_base_freq": local["rope_theta"]}


def _gemma3_misfit(config: Any) -> str | None:
    local = config.rope_parameters["sliding_attention"].get("rope_type", "default")
    return (
        f"rotary scaling '{local}' of windows in a gemma3_text"
        if local != "default"
        else _pattern_misfit(config)
    )


def _exaone4_fields(config: Any) -> dict[str, Any]:
    kinds = "".join("G" if kind == "full_attention" else "L" for kind in config.layer_types)
    windows = config.sliding_window is not None
    return {"sliding_window": config.sliding_window, "sliding_window_pattern": kinds if windows else None}


def _exaone4_misfit(config: Any) -> str | None:
    found = sorted(set(config.layer_types))
    if found == (["full_attention"] if config.sliding_window is None else sorted(WINDOWS)):
        return None
    return f"sliding_window={config.sliding_window} with blocks of {' and '.join(found)} in an exaone4"


def _hunyuan_fields(config: Any) -> dict[str, Any]:
    settings = rope.settings(config)
    if rope.kind(config) == "default":
        return {}
    scaling = {"type": "dynamic", "alpha": settings["alpha"], "factor": settings.get("factor", 1.0)}
    return {"rope_scaling": scaling}


def _hunyuan_misfit(config: Any) -> str | None:
    given = rope.kind(config) == "default" or rope.settings(config).get("alpha")
    return None if given else "rotary scaling 'dynamic' without alpha in a hunyuan_v1_dense"


def _lfm2_misfit(config: Any) -> str | None:
    return None if "full_attention" in config.layer_types else "layer_types without full_attention in a lfm2"


def _granite_shared_fields(config: Any) -> dict[str, Any]:
    """Return what makes it one of mlx-lm's hybrids, with attention in every block; without shared experts a granitemoe.

    transformers, in which mlx-lm reads the tokenizer, checks a hybrid's Mamba widths, though no block has them.
    """
    if config.shared_intermediate_size == 0:
        return {"model_type": "granitemoe"}
    return {
        "model_type": "granitemoehybrid", "layer_types": ["attention"] * config.num_hidden_layers,
        "position_embedding_type": "rope", "mamba_expand": 1, "mamba_n_heads": 1, "mamba_d_head": config.hidden_size,
    }  # fmt: skip


def _gpt_oss_misfit(config: Any) -> str | None:
    if missing := [kind for kind in WINDOWS if kind not in config.layer_types]:
        return f"layer_types without {missing[0]} in a gpt_oss"
    return rope.yarn_misfit(config)


def _gptj_misfit(config: Any) -> str | None:
    return _wide(config, config.n_inner, 4 * config.n_embd)


def _neox_misfit(config: Any) -> str | None:
    return _wide(config, config.intermediate_size, 4 * config.hidden_size)


def _wide(config: Any, width: int | None, fixed: int) -> str | None:
    return None if width in (None, fixed) else f"an MLP of {width}, not {fixed}, in a {config.model_type}"


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {  # by transformers' model type
        "llama": Family(SILU, scalings=_SCALED, square=False),
        "mistral": Family(SILU, scalings=_SCALED, square=False, window="sliding_window"),
        "qwen2": Family(only(SILU, NO_WINDOW), scalings=_SCALED),
        "qwen3": Family(only(SILU, NO_WINDOW, attention_bias=(False,)), scalings=_SCALED, square=False),
        "gemma": Family(
            only(TIED, hidden_act=(*TANH, *EXACT), attention_bias=(False,)), square=False, gelu=EXACT
        ),
        "gemma2": Family(
            only(_GEMMA, TIED, attention_bias=(False,)), square=False, layers=WINDOWS, window="sliding_window",
            misfit=lambda config: next(
                (
                    f"{name}=None in a gemma2" for name in ("attn_logit_softcapping", "final_logit_softcapping")
                    if getattr(config, name) is None
                ), None,
            ),
        ),
        "gemma3_text": Family(
            only(
                _GEMMA, attention_bias=(False,), attn_logit_softcapping=(None,), final_logit_softcapping=(None,)
            ),
            scalings=_SCALED, square=False, layers=WINDOWS, fields=_gemma3_fields, misfit=_gemma3_misfit,
        ),
        "phi": Family(only(OWN_HEAD, hidden_act=TANH, qk_layernorm=(False,)), partial=True),
        "phi3": Family(SILU, partial=True, window="sliding_window"),
        "gpt_neox": Family(
            only(OWN_HEAD, hidden_act=(*TANH, *EXACT), attention_bias=(True,)), partial=True, gelu=TANH,
            names=(("gpt_neox.layers.", "model.h."), ("gpt_neox.", "model."), ("lm_head.", "model.embed_out.")),
            fields=lambda config: {
                "rotary_emb_base": rope.settings(config)["rope_theta"],
                "rotary_pct": rope.settings(config).get("partial_rotary_factor", 1.0),
            },
            misfit=_neox_misfit,
        ),
        "gptj": Family(
            only(OWN_HEAD, activation_function=TANH), rotary=False, names=(("transformer.", "model."),),
            misfit=_gptj_misfit,
        ),
        "stablelm": Family(only(SILU, OWN_HEAD), partial=True),
        "olmo2": Family(SILU, scalings=_SCALED, square=False),
        "granite": Family(SILU, scalings=_SCALED),
        "smollm3": Family(only(SILU, NO_WINDOW), scalings=_SCALED, square=False),
        "starcoder2": Family(
            only(hidden_act=(*TANH, *EXACT), use_bias=(True,)), window="sliding_window", gelu=EXACT
        ),
        "exaone4": Family(
            SILU, scalings=_SCALED, square=False, layers=WINDOWS, fields=_exaone4_fields, misfit=_exaone4_misfit
        ),
        "seed_oss": Family(SILU, scalings=_SCALED, square=False),
        "hunyuan_v1_dense": Family(
            SILU, scalings=("default", "dynamic"), square=False, fields=_hunyuan_fields, misfit=_hunyuan_misfit
        ),
        "gpt_bigcode": Family(
            only(
                activation_function=(*TANH, *EXACT), scale_attn_weights=(True,), add_cross_attention=(False,),
                multi_query=(True,),
            ),
            rotary=False, gelu=EXACT,
            fields=lambda config: {"n_inner": config.n_inner or 4 * config.n_embd},
        ),
        "glm": Family(SILU, square=False),
        "lfm2": Family(
            only(TIED), layers=("full_attention", "conv"), fields=lambda config: {"block_dim": config.hidden_size},
            misfit=_lfm2_misfit,
        ),
        "cohere": Family(only(SILU, TIED)),
        "cohere2": Family(
            only(SILU, TIED), layers=WINDOWS,
            fields=lambda config: {"sliding_window_pattern": _pattern(config)}, misfit=_pattern_misfit,
        ),
        "glm4": Family(only(SILU, OWN_HEAD), partial=True, square=False),
        "ernie4_5": Family(SILU, square=False),
        "nemotron": Family(only(hidden_act=("relu2",)), partial=True, square=False),
        "mamba": Family(
            only(SILU, layer_norm_epsilon=(1e-5,)), rotary=False, square=False, layers=("linear_attention",)
        ),
        "mixtral": Family(
            SILU, window="sliding_window",
            names=((".mlp.experts.", ".block_sparse_moe.switch_mlp."), (".mlp.", ".block_sparse_moe.")),
        ),
        "qwen2_moe": Family(
            only(SILU, NO_WINDOW, OWN_HEAD, ALL_EXPERTS, qkv_bias=(True,), norm_topk_prob=(False,)), names=_SWITCH
        ),
        "qwen3_moe": Family(
            only(SILU, NO_WINDOW, attention_bias=(False,)), square=False, names=_SWITCH,
            fields=lambda config: {"head_dim": rope.head_dim(config)},
        ),
        "olmoe": Family(only(SILU, clip_qkv=(None,)), scalings=_SCALED, names=_SWITCH),
        "granitemoe": Family(SILU, scalings=_SCALED, names=_GRANITE_SWITCH),
        "granitemoeshared": Family(SILU, names=_GRANITE_SWITCH, fields=_granite_shared_fields),
        "ernie4_5_moe": Family(
            only(SILU, use_bias=(False,), moe_norm_min=(1e-12,)), square=False, names=_SWITCH,
            absent=(".e_score_correction_bias",), fields=lambda config: {"moe_gate_act": "softmax"},
        ),
        "gpt_oss": Family(
            only(OWN_HEAD, attention_bias=(True,), swiglu_alpha=(1.702,), swiglu_limit=(7.0,)),
            scalings=("default", "yarn"), square=False, layers=WINDOWS, paired=True, transposed=True,
            misfit=_gpt_oss_misfit,
        ),
    }
)  # fmt: skip


def misfit(config: Any) -> str | None:
    """Return what of a configuration mlx-lm has no place for; None when it has one for all."""
    kind = str(config.model_type)
    if (family := FAMILIES.get(kind)) is None:
        return f"'{kind}': it is written for {', '.join(FAMILIES)}"
    return family.unmet(config)


def fields(config: Any) -> dict[str, Any]:
    """Return what config.json states for mlx-lm, under its names; nothing that transformers could not read back from it."""
    family = FAMILIES[config.model_type]
    held = (key for key in STATED if not isinstance(getattr(type(config), key, None), property))
    found = {key: value for key in held if (value := getattr(config, key, None)) is not None}
    if family.rotary:
        settings = dict(rope.settings(config))
        found["rope_theta"] = settings.pop("rope_theta")
        found["partial_rotary_factor"] = settings.get("partial_rotary_factor", 1.0)
        found["rope_scaling"] = settings if rope.kind(config) != "default" else None
    return {**found, **family.fields(config)}


def is_absent(config: Any, parameter: str) -> bool:
    """Return whether mlx-lm has nothing for a parameter."""
    return parameter.endswith(FAMILIES[config.model_type].absent)


def parts(config: Any, parameter: str) -> Iterator[tuple[str, experts.Part]]:
    """Yield the tensors that a parameter is in mlx-lm: their names there, and which parts of it they are."""
    if not is_absent(config, parameter):
        for part in experts.stacked(parameter):
            yield _renamed(config, part.name), part


def layers(
    config: Any, parameter: str, weight: Quantised | Tensor
) -> Iterator[tuple[str, Quantised | Tensor]]:
    """Yield the tensors that a parameter is in mlx-lm: their names there, and their values."""
    family = FAMILIES[config.model_type]
    of_experts = experts.stacked(parameter)[0].name != parameter
    for name, part in parts(config, parameter):
        matrix, whole = not experts.is_bias(name), weight
        if family.transposed and of_experts and matrix:
            whole = (
                weight.mT.contiguous() if isinstance(weight, Tensor) else replace(weight, transposed=False)
            )
        order = part.order(tuple(whole.shape), matrix, family.paired)
        yield name, whole if order is None else _rows(whole, torch.from_numpy(order), part, name)


def _renamed(config: Any, name: str) -> str:
    for ours, theirs in FAMILIES[config.model_type].names:
        if ours in name:
            return name.replace(ours, theirs)
    return name


def _rows(weight: Quantised | Tensor, order: Tensor, part: experts.Part, name: str) -> Quantised | Tensor:
    """Return the rows of a part; of a bias, its values."""
    if isinstance(weight, Quantised):
        codes, scale, zero = (values[order] for values in (weight.codes, weight.scale, weight.zero))
        return replace(weight, codes=codes, scale=scale, zero=zero)
    shape = experts.part_shape(tuple(weight.shape), part, name)
    return weight.reshape(len(order) * part.of, -1)[order].reshape(shape)


def notes(config: Any) -> Iterator[str]:
    """Yield what mlx-lm computes otherwise than transformers."""
    family, kind = FAMILIES[config.model_type], config.model_type
    if family.window and (window := getattr(config, family.window)) is not None:
        yield f"mlx-lm has no window in a {kind}: it gives the same up to {window:,} tokens, and in longer texts sees more"
    if (
        family.gelu
        and (gelu := getattr(config, "activation_function", None) or config.hidden_act) not in family.gelu
    ):
        own = "exactly" if family.gelu == EXACT else "by tanh"
        yield f"mlx-lm computes the GELU of a {kind} {own}, transformers as '{gelu}'"
    yield from rope.ramp_notes(config, "mlx-lm")
