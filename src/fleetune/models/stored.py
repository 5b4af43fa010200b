"""Read any run of numbers of a tensor that lies in a mapped file, in the dtype that a model computes in.

Pages that were read count as the process's memory, so they are given back every `KEPT` bytes.  Size and time of the file are
compared at every read: writing to it would change a run's weights, cutting it would kill the process.

Blocks of ggml's formats are dequantised with torch, bit-equal to the package gguf (which does the rarer formats).  A block is 32
numbers of a row: a scale d (fp16), in Q4_1 and Q5_1 an offset m (fp16), and codes q,

    Q4_0   d (q - 8)      Q5_0   d (q - 16)      Q4_1, Q5_1   d q + m      Q8_0   d q      IQ4_NL   d CODEBOOKS["iq4_nl"][q]

The low halves of 16 bytes are numbers 0..15, the high halves 16..31; Q5_0 and Q5_1 have a word of 32 fifth bits.
"""

import json
import math
import mmap
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fleetune.common.ggml import BLOCK, BYTES, HALVES, has_super_blocks, in_layers, listed, scales_in
from fleetune.errors import ModelError
from fleetune.models.families.foreign import AGAIN, foreign_file
from fleetune.models.families.number_types import CODEBOOKS, WEIGHTS

PLAIN: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {dtype.tag: getattr(torch, dtype.full) for dtype in WEIGHTS.values()}
)


KEPT: Final = 32 << 20  # bytes read after which all pages are given back


class MappedFile:
    """A file's bytes.  Nobody may write to the arrays of them: what is written is lost when pages are given back."""

    def __init__(self, path: Path) -> None:
        """Map a file; ModelError for one that is gone or empty."""
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            weakref.finalize(self, os.close, self._file)
            self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{path} cannot be mapped into memory: {error}", hint="check the path"
            ) from error
        self._stated = self._state()
        self._read = 0

    def __len__(self) -> int:
        return len(self._map)

    def bytes(self, offset: int, size: int, used: int | None = None) -> np.ndarray:
        """Return uint8 [size] of the mapping itself; the values stay valid, whenever pages are given back.

        `used` is how many of them will be read (None: all).  ModelError when the file was written to since it was mapped.
        """
        if self._state() != self._stated:
            raise ModelError(
                f"{self.path} was changed while its weights were in use",
                hint="put the file back as it was, and repeat the command or resume the run",
            )
        used = size if used is None else used
        self._read += used
        if self._read > KEPT:
            self._read = used
            self.give_back()
        return np.frombuffer(self._map, np.uint8, size, offset)

    def give_back(self) -> None:
        """Give all pages back to the system, where it takes them (not on Windows)."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns


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
            hint=f"train=scales is for a GGUF file of {', '.join(HALVES)}, with base=mapped, or for a compressed model",
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


# ---------------------------------------------------------------- where the tensors of a GGUF file are

PLACES_FILE: Final = "tensors.json"  # so that loading a mapped base need not parse the file's metadata again


def has_places(folder: Path) -> bool:
    """Return whether a folder has such a list."""
    return (folder / PLACES_FILE).is_file()


def write_places(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Write the list of a file's tensors into a folder."""
    rows = {
        name: [t.offset, t.size, t.kind, t.shape, None if t.order is None else t.order.tolist(), t.shifted]
        for name, t in tensors.items()
    }
    (folder / PLACES_FILE).write_text(json.dumps(rows, separators=(",", ":")) + "\n", encoding="utf-8")


def read_places(folder: Path, path: Path) -> dict[str, Stored]:
    """Return the tensors of the GGUF file `path` as the list in a folder states them; ModelError where it does not fit."""
    file, found = MappedFile(path), {}
    with foreign_file(folder / PLACES_FILE, "is damaged", hint=f"remove {folder} and repeat the command"):
        for name, row in json.loads((folder / PLACES_FILE).read_bytes()).items():
            offset, size, kind, shape, order, shifted = row
            rows = None if order is None else np.array(order)
            found[name] = Stored(file, offset, size, kind, tuple(shape), rows, shifted)
            _check_place(found[name], name)
    if any(tensor.offset + tensor.size > len(file) for tensor in found.values()):
        raise ModelError(f"{path} is shorter than its tensors: it is damaged", hint="fetch the file again")
    return found


def _check_place(tensor: Stored, name: str) -> None:
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


# ---------------------------------------------------------------- blocks

_IQ4_NL: Final = torch.tensor(CODEBOOKS["iq4_nl"], dtype=torch.float32)
_LOW, _HIGH = _IQ4_NL.repeat(16), _IQ4_NL.repeat_interleave(16)  # of a byte's halves
_MIDDLES: Final[Mapping[str, int]] = MappingProxyType({"Q4_0": 8, "Q5_0": 16})
_BITS: Final = torch.arange(BLOCK, dtype=torch.int32)


def dequantise(out: Tensor, data: Tensor, kind: str) -> None:
    """Write the numbers of whole blocks: data uint8 [bytes] -> out float32 [numbers], both contiguous."""
    if kind in HALVES:
        blocks = data.view(len(out) // BLOCK, -1)
        write_codes(out.view(-1, BLOCK), blocks, kind)
        apply_scales(out.view(-1, BLOCK), scale_bits(blocks, kind).view(torch.float16).float())
        return
    with np.errstate(all="ignore"):  # of a damaged scale; who reads weights refuses what is not finite
        values = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])
    out.copy_(torch.from_numpy(values))


def scale_bits(blocks: Tensor, kind: str) -> Tensor:
    """Return the fp16 numbers d (and m) of blocks uint8 [n, bytes], as their bits: int16 [n, 1 or 2]."""
    return blocks[:, : 2 * HALVES[kind]].contiguous().view(torch.int16)


def write_codes(out: Tensor, blocks: Tensor, kind: str) -> None:
    """Write what the scale d is multiplied by, whole numbers: blocks uint8 [n, bytes] -> out float32 [n, 32]."""
    codes = blocks[:, 2 * HALVES[kind] :]
    if kind == "Q8_0":
        out.copy_(codes.view(torch.int8))
        return
    nibbles = codes[:, -BLOCK // 2 :]
    if kind == "IQ4_NL":
        bytes = nibbles.int().reshape(-1)
        out[:, : BLOCK // 2] = _LOW.index_select(0, bytes).view(-1, BLOCK // 2)
        out[:, BLOCK // 2 :] = _HIGH.index_select(0, bytes).view(-1, BLOCK // 2)
        return
    out[:, : BLOCK // 2] = nibbles & 15
    out[:, BLOCK // 2 :] = nibbles >> 4
    if kind in ("Q5_0", "Q5_1"):
        word = codes[:, :4].clone(memory_format=torch.contiguous_format).view(torch.int32)  # aligned
        out.add_((word >> _BITS & 1) << 4)
    if kind in _MIDDLES:
        out.sub_(_MIDDLES[kind])


def apply_scales(out: Tensor, scales: Tensor) -> None:
    """Make codes [n, 32] numbers, in place: times d, plus m where there is one; scales float32 [n, 1 or 2]."""
    out.mul_(scales[:, :1])
    if scales.shape[1] == 2:
        out.add_(scales[:, 1:])
