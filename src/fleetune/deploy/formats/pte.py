# SPDX-License-Identifier: Apache-2.0
"""Write a folder for ExecuTorch: a program in which XNNPACK multiplies with the codes, and the tokenizer's files.

    model.pte    the program (`_pte_program.py`), read by ExecuTorch's runtime and by its runner of language models

XNNPACK's product with 4-bit groups (ExecuTorch 1.5) holds codes from -8 to 7, a scale above 0 in bf16 for 32, 64, .. columns, and
no zero; it rounds the inputs of a layer to 8 bits, a scale and a zero for each token.  So the codes are kept, the scales are
rounded from the 11 significant bits of fp16 to 8.  Codes of 2 and 3 bits have the room of 4.  A group whose scale is negative
is held with the signs of both changed, where no code becomes 8.  The head is rounded to 8 bits, a scale for each row; the
embedding is fp16 (bf16 stays), norms and biases are fp32.  What the file holds is read back and run in the runtime.

Writing needs the packages executorch and torchao (an extra: `fleetune[executorch]`).
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fleetune import models
from fleetune.common.display import are
from fleetune.data.encode import stop_ids
from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import Misfit, Report, _decoders, _gguf_vocabulary, _hf_writer, _pte_program
from fleetune.models.artefact import Quantised
from fleetune.models.tensor_file import damaged

TARGETS: Final = {"pte": "a folder for ExecuTorch: codes of 2 to 4 bits for XNNPACK, with scales in bf16"}
TAKES: Final = "codes"
PROVENANCE: Final = True
WRITER_NEEDS: Final = ("executorch", "torchao")
RUNTIME: Final = "ExecuTorch"
EXTRA: Final = "executorch"
ORDER: Final = 65
TARGET: Final = "pte"
FILE: Final = "model.pte"
COLUMNS: Final = 32  # a group is a multiple of
ROOM: Final = 2048  # positions that keys and values have room for
AT_ONCE: Final = 128  # tokens that a call reads at most, where there is room for them
FARTHEST: Final = (
    0.25  # nats between the next tokens of the runtime and of torch, which round inputs at other places
)
GRID: Final = "symmetric"  # of `compress`, whose 4-bit codes have a place
REMEDY: Final = f"compress again with --set grid={GRID}"


def check(model: Checkpoint, kind: str | None) -> None:
    """Raise Misfit when the architecture or the codes have no place in the program, UsageError for plain weights."""
    _coded(model)


def write(model: Checkpoint, folder: Path, kind: str | None, made: Mapping[str, str]) -> Report:
    """Write the master artefact `model` into the empty `folder`; raises what `check` does before it writes."""
    coded = _coded(model)
    tokenizer, config = _gguf_vocabulary.load(model.folder), model.config
    net = models.load_artefact(model.folder).net
    names = {id(net.get_parameter(name)): name for name in model.names}
    table, head = (names[id(of.weight)] for of in (net.get_input_embeddings(), net.get_output_embeddings()))
    half = _hf_writer.half(table, model.weight(table))
    rounded = {n for n, (_, scale) in coded.items() if not torch.equal(scale.bfloat16().float(), scale)}
    halved = not torch.equal(half.float(), model.weight(table).float())
    dense = {head} - coded.keys() | ({table} if halved else set())
    _pte_program.on_codes(net, coded, half)
    decoder = _pte_program.Decoder(net, room(config))
    file = folder / FILE
    file.write_bytes(_pte_program.lower(decoder, at_once(config), methods(config, tokenizer, made)))
    _check_codes(file, coded)
    _check_runtime(file, decoder)
    eight = int(head not in coded)
    said = {
        f"the scales of {are(len(rounded), 'layer')} rounded to bf16": rounded,
        "the head is rounded to 8 bits": eight,
        "the embedding is rounded to fp16": halved,
        "the runtime rounds the inputs of linear layers to 8 bits": True,
    }
    notes = [*_hf_writer.add_companions(model, folder), *(note for note, holds in said.items() if holds)]
    return Report(
        path=folder,
        to=TARGET,
        bytes=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        tensors=len(model.names),
        exact=len(model.names) - len(rounded | dense),
        types={
            "4-bit": len(coded), "8-bit": eight, "BF16" if half.dtype == torch.bfloat16 else "F16": 1,
            "F32": len({*model.names} - coded.keys() - {table, head}),
        },
        notes=tuple(notes),
    )  # fmt: skip


def room(config: Any) -> int:
    """Return how many positions a text may have: within the window, where blocks have one."""
    window = getattr(config, "sliding_window", None) or ROOM
    return int(min(ROOM, config.max_position_embeddings, window))


def at_once(config: Any) -> int:
    """Return how many tokens a call reads at most."""
    return min(AT_ONCE, room(config))


def methods(config: Any, tokenizer: Any, made: Mapping[str, str]) -> dict[str, Any]:
    """Return the methods that ExecuTorch's runner asks for (extension/llm/runner), and the provenance as JSON."""
    facts = {
        "get_max_seq_len": at_once(config), "get_max_context_len": room(config), "get_vocab_size": config.vocab_size,
        "get_n_layers": config.num_hidden_layers, "get_eos_ids": list(stop_ids(tokenizer)),
        "use_kv_cache": True, "use_sdpa_with_kv_cache": False, "enable_dynamic_shape": True,
    }  # fmt: skip
    if tokenizer.bos_token_id is not None:
        facts["get_bos_id"] = tokenizer.bos_token_id
    return facts | {"get_provenance": json.dumps(made, sort_keys=True)}


