# SPDX-License-Identifier: Apache-2.0
"""Write down where the tensors of a GGUF file are, so that loading a mapped base need not parse the file's metadata again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from fleetune.errors import ModelError
from fleetune.models.foreign import foreign_file
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
            rows = None if order is None else np.array(order, np.int64)
            found[name] = Stored(file, offset, size, kind, tuple(shape), rows, shifted)
    if any(tensor.offset + tensor.size > len(file) for tensor in found.values()):
        raise ModelError(f"{path} is shorter than its tensors: it is damaged", hint="fetch the file again")
    return found
