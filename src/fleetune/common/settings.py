# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses whose fields are settings (`--set NAME=VALUE`): what they are, and how texts become one.

A field is `field(default=.., metadata={"symbol": .., "help": ..})`; a `__post_init__` raises ValueError in
plain words for values that do not go together.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from fleetune.errors import RecipeError

T = TypeVar("T")

Value = str | int | float | bool  # of an option or a setting


@dataclass(frozen=True)
class Setting:
    """One field: a `--set name=value`."""

    name: str
    type: type
    default: Any
    symbol: str
    help: str


def of(cls: type) -> list[Setting]:
    """The settings of a class, in order."""
    hints = get_type_hints(cls)
    return [
        Setting(
            f.name, hints[f.name], f.default, f.metadata.get("symbol", f.name), f.metadata.get("help", "")
        )
        for f in dataclasses.fields(cls)
    ]


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """What `--set NAME=VALUE ..` says; RecipeError for a setting without a value."""
    chosen = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RecipeError([f"--set {text!r} is not NAME=VALUE"], hint="for example --set K=4096")
        chosen[name.strip()] = value.strip()
    return chosen


def make(cls: type[T], name: str, values: Mapping[str, Any], *, hint: str) -> T:
    """A `cls` with these values (texts are parsed), called `name` in errors; RecipeError lists all that is wrong."""
    known = {s.name: s for s in of(cls)}
    parsed, problems = {}, []
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            guess = f" Did you mean '{close[0]}'?" if close else ""
            problems.append(f"{name} has no setting '{key}'.{guess} It has: {', '.join(known)}")
            continue
        try:
            parsed[key] = _parse(value, known[key].type)
        except ValueError:
            problems.append(f"{name}: {key} = {value!r} is not {_article(known[key].type)}")
    if not problems:
        try:
            return cls(**parsed)
        except ValueError as error:  # a __post_init__ says what is wrong in plain words
            problems.append(f"{name}: {error}")
    raise RecipeError(problems, hint=hint)


def _parse(value: Any, kind: type) -> Any:
    if kind is bool:
        if str(value).lower() in ("true", "yes", "on", "1"):
            return True
        if str(value).lower() in ("false", "no", "off", "0"):
            return False
        raise ValueError
    if kind is int:
        number = float(value)
        if number != int(number):
            raise ValueError
        return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else int(number)
    if kind is str and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise ValueError
    return kind(value)


def _article(kind: type) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}.get(
        kind, kind.__name__
    )
