"""Read the rotary embedding of a configuration, and convert rescaled frequencies to and from a GGUF file's factors.

A file stores what each of the d / 2 frequencies is divided by (rope_freqs.weight); transformers stores four numbers of Llama 3
from which these follow.  Our files have those too (`KEY`); for others, Llama 3.1's and 3.2's are tried, else the file is refused.
LongRoPE (Phi-3) has one list of factors up to the original context and one beyond it.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

KEY: Final = "fleetune.rope_parameters"  # JSON
TENSOR: Final = "rope_freqs.weight"
SHORT: Final = "rope_factors_short.weight"
LONG: Final = "rope_factors_long.weight"
_PUBLISHED: Final = tuple(
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)


def head_dim(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def settings(config: Any) -> Mapping[str, Any]:
    """Return the rotary settings (of the blocks without a window, where those have their own); empty for none."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    found: Mapping[str, Any] = rope.get("full_attention", rope)
    return found


def kind(config: Any) -> str:
    """Return how the frequencies are rescaled: "default" for not at all."""
    return str(settings(config).get("rope_type", "default"))


def in_windows(config: Any) -> Mapping[str, Any]:
    """Return the rotary settings of the blocks with a window, where those have their own; else {}."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    found: Mapping[str, Any] = rope.get("sliding_attention", {})
    return found


def width(config: Any) -> int:
    """Return how many numbers of a head are rotated."""
    return int(head_dim(config) * settings(config).get("partial_rotary_factor", 1.0))


def tensors(config: Any) -> dict[str, np.ndarray]:
    """Return the tensors of a file that say what the rotary frequencies are divided by, fp32 [width / 2] each."""
    rope = settings(config)
    if kind(config) == "llama3":
        return {TENSOR: _factors(rope, head_dim(config))}
    if kind(config) == "longrope":
        both = {LONG: rope["long_factor"], SHORT: rope["short_factor"]}
        return {name: np.array(factors, np.float32) for name, factors in both.items()}
    return {}


def original_length(config: Any) -> int:
    """Return the context of a LongRoPE model up to which the short factors hold."""
    rope = settings(config)
    return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)


def attention_factor(config: Any) -> float:
    """Return what LongRoPE multiplies rotated queries and keys by (transformers' _compute_longrope_parameters)."""
    rope = settings(config)
    if (stated := rope.get("attention_factor")) is not None:
        return float(stated)
    factor = float(rope.get("factor") or config.max_position_embeddings / original_length(config))
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length(config)))


def keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a GGUF file beyond the base and the factors of `tensors`, without the architecture."""
    rope, found = settings(config), dict[str, Any]()
    if local := in_windows(config):
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    if kind(config) in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind(config), "rope.scaling.factor": float(rope["factor"])}
    if kind(config) == "yarn":
        found["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    if kind(config) == "longrope":
        found["rope.scaling.original_context_length"] = original_length(config)
        found["rope.scaling.attn_factor"] = attention_factor(config)
    return found


def yarn_misfit(config: Any) -> str | None:
    """Return what of YaRN's settings runtimes compute otherwise: llama.cpp reads no ends of the ramp from its file."""
    rope = settings(config) if kind(config) == "yarn" else {}
    fixed = {
        "beta_fast": 32,
        "beta_slow": 1,
        **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim")),
    }
    for name, value in fixed.items():
        if (rope.get(name) or value) != value:
            return f"rotary scaling 'yarn' with {name}={rope[name]}"
    return None


def ramp_notes(config: Any, runtime: str) -> list[str]:
    """Return a note where YaRN's ramp ends between two frequencies, of a runtime that rounds its ends to whole numbers."""
    if kind(config) != "yarn" or settings(config).get("truncate", True):
        return []
    return [
        f"{runtime} rounds the ends of YaRN's ramp to whole frequencies, transformers does not (truncate=false): those "
        "between are rotated a little differently, and more so with the length of the text"
    ]


def _factors(rope: Mapping[str, Any], width: int) -> np.ndarray:
    """Return the factors by Llama 3.1's reference code (apply_scaling).

    Frequencies whose wavelength is above original / low are divided by `factor`, those below original / high are
    left alone, and those between get a blend.
    """
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    waves = 2 * np.pi * float(rope["rope_theta"]) ** (np.arange(0, width, 2) / width)
    turns = float(rope["original_max_position_embeddings"]) / waves
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / float(rope["factor"]) + blend)).astype(np.float32)


def parameters(found: np.ndarray, stored: str | None, theta: float, width: int) -> dict[str, Any] | None:
    """Return rotary settings that give the factors `found` in a file; `stored` is the value of its key `KEY`.

    None when neither these nor the published ones do.
    """
    tried = [_parsed(stored), *({**rope, "rope_theta": theta} for rope in _PUBLISHED)]
    for rope in tried:
        try:
            if rope and np.allclose(_factors(rope, width), found, rtol=1e-6, atol=0):
                return rope
        except (KeyError, TypeError, ValueError):  # the file's own words may be anything
            continue
    return None


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        rope = json.loads(text or "{}")
    except ValueError:
        return {}
    return rope if isinstance(rope, dict) else {}
