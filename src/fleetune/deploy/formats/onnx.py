# SPDX-License-Identifier: Apache-2.0
"""Write a folder for ONNX Runtime GenAI (and ONNX Runtime): the codes in MatMulNBits, nothing rounded a second time.

A quantised layer NAME of shape [R, C] (com.microsoft's MatMulNBits, ONNX Runtime 1.32):

    NAME.codes   uint8 [R, C / B, B bits / 8]       the first in the lowest bits
    NAME.scales  fp32 [R, C / B]
    NAME.zeros   uint8 [R, ceil(C / B bits / 8)]    packed as the codes

Bits are 2, 4 or 8: 3-bit codes have the room of 4, those of 5 to 7 of 8, which changes no weight.  The block B is a power of
two from 16; longer or odd groups are cut into blocks of the same scale.  The embedding, a plain head and linear layers that
are not quantised are fp16 (bf16 stays) and computed in fp32, norms and biases are fp32.

    model.onnx         the graph (`_onnx_graph.py`)
    model.onnx.data    the tensors, laid out as a safetensors file
    genai_config.json  what ONNX Runtime GenAI reads, with the tokenizer's files

The operator's accuracy_level is 1: the runtime computes in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from fleetune.data.encode import stop_ids
from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Misfit, Report, _decoders, _gguf_vocabulary, _hf_writer
from fleetune.deploy.formats._onnx_graph import INVERSE, POSITIONS, Decoder, Graph, Matrix, Stored
from fleetune.models.artefact import Quantised, pack
from fleetune.models.families import rope
from fleetune.models.families.widths import build
from fleetune.models.tensor_file import compare, damaged, write_tensors

TARGETS: Final = {"onnx": "a folder for ONNX Runtime GenAI: codes of 2 to 8 bits in MatMulNBits"}
TAKES: Final = "codes"
PROVENANCE: Final = True
RUNTIME: Final = "ONNX Runtime"
ORDER: Final = 60
TARGET: Final = "onnx"
DATA: Final = "model.onnx.data"
SMALLEST, LARGEST = 16, 128  # columns of a block that the kernels have
ROOM: Final = 4096  # tokens that a text gets room for unless the user says otherwise


def check(model: Checkpoint, kind: str | None) -> None:
    """Raise Misfit when the architecture or the codes have no place in the graph, UsageError for plain weights."""
    _grids(model)


def write(model: Checkpoint, folder: Path, kind: str | None, made: Mapping[str, str]) -> Report:
    """Write the master artefact `model` into the empty `folder`; raises what `check` does before it writes."""
    grids, rounded = _grids(model), set[str]()
    tables, tokenizer = _rotary(model.config), _gguf_vocabulary.load(model.folder)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from tables.items()
        vectors = [name for name, shape in model.shapes.items() if len(shape) == 1]
        yield from ((name, model.weight(name).float()) for name in vectors)
        yield from _hf_writer.packed(model, parts, rounded, besides=vectors)

    data = folder / DATA
    write_tensors(data, tensors, {})
    compare(data, tensors)
    _check_codes(model, data)
    matrices = {name: _matrix(q, model.shapes[name]) for name, q in grids.items()}
    decoder = Decoder(Graph(DATA, _stored(data), made), model.config, matrices)
    (folder / "model.onnx").write_bytes(decoder.to_bytes())
    text = json.dumps(genai_config(model.config, tokenizer), indent=2, sort_keys=True)
    (folder / "genai_config.json").write_text(text + "\n", encoding="utf-8")
    notes = [*_hf_writer.add_companions(model, folder), *_hf_writer.of_rounding(rounded)]
    return _hf_writer.report(model, folder, TARGET, len(rounded), notes, DATA)


def parts(name: str, q: Quantised) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a quantised layer."""
    layer, of = name.removesuffix(".weight"), _matrix(q, q.codes.shape)
    each = q.group // of.block
    yield f"{layer}.codes", pack(q.codes, of.bits).reshape(of.R, of.C // of.block, -1)
    yield f"{layer}.scales", q.scale.float().repeat_interleave(each, 1)
    yield f"{layer}.zeros", pack(q.zero.repeat_interleave(each, 1), of.bits)


def genai_config(config: Any, tokenizer: Any) -> dict[str, Any]:
    """Return genai_config.json (ONNX Runtime GenAI 0.18) of a graph of `_onnx_graph.py`."""
    names = {
        f"{which}_{part}_names": f"{stem}.%d.{part}"
        for which, stem in (("past", "past_key_values"), ("present", "present"))
        for part in ("key", "value")
    }
    ends, pad = list(stop_ids(tokenizer)), tokenizer.pad_token_id
    model = {
        "type": config.model_type, "vocab_size": config.vocab_size, "eos_token_id": ends,
        "pad_token_id": ends[0] if pad is None and ends else pad,
        "context_length": config.max_position_embeddings,
        "decoder": {
            "filename": "model.onnx", "session_options": {"provider_options": []},
            "head_size": rope.head_dim(config), "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads, "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask"}
            | {key: name for key, name in names.items() if key.startswith("past")},
            "outputs": {"logits": "logits"}
            | {key: name for key, name in names.items() if key.startswith("present")},
        },
    }  # fmt: skip
    if tokenizer.bos_token_id is not None:
        model["bos_token_id"] = tokenizer.bos_token_id
    search = {"max_length": min(ROOM, config.max_position_embeddings), "past_present_share_buffer": True}
    return {"model": model, "search": search}


def _grids(model: Checkpoint) -> dict[str, Quantised]:
    """Return the grids of the linear layers; Misfit when the graph cannot hold the model."""
    _decoders.check(model.config, TARGET, whole_heads=True)
    grids = _hf_writer.matrices(model, TARGET)
    for name, q in grids.items():
        if _block(q.group) < SMALLEST:
            raise Misfit(
                f"{TARGET} cannot hold the codes: {name} has groups of {q.group}, "
                f"which are not made of blocks of {SMALLEST}",
                remedy="compress again for this target",
            )
    return grids


def _block(group: int) -> int:
    """Return the largest block that groups are made of: a power of two."""
    return min(group & -group, LARGEST)


def _matrix(q: Quantised, shape: tuple[int, ...]) -> Matrix:
    bits = next(width for width in (2, 4, 8) if q.bits <= width)
    return Matrix(bits, _block(q.group), R=shape[0], C=shape[1])


def _rotary(config: Any) -> dict[str, Tensor]:
    """Return the tensors that the rotary embedding is computed from, as transformers computes it."""
    rotary = type(build(config).model.rotary_emb)(config)
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    scaling = torch.tensor([rotary.attention_scaling], dtype=torch.float32)
    return {POSITIONS: positions[:, None], INVERSE: rotary.inv_freq.float()[None], "rotary.scaling": scaling}


def _stored(data: Path) -> dict[str, Stored]:
    """Return where the tensors of a safetensors file are."""
    with data.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(length))
    head.pop("__metadata__", None)
    return {
        name: Stored(
            of["dtype"],
            tuple(of["shape"]),
            8 + length + of["data_offsets"][0],
            of["data_offsets"][1] - of["data_offsets"][0],
        )
        for name, of in sorted(head.items())
    }


def _check_codes(model: Checkpoint, data: Path) -> None:
    """Decode every quantised layer from the file as the runtime does; FleetuneError for other weights than the source's."""
    with safe_open(data, framework="pt") as file:
        for name in model.names:
            if (q := model.quantised(name)) is None:
                continue
            layer = name.removesuffix(".weight")
            if not torch.equal(_decode(file, layer, _matrix(q, q.codes.shape)), q.dense()):
                raise damaged(data, f"{layer} does not decode to its weights")


def _decode(file: Any, layer: str, of: Matrix) -> Tensor:
    """Decode a layer by shifts of bytes, fp32 [R, C]."""
    shifts = torch.arange(0, 8, of.bits, dtype=torch.uint8)
    codes, zeros = (
        (file.get_tensor(f"{layer}.{part}")[..., None] >> shifts & (1 << of.bits) - 1).flatten(-2).float()
        for part in ("codes", "zeros")
    )
    scales = file.get_tensor(f"{layer}.scales")[..., None]
    weight: Tensor = scales * (codes - zeros[:, : of.C // of.block, None])
    return weight.flatten(1)
