# SPDX-License-Identifier: Apache-2.0
"""Convert a GGUF file to a Hugging Face directory with the same numbers, a few rows in memory at a time.

GGUF (the ggml project's docs/gguf.md, version 2 and 3) stores quantised rows.  `w = d * q + m` per group
of 32 (Q4_1) and its relatives give values that 16-bit floats cannot hold, so the weights are written in
**fp32**: nothing is lost, and the same file gives the same bytes everywhere.

Beside sizes and rows:
  * llama's q and k rows are stored pair-wise interleaved for ggml's rotary embedding; they are put back in
    the half-split order that transformers uses (a permutation of rows, done before dequantising); a llama with biases
    has them for its own, not only in the file;
  * rescaled rotary frequencies (Llama 3.1) come as factors: used where Llama 3's rule gives them (`rope.py`),
    else the file is refused;
  * gemma's norms, caps and windows; llamas whose blocks differ in width (architecture deci, below), which only Fleetune
    loads again; the tokenizer (`tokenizer.py`).

The model is never in memory as a whole: names and shapes come from a model on the meta device, every tensor of
it must be found in the file and vice versa, and rows go straight into the safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import gguf
import numpy as np
import torch
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
)

from fleetune.common.shell import quoted
from fleetune.errors import ModelError
from fleetune.models import stored
from fleetune.models.families import rope, table, widths
from fleetune.models.families.foreign import check_blocks, check_range, foreign_file
from fleetune.models.families.widths import Width, write_widths
from fleetune.models.gguf import header
from fleetune.models.gguf import tokenizer as gguf_tokens
from fleetune.models.gguf.header import GgufHeader
from fleetune.models.net.saving import disk_errors
from fleetune.models.stored import MappedFile, Stored

ANOTHER: Final = "fetch the file again, or give another one"
SLAB: Final = 1 << 22  # elements dequantised at a time (16 MiB of fp32)
# what the rows and values of an architecture need; an architecture that is not here was not verified
ARCHITECTURES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "llama": "interleaved q, k",
        "qwen2": "as they are",
        "qwen3": "as they are",
        "gemma": "norms 1 + w",
        "gemma2": "norms 1 + w",
        "gemma3": "norms 1 + w",
        "deci": "interleaved q, k",
    }
)
READ: Final = frozenset({"F32", "F16", *(kind.name for kind in gguf.quants._type_traits)})  # types of tensors
SIZES: Final[Mapping[str, str]] = MappingProxyType(  # keys of an architecture -> names in a configuration
    {
        "context_length": "max_position_embeddings",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "embedding_length": "hidden_size",
        "rope.freq_base": "rope_theta",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "vocab_size": "vocab_size",
    }
)


def load_config(path: Path) -> Any:
    """Return the transformers configuration that a GGUF file's metadata describes; no weights are read.

    ModelError for a damaged file, an architecture not in `ARCHITECTURES`, blocks that no class has a place for, or
    rescaled rotary frequencies.
    """
    return _config(path, header.check_whole(path))


def convert(
    path: Path, folder: Path, *, weights: bool = True, progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Write the model of the GGUF file `path` into the existing `folder` as a Hugging Face directory.

    fp32 safetensors, configuration, generation defaults, tokenizer with chat template and special tokens.  Without `weights`
    these stay in the file, and where they are is written instead (`stored.py`).  ModelError as in `load_config`, or
    when names or shapes do not fit the architecture; OSError when the disk is full.
    """
    head = header.check_whole(path)
    config = _config(path, head)
    tensors = _tensors(path, head, config)
    tokenizer = _tokenizer(path, head, config)
    if weights:
        _write_weights(path, tensors, folder / "model.safetensors", progress)
    else:
        stored.write_places(folder, tensors)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    widths.mark_config(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    with disk_errors(folder):
        tokenizer.save_pretrained(folder)


def _config(path: Path, head: GgufHeader) -> Any:
    instead = "use the model's hub id or a Hugging Face directory of it"
    with foreign_file(path, "has unusable metadata", hint=instead):  # a text may be in no encoding
        architecture = _checked_architecture(path, head, instead)
        config = _described(path, architecture, head)
        if (width := head.values.get(f"{architecture}.attention.key_length")) is not None:
            config.head_dim = int(width)  # transformers does not read it for every architecture
        _take_factors(path, head, config, instead)
        # metadata hold fp32: 1e-05 comes back as 9.999999747378752e-06
        config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    return config


def _checked_architecture(path: Path, head: GgufHeader, instead: str) -> str:
    """Return the architecture of the metadata; ModelError for one that is not read, and for sizes that no model has."""
    architecture = str(head.values.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"{path} holds architecture '{architecture}'; GGUF files are read for {known}", hint=instead
        )
    if head.values.get(f"{architecture}.expert_count"):
        raise ModelError(
            f"{path} holds a mixture of experts; GGUF files are read for dense models", hint=instead
        )
    scaling = head.values.get(f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none") and (architecture, scaling) != ("gemma3", "linear"):
        raise ModelError(
            f"{path} rescales its rotary frequencies, which transformers cannot express", hint=instead
        )
    check_blocks(head.values.get(f"{architecture}.block_count"), len(head.tensors), path)
    return architecture


def _described(path: Path, architecture: str, head: GgufHeader) -> Any:
    """Return the configuration of metadata and tensor names; a configuration class may raise anything for a wrong value."""
    names = {tensor.name for tensor in head.tensors}
    ids = {
        f"{name}_token_id": head.values.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in gguf_tokens.SPECIAL.items()
    }
    if architecture in ("gemma", "gemma2", "gemma3", widths.DECI):
        config = _own(path, architecture, head)
        del ids["unk_token_id"]
        config.update(ids)
    else:
        keys = dict(SIZES) | ({"rope.dimension_count": "head_dim"} if architecture == "llama" else {})
        values = ids | {name: head.values.get(f"{architecture}.{key}") for key, name in keys.items()}
        if values["vocab_size"] is None:
            values["vocab_size"] = len(head.values["tokenizer.ggml.tokens"])
        values["tie_word_embeddings"] = "output.weight" not in names
        config = AutoConfig.for_model(architecture, **{n: v for n, v in values.items() if v is not None})
    if config.model_type == "llama":
        config.tie_word_embeddings = "output.weight" not in names
        config.attention_bias = "blk.0.attn_q.bias" in names
        config.mlp_bias = "blk.0.ffn_up.bias" in names
    return config


def _own(path: Path, architecture: str, head: GgufHeader) -> Any:
    """Return the configuration of what transformers cannot read: gemma and deci, and gemma2's and gemma3's caps and bases."""
    tokens = head.values.get("tokenizer.ggml.tokens") or []

    def field(key: str) -> Any:
        value = head.values.get(f"{architecture}.{key}")
        return len(tokens) if key == "vocab_size" and value is None else value

    if architecture != widths.DECI:
        return _gemma(architecture, field)
    if (why := _deci_misfit(field)) is not None:
        raise ModelError(
            f"{path} is no llama with narrower blocks: {why}",
            hint=f"llama.cpp runs it (fleetune serve {quoted(path)}); to tune or compress, take another model",
        )
    return _deci(field)


def _gemma(architecture: str, field: Callable[[str], Any]) -> Any:
    """Return the configuration of a gemma, gemma2 or gemma3; `field` as for `_deci`.

    KeyError for a key that is required; ValueError when the values make no sense.
    """

    def need(key: str) -> Any:
        if (value := field(key)) is None:
            raise KeyError(key)
        return value

    sizes = {
        "vocab_size": need("vocab_size"),
        "hidden_size": need("embedding_length"),
        "num_hidden_layers": need("block_count"),
        "intermediate_size": need("feed_forward_length"),
        "num_attention_heads": need("attention.head_count"),
        "head_dim": need("attention.key_length"),
        "num_key_value_heads": need("attention.head_count_kv"),
        "max_position_embeddings": need("context_length"),
    }
    made: dict[str, Any] = {key: int(value) for key, value in sizes.items()}
    made["rms_norm_eps"] = need("attention.layer_norm_rms_epsilon")
    rope = {"rope_type": "default", "rope_theta": float(field("rope.freq_base") or 10000.0)}
    if architecture == "gemma":
        return GemmaConfig(**made, rope_parameters=rope)
    made["sliding_window"] = int(need("attention.sliding_window"))
    if architecture == "gemma2":
        caps = {key: float(need(key)) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
        config: Any = Gemma2Config(**made, **caps, rope_parameters=rope)
    else:
        local = {"rope_type": "default", "rope_theta": float(field("rope.freq_base_swa") or 10000.0)}
        if field("rope.scaling.type") == "linear":
            rope |= {"rope_type": "linear", "factor": float(need("rope.scaling.factor"))}
        both = {"full_attention": rope, "sliding_attention": local}
        config = Gemma3TextConfig(**made, rope_parameters=both)
    config.query_pre_attn_scalar = table.query_scalar(config)
    return config


def _take_factors(path: Path, head: GgufHeader, config: Any, instead: str) -> None:
    """Set Llama 3's rescaled frequencies in the configuration; ModelError for factors that are not Llama 3's."""
    found = [tensor for tensor in head.tensors if tensor.name.startswith("rope_")]
    if not found:
        return
    rescaled = None
    if config.model_type == "llama" and [tensor.name for tensor in found] == [rope.TENSOR]:
        theta, width = float(config.rope_parameters["rope_theta"]), rope.head_dim(config)
        rescaled = rope.parameters(
            head.bytes(found[0]).view(np.float32), head.values.get(rope.KEY), theta, width
        )
    if rescaled is None:
        raise ModelError(
            f"{path} rescales its rotary frequencies, which transformers cannot express", hint=instead
        )
    config.rope_parameters = rescaled


def _tensors(path: Path, head: GgufHeader, config: Any) -> dict[str, Stored]:
    """Return for each tensor of the model where it is in the file, and how its rows lie there."""
    with foreign_file(path, "describes a model that cannot be made", hint=ANOTHER):
        net = widths.build(config)
        config.architectures = [type(net).__name__]
        shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}  # tied tensors once
        return _placed(path, head, config, shapes)


def _placed(
    path: Path, head: GgufHeader, config: Any, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Stored]:
    architecture = str(head.values.get("general.architecture"))
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    left = {tensor.name: tensor for tensor in head.tensors if tensor.name != rope.TENSOR}
    file = MappedFile(path)
    tensors: dict[str, Stored] = {}
    for name, shape in shapes.items():
        found = left.pop(str(names.get_name(name, try_suffixes=(".weight", ".bias"))), None)
        if found is None:
            raise ModelError(
                f"{path} has no tensor for {name}", hint="the file is incomplete: fetch it again"
            )
        if found.shape != shape:
            raise ModelError(
                f"{path}: {found.name} has shape {found.shape}, {name} needs {shape}",
                hint="the file's metadata and tensors disagree: give another file",
            )
        if found.kind not in READ:
            raise ModelError(f"{path}: {found.name} is of type {found.kind}, which is not read", hint=ANOTHER)
        tensors[name] = Stored(
            file,
            found.offset,
            found.size,
            found.kind,
            shape,
            _row_order(found.name, shape, config),
            table.is_shifted(config, found.name),
        )
    if left:
        raise ModelError(
            f"{path} has {len(left)} tensors that architecture '{architecture}' does not: "
            + ", ".join(left)[:200],
            hint="use the model's hub id or a Hugging Face directory of it",
        )
    return tensors


def _row_order(name: str, shape: tuple[int, ...], config: Any) -> np.ndarray | None:
    order = table.row_order(config, name, shape[0])
    return None if order is None else np.argsort(order)


def _write_weights(
    source: Path, tensors: Mapping[str, Stored], path: Path, progress: Callable[[str, int, int], None] | None
) -> None:
    """Write a safetensors file: 8 bytes with the header's length, the header (JSON), the raw little-endian values.

    ModelError for values of the file `source` that are not finite.
    """
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numbers
        head[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(head, separators=(",", ":")).encode()
    raw += b" " * (-(len(raw) + 8) % 64)  # values start on a cache line
    done = 0
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, tensor in tensors.items():
            step = max(1, SLAB * tensor.shape[0] // tensor.numbers) * (tensor.numbers // tensor.shape[0])
            for first in range(0, tensor.numbers, step):
                values = tensor.read(first, min(first + step, tensor.numbers), torch.float32)
                check_range(float(values.min()), float(values.max()), name, source, ANOTHER)
                file.write(values.numpy().data)
                done += values.nbytes
            if progress is not None:
                progress("convert to safetensors", done, end)


def _tokenizer(path: Path, head: GgufHeader, config: Any) -> Any:
    hint = "use the model's hub id or a Hugging Face directory of it"
    with foreign_file(path, "has a tokenizer that cannot be read", hint=hint):
        tokenizer: Any = gguf_tokens.build_tokenizer(head.values.get)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.padding_side = "right"
    return tokenizer


# ---------------------------------------------------------------- deci

# llama.cpp's architecture for models found by a search over blocks; `deploy/formats/gguf.py` writes pruned llamas as such.
# Each of the first three is one number for all blocks, or a list of every block's:
#
#     attention.head_count       query heads; 0: the block has no attention
#     attention.head_count_kv    key heads; 0 beside query heads: one matrix in the place of attention
#     feed_forward_length        channels of the MLP; 0: the block has none
#     attention.key_length       the width of a head; not given: embedding_length / query heads of the first block
#
# A llama whose blocks were narrowed has none of those zeros, and in every block as many query heads to a key head.  It
# becomes a configuration with widths of its own (`widths.py`), or a plain one where its blocks are alike.  Any other is
# refused: no class here has a place for it.
HEADS: Final = "attention.head_count"
KEY_HEADS: Final = "attention.head_count_kv"
CHANNELS: Final = "feed_forward_length"

Field = Callable[[str], Any]  # a value by its key without the architecture, or None


def _deci_misfit(field: Field) -> str | None:
    """Return why metadata do not describe a llama with narrower blocks; None when they do.

    KeyError for a key that must be there and is not; ValueError when the values make no sense.
    """
    found = _block_widths(field)
    first = found[0]
    for i, (heads, key_heads, channels) in enumerate(found):
        if heads == 0:
            return f"block {i} has no attention (head_count 0)"
        if key_heads == 0:
            return f"block {i} has one matrix in the place of attention (head_count {heads}, head_count_kv 0)"
        if channels == 0:
            return f"block {i} has no MLP (feed_forward_length 0)"
        if heads % key_heads:
            return f"block {i} has {heads} query heads, no multiple of its {key_heads} key heads"
        if heads * first.num_key_value_heads != first.num_attention_heads * key_heads:
            return (
                f"block {i} has {heads // key_heads} query heads to a key head, block 0 has {_ratio(first)}"
            )
    width = _head_dim(field, found)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := field(key)) not in (None, width):
            return f"its heads are {width} wide, and {key} is {other}"
    return None


def _deci(field: Field) -> Any:
    """Return the configuration of a llama that `_deci_misfit` accepts; errors as there."""
    found = _block_widths(field)
    width, hidden = _head_dim(field, found), int(_need(field, "embedding_length"))
    config = LlamaConfig(
        **_whole(found, hidden, width)._asdict(),
        hidden_size=hidden,
        head_dim=width,
        num_hidden_layers=len(found),
        vocab_size=int(_need(field, "vocab_size")),
        max_position_embeddings=int(_need(field, "context_length")),
        rms_norm_eps=float(_need(field, "attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": float(field("rope.freq_base") or 10000.0)},
    )
    write_widths(config, found, width)
    return config


def _block_widths(field: Field) -> list[Width]:
    """Return every block's widths, 0 for a part that a block lacks; errors as in `_deci_misfit`."""
    count = int(_need(field, "block_count"))
    if count < 1:
        raise ValueError(f"block_count is {count}")
    key_heads = HEADS if field(KEY_HEADS) is None else KEY_HEADS  # llama.cpp's rule
    columns = [_of_blocks(field, key, count) for key in (HEADS, key_heads, CHANNELS)]
    return [Width(*numbers) for numbers in zip(*columns, strict=True)]


def _of_blocks(field: Field, key: str, count: int) -> list[int]:
    value = _need(field, key)
    numbers = value if isinstance(value, list) else [value] * count
    if len(numbers) != count:
        raise ValueError(f"{key} has {len(numbers)} numbers for {count} blocks")
    for i, number in enumerate(numbers):
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"{key} of block {i} is {number!r}")
    return numbers


def _need(field: Field, key: str) -> Any:
    if (value := field(key)) is None:
        raise KeyError(key)
    return value


def _head_dim(field: Field, found: Sequence[Width]) -> int:
    width = field("attention.key_length")
    if width is None:
        width = int(_need(field, "embedding_length")) // found[0].num_attention_heads
    if width < 2 or width % 2:  # the rotary embedding turns pairs
        raise ValueError(f"heads are {width} wide")
    return int(width)


def _ratio(width: Width) -> int:
    return width.num_attention_heads // width.num_key_value_heads


def _whole(found: Sequence[Width], hidden: int, head_dim: int) -> Width:
    """Return widths that no block exceeds and whose heads divide the hidden size, as transformers requires.

    The file does not say what the model had before it was pruned; only the configuration depends on it.
    """
    ratio = _ratio(found[0])
    most = max(width.num_key_value_heads for width in found)
    usual = hidden // head_dim // ratio  # heads that fill the hidden size: most likely the model's own
    fits = (n for n in (usual, most, hidden // ratio) if n >= most and hidden % (n * ratio) == 0)
    key_heads = next(fits, most)
    return Width(ratio * key_heads, key_heads, max(width.intermediate_size for width in found))
