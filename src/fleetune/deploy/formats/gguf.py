# SPDX-License-Identifier: Apache-2.0
"""A model as one .gguf file, for llama.cpp and what is built on it (Ollama, LM Studio, llamafile).

The container is the ggml project's docs/gguf.md, version 3; tensor names are gguf.TensorNameMap's and
metadata keys those that llama.cpp reads for architectures llama, qwen2 and qwen3.  Quantised matrices are
repacked without loss (`blocks.py`); a target that cannot hold the codes is refused before anything is written.

    target      quantised matrices             embedding, head        other matrices       norms, biases
    gguf        Q4_0, Q4_1 or Q8_0: the        Q8_0                   F16 (BF16 stays)     F32
                smallest that is exact
    gguf:q4_0   Q4_0 (q4_1, q8_0 alike)        Q8_0                   F16 (BF16 stays)     F32
    gguf:f32    F32 (f16, bf16 if exact)       F32                    F32                  F32

of a plain directory: gguf:q8_0, f16, bf16, f32 for all matrices; gguf alone is F16 (BF16 stays).  Rows that
Q8_0's blocks of 32 do not divide become F16, and the report says so.

llama.cpp rotates pairs of neighbouring rows of a llama's q and k, transformers pairs of row i and i + d/2;
so the rows of a head are interleaved, [2, d/2] -> [d/2, 2].  Groups lie along columns and are left whole.
Gemma's norms are held as 1 + w (`gemma.py`).  Llama 3's rescaled frequencies go into the tensor rope_freqs.weight
(`rope.py`); other rescalings are refused.  A pruned llama whose blocks differ in width is architecture "deci", whose
numbers of heads and channels are lists.

One tensor at a time is in memory, in writing and in reading back.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from fleetune.deploy.checkpoint import Checkpoint, Report
from fleetune.deploy.formats import ggml_blocks, gguf_vocabulary
from fleetune.errors import UsageError
from fleetune.models.artefact import Quantised
from fleetune.models.dtypes import WEIGHTS
from fleetune.models.families import deci, gemma, rope, widths
from fleetune.models.tensor_file import damaged

KINDS: Final = ("q4_0", "q4_1", "q8_0", "f16", "bf16", "f32")
ARCHITECTURES: Final = ("llama", "qwen2", "qwen3", *gemma.ARCHITECTURES)
FLOATS: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {dtype.tag: getattr(torch, dtype.full) for dtype in WEIGHTS.values()}
)
ENDS: Final = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Slot:
    """A tensor of the file and where it comes from."""

    tensor: str  # its name in the file
    name: str  # the parameter
    shape: tuple[int, ...]
    kind: str  # Q4_0, Q4_1, Q8_0, F32, F16 or BF16
    heads: int  # in how many heads the rows are interleaved; 0: as they are
    shifted: bool  # whether the file holds 1 + w: gemma's norms

    @property
    def bytes(self) -> int:
        """Size in the file."""
        block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // int(block) * int(size)


def write(model: Checkpoint, path: Path, kind: str | None, made: Mapping[str, str], *, name: str) -> Report:
    """Write `model` to the new file `path`, read it back and compare every tensor.

    `kind` is one of `KINDS`, None for what the codes are; `made` are strings for the header (`provenance.py`), `name`
    the model's name there.
    UsageError before anything is written when the architecture or the codes have no place in GGUF;
    OSError when the disk is full; FleetuneError when the file does not hold what was written.
    """
    check_config(model.config)
    notes: list[str] = []
    slots = _plan(model, kind, notes)
    vocabulary = gguf_vocabulary.read(
        model.folder, model.shapes["model.embed_tokens.weight"][0], model.config
    )
    notes.extend(vocabulary.notes)
    factors = rope.factors(model.config)
    writer = gguf.GGUFWriter(path, architecture(model.config))
    try:
        _add_metadata(writer, model.config, _file_type(slots), name)
        for key, text in made.items():
            writer.add_string(key, text)
        vocabulary.add_to(writer)
        _write_tensors(writer, model, slots, factors)
    finally:
        writer.close()
    rounded = verify(path, model, slots, factors)
    notes += _rounded(rounded)
    return Report(
        path=path,
        to="gguf" if kind is None else f"gguf:{kind}",
        bytes=path.stat().st_size,
        tensors=len(slots),
        exact=len(slots) - len(rounded),
        types=dict(Counter(slot.kind for slot in slots)),
        notes=tuple(notes),
    )


def _rounded(slots: Sequence[Slot]) -> list[str]:
    """What is said of the tensors that do not hold the source's values: a line for each type."""
    names = {
        kind: [slot.name for slot in slots if slot.kind == kind] for kind in sorted({s.kind for s in slots})
    }
    return [f"{_counted(found)} rounded to {kind}" for kind, found in names.items()]


