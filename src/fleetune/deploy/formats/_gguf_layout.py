# SPDX-License-Identifier: Apache-2.0
"""Lay out a GGUF file: the metadata of a configuration, and for each tensor its parameter, the order of its rows and its type."""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Misfit, _ggml_blocks
from fleetune.errors import UsageError
from fleetune.models.artefact import Quantised
from fleetune.models.families import experts, rope, table, widths
from fleetune.models.families.number_types import WEIGHTS

PHI3_TOKENS: Final = frozenset(("</s>", "<unk>", "<s>", "<|endoftext|>"))
FLOATS: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {dtype.tag: getattr(torch, dtype.full) for dtype in WEIGHTS.values()}
)
# types that plain weights are not rounded to here
ROUNDED_BY_COMPRESS: Final = tuple(kind.lower() for kind in _ggml_blocks.PACKERS if kind != "Q8_0")
EMBEDDING: Final = "token_embd.weight"
ENDS: Final = (EMBEDDING, "output.weight")
FULL: Final = (  # F32, whatever their shape
    "norm.weight",
    "position_embd.weight",
    "shortconv.conv.weight",
    "ffn_gate_inp.weight",
)


def check_config(config: Any) -> None:
    """Raise Misfit for a configuration that has no place in GGUF, whatever the weights."""
    if (why := table.misfit(config)) is not None:
        remedy = "prune it again with --set first=0 --set last=0, which leaves all blocks alike"
        alike = widths.has_block_widths(config) and config.model_type == "qwen3"
        raise Misfit(why, remedy=remedy if alike else "")


