# SPDX-License-Identifier: Apache-2.0
"""Read the names of a method's settings from its file's text, since importing a method loads torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

from fleetune.common.registry import Registry
from fleetune.errors import FAULTS, UsageError

ALIKE: Final[Mapping[str, str]] = {"learning_rate": "lr", "rank": "r", "lora_r": "r", "lora_alpha": "alpha"}


def registry_of(command: str) -> Registry | None:
    """Return the registry whose members have the settings of a command's `--set`; None for a command without it."""
    if command in ("tune", "sweep", "fleet"):
        from fleetune.tuning import methods

        return methods.REGISTRY
    if command == "compress":
        from fleetune import compression

        return compression.REGISTRY
    return None


def of_module(module: str) -> list[str]:
    """Return the settings that a module declares with `setting(..)`, in order; none where it cannot be read."""
    try:
        spec = importlib.util.find_spec(module)
        return list(_declared(Path(spec.origin))) if spec and spec.origin else []
    except FAULTS:
        return []


@lru_cache(maxsize=64)
def _declared(path: Path) -> tuple[str, ...]:
    classes = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)]
    found = [field for node in classes for field in node.body if isinstance(field, ast.AnnAssign)]
    return tuple(
        field.target.id
        for field in found
        if isinstance(field.target, ast.Name)
        and isinstance(field.value, ast.Call)
        and isinstance(field.value.func, ast.Name)
        and field.value.func.id == "setting"
    )


def of_method(registry: Registry, name: str) -> list[str]:
    """Return the settings of a member of a registry; none of an unknown one."""
    try:
        return of_module(registry.member(name).module)
    except UsageError:
        return []


def close_to(flag: str, names: list[str]) -> str:
    """Return the setting that `--flag` means, "" for none: `--batch-size` is batch_size, `--k` is K."""
    asked = flag.lstrip("-").replace("-", "_")
    by_lower = {name.lower(): name for name in names}
    for word in (asked, asked.lower(), ALIKE.get(asked.lower(), "")):
        if word in names:
            return word
        if word in by_lower:
            return by_lower[word]
    return ""
