# SPDX-License-Identifier: Apache-2.0
"""Write and compare a safetensors file one tensor at a time; the same tensors give the same bytes.

The file is 8 bytes with the header's length, the header (JSON: dtype, shape and offsets of each tensor) and the
raw little-endian values.  Tensors come from a function that yields the same ones at every call: once for the
header, once to write them, once to compare what the disk gives back.  (The writer of the safetensors package
needs all of them in memory, and its order of metadata varies.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fleetune.errors import FleetuneError
from fleetune.models.families.dtypes import WEIGHTS

Tensors = Callable[[], Iterator[tuple[str, Tensor]]]

TYPES: Final[Mapping[torch.dtype, str]] = MappingProxyType(
    {
        **{getattr(torch, dtype.full): dtype.tag for dtype in WEIGHTS.values()},
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.int32: "I32",
        torch.uint32: "U32",
        torch.int64: "I64",
    }
)


def write_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; wide dtypes come first, so that all values are aligned."""
    table = {name: (tensor.dtype, tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors()}
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(table, key=lambda name: (-table[name][0].itemsize, name)):
        dtype, shape, size = table[name]
        head[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": (end, end + size)}
        end += size
    raw = json.dumps(head, separators=(",", ":")).encode()
    raw += b" " * (-(len(raw) + 8) % 64)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, tensor in tensors():
            file.seek(8 + len(raw) + head[name]["data_offsets"][0])
            file.write(_bytes(tensor).numpy().data)


# The order that safetensors' own writer has, within the wide types first.
_RANK: Final = ("I8", "F16", "BF16", "I32", "U32", "F32", "I64")


def write_in_turn(
    path: Path,
    table: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write what `safetensors.torch.save_file` would, byte for byte, with one tensor in memory at a time.

    `table` gives every tensor's dtype and shape; `tensors` come in any order.  (Only one key of metadata, since that
    writer's order of several varies.)
    """
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    ranked = [(_rank(TYPES[dtype]), name) for name, (dtype, _) in table.items()]
    for _, name in sorted(ranked, key=lambda item: (-item[0], item[1])):
        dtype, shape = table[name]
        size = math.prod(shape) * dtype.itemsize
        head[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": (end, end + size)}
        end += size
    raw = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, tensor in tensors:
            file.seek(8 + len(raw) + head[name]["data_offsets"][0])
            file.write(_bytes(tensor).numpy().data)


def _rank(kind: str) -> int:
    return _RANK.index(kind) if kind in _RANK else -1


def compare(path: Path, tensors: Tensors) -> None:
    """Raise FleetuneError unless the file holds these tensors and no others, bit for bit."""
    try:
        with safe_open(path, framework="pt") as file:
            left = set(file.keys())
            for name, tensor in tensors():
                found = file.get_tensor(name)
                same = (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                if not same or not torch.equal(_bytes(found), _bytes(tensor)):
                    raise damaged(path, f"{name} does not hold what was written")
                left.remove(name)
    except SafetensorError as error:
        raise damaged(path, str(error)) from error
    if left:
        raise damaged(path, f"{min(left)} was not written")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def damaged(path: Path, what: str) -> FleetuneError:
    """Return the error for a file that does not give back what was written."""
    return FleetuneError(
        f"the file just written to {path} is wrong: {what}",
        hint="try again on another disk; if it stays, report it as a fault of Fleetune",
    )