def notes_on(config: Any) -> list[str]:
    """Return what llama.cpp does otherwise with a model of this configuration, for the user."""
    found = []
    length, whole = context_length(config), config.max_position_embeddings
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
    length = int(config.max_position_embeddings)
    window = config.sliding_window if table.family_of(config).windowless else None
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
    add_epsilon(table.epsilon(config))
    for key, value in table.keys(config).items():
        _add(writer, f"{table.architecture(config)}.{key}", value)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(int(file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add(writer: Any, key: str, value: table.Value) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](key, value)


def _add_widths(writer: Any, config: Any) -> None:
    """Write the numbers of heads and channels: of all blocks, or lists of every block's where these differ."""
    if widths.has_block_widths(config):
        heads, key_heads, channels = (list(each) for each in zip(*widths.block_widths(config), strict=True))
        writer.add_head_count(heads)
        writer.add_head_count_kv(key_heads)
        writer.add_feed_forward_length(channels)
        return
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(table.key_heads(config))
    writer.add_feed_forward_length(table.channels(config))


def loadable_name(name: str, tokens: Sequence[str]) -> str:
    """Return a model's name as the header of its file has it.

    Of a name with "phi-3" or "phi3" llama.cpp takes it that the vocabulary is Phi-3's, and loads no other.
    """
    return name if set(tokens) >= PHI3_TOKENS else re.sub("(?i)phi-?3", "phi 3", name)


# ---------------------------------------------------------------- tensors


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file, and the parameter that it comes from."""

    name: str  # in the file
    parameter: str  # transformers' name
    shape: tuple[int, ...]  # in the file
    kind: str  # one of `_ggml_blocks.PACKERS`, F32, F16 or BF16
    order: np.ndarray | None  # int64: which of the parameter's rows each row is; None: as they are
    parts: int  # tensors of the file that the parameter is
    shifted: bool  # whether the file holds 1 + w
    transposed: bool  # whether the model has it as [in, out]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // int(block) * int(size)


def plan(model: Checkpoint, kind: str | None, notes: list[str]) -> list[GgufTensor]:
    """Return the tensors of the file in the model's order; `notes` gets the fallbacks."""
    if not model.compressed and kind in ROUNDED_BY_COMPRESS:
        raise UsageError(
            f"{model.folder} holds plain weights, and gguf:{kind} is for compressed ones",
            hint="compress it first (fleetune compress), or use --to gguf:q8_0",
        )
    entries, odd = list[GgufTensor](), list[str]()
    for name in model.names:
        for part in experts.parts(name):
            tensor = tensor_name(model.config, part.name)
            if tensor is None:
                raise UsageError(
                    f"GGUF has no place for {name}", hint="export to a directory instead: --to hf"
                )
            entries.append(_entry(model, name, part, tensor, kind, odd))
    if odd:
        notes.append(f"{counted(odd)} not Q8_0: blocks of {_ggml_blocks.BLOCK} do not divide the rows")
    return entries


def _entry(
    model: Checkpoint, name: str, part: experts.Part, tensor: str, kind: str | None, odd: list[str]
) -> GgufTensor:
    """Return the tensor of the file for a part of a parameter; `odd` as in `_kind_of`."""
    config, own = model.config, model.shapes[name]
    transposed = table.is_transposed(config, tensor)
    whole = (*own[:-2], own[-1], own[-2]) if transposed else _flat(own)
    shape = experts.part_shape(whole, part, tensor)
    order = part.order(whole, not experts.is_bias(tensor), table.family_of(config).paired)
    if order is None:
        order = table.row_order(config, tensor, shape[0])
    chosen = _kind_of(model, name, tensor, shape, kind, odd)
    shifted = table.is_shifted(config, tensor)
    return GgufTensor(tensor, name, shape, chosen, order, part.of, shifted, transposed)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a convolution's shape [C, 1, K] as [C, K], and others as they are."""
    return (shape[0], shape[2]) if len(shape) == 3 and shape[1] == 1 else shape


def _kind_of(
    model: Checkpoint, name: str, tensor: str, shape: tuple[int, ...], kind: str | None, odd: list[str]
) -> str:
    """Return the type of a tensor in the file; `odd` gets the names of those whose rows Q8_0 does not fit."""
    if len(shape) == 1 or experts.is_bias(tensor) or tensor.endswith(FULL):
        return "F32"
    plain = "BF16" if model.dtype == torch.bfloat16 else "F16"
    if (q := model.quantised(name)) is not None:
        return _exact_kind(name, q, kind)
    if kind in ("f16", "bf16", "f32"):
        return kind.upper()
    if model.compressed and tensor not in ENDS:
        return plain
    if not model.compressed and kind is None:
        return plain
    if shape[-1] % _ggml_blocks.BLOCK:
        odd.append(name)
        return plain
    return "Q8_0"


def _exact_kind(name: str, q: Quantised, kind: str | None) -> str:
    """Return the type that holds a quantised matrix without loss; UsageError when there is none, or not `kind`."""
    fits = {k: _ggml_blocks.misfit(q, k) for k in _ggml_blocks.PACKERS}
    possible = [k for k, why in fits.items() if why is None]
    wanted = "Q4_0" if kind is None else kind.upper()
    reason = _inexact(q, wanted) if wanted in FLOATS else fits[wanted]
    if reason is None:
        return wanted
    if kind is None and possible:
        return possible[0]
    raise UsageError(
        f"{name} does not go into {'GGUF blocks' if kind is None else f'gguf:{kind}'} without loss: {reason}",
        hint=f"use --to {'gguf' if possible else 'gguf:f32'} or --to hf, or compress again for this target",
    )


def _inexact(q: Quantised, kind: str) -> str | None:
    dense = q.dense()
    same = bool((dense.to(FLOATS[kind]).float() == dense).all())
    return None if same else f"scale * (code - zero) is not exact in {kind}"


def file_type(entries: list[GgufTensor]) -> LlamaFileType:
    """Return the type that llama.cpp shows for the file: that of most weights in the layers."""
    weights: Counter[str] = Counter()
    for entry in entries:
        if len(entry.shape) > 1 and entry.name not in ENDS and not entry.name.endswith(FULL):
            weights[entry.kind] += math.prod(entry.shape)
    main = weights.most_common(1)[0][0]
    if main == "F32":
        return LlamaFileType.ALL_F32
    return LlamaFileType[f"MOSTLY_{main}" + ("_S" if main in ("Q3_K", "Q4_K", "Q5_K") else "")]


def counted(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} tensors are"
