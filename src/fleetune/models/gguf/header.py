# SPDX-License-Identifier: Apache-2.0
"""Read and check the header of a .gguf file (the ggml project's docs/gguf.md, versions 2 and 3).

An engine that is given half a file, or an adapter, fails with an unclear message or none, so files are checked before
one is started.  Only the header is read, without torch and without an object for every token: the package gguf takes
seconds for a large vocabulary.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from fleetune.common.shell import quoted
from fleetune.errors import ModelError, UsageError

# the numbers of the types of values -> struct's letter; 8 is text, 9 a list
NUMBERS: Final[Mapping[int, str]] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
TEXT, LIST = 8, 9
DIMS: Final = 4  # of a tensor, ggml's own bound
LISTED: Final = 1 << 22  # values in all lists; the largest vocabularies have a third of that
KEPT: Final = 1 << 20  # bytes of the longest text that is looked at: a chat template has thousands
PARTS, PART = "split.count", "split.no"  # of a model that lies in several files
AGAIN: Final = "copy, fetch or export it again"


@dataclass(frozen=True)
class GgufHeader:
    """The single values by key, and the file size that the header implies."""

    values: Mapping[str, Any]
    tensors: int
    size: int  # bytes up to the end of the last tensor; types that are not known here count nothing


def check(path: Path) -> GgufHeader:
    """Return the header of a file with a whole model in it.

    ModelError when it is missing, damaged or cut off; UsageError for an adapter, which is no model.
    """
    head = _of_model(path)
    has = path.stat().st_size
    if has < head.size:
        raise ModelError(
            f"{path} is cut off: it has {has:,} bytes, its tensors take {head.size:,}", hint=AGAIN
        )
    if not head.tensors and PARTS not in head.values:
        raise ModelError(f"{path} holds no tensors", hint="give a file with a model")
    return head


def read_whole(path: Path) -> GgufHeader:
    """Read the header of a file that a model is to be made of; no tensor is looked at.

    UsageError for an adapter, ModelError for a part of a split model; the rest as in `read`.
    """
    head = _of_model(path)
    if type(count := head.values.get(PARTS)) is int and count > 1:
        number = head.values.get(PART)
        what = f"part {number + 1} of {count}" if type(number) is int else f"one of {count} parts"
        parts = re.fullmatch(r"(.+)-\d{5}(-of-\d{5}\.gguf)", path.name)
        first, joined = (
            (path.with_name(f"{parts[1]}-00001{parts[2]}"), path.with_name(f"{parts[1]}.gguf"))
            if parts
            else ("FIRST.gguf", "OUT.gguf")
        )
        raise ModelError(
            f"{path} is {what} of a split model, and models are read from one file",
            hint=f"with all parts in a folder: llama-gguf-split --merge {quoted(first)} {quoted(joined)}   "
            f"and then give {quoted(joined)} as the model",
        )
    return head


def _of_model(path: Path) -> GgufHeader:
    """Read the header of a file; UsageError for an adapter."""
    head = read(path)
    if head.values.get("general.type") == "adapter":
        name, place = (head.values.get(f"general.base_model.0.{key}") for key in ("name", "repo_url"))
        of = f" of {name or place}" + (f" ({place})" if name and place else "") if name or place else ""
        raise UsageError(
            f"{path} is an adapter{of}, not a model: it runs beside a file of its base",
            hint=f"name the run it is of, or: llama-cli -m BASE.gguf --lora {quoted(path)}; or merge it: "
            f"llama-export-lora -m BASE.gguf --lora {quoted(path)} -o merged.gguf   and then give merged.gguf as the model",
        )
    return head


def read(path: Path) -> GgufHeader:
    """Read the header of a file.  ModelError when there is none, or none that can be read."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(
                    f"{path} is not a GGUF file", hint="give a .gguf file, or export the model again"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
                return _head(_HeaderReader(raw))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint="check the path") from error
    except (struct.error, ValueError, KeyError, IndexError, OverflowError) as error:
        raise ModelError(f"{path} is cut off or damaged: its head cannot be read", hint=AGAIN) from error


class _HeaderReader:
    """Reads values in turn; struct.error or ValueError beyond the end."""

    def __init__(self, raw: mmap.mmap) -> None:
        self.raw, self.at, self.listed = raw, 4, 0

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.raw, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.skip(length)
        return self.raw[self.at - length : self.at].decode(errors="replace") if length <= KEPT else ""

    def skip(self, length: int) -> None:
        self.at += length
        if self.at > len(self.raw):
            raise ValueError("beyond the end")

    def value(self) -> Any:
        """Read a single value; None for a list, which is skipped."""
        kind = self.number("I")
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            return self.number(NUMBERS[kind])
        inner, count = self.number("I"), self.number("Q")
        self.listed += count
        if self.listed > LISTED:
            raise ValueError("lists without an end")
        if inner != TEXT:
            self.skip(count * struct.calcsize(f"<{NUMBERS[inner]}"))
            return None
        for _ in range(count):
            self.skip(self.number("Q"))
        return None


def _head(reader: _HeaderReader) -> GgufHeader:
    if reader.number("I") not in (2, 3):
        raise ValueError("another version, or big-endian")
    tensors, keys = reader.number("Q"), reader.number("Q")
    values = {}
    for _ in range(keys):
        key = reader.text()
        values[key] = reader.value()
    ends = [0]
    for _ in range(tensors):
        reader.text()
        if (dims := reader.number("I")) > DIMS:
            raise ValueError("more dims than a tensor has")
        shape = [reader.number("Q") for _ in range(dims)]
        kind, offset = reader.number("I"), reader.number("Q")
        ends.append(offset + _bytes(kind, math.prod(shape)))
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError("an alignment that is none")
    start = -(-reader.at // alignment) * alignment if tensors else reader.at
    return GgufHeader(values, tensors, start + max(ends))


def _bytes(kind: int, count: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):  # newer than the package: the engine may know it
        return 0
    return count // int(block) * int(size)
