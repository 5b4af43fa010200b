"""Write an export again from its source, and name the first place that differs: file, byte and tensor."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import numpy as np

from fleetune.common import sums
from fleetune.deploy import export, targets
from fleetune.errors import ModelError, UsageError
from fleetune.models.gguf import header
from fleetune.runs import compression_folder, rundir
from fleetune.runs.listener import Silent
from fleetune.subject import Compressed, Run, Subject

CHUNK: Final = 1 << 22  # bytes that are compared at a time
SAFETENSORS: Final = ".safetensors"


def written_again(path: Path, source: Subject, *, offline: bool) -> str:
    """Return the target as which `source` gives the very bytes of `path`; ModelError with the first place that differs."""
    nearest = Difference(-1, "")
    for target, name, usual in _ways(path, source):
        with TemporaryDirectory() as place:
            made = Path(place) / name
            try:
                export.export(source, target.name, made, None, Silent(), offline=offline)
            except UsageError as error:
                if isinstance(error, ModelError):
                    raise
                continue  # no target of this source
            found = difference(path, made)
            alike = usual and _size(path) == _size(made)
        if not found.words:
            return target.name
        nearest = max(nearest, found)
        if alike:
            break  # it is of this target, and damaged
    if not nearest.words:
        raise UsageError(
            f"{source.argument} is exported as nothing like {path}",
            hint="name what it was made from: --from RUN, COMPRESSION or MODEL",
        )
    raise ModelError(
        f"{nearest.words}: {source.argument} gives something else",
        hint="export it again; a file that was renamed holds its first name: give it that",
    )


def _ways(path: Path, source: Subject) -> list[tuple[targets.Target, str, bool]]:
    """Return the targets that `path` may be of, with the name that the file had, and whether that is the target's usual one."""
    stem = ""
    if isinstance(source, Run):
        home = source.folder
    elif isinstance(source, Compressed):
        home = source.home
    else:
        home, stem = Path("."), rundir.of_model(source.name)
    able = [
        target
        for target in targets.every().values()
        if target.suffix == ("" if path.is_dir() else path.suffix)
        and (target.takes != "codes" or isinstance(source, Compressed))
        and (target.takes != "adapter" or isinstance(source, Run))
    ]
    usual = {target.name: target.place(home, stem).name for target in able}
    names = [path.name]
    if path.suffix == export.GGUF:  # which holds the name that it was written under
        own = header.read(path).values.get("general.name")
        names += {name for name in usual.values() if Path(name).stem == own} - {path.name}
    ways = [(target, name, usual[target.name] == path.name) for name in names for target in able]
    return sorted(ways, key=lambda way: not way[2])


def _size(path: Path) -> int:
    return compression_folder.size(path) if path.is_dir() else path.stat().st_size


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
    return "in its head" if path.suffix in (export.GGUF, SAFETENSORS) else "in its text"


def _tensors(path: Path) -> Iterator[tuple[str, int, int]]:
    if path.suffix == export.GGUF:
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
