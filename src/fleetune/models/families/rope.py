# SPDX-License-Identifier: Apache-2.0
"""Convert Llama 3's rescaled rotary frequencies between a GGUF file's factors and transformers' settings.

A file stores what each of the d / 2 frequencies is divided by (tensor rope_freqs.weight); transformers stores four
numbers from which these follow.  Our files have the numbers too (key `KEY`); for others, those of Llama 3.1 and 3.2 are
tried.  Numbers that do not give the file's factors are rejected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

KEY: Final = "fleetune.rope_parameters"  # JSON
TENSOR: Final = "rope_freqs.weight"
_PUBLISHED: Final = tuple(
    {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)  # fmt: skip


def head_dim(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def factors(config: Any) -> np.ndarray | None:
    """Return what Llama 3's rescaling divides each of the d / 2 rotary frequencies by, fp32; None without it."""
    rope = config.rope_parameters
    return _factors(rope, head_dim(config)) if rope.get("rope_type", "default") == "llama3" else None


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
