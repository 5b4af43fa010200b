# SPDX-License-Identifier: Apache-2.0
"""Check that a configuration has a place in GGUF, and write it as the metadata of a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import gguf
from gguf import LlamaFileType

from fleetune.errors import UsageError
from fleetune.models.families import deci, gemma, rope, widths
from fleetune.models.tensor_file import damaged

ARCHITECTURES: Final = ("llama", "qwen2", "qwen3", *gemma.ARCHITECTURES)

UNREADABLE: Final = (  # what the gguf package raises for a file that is none, or is damaged
    OSError, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError,
)  # fmt: skip


def open_written(path: Path) -> Any:
    """Open a file that was just written with a gguf.GGUFReader; FleetuneError when it cannot be read."""
    try:
        return gguf.GGUFReader(path)
    except UNREADABLE as error:
        raise damaged(path, str(error)) from error


def check_config(config: Any) -> None:
    """Raise UsageError for a configuration that has no place in GGUF, whatever the weights."""
    instead = "export to a directory instead: --to hf"
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(f"GGUF files are written for {known}, not for '{config.model_type}'", hint=instead)
    if widths.has_block_widths(config) and config.model_type != "llama":
        raise UsageError(
            f"GGUF has no place for blocks of different widths in a {config.model_type}",
            hint=instead
            if config.model_type == "qwen2"
            else "--to hf, or prune it again with --set first=0 --set last=0, which leaves all blocks alike",
        )
    if config.model_type in gemma.ARCHITECTURES:
        if (why := gemma.misfit(config)) is not None:
            raise UsageError(f"GGUF has no place for {why}", hint=instead)
        return
    if config.hidden_act != "silu":
        raise UsageError(f"GGUF has no place for the activation '{config.hidden_act}'", hint=instead)
    wide = int(getattr(config, "head_dim", 0) or 0) * config.num_attention_heads
    if config.model_type == "qwen2" and wide not in (0, config.hidden_size):
        raise UsageError(
            f"llama.cpp reads no qwen2 whose heads are {wide} wide together where the model is {config.hidden_size}",
            hint=instead,
        )
    if getattr(config, "use_sliding_window", False):
        raise UsageError("GGUF files are not written for sliding-window attention", hint=instead)
    scaling = config.rope_parameters.get("rope_type", "default")
    if scaling not in ("default", "llama3") or (scaling == "llama3" and config.model_type != "llama"):
        raise UsageError(f"GGUF files are not written for rotary scaling '{scaling}'", hint=instead)
    if config.rope_parameters.get("partial_rotary_factor", 1) != 1:
        raise UsageError("GGUF files are not written for partly rotated heads", hint=instead)


def architecture(config: Any) -> str:
    """Return llama.cpp's name for the model; deci is a llama with numbers of heads and channels for every block."""
    kind = str(config.model_type)
    return deci.ARCHITECTURE if widths.has_block_widths(config) else gemma.ARCHITECTURES.get(kind, kind)


def tensor_names(config: Any) -> Any:
    """Return the gguf package's map from transformers' tensor names to those of the file."""
    arch = {text: key for key, text in gguf.MODEL_ARCH_NAMES.items()}[architecture(config)]
    return gguf.get_tensor_name_map(arch, config.num_hidden_layers)


def add_metadata(writer: Any, config: Any, file_type: LlamaFileType, name: str) -> None:
    """Write a model's name, sizes and file type into the metadata of a gguf.GGUFWriter."""
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    heads, kv_heads, channels = zip(*widths.block_widths(config), strict=True)
    writer.add_feed_forward_length(_all_or_one(config, channels))
    writer.add_head_count(_all_or_one(config, heads))
    writer.add_head_count_kv(_all_or_one(config, kv_heads))
    writer.add_key_length(rope.head_dim(config))
    writer.add_value_length(rope.head_dim(config))
    writer.add_rope_dimension_count(rope.head_dim(config))
    if config.model_type in gemma.ARCHITECTURES:
        writer.add_rope_freq_base(gemma.rope_theta(config))
        gemma.add_to(writer, config)
    else:
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_string(rope.KEY, json.dumps(config.rope_parameters, sort_keys=True))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(int(file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _all_or_one(config: Any, numbers: Sequence[int]) -> list[int] | int:
    """Return one number per block where blocks differ in width, else the one of all."""
    return list(numbers) if widths.has_block_widths(config) else numbers[0]
