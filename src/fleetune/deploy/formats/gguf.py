"""Write a model as one .gguf file (version 3), for llama.cpp and what is built on it (Ollama, LM Studio, llamafile).

    gguf        quantised matrices in the smallest exact type of Q4_0, IQ4_NL, Q4_1, Q5_0, Q5_1 and Q8_0, or in that of their
                super-blocks; embedding and head in Q8_0, other matrices in F16 (BF16 stays); of a plain model all in F16
    gguf:q8_0   the same with Q8_0; gguf:f16, bf16 and f32 of a plain model: all matrices in that type
    gguf:f32    quantised matrices in F32 (f16, bf16 if exact), all others in F32

Norms (as factors, also where a family adds 1) and biases are F32; rows that Q8_0's blocks of 32 do not divide become F16.
llama.cpp rotates pairs of neighbouring rows of a llama's q and k, transformers rows i and i + d/2: so the rows of a head are
interleaved, [2, d/2] -> [d/2, 2].  It wants all queries of a fused matrix first.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from fleetune.common.ggml import padded
from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Misfit, Report, _ggml_blocks, _gguf_vocabulary, rounded_to
from fleetune.errors import UsageError
from fleetune.models.artefact import Quantised
from fleetune.models.families import rope, table, widths
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.gguf import header
from fleetune.models.gguf.header import GgufHeader, TensorPlace
from fleetune.models.net.saving import damaged

TARGETS: Final = {
    "gguf": "one file for llama.cpp, Ollama, LM Studio: in the type that holds the codes exactly",
    "gguf:q8_0": "the same, 8.5 bits a weight: codes up to 8 bits, or plain weights rounded",
    "gguf:f16": "the same, plain weights in fp16",
    "gguf:bf16": "the same, plain weights in bf16",
    "gguf:f32": "the same, plain weights in fp32",
}
SUFFIX: Final = ".gguf"
BLOCK_WIDTHS: Final = True
PROVENANCE: Final = True
RUNTIME: Final = "llama.cpp"
NEEDS: Final = ("llama_cpp_py_sync",)
EXTRA: Final = "llamacpp"
ORDER: Final = 10
PHI3_TOKENS: Final = frozenset(("</s>", "<unk>", "<s>", "<|endoftext|>"))
FLOATS: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {dtype.tag: getattr(torch, dtype.full) for dtype in WEIGHTS.values()}
)
EMBEDDING: Final = "token_embd.weight"
ENDS: Final = (EMBEDDING, "output.weight")
FULL: Final = (  # F32, whatever their shape
    "norm.weight",
    "position_embd.weight",
    "shortconv.conv.weight",
    "ffn_gate_inp.weight",
)


def check(model: Checkpoint, kind: str | None) -> None:
    """Raise UsageError when the architecture, the tokenizer or the codes have no place in GGUF."""
    check_config(model.config)
    plan(model, kind, [])
    _vocabulary(model)


def exact_target(model: Checkpoint, *, sample: bool = False) -> str | None:
    """Return the target that holds a model exactly: gguf:f32 where no blocks fit its codes; None for no GGUF at all.

    With `sample` the first quantised matrix speaks for all of them: the others are not read.
    """
    try:
        check_config(model.config)
    except UsageError:
        return None
    codes = (q for name in model.names if (q := model.quantised(name)) is not None)
    for q in islice(codes, 1 if sample else None):
        if all(_ggml_blocks.misfit(q, kind) is not None for kind in _ggml_blocks.PACKERS):
            return "gguf:f32"
    return "gguf"


def write(model: Checkpoint, path: Path, kind: str | None, made: Mapping[str, str]) -> Report:
    """Write `model` to the new file `path`, read it back and compare every tensor; or compare it with `model.again`.

    `kind` names the type of quantised matrices (None: the smallest that is exact); `made` are strings for the header
    (`export.py`), which has the file's name as the model's.  UsageError before anything is written when the
    architecture or the codes have no place in GGUF; OSError when the disk is full; FleetuneError when the file does not
    hold what was written.
    """
    check_config(model.config)
    notes: list[str] = []
    entries = plan(model, kind, notes)
    factors = rope.tensors(model.config)
    notes += _write_header_alone(path, model, entries, made, factors)
    parts = _parts(path, model, entries, factors)
    if model.again is not None:
        model.again.compare(path.name, parts)
    else:
        with path.open("ab") as file:
            for start, part in parts:
                if start:
                    file.write(part.data)
    rounded = [] if model.again else verify(path, model, entries, factors)
    return Report(
        path=path,
        to="gguf" if kind is None else f"gguf:{kind}",
        bytes=path.stat().st_size,
        tensors=len(entries),
        exact=len(entries) - len(rounded),
        types=dict(Counter(entry.kind for entry in entries)),
        notes=(*notes, *_rounded(rounded)),
    )


def size_beside(model: Checkpoint, without: Collection[str], path: Path, made: Mapping[str, str]) -> int:
    """Return the bytes of the file of a compressed model beside the parameters `without`; its header is written to `path`.

    UsageError when the architecture or the tokenizer has no place in GGUF.
    """
    check_config(model.config)
    entries, factors = plan(model, None, []), rope.tensors(model.config)
    _write_header_alone(path, model, entries, made, factors)
    sizes = [path.stat().st_size, *(values.nbytes for values in factors.values())]
    sizes += [entry.bytes for entry in entries if entry.parameter not in without]
    return sum(map(padded, sizes))


def layer_types(model: Checkpoint) -> dict[str, str]:
    """Return the types that the matrices of a model's layers get in its file, by parameter; UsageError where none is exact."""
    return {
        entry.parameter: entry.kind
        for entry in plan(model, None, [])
        if entry.name.startswith("blk.") and len(entry.shape) > 1
    }


