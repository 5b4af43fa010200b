# SPDX-License-Identifier: Apache-2.0
"""The targets of an export by name, and whether a place suits one: light, so that a slip is said at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from fleetune.errors import UsageError

LORA: Final = "gguf:lora"  # of a run's adapter alone
PEFT: Final = "peft"  # of a run's adapter; copied, not repacked
TARGETS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "gguf": "one file for llama.cpp, Ollama, LM Studio: in the type that holds the codes exactly",
        "gguf:q4_0": "the same, 4.5 bits a weight: symmetric 4-bit codes",
        "gguf:q4_1": "the same, 5 bits a weight: 4-bit codes with a zero",
        "gguf:q8_0": "the same, 8.5 bits a weight: codes up to 8 bits, or plain weights rounded",
        "gguf:f16": "the same, plain weights in fp16",
        "gguf:bf16": "the same, plain weights in bf16",
        "gguf:f32": "the same, plain weights in fp32",
        LORA: "a run's LoRA adapter, for llama.cpp beside a GGUF file of the base",
        "compressed-tensors": "a directory for vLLM, SGLang and transformers: 4- or 8-bit codes",
        "gptq": "a directory in GPTQ's format: 2-, 3-, 4- or 8-bit codes",
        "mlx": "a directory for MLX on Apple computers: codes of 2 to 8 bits in groups of 32, 64 or 128",
        "hf": "a plain directory for transformers: fp32 from codes, else as stored",
        "hf:fp32": "the same, in fp32",
        "hf:bf16": "the same, in bf16",
        "hf:fp16": "the same, in fp16",
    }
)


def check_target(to: str) -> None:
    """UsageError unless `to` is a target."""
    if to in TARGETS:
        return
    close = difflib.get_close_matches(to.lower(), TARGETS, n=1, cutoff=0.5)
    raise UsageError(
        f"no target named '{to}'" + (f". Did you mean '{close[0]}'?" if close else ""),
        hint="choose one of " + ", ".join([*TARGETS, PEFT]),
    )


def check_place(to: str, out: Path) -> None:
    """UsageError unless `out` is a new place that suits the target `to`."""
    if out.exists():
        raise UsageError(f"{out} exists already", hint="choose a new place with --path, or remove it first")
    if to.startswith("gguf") != (out.suffix.lower() == ".gguf"):
        what = "a file, named .gguf" if to.startswith("gguf") else "a folder, not named .gguf"
        raise UsageError(
            f"{to} is written as {what}; --path is {out}", hint="choose another name with --path"
        )
