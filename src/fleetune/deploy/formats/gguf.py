# SPDX-License-Identifier: Apache-2.0
"""Write a model as one .gguf file, for llama.cpp and what is built on it (Ollama, LM Studio, llamafile).

The container is the ggml project's docs/gguf.md, version 3; tensor names are gguf.TensorNameMap's, and what else a
family needs stands in one table (`models/families/table.py`).  Quantised matrices are repacked without loss
(`_ggml_blocks.py`); a target that cannot hold the codes is refused before anything is written.

    target      quantised matrices             embedding, head        other matrices       norms, biases
    gguf        Q4_0, IQ4_NL, Q4_1, Q5_0,      Q8_0                   F16 (BF16 stays)     F32
                Q5_1 or Q8_0: the smallest
                that is exact; or that
                of their super-blocks
    gguf:q4_0   Q4_0 (the others alike)        Q8_0                   F16 (BF16 stays)     F32
    gguf:f32    F32 (f16, bf16 if exact)       F32                    F32                  F32

of a plain directory: gguf:q8_0, f16, bf16, f32 for all matrices; gguf alone is F16 (BF16 stays).  Rows that
Q8_0's blocks of 32 do not divide become F16, and the report says so.

llama.cpp rotates pairs of neighbouring rows of a llama's q and k, transformers pairs of row i and i + d/2;
so the rows of a head are interleaved, [2, d/2] -> [d/2, 2]; and it wants all queries of a fused matrix first.  Groups lie
along columns and are left whole.  Norms that multiply by 1 + w are held as that.  Rescaled frequencies of Llama 3 and
Phi-3 go into tensors of their own (`rope.py`); other rescalings are refused.  A pruned llama whose blocks differ in width
is architecture "deci", whose numbers of heads and channels are lists.

The experts of a mixture, which transformers holds in one or two tensors a layer, go into llama.cpp's three
(`models/families/experts.py`), and the router into fp32.

One tensor at a time is in memory, in writing and in reading back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from fleetune.common.ggml import padded
from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Report, _ggml_blocks, _gguf_vocabulary
from fleetune.deploy.formats._gguf_layout import (
    EMBEDDING,
    FLOATS,
    GgufTensor,
    add_metadata,
    check_config,
    counted,
    file_type,
    loadable_name,
    notes_on,
    plan,
    tensor_name,
)
from fleetune.errors import UsageError
from fleetune.models.families import rope, table
from fleetune.models.gguf import header
from fleetune.models.gguf.header import GgufHeader, TensorPlace
from fleetune.models.net.saving import damaged

TARGETS: Final = {
    "gguf": "one file for llama.cpp, Ollama, LM Studio: in the type that holds the codes exactly",
    "gguf:q4_0": "the same, 4.5 bits a weight: symmetric 4-bit codes",
    "gguf:iq4_nl": "the same, 4.5 bits a weight: codes of the grid iq4_nl",
    "gguf:q4_1": "the same, 5 bits a weight: 4-bit codes with a zero",
    "gguf:q5_0": "the same, 5.5 bits a weight: symmetric 5-bit codes",
    "gguf:q5_1": "the same, 6 bits a weight: 5-bit codes with a zero",
    "gguf:q8_0": "the same, 8.5 bits a weight: codes up to 8 bits, or plain weights rounded",
    "gguf:q2_k": "the same, 2.625 bits a weight: codes of the grid q2_k",
    "gguf:q3_k": "the same, 3.4375 bits a weight: codes of the grid q3_k",
    "gguf:iq4_xs": "the same, 4.25 bits a weight: codes of the grid iq4_xs",
    "gguf:q4_k": "the same, 4.5 bits a weight: codes of the grid q4_k",
    "gguf:q5_k": "the same, 5.5 bits a weight: codes of the grid q5_k",
    "gguf:q6_k": "the same, 6.5625 bits a weight: codes of the grid q6_k",
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
    """Write `model` to the new file `path`, read it back and compare every tensor.

    `kind` names the type of quantised matrices (None: the smallest that is exact); `made` are strings for the header
    (`provenance.py`), which has the file's name as the model's.  UsageError before anything is written when the
    architecture or the codes have no place in GGUF; OSError when the disk is full; FleetuneError when the file does not
    hold what was written.
    """
    check_config(model.config)
    notes: list[str] = []
    entries = plan(model, kind, notes)
    factors = rope.tensors(model.config)
    writer = gguf.GGUFWriter(path, table.architecture(model.config))
    try:
        notes += _write_header(writer, model, entries, path.stem, made, factors)
        for values in factors.values():
            writer.write_tensor_data(values)
        for entry in entries:
            writer.write_tensor_data(_encode(model, entry))
    finally:
        writer.close()
    return _verified(path, model, entries, factors, kind, notes)


def _verified(
    path: Path,
    model: Checkpoint,
    entries: list[GgufTensor],
    factors: Mapping[str, np.ndarray],
    kind: str | None,
    notes: list[str],
) -> Report:
    """Read a file back and describe it; FleetuneError as of `verify`."""
    rounded = verify(path, model, entries, factors)
    return Report(
        path=path,
        to="gguf" if kind is None else f"gguf:{kind}",
        bytes=path.stat().st_size,
        tensors=len(entries),
        exact=len(entries) - len(rounded),
        types=dict(Counter(entry.kind for entry in entries)),
        notes=(*notes, *_rounded(rounded)),
    )


def written(path: Path, model: Checkpoint, kind: str | None, made: Mapping[str, str]) -> Report | None:
    """Return what `write` returns where the file `path` is what it makes there, None for another; UsageError as of `write`."""
    check_config(model.config)
    if not is_written(path, model, made, kind):
        return None
    notes: list[str] = []
    entries = plan(model, kind, notes)
    notes += [*notes_on(model.config), *_vocabulary(model).notes]
    return _verified(path, model, entries, rope.tensors(model.config), kind, notes)


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


def is_written(path: Path, model: Checkpoint, made: Mapping[str, str], kind: str | None = None) -> bool:
    """Return whether the file `path` is, byte for byte, what `write` makes there; `kind` as for that."""
    entries, factors = plan(model, kind, []), rope.tensors(model.config)
    with TemporaryDirectory() as scratch, path.open("rb") as file:
        header = Path(scratch) / path.name
        _write_header_alone(header, model, entries, made, factors)
        parts = chain(
            [np.fromfile(header, np.uint8)], factors.values(), (_encode(model, entry) for entry in entries)
        )
        for part in parts:
            if file.read(padded(part.nbytes)) != part.tobytes().ljust(padded(part.nbytes), b"\0"):
                return False
        return not file.read(1)


def holds(path: Path, model: Checkpoint) -> bool:
    """Return whether the tensors of the file `path` are, byte for byte, those that a target of this module writes of `model`.

    Its header is not compared: a file may have been renamed.  FleetuneError for a file that cannot be read.
    """
    found, factors = header.read(path), rope.tensors(model.config)
    layers = Counter(t.kind for t in found.tensors if t.name.startswith("blk.") and len(t.shape) > 1)
    stated = [kind.lower() for kind, _ in layers.most_common(1) if f"gguf:{kind.lower()}" in TARGETS]
    return any(_holds(found, model, kind, factors) for kind in (None, *stated))


def _holds(file: GgufHeader, model: Checkpoint, kind: str | None, factors: Mapping[str, np.ndarray]) -> bool:
    try:
        entries = plan(model, kind, [])
    except UsageError:
        return False
    stated = {entry.name: (entry.kind, tuple(entry.shape)) for entry in entries}
    found = {tensor.name: tensor for tensor in file.tensors}
    own = {name: (t.kind, t.shape) for name, t in found.items() if name not in factors}
    return (
        own == stated
        and all(name in found and _has(file, found[name], values) for name, values in factors.items())
        and all(_has(file, found[entry.name], _encode(model, entry)) for entry in entries)
    )


def _has(file: GgufHeader, tensor: TensorPlace, values: np.ndarray) -> bool:
    """Return whether a tensor of a file has these values' bytes."""
    return np.array_equal(
        file.bytes(tensor).reshape(-1), np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    )


