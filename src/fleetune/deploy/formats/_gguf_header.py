# SPDX-License-Identifier: Apache-2.0
"""Check that a configuration has a place in GGUF, and write it as the metadata of a file."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, Final

import gguf
from gguf import LlamaFileType

from fleetune.deploy.formats import Misfit
from fleetune.models.families import rope, table, widths

PHI3_TOKENS: Final = frozenset(("</s>", "<unk>", "<s>", "<|endoftext|>"))


def check_config(config: Any) -> None:
    """Raise Misfit for a configuration that has no place in GGUF, whatever the weights."""
    if (why := table.misfit(config)) is not None:
        remedy = "prune it again with --set first=0 --set last=0, which leaves all blocks alike"
        alike = widths.has_block_widths(config) and config.model_type == "qwen3"
        raise Misfit(why, remedy=remedy if alike else "")


def notes_on(config: Any) -> list[str]:
    """Return what llama.cpp does otherwise with a model of this configuration, for the user."""
    found = []
    length, whole = context_length(config), table.family_of(config).length(config)
    if length != whole:
        found.append(
            f"llama.cpp has no window in a {config.model_type}: the file states a context of {length} tokens instead of "
            f"{whole}, up to which it is the same"
        )
    if rope.kind(config) == "longrope":
        found.append(
            f"llama.cpp takes the long factors of the rotary embedding when its context is longer than "
            f"{rope.original_length(config)}, transformers when the text is"
        )
    return [*found, *rope.ramp_notes(config, "llama.cpp")]


def context_length(config: Any) -> int:
    """Return the longest context for which llama.cpp computes what transformers does."""
    family = table.family_of(config)
    window = getattr(config, family.window) if family.window else None
    length = int(family.length(config))
    return length if window is None else min(length, int(window))


def tensor_name(config: Any, parameter: str) -> str | None:
    """Return the file's name of a parameter by the gguf package's map; None when it has none."""
    names = _names(table.architecture(config), int(config.num_hidden_layers))
    suffixes = (".weight", ".bias")
    found: str | None = names.get_name(parameter, try_suffixes=suffixes) or names.get_name(
        parameter.removeprefix("transformer."), try_suffixes=suffixes
    )
    return found


@functools.cache
def _names(architecture: str, blocks: int) -> Any:
    arch = {text: key for key, text in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    return gguf.get_tensor_name_map(arch, blocks)


def add_metadata(writer: Any, config: Any, file_type: LlamaFileType, name: str) -> None:
    """Write a model's name, sizes and file type into the metadata of a gguf.GGUFWriter."""
    family = table.family_of(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    _add_widths(writer, config)
    writer.add_key_length(rope.head_dim(config))
    writer.add_value_length(rope.head_dim(config))
    if family.rotary:
        writer.add_rope_dimension_count(rope.width(config))
        writer.add_rope_freq_base(float(rope.settings(config)["rope_theta"]))
    if rope.kind(config) == "llama3":
        writer.add_string(rope.KEY, json.dumps(config.rope_parameters, sort_keys=True))
    add_epsilon = writer.add_layer_norm_eps if family.layer_norm else writer.add_layer_norm_rms_eps
    add_epsilon(getattr(config, family.epsilon))
    for key, value in family.keys(config).items():
        _add(writer, f"{table.architecture(config)}.{key}", value)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(int(file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add(writer: Any, key: str, value: table.Value) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](key, value)


def _add_widths(writer: Any, config: Any) -> None:
    """Write the numbers of heads and channels: of all blocks, or lists of every block's where these differ."""
    family = table.family_of(config)
    if widths.has_block_widths(config):
        heads, key_heads, channels = (list(each) for each in zip(*widths.block_widths(config), strict=True))
        writer.add_head_count(heads)
        writer.add_head_count_kv(key_heads)
        writer.add_feed_forward_length(channels)
        return
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(family.key_heads(config))
    writer.add_feed_forward_length(family.channels(config))


def loadable_name(name: str, tokens: Sequence[str]) -> str:
    """Return a model's name as the header of its file has it.

    Of a name with "phi-3" or "phi3" llama.cpp takes it that the vocabulary is Phi-3's, and loads no other.
    """
    return name if set(tokens) >= PHI3_TOKENS else re.sub("(?i)phi-?3", "phi 3", name)
