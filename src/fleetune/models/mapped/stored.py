# SPDX-License-Identifier: Apache-2.0
"""Read any run of numbers of a tensor that lies in a mapped file, in the dtype that a model computes in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fleetune.common.ggml import BLOCK, BYTES, HALVES, has_super_blocks, in_layers, listed, scales_in
from fleetune.errors import ModelError
from fleetune.models.families.dtypes import WEIGHTS
from fleetune.models.families.foreign import AGAIN, foreign_file
from fleetune.models.mapped.file import MappedFile
from fleetune.models.mapped.quants import dequantise

PLAIN: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {dtype.tag: getattr(torch, dtype.full) for dtype in WEIGHTS.values()}
)


class Stored(NamedTuple):
    """A tensor in a mapped file."""

    file: MappedFile
    offset: int  # of its first byte
    size: int  # bytes
    kind: str  # F32, F16, BF16, or a format of ggml's blocks, of which a row has a whole number
    shape: tuple[int, ...]
    order: np.ndarray | None = None  # int64 [rows]: which row of the file is which row of the tensor
    shifted: bool = False  # whether the file holds 1 + w

    @property
    def numbers(self) -> int:
        """Numbers of the tensor."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Numbers of a row, of which whole ones are read where a number alone cannot be."""
        by_rows = len(self.shape) > 1 or self.order is not None
        return self.numbers // self.shape[0] if by_rows else self.numbers

    def read(self, first: int, last: int, dtype: torch.dtype, scratch: Tensor | None = None) -> Tensor:
        """Return the numbers first..last, in row-major order, 1-D: the mapping itself where it holds them so.

        Else they are made in `scratch` (1-D float32, as many numbers as the rows that are touched) or in new memory.
        """
        if first == last:
            return torch.empty(0, dtype=dtype)
        if self.kind in PLAIN and self.order is None:
            size = PLAIN[self.kind].itemsize
            raw = self.file.bytes(self.offset + first * size, (last - first) * size)
            if raw.ctypes.data % size:  # safetensors promises no alignment
                raw = raw.copy()
            return self._finished(torch.from_numpy(raw).view(PLAIN[self.kind]), dtype)
        top, end, width = first // self.width, -(-last // self.width), self.width
        found = self._decoded(self._data(top, end), (end - top) * width, scratch)
        return self._finished(found[first - top * width : last - top * width], dtype)

    def blocks(self, top: int, end: int) -> Tensor:
        """Return the bytes of the rows top..end of a tensor of blocks, uint8 [blocks, bytes], in its order of rows."""
        return self._data(top, end).view((end - top) * self.width // BLOCK, BYTES[self.kind])

    def _data(self, top: int, end: int) -> Tensor:
        if self.order is None:
            row = self._bytes_of_row
            return torch.from_numpy(self.file.bytes(self.offset + top * row, (end - top) * row))
        return self._bytes_of(torch.from_numpy(self.order[top:end]))

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows [n, width] by their numbers int64 [n], in memory of their own."""
        at = index if self.order is None else torch.from_numpy(self.order)[index]
        found = self._decoded(self._bytes_of(at), len(index) * self.width, None)
        return self._finished(found, dtype).view(len(index), self.width)

    @property
    def _bytes_of_row(self) -> int:
        return self.size * self.width // self.numbers

    def _bytes_of(self, rows: Tensor) -> Tensor:
        """Return the bytes of some of the file's rows, one after the other, in memory of their own."""
        used = len(rows) * self._bytes_of_row
        all_bytes = torch.from_numpy(self.file.bytes(self.offset, self.size, used))
        return all_bytes.view(-1, self._bytes_of_row)[rows].view(-1)

    def _decoded(self, data: Tensor, count: int, scratch: Tensor | None) -> Tensor:
        if self.kind in PLAIN:
            return data.view(PLAIN[self.kind])
        out = torch.empty(count) if scratch is None else scratch[:count]
        dequantise(out, data, self.kind)
        return out

    def _finished(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return (values.float() - 1.0 if self.shifted else values).to(dtype)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a directory: one, or shards."""
    one = folder / "model.safetensors"
    return [one] if one.is_file() else sorted(folder.glob("model-*.safetensors"))


def check_scales(kinds: Mapping[str, str]) -> None:
    """Raise ModelError where no layer has a matrix in blocks, whose scales could be trained; `kinds`: types by name."""
    found = in_layers(kinds)
    if not scales_in(found):
        has = f": its layers are in {listed(found.values())}" if set(found.values()) - set(PLAIN) else ""
        why = ", and super-blocks are not trained" if has_super_blocks(found.values()) else ""
        raise ModelError(
            f"this base has no scales that could be trained{has}{why}",
            hint=f"train=scales is for a GGUF file of {', '.join(HALVES)}, with base=mapped, or for a model that "
            "fleetune compress has written",
        )


def of_folder(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a directory's safetensors files by name; ModelError for a file that is damaged.

    Tensors of other types than weights have (integers) are left out.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        file = MappedFile(path)
        with foreign_file(path, "is damaged", hint=AGAIN):
            with safe_open(path, "pt") as opened:  # refuses what overlaps, has gaps or ends elsewhere
                list(opened.keys())
            begin = 8 + int.from_bytes(file.bytes(0, 8).tobytes(), "little")
            head = json.loads(file.bytes(8, begin - 8).tobytes())
            for name, entry in head.items():
                if name != "__metadata__" and entry["dtype"] in PLAIN:
                    start, end = entry["data_offsets"]
                    found[name] = Stored(
                        file, begin + start, end - start, entry["dtype"], tuple(entry["shape"])
                    )
                    _check(found[name], len(file), path, name)
    return found


def _check(tensor: Stored, size: int, path: Path, name: str) -> None:
    wanted = tensor.numbers * PLAIN[tensor.kind].itemsize
    if tensor.size != wanted or not 0 < tensor.offset <= size - wanted:
        raise ModelError(f"{path} is damaged: {name:.80} lies outside the file", hint=AGAIN)
