# SPDX-License-Identifier: Apache-2.0
"""List what lies in the cache of models with its size, and remove a model from it.  Loads no torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fleetune.common.files import storage_error
from fleetune.common.folders import locked
from fleetune.errors import ModelError, suggest
from fleetune.models.cache import cache


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache: a folder of its own."""

    name: str  # built-in name, hub id, or name of the folder
    path: Path
    bytes: int  # on the disk
    source: str  # where it came from
    licence: str  # "" where nothing states it


def contents() -> list[CachedModel]:
    """Return every model in the cache: built-in ones first, then the others by name."""
    built_in = {target: o for o in cache.ORIGINS.values() for target in _targets(o)}
    folders = [p for p in _folders() if (p / "config.json").is_file()]
    found = []
    for folder in sorted(folders, key=lambda p: (p not in built_in, p.name)):
        stated, origin = cache.source_of(folder), built_in.get(folder)
        name = origin.name if origin else _name(folder, stated)
        licence = origin.licence if origin else str(stated.get("licence", ""))
        found.append(CachedModel(name, folder, size(folder), str(stated.get("source") or "unknown"), licence))
    return found


def size(folder: Path) -> int:
    """Return the bytes of all files under a folder; a file that cannot be read counts 0."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:
            continue
    return total


def remove(name: str) -> list[CachedModel]:
    """Remove the copies of a model from the cache and return them; ModelError when it is not there.

    `name` is a built-in name, a hub id, or the name of a folder in the cache.
    """
    every = contents()
    found = [model for model in every if name in (model.name, model.path.name)]
    if not found:
        guess = suggest(name, [model.name for model in every])
        raise ModelError(
            f"no model named '{name}' is in the cache ({cache.cache()}).{guess}",
            hint="what is there: fleetune models",
        )
    for model in found:
        try:
            with locked(model.path):
                shutil.rmtree(model.path)
        except OSError as error:
            raise storage_error(error, model.path) from error
    return found


def _folders() -> list[Path]:
    try:
        return [p for p in (cache.cache() / "models").iterdir() if p.is_dir() and not p.name.startswith(".")]
    except OSError:
        return []


def _targets(origin: cache.Origin) -> list[Path]:
    indexed = [cache.index_target(origin, weights=weights) for weights in (True, False)]
    return [*indexed, cache.hub_target(origin.hub)]


def _name(folder: Path, stated: dict[str, object]) -> str:
    if folder.name.startswith("hub-"):
        return folder.name.removeprefix("hub-").replace("--", "/")
    return Path(str(stated.get("file") or folder.name)).name
