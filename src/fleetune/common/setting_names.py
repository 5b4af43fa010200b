# SPDX-License-Identifier: Apache-2.0
"""Read the names of a method's settings from its file's text, since importing a method loads torch."""

from __future__ import annotations

import ast
import importlib.util
from functools import lru_cache
from pathlib import Path

from fleetune.common.registry import Registry
from fleetune.errors import FAULTS, UsageError


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
