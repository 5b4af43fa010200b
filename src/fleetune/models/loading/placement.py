# SPDX-License-Identifier: Apache-2.0
"""Decide where the weights of a model are while it is used: in memory, or in their file (`mapped/`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from safetensors import safe_open

from fleetune.errors import ModelError
from fleetune.models.cache import cache, names
from fleetune.models.cache.download import Progress
from fleetune.models.families.foreign import foreign_file
from fleetune.models.mapped import places
from fleetune.models.mapped.bases import BASES, BLOCKS, MAPPED, SHARE
from fleetune.models.mapped.stored import Stored, of_folder, weight_files

DENSEST: Final = 8  # numbers that a byte of a GGUF file stands for, at most

Resolve = Callable[[str], Path]
Tensors = Callable[[str], tuple[Path, Mapping[str, Stored]]]


def chosen(base: str, name: str, size: int, device: str, ram: int, resolve: Resolve, tensors: Tensors) -> str:
    """Return memory or mapped; auto is mapped on a CPU where weights of `size` bytes each would take half of `ram` bytes.

    `resolve` and `tensors` (`tensors_of`) are asked where the size cannot be told without.  ModelError for another word, and
    for mapped on another device.
    """
    if base not in (*BASES, BLOCKS):
        raise ModelError(f"no base named '{base}'", hint="choose one of " + ", ".join(BASES))
    if base in MAPPED and device != "cpu":
        raise ModelError(
            f"a mapped base is for the CPU, not for '{device}'", hint="leave out --base or --device"
        )
    if base != "auto":
        return base
    room = SHARE * ram / size
    return "mapped" if device == "cpu" and room and _count(name, room, resolve, tensors) > room else "memory"


def _count(name: str, room: float, resolve: Resolve, tensors: Tensors) -> float:
    """Return how many weights a model has, or an upper bound that is below `room`."""
    if name in cache.ORIGINS:
        return cache.ORIGINS[name].params
    path = names.local(name)
    if path is not None and path.is_file():
        most = DENSEST * path.stat().st_size
        return most if most < room else sum(t.numbers for t in tensors(name)[1].values())
    return sum(math.prod(shape) for shape in shapes(resolve(name)))


def tensors_of(
    name: str,
    resolve: Resolve,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    blocks: bool = False,
) -> tuple[Path, Mapping[str, Stored]]:
    """Return the folder of a model's configuration and tokenizer, and where its tensors are.

    A GGUF file is not converted: the folder, in the cache, has no weights.  With `blocks` a built-in model is its GGUF file,
    else whatever of it is in the cache.  ModelError as in `models.load`.
    """
    if name in cache.ORIGINS:
        folder = cache.pull_builtin(
            cache.ORIGINS[name],
            offline=offline,
            progress=progress,
            bases=("mapped",) if blocks else ("mapped", "memory"),
        )
        file = folder / cache.GGUF
    elif (path := names.local(name)) is not None and path.is_file():
        folder, file = cache.import_gguf(path, weights=False, progress=progress), path
    else:
        folder, file = resolve(name), Path()
    return folder, places.read(folder, file) if file.is_file() and places.known(folder) else of_folder(folder)


def shapes(folder: Path) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors in a directory's files."""
    found = []
    with foreign_file(folder, "has weights that cannot be loaded"):
        for file in weight_files(folder):
            with safe_open(file, "pt") as opened:
                found += [tuple(opened.get_slice(name).get_shape()) for name in list(opened.keys())]
    return found
