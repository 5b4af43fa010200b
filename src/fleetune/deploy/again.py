"""Compare an export with the file or folder that it should be while it is made, and name the first place that differs.

No tensor is written: a format hands each to `Again`, which reads the same bytes of the file.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fleetune.common import sums
from fleetune.common.files import regular
from fleetune.models.gguf import header
from fleetune.models.net.saving import Table, bytes_of

CHUNK: Final = 1 << 22  # bytes that are compared at a time
GGUF: Final = ".gguf"
SAFETENSORS: Final = ".safetensors"


class FirstDifference(NamedTuple):
    """How far two exports agree, and the first place where they differ ("" for none)."""

    equal: int  # bytes
    words: str


class DiffersError(Exception):
    """What is made is not what is there."""

    def __init__(self, found: FirstDifference, *, head: bool) -> None:
        super().__init__(found.words)
        self.found, self.head = found, head  # whether that is in the file's head


@dataclass(frozen=True)
class Again:
    """What an export is compared with; `seen` gets the names of the files that were compared while they were made."""

    path: Path
    seen: set[str] = field(default_factory=set)

    def compare(self, name: str, parts: Iterable[tuple[int, Any]]) -> None:
        """Compare the file `name` of the folder (or the file itself) with parts, each with the byte where it begins.

        The one at 0 is the head.  DiffersError for the lowest byte that differs.
        """
        file, first, end = self.path / name if self.path.is_dir() else self.path, 0, 0
        found: int | None = None
        if not file.is_file():
            raise DiffersError(FirstDifference(0, f"{file} is missing"), head=True)
        with file.open("rb") as opened:
            for start, part in parts:
                data = memoryview(part).cast("B") if len(part) else memoryview(b"")
                end = max(end, start + len(data))
                if found is None or start < found:
                    opened.seek(start)
                    if (equal := _equal(opened, data)) < len(data):
                        found, first = start + equal, start
                    if found is not None and not first:
                        break  # nothing is lower than the head
        size = file.stat().st_size
        if found is None and size != end:
            found, first = min(size, end), end
        if found is not None:
            place = "in its head" if not first else place_of(file, found)
            raise DiffersError(
                FirstDifference(found, f"{file} differs in byte {found:,}, {place}"), head=not first
            )
        self.seen.add(name)

    def compare_tensors(
        self, name: str, tensors: Iterable[tuple[str, Tensor]], head: Callable[[Table], bytes]
    ) -> None:
        """Compare a safetensors file with these tensors, which come in any order, behind the `head` that they have."""
        file = self.path / name
        try:
            places = {tensor: start for tensor, start, _ in tensors_of(file)}
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
            places = {}  # of a head that differs
        size = file.stat().st_size if file.is_file() else 0
        places = {n: start for n, start in places.items() if type(start) is int and 0 <= start <= size}

        def parts() -> Iterator[tuple[int, Any]]:
            table = dict[str, tuple[torch.dtype, tuple[int, ...]]]()
            for tensor, values in tensors:
                table[tensor] = values.dtype, tuple(values.shape)
                if tensor in places:
                    yield places[tensor], bytes_of(values).numpy()
            yield 0, head(table)

        self.compare(name, parts())


def _equal(opened: Any, data: memoryview) -> int:
    """Return how many bytes of a file are those of `data`, up to the first that differs."""
    for at in range(0, len(data), CHUNK):
        wanted = data[at : at + CHUNK]
        if (there := opened.read(len(wanted))) != bytes(wanted):  # a view is compared byte after byte
            return at + _same(there, wanted)
    return len(data)


def _same(a: bytes, b: bytes | memoryview) -> int:
    n = min(len(a), len(b))
    unequal = np.flatnonzero(np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n))
    return int(unequal[0]) if len(unequal) else n


def difference(path: Path, made: Path, seen: Iterable[str] = ()) -> FirstDifference:
    """Compare a file or folder with the one that was `made` again, but for the files that were `seen`.

    A folder's README.md is left out, since people write in it, and hidden files, such as a hub adds.
    """
    if not made.is_dir():
        return _of_bytes(path, made)
    equal = sum((path / name).stat().st_size for name in seen)
    names = [{p.name for p in folder.glob("[!.]*")}.difference(seen) for folder in (path, made)]
    if (path / sums.README).is_file():
        names = [each - {sums.README} for each in names]
    if odd := sorted(names[0] ^ names[1]):
        return FirstDifference(
            equal, f"{path / odd[0]} is {'missing' if odd[0] in names[1] else 'not of it'}"
        )
    found = [_of_bytes(path / name, made / name) for name in sorted(names[0])]
    return FirstDifference(
        equal + sum(each.equal for each in found), next((each.words for each in found if each.words), "")
    )


def _of_bytes(path: Path, made: Path) -> FirstDifference:
    at = 0
    if not path.is_file():
        return FirstDifference(0, f"{path} is no file")
    with path.open("rb") as one, made.open("rb") as other:
        while True:
            a, b = one.read(CHUNK), other.read(CHUNK)
            if a != b:
                at += _same(a, b)
                return FirstDifference(at, f"{path} differs in byte {at:,}, {place_of(made, at)}")
            if not a:
                return FirstDifference(at, "")
            at += len(a)


def place_of(path: Path, at: int) -> str:
    """Say what lies at a byte of a whole file: a tensor, or the head."""
    for name, start, end in tensors_of(path):
        if start <= at < end:
            return f"in {name}"
    return "in its head" if path.suffix in (GGUF, SAFETENSORS) else "in its text"


def tensors_of(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield the tensors of a file, with where each begins and ends; nothing of another file."""
    if path.suffix == GGUF:
        for tensor in header.read(path).tensors:
            yield tensor.name, tensor.offset, tensor.offset + tensor.size
    elif path.suffix == SAFETENSORS:
        with open(path, "rb", opener=regular) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("a head that is longer than its file")
            head: Mapping[str, Any] = json.loads(file.read(size))
        for name, entry in head.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                yield name, 8 + size + start, 8 + size + end
