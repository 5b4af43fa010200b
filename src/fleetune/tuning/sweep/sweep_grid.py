# SPDX-License-Identifier: Apache-2.0
"""Make the grid of a sweep: which names vary, over which values and seeds, and the checked recipe of every run.

A name that varies is `alpha` (of the Dirichlet partition), an option of the recipe (`rounds`) or a setting of the
method (`K`, in full `set.K`).
All combinations of a seed come before the next seed, so that the first pass over the grid is whole early.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fleetune.common.settings import Value
from fleetune.errors import RecipeError, suggest
from fleetune.report.sweep import SweepAxis
from fleetune.runs import folder_names
from fleetune.tuning import methods
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe

SHOWN: Final = 8  # problems shown at once
MANY: Final = 10_000  # runs


@dataclass(frozen=True)
class Point:
    """One run of a sweep: the values that vary, in the order of the axes, and all else that decides it."""

    values: tuple[Value, ...]
    seed: int
    recipe: Recipe
    name: str  # of its folder
    words: str  # "alpha 0.5 · K 64 · seed 42"


@dataclass(frozen=True)
class SweepGrid:
    """A checked sweep."""

    base: Recipe
    axes: tuple[SweepAxis, ...]
    seeds: int
    points: tuple[Point, ...]


def make(values: Mapping[str, Any], vary: Sequence[str] = (), seeds: int | None = None) -> SweepGrid:
    """Return the grid of a recipe's keys with its table [sweep]; `vary` (NAME=V1,V2,..) and `seeds` override that table.

    RecipeError lists every problem: unknown names, values of a wrong type, combinations a method refuses.
    """
    base = recipes.make({k: v for k, v in values.items() if k != "sweep"})
    table = values.get("sweep", {})
    if not isinstance(table, dict):
        raise RecipeError(["sweep is not a table"], hint="write [sweep], then a line such as K = [64, 512]")
    wanted: dict[str, Any] = _flat(table)
    count = wanted.pop("seeds", 1) if seeds is None else seeds
    wanted.pop("seeds", None)
    problems: list[str] = []
    for text in vary:
        name, equals, listed = text.partition("=")
        if not (equals and name.strip()):
            problems.append(f"--vary {text!r} is not NAME=VALUE,VALUE")
            continue
        wanted[name.strip()] = [_guess(v.strip()) for v in listed.split(",") if v.strip()]
    if type(count) is not int or not 1 <= count <= MANY:
        problems.append(f"seeds = {count!r} is not a whole number from 1 to {MANY}")
    axes = _axes(base, wanted, problems)
    if not problems and not axes and count == 1:
        problems.append("nothing varies: give --vary NAME=VALUE,VALUE or --seeds N")
    raise_together(problems)
    return SweepGrid(base, axes, count, _points(base, axes, count))


def _flat(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flatten nested tables to dotted names: `set.K = [..]` in TOML is a table `set`."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def _guess(text: str) -> Value:
    """Type a value of the command line as TOML would."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)


def _axes(base: Recipe, wanted: Mapping[str, Any], problems: list[str]) -> tuple[SweepAxis, ...]:
    axes: list[SweepAxis] = []
    tried = wanted.get("method", [base.method])
    known = _names([m for m in (tried if isinstance(tried, list) else [tried]) if isinstance(m, str)])
    for name, values in wanted.items():
        key = name if name in known else f"set.{name}"
        if key not in known:
            problems.append(_unknown(name, known))
        elif not isinstance(values, list) or not values:
            problems.append(f"{name} = {values!r} is not a list of values")
        elif odd := [v for v in values if not isinstance(v, str | int | float)]:
            problems.append(f"{name}: {odd[0]!r} is not a value")
        elif twice := [v for i, v in enumerate(values) if v in values[:i]]:
            problems.append(f"{name}: {twice[0]!r} stands twice")
        elif key in [a.key for a in axes]:
            problems.append(f"{name} varies twice")
        else:
            axes.append(SweepAxis(name, key, tuple(values)))
    keys = [a.key for a in axes]
    if "alpha" in keys and "partition" in keys:
        problems.append("alpha is a part of partition: vary one of them")
    elif "alpha" in keys and base.partition.split(":")[0] != "dirichlet":
        said = f"alpha varies the Dirichlet partition, but partition = {base.partition!r}"
        other = "; for the method's own alpha write set.alpha" if "set.alpha" in known else ""
        problems.append(f"{said}: set it to dirichlet:0.5:COLUMN{other}")
    return tuple(axes)


def _names(tried: Sequence[str]) -> list[str]:
    """List every name that can vary.  An unknown method among `tried` is found when the runs are checked."""
    options = [n for n in recipes.fields() if n not in ("set", "seed")]
    entries = methods.entries()
    settings = [f"set.{s.name}" for m in tried if m in entries for s in methods.settings(m)]
    return ["alpha", *options, *dict.fromkeys(settings)]


def _unknown(name: str, known: Sequence[str]) -> str:
    if name == "seed":
        return "seed varies by seeds: --seeds N, or seeds = N in [sweep]"
    guess = suggest(name.removeprefix("set."), [k.removeprefix("set.") for k in known], cutoff=0.5)
    return f"nothing called '{name}' can vary.{guess}"


def _points(base: Recipe, axes: Sequence[SweepAxis], seeds: int) -> tuple[Point, ...]:
    combinations = list(itertools.product(*(a.values for a in axes)))
    if len(combinations) * seeds > MANY:
        raise RecipeError([f"{len(combinations) * seeds:,} runs are more than {MANY:,}"])
    points: list[Point] = []
    problems: list[str] = []
    plain = dataclasses.asdict(base)
    for seed, values in itertools.product(range(base.seed, base.seed + seeds), combinations):
        named = [*zip((a.name for a in axes), values, strict=True), ("seed", seed)]
        words = " · ".join(f"{name} {shown(value)}" for name, value in named)
        parts = "-".join(folder_names.slug(f"{name}-{shown(value)}") for name, value in named)
        try:
            recipe = recipes.make(_changed(plain, axes, values) | {"seed": seed})
        except RecipeError as error:
            problems += error.problems
            continue
        points.append(Point(values, seed, recipe, f"{len(points) + 1:04d}-{parts[:80].rstrip('-.')}", words))
    raise_together(problems)
    return tuple(points)


def shown(value: Value) -> str:
    """Write a value that varies as text, exactly."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _changed(plain: Mapping[str, Any], axes: Sequence[SweepAxis], values: Sequence[Value]) -> dict[str, Any]:
    """Return the recipe's keys with these values in place."""
    changed = {**plain, "set": dict(plain["set"])}
    for axis, value in zip(axes, values, strict=True):
        if axis.key == "alpha":
            changed["partition"] = f"dirichlet:{shown(value)}:{plain['partition'].split(':', 2)[-1]}"
        elif axis.key.startswith("set."):
            changed["set"][axis.key.removeprefix("set.")] = value
        else:
            kind = recipes.fields()[axis.key][0]
            changed[axis.key] = shown(value) if kind is str and not isinstance(value, str) else value
    return changed


def raise_together(problems: Sequence[str]) -> None:
    """Raise RecipeError with these problems, each once, if there are any."""
    different = list(dict.fromkeys(problems))
    if different:
        more = [f"and {len(different) - SHOWN} more problems"] if len(different) > SHOWN else []
        hint = "options: fleetune sweep --help; settings: fleetune methods NAME"
        raise RecipeError(different[:SHOWN] + more, hint=hint)
