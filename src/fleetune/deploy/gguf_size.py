# SPDX-License-Identifier: Apache-2.0
"""Compute the size of the GGUF file that a model will be exported to, before it is compressed."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from fleetune.common import ggml
from fleetune.deploy import provenance
from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import _gguf_vocabulary
from fleetune.deploy.formats._gguf_header import add_metadata, architecture, check_config, tensor_names
from fleetune.errors import UsageError
from fleetune.models.artefact import ArtefactHead
from fleetune.models.families import rope
from fleetune.models.families.widths import mark_config
from fleetune.models.model import Model, named_tensors

FILE: Final = "model.gguf"
HALF: Final = 2  # bytes of a weight of a matrix that is not compressed
FLOAT: Final = 4  # of a norm or a bias


class _Names:
    """The parameters of a model in memory, for a `Checkpoint` that is asked for names and shapes alone."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.folder = folder
        self.names = [name for name, _ in named_tensors(model.net)]

    def quantised(self, name: str) -> None:
        """Return None: nothing is compressed yet."""

    def weight(self, name: str) -> Tensor:
        """Raise KeyError: values are not asked for."""
        raise KeyError(name)


def beside(model: Model, quantised: Collection[str], head: ArtefactHead) -> int:
    """Return the bytes of a model's GGUF file beside the matrices `quantised`: the header and all other tensors.

    `head` is that of the artefact to come.  It is exact for a file called `model.gguf`; a longer name takes its further
    characters, in steps of 32 bytes.  UsageError when the model has no place in GGUF.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.net.config.save_pretrained(folder)
        mark_config(folder)
        model.tokenizer.save_pretrained(folder)
        try:
            check_config(model.net.config)
            checkpoint = Checkpoint(_Names(model, folder))
            header = _write_header(folder / FILE, checkpoint, head)
        except UsageError as error:
            told = error.message.replace(scratch, model.name)
            raise UsageError(
                f"grids are chosen among those of GGUF files, and none can be made of this model: {told}",
                hint="leave out --bytes and --bpw, and choose one grid: --set grid=.. --set bits=..",
            ) from error
    others = (
        shape for name, shape in checkpoint.shapes.items() if checkpoint.stored_name(name) not in quantised
    )
    factors = rope.factors(model.net.config)
    return header + sum(map(_bytes, others)) + (0 if factors is None else ggml.padded(factors.nbytes))


def _bytes(shape: tuple[int, ...]) -> int:
    return ggml.padded(math.prod(shape) * (FLOAT if len(shape) == 1 else HALF))


def _write_header(path: Path, checkpoint: Checkpoint, head: ArtefactHead) -> int:
    """Write the header of the file to come, and return its bytes."""
    config: Any = checkpoint.config
    vocabulary = _gguf_vocabulary.read(
        checkpoint.folder, checkpoint.shapes["model.embed_tokens.weight"][0], config
    )
    names, writer = tensor_names(config), gguf.GGUFWriter(path, architecture(config))
    try:
        add_metadata(writer, config, LlamaFileType.MOSTLY_Q8_0, path.stem)
        for key, text in provenance.of_head(head, "0" * 64).items():
            writer.add_string(key, text)
        vocabulary.add_to(writer)
        if rope.factors(config) is not None:
            writer.add_tensor_info(rope.TENSOR, (1,), np.dtype(np.float32), FLOAT)
        for name, shape in checkpoint.shapes.items():
            tensor = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if tensor is None:
                raise UsageError(f"GGUF has no place for {name}")
            size, kind = math.prod(shape), GGMLQuantizationType.F32
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return ggml.padded(path.stat().st_size)