def _parts(
    header: Path, model: Checkpoint, entries: list[GgufTensor], factors: Mapping[str, np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield what the file has, each with where it begins; `header` holds what precedes the values.

    To be compared, the parameters come in the order of their names, as a digest has them.
    """
    first = [np.fromfile(header, np.uint8), *factors.values()]
    sizes = (*(part.nbytes for part in first), *(entry.bytes for entry in entries))
    starts = accumulate(map(padded, sizes), initial=0)
    heads = list(zip(first, starts, strict=False))
    places = list(zip(entries, starts, strict=False))
    if model.again is not None:
        places.sort(key=lambda place: place[0].parameter)
    for part, at in chain(heads, ((_encode(model, entry), at) for entry, at in places)):
        flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        yield at, flat
        yield at + len(flat), np.zeros(padded(len(flat)) - len(flat), np.uint8)


def _has(file: GgufHeader, tensor: TensorPlace, values: np.ndarray) -> bool:
    """Return whether a tensor of a file has these values' bytes."""
    return np.array_equal(
        file.bytes(tensor).reshape(-1), np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    )


def _vocabulary(model: Checkpoint) -> _gguf_vocabulary.Vocabulary:
    embedding = next(name for name in model.names if tensor_name(model.config, name) == EMBEDDING)
    return _gguf_vocabulary.read(model.folder, model.shapes[embedding][0], model.config, model.tokenizer)


def _rounded(entries: Sequence[GgufTensor]) -> list[str]:
    """Return a note for each type of the tensors that do not hold the source's values."""
    names = {
        kind: [entry.parameter for entry in entries if entry.kind == kind]
        for kind in sorted({entry.kind for entry in entries})
    }
    return [f"{counted(found)} rounded to {kind}" for kind, found in names.items()]


# ---------------------------------------------------------------- metadata


def check_config(config: Any) -> None:
    """Raise Misfit for a configuration that has no place in GGUF, whatever the weights."""
    if (why := table.misfit(config)) is not None:
        remedy = "prune it again with --set first=0 --set last=0, which leaves all blocks alike"
        alike = widths.has_block_widths(config) and config.model_type == "qwen3"
        raise Misfit(why, remedy=remedy if alike else "")


def notes_on(config: Any) -> list[str]:
    """Return what llama.cpp does otherwise with a model of this configuration, for the user."""
    found = []
    length, whole = context_length(config), int(config.max_position_embeddings)
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

    If a name contains "phi-3" or "phi3", llama.cpp assumes Phi-3's vocabulary and loads no other.
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
    entries, odd = list[GgufTensor](), list[str]()
    for name in model.names:
        for part in table.parts(name):
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
    model: Checkpoint, name: str, part: table.ParameterPart, tensor: str, kind: str | None, odd: list[str]
) -> GgufTensor:
    """Return the tensor of the file for a part of a parameter; `odd` as in `_kind_of`."""
    config, own = model.config, model.shapes[name]
    transposed = table.is_transposed(config, tensor)
    whole = (*own[:-2], own[-1], own[-2]) if transposed else _flat(own)
    shape = table.part_shape(whole, part, tensor)
    order = part.order(whole, not table.is_bias(tensor), table.family_of(config).paired)
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
    if len(shape) == 1 or table.is_bias(tensor) or tensor.endswith(FULL):
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
    wanted = "Q4_0" if kind is None else kind.upper()
    reason = _inexact(q, wanted) if wanted in FLOATS else _ggml_blocks.misfit(q, wanted)
    if reason is None:
        return wanted
    possible = next((k for k in _ggml_blocks.PACKERS if _ggml_blocks.misfit(q, k) is None), None)
    if kind is None and possible:
        return possible
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


# ---------------------------------------------------------------- writing


class _Writer(gguf.GGUFWriter):  # type: ignore[misc]  # the package has no types
    """Packs a list of texts, such as the tokens and merges, at once: the package's own writer takes a second for them."""

    def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, *more: Any, **given: Any) -> bytes:
        if not (isinstance(val, list) and val and all(type(text) is str for text in val)):
            packed: bytes = super()._pack_val(val, vtype, add_vtype, *more, **given)
            return packed
        kinds = [int(vtype)] * add_vtype + [int(gguf.GGUFValueType.STRING)]
        raw = [text.encode() for text in val]
        head = b"".join(kind.to_bytes(4, "little") for kind in kinds) + len(raw).to_bytes(8, "little")
        return head + b"".join(part for text in raw for part in (len(text).to_bytes(8, "little"), text))


