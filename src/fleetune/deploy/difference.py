# SPDX-License-Identifier: Apache-2.0
"""Compare a file or folder with one that was made again, and name the first place that differs: file, byte and tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from fleetune.common import sums
from fleetune.models.gguf import header

CHUNK: Final = 1 << 22  # bytes that are compared at a time
GGUF: Final = ".gguf"
SAFETENSORS: Final = ".safetensors"


class Difference(NamedTuple):
    """How far two exports agree, and the first place where they differ ("" for none)."""

    equal: int  # bytes
    words: str


def difference(path: Path, made: Path) -> Difference:
    """Compare a file or folder with the one that was `made` again.

    A folder's README.md is left out, since people write in it.
    """
    if not made.is_dir():
        return _of_bytes(path, made)
    names = [{p.name for p in folder.iterdir() if p.name not in sums.LEFT_OUT} for folder in (path, made)]
    if odd := sorted(names[0] ^ names[1]):
        return Difference(0, f"{path / odd[0]} is {'missing' if odd[0] in names[1] else 'not of it'}")
    found = [_of_bytes(path / name, made / name) for name in sorted(names[0])]
    return Difference(
        sum(each.equal for each in found), next((each.words for each in found if each.words), "")
    )


def _of_bytes(path: Path, made: Path) -> Difference:
    at = 0
    with path.open("rb") as one, made.open("rb") as other:
        while True:
            a, b = one.read(CHUNK), other.read(CHUNK)
            if a != b:
                n = min(len(a), len(b))
                unequal = np.flatnonzero(np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n))
                at += int(unequal[0]) if len(unequal) else n
                return Difference(at, f"{path} differs in byte {at:,}, {_place(made, at)}")
            if not a:
                return Difference(at, "")
            at += len(a)


def _place(path: Path, at: int) -> str:
    """Say what lies at a byte of a whole file: a tensor, or the head."""
    for name, start, end in _tensors(path):
        if start <= at < end:
            return f"in {name}"
    return "in its head" if path.suffix in (GGUF, SAFETENSORS) else "in its text"


def _tensors(path: Path) -> Iterator[tuple[str, int, int]]:
    if path.suffix == GGUF:
        for tensor in header.read(path).tensors:
            yield tensor.name, tensor.offset, tensor.offset + tensor.size
    elif path.suffix == SAFETENSORS:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head: Mapping[str, Any] = json.loads(file.read(size))
        for name, entry in head.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                yield name, 8 + size + start, 8 + size + end