def _vocabulary(model: Checkpoint) -> _gguf_vocabulary.Vocabulary:
    embedding = next(name for name in model.names if tensor_name(model.config, name) == EMBEDDING)
    return _gguf_vocabulary.read(model.folder, model.shapes[embedding][0], model.config)


def _rounded(entries: Sequence[GgufTensor]) -> list[str]:
    """Return a note for each type of the tensors that do not hold the source's values."""
    names = {
        kind: [entry.parameter for entry in entries if entry.kind == kind]
        for kind in sorted({entry.kind for entry in entries})
    }
    return [f"{counted(found)} rounded to {kind}" for kind, found in names.items()]


# ---------------------------------------------------------------- writing


def _write_header_alone(
    path: Path,
    model: Checkpoint,
    entries: list[GgufTensor],
    made: Mapping[str, str],
    factors: Mapping[str, np.ndarray],
) -> None:
    """Write a file that ends where the tensors' values would begin; its name is the model's in it."""
    writer = gguf.GGUFWriter(path, table.architecture(model.config))
    try:
        _write_header(writer, model, entries, path.stem, made, factors)
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
        blocks_of_rows: np.ndarray = gguf.quants.quantize(weight.float().numpy(), GGMLQuantizationType.Q8_0)
        return blocks_of_rows
    return _float_bytes(weight, entry)


def _values(model: Checkpoint, entry: GgufTensor) -> Tensor:
    """Return what the file's tensor should hold."""
    weight = model.weight(entry.parameter)
    if entry.transposed:
        weight = weight.mT
    if entry.order is not None:
        weight = weight.reshape(len(entry.order) * entry.parts, -1)[torch.from_numpy(entry.order)]
    weight = weight.reshape(entry.shape).contiguous()
    return torch.from_numpy(table.plus_one(weight.float().numpy())) if entry.shifted else weight


def _float_bytes(weight: Tensor, entry: GgufTensor) -> np.ndarray:
    values = weight.to(FLOATS[entry.kind]).contiguous()
    if bool(values.isinf().any()) and not bool(weight.isinf().any()):
        raise UsageError(
            f"{entry.parameter} has values beyond {entry.kind}'s range", hint="use --to gguf:bf16"
        )
    return values.view(torch.uint8).numpy()


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