def _counted(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} tensors are"


# ---------------------------------------------------------------- what goes where


def check_config(config: Any) -> None:
    """UsageError for a model that has no place in GGUF, whatever its weights."""
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
    """llama.cpp's name for the model: deci is a llama with numbers of heads and channels for every block."""
    kind = str(config.model_type)
    return deci.ARCHITECTURE if widths.has_block_widths(config) else gemma.ARCHITECTURES.get(kind, kind)


def _plan(model: Checkpoint, kind: str | None, notes: list[str]) -> list[Slot]:
    """The tensors of the file, in the model's order; notes get the fallbacks."""
    if not model.compressed and kind in ("q4_0", "q4_1"):
        raise UsageError(
            f"{model.folder} holds plain weights, and gguf:{kind} is for compressed ones",
            hint="compress it first (fleetune compress), or use --to gguf:q8_0",
        )
    config = model.config
    arch = {text: key for key, text in gguf.MODEL_ARCH_NAMES.items()}[architecture(config)]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    slots, odd = list[Slot](), list[str]()
    for name, shape in model.shapes.items():
        tensor = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if tensor is None:
            raise UsageError(f"GGUF has no place for {name}", hint="export to a directory instead: --to hf")
        chosen = _kind_of(model, name, tensor, kind, odd)
        shifted = gemma.is_norm(architecture(config), tensor)
        slots.append(Slot(tensor, name, shape, chosen, widths.heads_of(config, tensor), shifted))
    if odd:
        notes.append(f"{_counted(odd)} not Q8_0: blocks of {ggml_blocks.BLOCK} do not divide the rows")
    return slots


def _kind_of(model: Checkpoint, name: str, tensor: str, kind: str | None, odd: list[str]) -> str:
    """The type of a tensor in the file; `odd` gets the names of those whose rows Q8_0 does not fit."""
    shape = model.shapes[name]
    if len(shape) == 1:
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
    if shape[-1] % ggml_blocks.BLOCK:
        odd.append(name)
        return plain
    return "Q8_0"


def _exact_kind(name: str, q: Quantised, kind: str | None) -> str:
    """The type that holds a quantised matrix without loss; UsageError when there is none, or not `kind`."""
    fits = {k: ggml_blocks.misfit(q, k) for k in ggml_blocks.PACKERS}
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


def _file_type(slots: list[Slot]) -> LlamaFileType:
    """What llama.cpp shows as the file's type: that of most weights in the layers."""
    weights: Counter[str] = Counter()
    for slot in slots:
        if len(slot.shape) == 2 and slot.tensor not in ENDS:
            weights[slot.kind] += math.prod(slot.shape)
    main = weights.most_common(1)[0][0]
    return LlamaFileType.ALL_F32 if main == "F32" else LlamaFileType[f"MOSTLY_{main}"]


# ---------------------------------------------------------------- writing


def _add_metadata(writer: Any, config: Any, file_type: LlamaFileType, name: str) -> None:
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
    """A number of every block where blocks have widths of their own, else the one of all."""
    return list(numbers) if widths.has_block_widths(config) else numbers[0]