def _write_header_alone(
    path: Path,
    model: Checkpoint,
    entries: list[GgufTensor],
    made: Mapping[str, str],
    factors: Mapping[str, np.ndarray],
) -> list[str]:
    """Write a file that ends where the tensors' values would begin; its name is the model's in it.  Notes for the user."""
    writer = _Writer(path, table.architecture(model.config))
    try:
        return _write_header(writer, model, entries, path.stem, made, factors)
    finally:
        writer.close()


def _write_header(
    writer: Any,
    model: Checkpoint,
    entries: list[GgufTensor],
    name: str,
    made: Mapping[str, str],
    factors: Mapping[str, np.ndarray],
) -> list[str]:
    """Write everything in front of the tensors' values; return notes for the user."""
    vocabulary = _vocabulary(model)
    add_metadata(writer, model.config, file_type(entries), loadable_name(name, vocabulary.tokens))
    for key, text in made.items():
        writer.add_string(key, text)
    vocabulary.add_to(writer)
    for tensor, values in factors.items():
        writer.add_tensor_info(tensor, values.shape, values.dtype, values.nbytes)
    for entry in entries:
        kind = GGMLQuantizationType[entry.kind]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return [*notes_on(model.config), *vocabulary.notes]


def _encode(model: Checkpoint, entry: GgufTensor) -> np.ndarray:
    """Encode a tensor as the file has it: uint8, with rows (or values of a bias) in the file's order."""
    if entry.kind in _ggml_blocks.PACKERS and (q := model.quantised(entry.parameter)) is not None:
        raw = _ggml_blocks.PACKERS[entry.kind](q)
        taken = raw if entry.order is None else np.ascontiguousarray(raw[entry.order])
        return taken.reshape(*entry.shape[:-1], -1)
    weight = _values(model, entry)
    if entry.kind == "Q8_0":
        return _ggml_blocks.round_q8_0(weight.float())
    return _float_bytes(weight, entry)


def _values(model: Checkpoint, entry: GgufTensor) -> Tensor:
    """Return what the file's tensor should hold."""
    weight = model.weight(entry.parameter)
    if entry.transposed:
        weight = weight.mT
    if entry.order is not None:
        weight = weight.reshape(len(entry.order) * entry.parts, -1)[torch.from_numpy(entry.order)]
    weight = weight.reshape(entry.shape).contiguous()
    return weight.float() + 1 if entry.shifted else weight


def _float_bytes(weight: Tensor, entry: GgufTensor) -> np.ndarray:
    values = rounded_to(entry.parameter, weight, FLOATS[entry.kind], entry.kind, hint="use --to gguf:bf16")
    return values.contiguous().view(torch.uint8).numpy()


# ---------------------------------------------------------------- reading back


def verify(
    path: Path, model: Checkpoint, entries: list[GgufTensor], factors: Mapping[str, np.ndarray]
) -> list[GgufTensor]:
    """Compare the file with the model tensor by tensor; return those that do not hold the model's values exactly.

    Names, types, shapes and bytes must be what was meant to be written, and the values, read by the gguf
    package's own rules, must be those of a quantised matrix.  FleetuneError otherwise.
    """
    file = header.read(path)
    found = {tensor.name: tensor for tensor in file.tensors}
    for name, values in factors.items():
        held = found.pop(name, None)
        if held is None or not _has(file, held, values):
            raise damaged(path, f"{name} is not what was written")
    if sorted(found) != sorted(entry.name for entry in entries):
        raise damaged(path, "it does not hold the tensors that were written")
    return [entry for entry in entries if not _compare(file, model, entry, found[entry.name])]


def _compare(file: GgufHeader, model: Checkpoint, entry: GgufTensor, tensor: TensorPlace) -> bool:
    """Return whether a tensor of the file has the model's values; FleetuneError when its bytes are wrong."""
    path = file.path
    if (tensor.kind, tensor.shape) != (entry.kind, tuple(entry.shape)):
        raise damaged(path, f"{entry.name} is {tensor.kind} {tensor.shape}, not {entry.kind} {entry.shape}")
    if not _has(file, tensor, _encode(model, entry)):
        raise damaged(path, f"{entry.name} does not hold the bytes that were written")
    exact = all(bool((part == own).all()) for part, own in _value_pairs(file, model, entry, tensor))
    if not exact and model.quantised(entry.parameter) is not None:
        raise damaged(path, f"{entry.name} does not hold the values of {entry.parameter}")
    return exact


def _value_pairs(
    file: GgufHeader, model: Checkpoint, entry: GgufTensor, tensor: TensorPlace
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield values in fp32 as read and as they should be, some rows at a time."""
    own, data = _values(model, entry), file.bytes(tensor)
    step = max(1, (1 << 22) // max(1, own[0].numel()))
    data = data.reshape(len(own), -1)  # of a vector, each value is a row
    for start in range(0, len(own), step):
        part = own[start : start + step].float().numpy()
        read = gguf.quants.dequantize(data[start : start + step], GGMLQuantizationType[tensor.kind])
        yield read.reshape(part.shape), part
