# SPDX-License-Identifier: Apache-2.0
"""Tell what a model's name is: a built-in one, a path or a hub id.  Nothing heavy is imported for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from fleetune.errors import ModelError, suggest
from fleetune.models.cache import cache, short_names

NAME_HINT: Final = "give a built-in name (fleetune models), a model directory, a .gguf file or a hub id"


def check(name: str) -> None:
    """ModelError for a name that no model can have, and for a path that leads nowhere."""
    if name not in cache.ORIGINS and local(name) is None:
        hub_id(name)


def local(name: str) -> Path | None:
    """Return the existing path that `name` is, or None when it may be a hub id."""
    if not name:
        raise ModelError("no model was named", hint=NAME_HINT)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"'{name}' is a file, but not a .gguf file", hint=NAME_HINT)
        return path
    if path.is_symlink():
        raise ModelError(f"'{name}' is a link that leads nowhere", hint=f"remove it, or {NAME_HINT}")
    like_a_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or re.match(r"[A-Za-z]:[\\/]", name)
    if like_a_path or path.suffix.lower() == ".gguf":
        raise ModelError(f"there is no file or directory '{name}'", hint="check the path, or " + NAME_HINT)
    return None


def can_be_fetched(name: str) -> bool:
    """Whether a name, as another machine gives it, is one that we know: a built-in model's or a short name.

    A model that anybody else has put on the hub brings a chat template, which sees the rows.
    """
    return name in cache.ORIGINS or name in short_names.SHORT_NAMES


def hub_id(name: str) -> str:
    """Return the hub id that a name is or stands for; ModelError for one that cannot be, with a built-in name that is like it."""
    if name in short_names.SHORT_NAMES:
        return short_names.SHORT_NAMES[name].hub
    if "/" not in name and (
        guess := suggest(name.lower(), cache.ORIGINS) or suggest(name.lower(), short_names.SHORT_NAMES)
    ):
        raise ModelError(f"no model named '{name}'.{guess}", hint=NAME_HINT)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name or "--" in name:
        raise ModelError(f"'{name}' is not a model's name", hint=NAME_HINT)
    return name
