# SPDX-License-Identifier: Apache-2.0
"""Read a method's settings from its file's text, since importing a method loads torch."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from fleetune.common.registry import Registry
from fleetune.common.settings import Setting, setting
from fleetune.errors import FAULTS, UsageError

TYPES: Final = {kind.__name__: kind for kind in (int, float, str, bool)}


def of_module(module: str) -> list[str]:
    """Return the settings that a module's classes declare or inherit, in order; none where it cannot be read."""
    found = (
        name for node in _classes(module) for name, field in _fields(module, node).items() if _call(field)
    )
    return list(dict.fromkeys(found))


def settings_of(module: str, name: str) -> list[Setting] | None:
    """Return the settings of the class `name` of a module; None where its text does not say all of them."""
    node = next((node for node in _classes(module) if node.name == name), None)
    try:
        if node is None or not all(_parent(module, base) for base in node.bases):
            return None
        return [
            _setting(field)
            for field in _fields(module, node).values()
            if "ClassVar" not in ast.unparse(field.annotation)
        ]
    except (KeyError, TypeError, ValueError):  # what is no literal, a field of another kind
        return None


def of_method(registry: Registry, name: str) -> list[str]:
    """Return the settings of a member of a registry; none of an unknown one."""
    try:
        return of_module(registry.member(name).module)
    except UsageError:
        return []


def _classes(module: str) -> list[ast.ClassDef]:
    """Return the classes of a module; none of one that cannot be read."""
    return [node for node in _body(module) if isinstance(node, ast.ClassDef)]


def _body(module: str) -> tuple[ast.stmt, ...]:
    """Return the statements of a module; none of one that cannot be read."""
    try:
        spec = importlib.util.find_spec(module)
        return _parsed(Path(spec.origin)) if spec and spec.origin else ()
    except FAULTS:
        return ()


@lru_cache(maxsize=64)
def _parsed(path: Path) -> tuple[ast.stmt, ...]:
    return tuple(ast.parse(path.read_text(encoding="utf-8")).body)


def _fields(module: str, node: ast.ClassDef) -> dict[str, ast.AnnAssign]:
    """Return the fields of a class by name, in the order of a dataclass: those of its base, then its own."""
    fields: dict[str, ast.AnnAssign] = {}
    for base in node.bases:
        if parent := _parent(module, base):
            fields.update(_fields(*parent))
    own = (field for field in node.body if isinstance(field, ast.AnnAssign))
    fields.update({field.target.id: field for field in own if isinstance(field.target, ast.Name)})
    return fields


def _parent(module: str, base: ast.expr) -> tuple[str, ast.ClassDef] | None:
    """Return the module and the class that `imported.Class` names; None for a base of another form."""
    if not (isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name)):
        return None
    for line in _body(module):
        if isinstance(line, ast.ImportFrom) and any(
            base.value.id == name.name and not name.asname for name in line.names
        ):
            where = f"{line.module}.{base.value.id}"
            return next(((where, node) for node in _classes(where) if node.name == base.attr), None)
    return None


def _call(field: ast.AnnAssign) -> ast.Call | None:
    """Return the call of `setting` that declares a field; None for one that is declared otherwise."""
    call = field.value
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == setting.__name__:
        return call
    return None


def _setting(field: ast.AnnAssign) -> Setting:
    """Return a setting as its call declares it; KeyError, TypeError or ValueError where its text does not say it all."""
    call = _call(field)
    if call is None or not isinstance(field.target, ast.Name):
        raise ValueError("declared without `setting(..)`")
    given: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    bound = inspect.signature(setting).bind(*map(ast.literal_eval, call.args), **given)
    bound.apply_defaults()
    about = dict(bound.arguments)
    about["auto"] = about["auto"] or about["found"]
    return Setting(name=field.target.id, type=TYPES[ast.unparse(field.annotation)], **about)