def _write_tensors(writer: Any, model: Checkpoint, slots: list[Slot], factors: np.ndarray | None) -> None:
    """The table of tensors first, then their values one at a time."""
    if factors is not None:
        writer.add_tensor_info(rope.TENSOR, factors.shape, factors.dtype, factors.nbytes)
    for slot in slots:
        kind = GGMLQuantizationType[slot.kind]
        writer.add_tensor_info(slot.tensor, slot.shape, np.dtype(np.float32), slot.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for slot in slots:
        writer.write_tensor_data(_encode(model, slot))


def _encode(model: Checkpoint, slot: Slot) -> np.ndarray:
    """The bytes of a tensor as the file has them, uint8 with rows (or values of a bias) in the file's order."""
    if slot.kind in ggml_blocks.PACKERS and (q := model.quantised(slot.name)) is not None:
        raw = ggml_blocks.PACKERS[slot.kind](q)
        return np.ascontiguousarray(raw[_order(slot)]) if slot.heads else raw
    weight = _values(model, slot)
    if slot.heads:
        weight = weight[torch.from_numpy(_order(slot))]
    if slot.kind == "Q8_0":
        blocks_of_rows: np.ndarray = gguf.quants.quantize(weight.float().numpy(), GGMLQuantizationType.Q8_0)
        return blocks_of_rows
    return _float_bytes(weight, slot)


def _values(model: Checkpoint, slot: Slot) -> Tensor:
    """What the file's tensor should hold, rows in the model's order."""
    weight = model.weight(slot.name)
    return torch.from_numpy(gemma.plus_one(weight.float().numpy())) if slot.shifted else weight


def _float_bytes(weight: Tensor, slot: Slot) -> np.ndarray:
    values = weight.to(FLOATS[slot.kind]).contiguous()
    if bool(values.isinf().any()) and not bool(weight.isinf().any()):
        raise UsageError(f"{slot.name} has values beyond {slot.kind}'s range", hint="use --to gguf:bf16")
    return values.view(torch.uint8).numpy()


def _order(slot: Slot) -> np.ndarray:
    return interleaved(slot.shape[0], slot.heads)


def interleaved(rows: int, heads: int) -> np.ndarray:
    """Which of the model's rows of a q or k with so many heads each row of the file is."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


# ---------------------------------------------------------------- reading back


def verify(path: Path, model: Checkpoint, slots: list[Slot], factors: np.ndarray | None = None) -> list[Slot]:
    """Compare the file with the model, tensor by tensor; those that do not hold the model's values exactly.

    Names, types, shapes and bytes must be what was meant to be written, and the values, read by the gguf
    package's own rules, must be those of a quantised matrix.  FleetuneError otherwise.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise damaged(path, str(error)) from error
    found = {tensor.name: tensor for tensor in reader.tensors}
    if factors is not None:
        held = found.pop(rope.TENSOR, None)
        if held is None or not np.array_equal(held.data, factors):
            raise damaged(path, f"{rope.TENSOR} is not what was written")
    if sorted(found) != sorted(slot.tensor for slot in slots):
        raise damaged(path, "it does not hold the tensors that were written")
    return [slot for slot in slots if not _compare(path, model, slot, found[slot.tensor])]


def _compare(path: Path, model: Checkpoint, slot: Slot, tensor: Any) -> bool:
    """Whether a tensor of the file has the model's values; FleetuneError when its bytes are wrong."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if shape != slot.shape or tensor.tensor_type.name != slot.kind:
        raise damaged(
            path, f"{slot.tensor} is {tensor.tensor_type.name} {shape}, not {slot.kind} {slot.shape}"
        )
    if not np.array_equal(np.ascontiguousarray(tensor.data).view(np.uint8), _encode(model, slot)):
        raise damaged(path, f"{slot.tensor} does not hold the bytes that were written")
    exact = all(bool((part == own).all()) for part, own in _value_pairs(model, slot, tensor))
    if not exact and model.quantised(slot.name) is not None:
        raise damaged(path, f"{slot.tensor} does not hold the values of {slot.name}")
    return exact


def _value_pairs(model: Checkpoint, slot: Slot, tensor: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Values in fp32 as read and as they should be, some rows at a time in the file's order."""
    own = _values(model, slot)
    order = torch.from_numpy(_order(slot)) if slot.heads else torch.arange(len(own))
    step = max(1, (1 << 22) // max(1, own[0].numel()))
    for start in range(0, len(own), step):
        rows = tensor.data[start : start + step]
        read = gguf.quants.dequantize(rows, tensor.tensor_type)
        yield read, own[order[start : start + step]].float().numpy()
