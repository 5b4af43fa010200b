# SPDX-License-Identifier: Apache-2.0
"""Write down where the tensors of a GGUF file are, so that loading a mapped base need not parse the file's metadata again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import gguf
import numpy as np

from fleetune.errors import ModelError
from fleetune.models.families.foreign import foreign_file
from fleetune.models.mapped.file import MappedFile
from fleetune.models.mapped.stored import Stored

FILE: Final = "tensors.json"


def known(folder: Path) -> bool:
    """Return whether a folder has such a list."""
    return (folder / FILE).is_file()


def write(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Write the list of a file's tensors into a folder."""
    rows = {
        name: [t.offset, t.size, t.kind, t.shape, None if t.order is None else t.order.tolist(), t.shifted]
        for name, t in tensors.items()
    }
    (folder / FILE).write_text(json.dumps(rows, separators=(",", ":")) + "\n", encoding="utf-8")


def read(folder: Path, path: Path) -> dict[str, Stored]:
    """Return the tensors of the GGUF file `path` as the list in a folder states them; ModelError where it does not fit."""
    file, found = MappedFile(path), {}
    with foreign_file(folder / FILE, "is damaged", hint=f"remove {folder} and repeat the command"):
        for name, row in json.loads((folder / FILE).read_bytes()).items():
            offset, size, kind, shape, order, shifted = row
            rows = None if order is None else np.array(order)
            found[name] = Stored(file, offset, size, kind, tuple(shape), rows, shifted)
            _check(found[name], name)
    if any(tensor.offset + tensor.size > len(file) for tensor in found.values()):
        raise ModelError(f"{path} is shorter than its tensors: it is damaged", hint="fetch the file again")
    return found


def _check(tensor: Stored, name: str) -> None:
    """Raise ValueError for what no tensor of a GGUF file is."""
    numbers = (tensor.offset, tensor.size, *tensor.shape)
    if not all(type(n) is int and n > 0 for n in numbers) or type(tensor.shifted) is not bool:
        raise ValueError(f"{name:.80}: {numbers} and {tensor.shifted!r} are no place of a tensor")
    per_block, bytes_of_block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]]
    if tensor.shape[-1] % per_block or tensor.size * per_block != tensor.numbers * bytes_of_block:
        raise ValueError(f"{name:.80}: {tensor.size} bytes hold no {list(tensor.shape)} in {tensor.kind}")
    if tensor.order is None:
        return
    rows = np.arange(tensor.shape[0])
    if tensor.order.dtype != rows.dtype or not np.array_equal(np.sort(tensor.order), rows):
        raise ValueError(f"{name:.80}: its order of rows is none")
