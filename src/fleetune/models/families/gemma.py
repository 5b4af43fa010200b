# SPDX-License-Identifier: Apache-2.0
"""Translate Gemma decoders (gemma, gemma2, gemma3's text part) between transformers and GGUF.

    norms            multiply by 1 + w; the file holds 1 + w, in fp32 as transformers adds it
    embeddings       are multiplied by sqrt(width), by the runtime
    output head      is the input embedding, always
    attention        is scaled by query_pre_attn_scalar ** -0.5, which llama.cpp takes for the head's width (in the 27B
                     models, which it knows by their number of blocks, for width / heads)
    gemma2           caps of the scores and the logits; every second block looks at a window
    gemma3           five blocks of six look at a window and rotate with a base of their own

A configuration that differs from what llama.cpp fixes is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig

# transformers' model type -> llama.cpp's architecture
ARCHITECTURES: Final[Mapping[str, str]] = MappingProxyType(
    {"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"}
)
# the last of so many blocks looks at everything, the others at a window
PERIODS: Final[Mapping[str, int]] = MappingProxyType({"gemma2": 2, "gemma3_text": 6})
OF_27B: Final[Mapping[str, int]] = MappingProxyType({"gemma2": 46, "gemma3_text": 62})  # blocks
ACTIVATION: Final = "gelu_pytorch_tanh"


def misfit(config: Any) -> str | None:
    """Return why llama.cpp cannot express a configuration of these types; None when it can."""
    kind = str(config.model_type)
    activation = config.hidden_act if kind == "gemma" else config.hidden_activation
    ropes = _ropes(config)
    if activation != ACTIVATION:
        return f"the activation '{activation}'"
    if not config.tie_word_embeddings:
        return "an output head of its own in a gemma"
    if config.attention_bias or config.use_bidirectional_attention:
        return "biases or both directions in a gemma's attention"
    if any(rope.get("partial_rotary_factor", 1) != 1 for rope in ropes):
        return "partly rotated heads"
    allowed = ("default", "linear") if kind == "gemma3_text" else ("default",)
    kinds = [str(rope.get("rope_type", "default")) for rope in ropes]
    if kinds[0] not in allowed or any(other != "default" for other in kinds[1:]):
        return f"rotary scaling '{max(kinds, key=lambda k: k != 'default')}'"
    return None if kind == "gemma" else _misfit_of_windows(config)


def _misfit_of_windows(config: Any) -> str | None:
    kind = str(config.model_type)
    caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    if (None in caps) if kind == "gemma2" else (caps != (None, None)):
        return f"the caps {caps[0]} and {caps[1]} of a {kind}"
    if config.query_pre_attn_scalar != _scalar(kind, config):
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar} with heads of {config.head_dim}"
    if config.sliding_window is None or list(config.layer_types) != _layer_types(config):
        return f"windows in other blocks than all but each {PERIODS[kind]}th"
    return None


def keys(config: Any) -> dict[str, int | float | str]:
    """Return Gemma's own settings as metadata, by keys without the architecture."""
    full, *local = _ropes(config)
    found: dict[str, int | float | str] = {}
    if local:
        found["rope.freq_base_swa"] = float(local[0]["rope_theta"])
    if full.get("rope_type", "default") == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(full["factor"])}
    if config.model_type != "gemma":
        found["attention.sliding_window"] = int(config.sliding_window)
    if config.model_type == "gemma2":
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            found[cap] = float(getattr(config, cap))
    return found


def config_of(architecture: str, field: Callable[[str], Any]) -> Any:
    """Return the configuration that metadata describe; `field` gives a value by its key without the architecture.

    `field` gives None for a missing key.  KeyError for one that is required; ValueError when the values make no
    sense.
    """
    kind = {arch: kind for kind, arch in ARCHITECTURES.items()}[architecture]

    def need(key: str) -> Any:
        if (value := field(key)) is None:
            raise KeyError(key)
        return value

    sizes = {
        "vocab_size": need("vocab_size"), "hidden_size": need("embedding_length"),
        "num_hidden_layers": need("block_count"), "intermediate_size": need("feed_forward_length"),
        "num_attention_heads": need("attention.head_count"), "head_dim": need("attention.key_length"),
        "num_key_value_heads": need("attention.head_count_kv"),
        "max_position_embeddings": need("context_length"),
    }  # fmt: skip
    made: dict[str, Any] = {key: int(value) for key, value in sizes.items()}
    made["rms_norm_eps"] = need("attention.layer_norm_rms_epsilon")
    rope = {"rope_type": "default", "rope_theta": float(field("rope.freq_base") or 10000.0)}
    if kind == "gemma":
        return GemmaConfig(**made, rope_parameters=rope)
    made["sliding_window"] = int(need("attention.sliding_window"))
    if kind == "gemma2":
        caps = {key: float(need(key)) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
        config: Any = Gemma2Config(**made, **caps, rope_parameters=rope)
    else:
        local = {"rope_type": "default", "rope_theta": float(field("rope.freq_base_swa") or 10000.0)}
        if field("rope.scaling.type") == "linear":
            rope |= {"rope_type": "linear", "factor": float(need("rope.scaling.factor"))}
        both = {"full_attention": rope, "sliding_attention": local}
        config = Gemma3TextConfig(**made, rope_parameters=both)
    config.query_pre_attn_scalar = _scalar(kind, config)
    return config


def plus_one(values: np.ndarray) -> np.ndarray:
    """Return a norm's weights as the file stores them: 1 + w, fp32."""
    shifted: np.ndarray = np.float32(1) + values.astype(np.float32)
    return shifted


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """Return the rotary settings of the blocks without a window, then of those with one where they differ."""
    rope = config.rope_parameters
    return [rope["full_attention"], rope["sliding_attention"]] if "full_attention" in rope else [rope]


def _scalar(kind: str, config: Any) -> int:
    if config.num_hidden_layers == OF_27B[kind]:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def _layer_types(config: Any) -> list[str]:
    period = PERIODS[config.model_type]
    return [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]
