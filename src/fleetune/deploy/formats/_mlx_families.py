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
    misfit      what the two cannot say

Families that are missing have no class in mlx-lm, or one that computes something else.  Everything here was checked by
running mlx-lm beside transformers (`python -m benchmarks.mlx_families`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from fleetune.models.families import rope
from fleetune.models.families.limits import (
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
)  # fmt: skip
EXACT: Final = ("gelu",)


@dataclass(frozen=True)
class Family(Limits):
    """How mlx-lm reads a family; functions take a configuration."""

    options: Options = field(default_factory=dict)
    window: str = ""
    gelu: tuple[str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()  # how transformers' names of tensors begin, and mlx-lm's
    fields: Callable[[Any], Mapping[str, Any]] = lambda config: {}


_SCALED: Final = ("default", "linear", "llama3")  # of mlx-lm's initialize_rope
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
    }
)  # fmt: skip


def misfit(config: Any) -> str | None:
    """Return what of a configuration mlx-lm has no place for; None when it has one for all."""
    kind = str(config.model_type)
    if (family := FAMILIES.get(kind)) is None:
        return f"'{kind}': it is written for {', '.join(FAMILIES)}"
    return family.unmet(config)


def fields(config: Any) -> dict[str, Any]:
    """Return what config.json states for mlx-lm, under its names."""
    family = FAMILIES[config.model_type]
    found = {key: value for key in STATED if (value := getattr(config, key, None)) is not None}
    if family.rotary:
        settings = dict(rope.settings(config))
        found["rope_theta"] = settings.pop("rope_theta")
        found["partial_rotary_factor"] = settings.get("partial_rotary_factor", 1.0)
        found["rope_scaling"] = settings if rope.kind(config) != "default" else None
    return {**found, **family.fields(config)}


def renamed(config: Any, name: str) -> str:
    """Return mlx-lm's name of a tensor of the model."""
    for ours, theirs in FAMILIES[config.model_type].names:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


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
