# SPDX-License-Identifier: Apache-2.0
"""Compute the size of the GGUF file that a model will be exported to, before it is compressed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fleetune.deploy import provenance
from fleetune.deploy.checkpoint import Checkpoint
from fleetune.deploy.formats import gguf
from fleetune.errors import UsageError
from fleetune.models.artefact import ArtefactHead
from fleetune.models.dtypes import WEIGHTS
from fleetune.models.families.widths import mark_config
from fleetune.models.model import Model, stored_tensors


class _Names:
    """The names of a model's tensors, as a source that is asked for no values."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.folder = folder
        self.names = [name for name, _ in stored_tensors(model.net)]

    def quantised(self, name: str) -> None:
        """Return None: nothing is compressed yet."""

    def weight(self, name: str) -> Tensor:
        """Raise KeyError: there are no values."""
        raise KeyError(name)


class _ToBeCompressed(Checkpoint):
    """A model in memory as the compressed one that will be made of it."""

    compressed = True

    def __init__(self, model: Model, folder: Path) -> None:
        super().__init__(_Names(model, folder))
        self.dtype: torch.dtype = getattr(torch, WEIGHTS[model.dtype].full)


def beside(model: Model, quantised: Collection[str], head: ArtefactHead, name: str) -> int:
    """Return the bytes of a model's GGUF file beside the matrices `quantised`: the header and all other tensors.

    `head` is that of the artefact to come, `name` the file's, without its ending: the header holds it.  UsageError when the
    model has no place in GGUF.
    """
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.net.config.save_pretrained(folder)
        mark_config(folder)
        model.tokenizer.save_pretrained(folder)
        try:
            checkpoint = _ToBeCompressed(model, folder)
            without = {name for name in checkpoint.names if checkpoint.stored_name(name) in quantised}
            made = provenance.of_head(head, "0" * 64)
            return gguf.size_beside(checkpoint, without, folder / f"{name}.gguf", made)
        except UsageError as error:
            told = error.message.replace(scratch, model.name)
            raise UsageError(
                f"grids are chosen among those of GGUF files, and none can be made of this model: {told}",
                hint="leave out --bytes and --bpw, and choose one grid: --set grid=.. --set bits=..",
            ) from error
