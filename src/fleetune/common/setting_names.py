# SPDX-License-Identifier: Apache-2.0
"""Read a method's settings from its file's text, since importing a method loads torch."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from fleetune.common.registry import Registry
from fleetune.common.settings import Setting, setting
from fleetune.errors import FAULTS, UsageError

TYPES: Final = {kind.__name__: kind for kind in (int, float, str, bool)}


def of_module(module: str) -> list[str]:
    """Return the settings that a module declares with `setting(..)`, in order; none where it cannot be read."""
    return [name for node in _classes(module) for name, _, _ in _declared(node)]


def settings_of(module: str, name: str) -> list[Setting] | None:
    """Return the settings of the class `name` of a module; None where its text does not say all of them."""
    node = next((node for node in _classes(module) if node.name == name), None)
    if node is None or node.bases:
        return None
    declared = _declared(node)
    if len(declared) < sum("ClassVar" not in ast.unparse(field.annotation) for field in _fields(node)):
        return None  # a field of another kind
    try:
        return [_setting(name, TYPES[ast.unparse(annotation)], call) for name, annotation, call in declared]
    except (KeyError, TypeError, ValueError):  # what is no literal
        return None


def of_method(registry: Registry, name: str) -> list[str]:
    """Return the settings of a member of a registry; none of an unknown one."""
    try:
        return of_module(registry.member(name).module)
    except UsageError:
        return []


def _classes(module: str) -> list[ast.ClassDef]:
    """Return the classes of a module; none of one that cannot be read."""
    try:
        spec = importlib.util.find_spec(module)
        return list(_parsed(Path(spec.origin))) if spec and spec.origin else []
    except FAULTS:
        return []


@lru_cache(maxsize=64)
def _parsed(path: Path) -> tuple[ast.ClassDef, ...]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return tuple(node for node in body if isinstance(node, ast.ClassDef))


def _fields(node: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    return (field for field in node.body if isinstance(field, ast.AnnAssign))


def _declared(node: ast.ClassDef) -> list[tuple[str, ast.expr, ast.Call]]:
    """Return (name, annotation, call of `setting`) of the fields that are declared so."""
    return [
        (field.target.id, field.annotation, field.value)
        for field in _fields(node)
        if isinstance(field.target, ast.Name)
        and isinstance(field.value, ast.Call)
        and isinstance(field.value.func, ast.Name)
        and field.value.func.id == setting.__name__
    ]


def _setting(name: str, kind: type, call: ast.Call) -> Setting:
    """Return a setting as its call declares it; ValueError or TypeError where an argument is no literal, or is not taken."""
    given: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    bound = inspect.signature(setting).bind(*map(ast.literal_eval, call.args), **given)
    bound.apply_defaults()
    about = dict(bound.arguments)
    about["auto"] = about["auto"] or about["found"]
    return Setting(name=name, type=kind, **about)