def signed(name: str, q: Quantised) -> tuple[Tensor, Tensor]:
    """Return codes int8 [R, C] about 0 and scales fp32 [R, C / group] above 0; Misfit where the program has no place for them."""
    if q.group % COLUMNS:
        raise Misfit(
            f"{TARGET} cannot hold the codes: {name} has groups of {q.group}, no multiple of {COLUMNS}",
            remedy=REMEDY,
        )
    scale = q.scale.float()
    steps = q.steps() * scale.sign().to(torch.int16).repeat_interleave(q.group, 1)
    low, high = _pte_program.SIGNED[4]
    if int(steps.min()) < low or int(steps.max()) > high or bool((scale == 0).any()):
        raise Misfit(
            f"{TARGET} holds codes from {low} to {high} on scales above 0, without zeros; {name} has others",
            remedy=REMEDY,
        )
    return steps.to(torch.int8), scale.abs()


def _coded(model: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """Return codes and scales of the linear layers; Misfit when the program cannot hold the model."""
    _decoders.check(model.config, TARGET, whole_heads=False)
    return {name: signed(name, q) for name, q in _hf_writer.coded(model, TARGET, GRID)}


def _check_codes(file: Path, coded: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Find every layer's codes and scales among the data that the file names; FleetuneError for others."""
    reader = importlib.import_module("executorch.exir._serialize._program")
    held = reader.deserialize_pte_binary(file.read_bytes()).named_data
    data = {key: held.buffers[entry.buffer_index] for key, entry in held.pte_data.items()} if held else {}
    for name, (codes, scale) in coded.items():
        both = (codes.flatten() + 8).to(torch.uint8)
        packed = (both[::2] | both[1::2] << 4).numpy().tobytes()
        halves = scale.bfloat16().view(torch.int16).numpy().tobytes()
        for what, key in ((packed, ""), (halves, "scale_")):
            if data.get(key + hashlib.sha256(what).hexdigest()) != what:
                raise damaged(file, f"{name} is not among its codes and scales")


def _check_runtime(file: Path, decoder: _pte_program.Decoder) -> None:
    """Run the file; FleetuneError where its next tokens are not torch's of the same codes."""
    config: Any = decoder.net.config
    tokens = torch.arange(min(16, at_once(config)))[None] * 37 % config.vocab_size
    with torch.no_grad():
        want = decoder(tokens, torch.tensor([0])).double().log_softmax(-1)
    found = _pte_program.Program(file).forward(tokens, 0).double().log_softmax(-1)
    away = float((want.exp() * (want - found)).sum(-1).mean())
    if not away <= FARTHEST:
        raise damaged(file, f"its next tokens are {away:.3g} nats from torch's")
