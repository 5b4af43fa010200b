# SPDX-License-Identifier: Apache-2.0
"""Run a grid of recipes in one folder: list its runs, check them, and run or resume them in turn.

    runs/0007-sweep-case-study/
      sweep.toml      the recipe, and the table [sweep]: what varies, over which values, and how many seeds
      0001-alpha-0.5-k-64-seed-42/ ...      run folders as `tune` leaves them
      sweep.html      figures/*.svg         all runs together, written anew after every run
      status          log.txt

The folder is the record: a run whose status is `done` is not run again, an unfinished one resumes from its
last checkpoint, so a sweep can be killed at any time and resumed.  A name that varies is `alpha` (of the
Dirichlet partition), an option of the recipe (`rounds`) or a setting of the method (`K`, in full `set.K`).
All combinations of a seed are run before the next seed, so that the first pass over the grid is whole early.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fleetune.common.display import counted
from fleetune.common.files import read_text, storage_error, write_atomic
from fleetune.common.settings import Value
from fleetune.errors import (
    FAULTS,
    FleetuneError,
    Interrupted,
    RecipeError,
    StorageError,
    UsageError,
    fault,
    suggest,
)
from fleetune.runs import report, rundir, sealed
from fleetune.runs.listener import Listener
from fleetune.runs.report.cells import GridRun, SweepAxis
from fleetune.runs.rundir import RunDir
from fleetune.tuning import foundations, methods, prepare
from fleetune.tuning import recipe as recipes
from fleetune.tuning import run as jobs
from fleetune.tuning.recipe import Recipe

FILE = "sweep.toml"
PAGE = "sweep.html"
SEAL = "# crc32 of the lines below: "
SHOWN = 8  # problems shown at once
MANY = 10_000  # runs


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


# What varies --------------------------------------------------------------------------------------


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
    _raise(problems)
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
        parts = "-".join(rundir.slug(f"{name}-{shown(value)}") for name, value in named)
        try:
            recipe = recipes.make(_changed(plain, axes, values) | {"seed": seed})
        except RecipeError as error:
            problems += error.problems
            continue
        points.append(Point(values, seed, recipe, f"{len(points) + 1:04d}-{parts[:80].rstrip('-.')}", words))
    _raise(problems)
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


def _raise(problems: Sequence[str]) -> None:
    """Raise RecipeError with these problems, each once, if there are any."""
    different = list(dict.fromkeys(problems))
    if different:
        more = [f"and {len(different) - SHOWN} more problems"] if len(different) > SHOWN else []
        hint = "options: fleetune sweep --help; settings: fleetune methods NAME"
        raise RecipeError(different[:SHOWN] + more, hint=hint)


def check(grid: SweepGrid, *, folder: Path | None = None, offline: bool = False) -> None:
    """Check everything about the runs that needs no model: methods with their settings, and the data's split.

    RecipeError lists what methods refuse, DataError is of the first split that cannot be.  With the `folder` of a stopped
    sweep, UsageError names the runs that were made on other rows than the data has now.
    """
    problems: list[str] = []
    for point in grid.points:
        try:
            prepare.check(point.recipe)
        except RecipeError as error:
            problems += error.problems
        except UsageError as error:
            problems.append(error.message)
    _raise(problems)
    shared: dict[tuple[object, ...], list[Point]] = {}
    for point in grid.points:
        shared.setdefault(_of_data(point.recipe), []).append(point)
    changed = []
    for first, *others in shared.values():
        try:
            parts = prepare.split(first.recipe, methods.entry(first.recipe.method), offline=offline)
        except UsageError as error:
            error.message = f"{first.words}: {error.message}"
            raise
        if folder:
            changed += [p.name for p in (first, *others) if foundations.changed_rows(folder / p.name, parts)]
    if folder and changed:
        raise _on_other(folder, changed, "other rows than the data has now")


def _of_data(r: Recipe) -> tuple[object, ...]:
    """Return all that decides how the data are split."""
    clients = r.clients or methods.entry(r.method).clients
    return r.data, r.columns, r.eval_data, r.limit, r.partition, r.held_out, r.seed, clients


def _on_other(folder: Path, names: Sequence[str], what: str) -> UsageError:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return UsageError(
        f"runs of {folder} were made on {what}: {', '.join(names[:SHOWN])}{more}",
        hint="bring back the data and the model of the sweep; or begin a new sweep: one page does not hold both",
    )


# The folder ---------------------------------------------------------------------------------------


def to_toml(grid: SweepGrid) -> str:
    """Write the grid as the text of `sweep.toml`; `read` and `make` are the inverse."""
    recipe = recipes.to_toml(grid.base).split("\n", 1)[1]
    table = {recipes.toml_key(a.name): ", ".join(map(recipes.toml_value, a.values)) for a in grid.axes}
    lines = [f"seeds = {grid.seeds}", *(f"{name} = [{values}]" for name, values in table.items())]
    text = recipe + "\n[sweep]\n" + "\n".join(lines) + "\n"
    return (
        f"# The recipe of a sweep. Run it again: fleetune sweep {FILE}\n{SEAL}{sealed.checksum(text)}\n{text}"
    )


def _check_whole(file: Path) -> None:
    """RecipeError when a sweep.toml was changed since it was written, by the checksum in its second line."""
    try:
        text = read_text(file)
    except (OSError, ValueError):  # `recipes.read` says more
        return
    _, seal, rest = text.partition(SEAL)
    stated, _, content = rest.partition("\n")
    if seal and stated != (found := sealed.checksum(content)):
        what = f"{file} was changed since the sweep began: its checksum is {found}, it states {stated}"
        hint = f"put it back as it was; the recipes of its runs are in {file.parent}/*/run.toml"
        raise RecipeError([what], hint=hint)


def create(out: Path, name: str, grid: SweepGrid) -> RunDir:
    """Create a new, numbered folder under `out` with the grid in it."""
    folder = RunDir(rundir.numbered(out, f"sweep-{rundir.slug(name) or 'grid'}"))
    folder.write(FILE, to_toml(grid))
    return folder


def find(name: str, out: Path) -> Path:
    """Find the sweep that a user means: a path, a name or number under `out`, or `latest`.  UsageError if there is none."""
    if (Path(name) / FILE).is_file():
        return Path(name)
    found = sorted((p for p in out.glob("*-sweep-*") if (p / FILE).is_file()), key=lambda p: p.name)
    if name == "latest" and found:
        return found[-1]
    matches = [p for p in found if name in (p.name, p.name.split("-")[0].lstrip("0"), p.name.split("-")[0])]
    if not matches:
        raise UsageError(f"no sweep '{name}' in {out}", hint="a sweep's folder has a file sweep.toml")
    return matches[0]


def read(folder: Path) -> SweepGrid:
    """Read the grid of a sweep's folder; RecipeError when its sweep.toml is damaged."""
    _check_whole(folder / FILE)
    values = recipes.read(folder / FILE)
    try:
        return make(values)
    except RecipeError as error:
        raise RecipeError([f"{folder / FILE} is no sweep's", *error.problems], hint=error.hint) from None


def done(folder: Path, point: Point, note: Callable[[str], None]) -> bool:
    """Tell whether a run is finished.

    UsageError when its folder holds another run than the sweep now states, RecipeError when its recipe is damaged.
    """
    path = folder / point.name
    if not (path / "run.toml").is_file():
        return False
    try:
        have = foundations.recipe_of(path)
    except RecipeError as error:
        error.hint = (
            f"remove {path / 'run.toml'}: the sweep writes it again, and the run goes on where it was"
        )
        raise
    # `labels` is written out by a run of an encoder
    if not foundations.same(dataclasses.replace(have, labels=point.recipe.labels), point.recipe):
        raise UsageError(
            f"{path} was made by another recipe than {folder / FILE} states now",
            hint=f"put {FILE} back as it was, or begin a new sweep with the changed one",
        )
    return jobs.is_done(path, note)


def members(folder: Path, grid: SweepGrid) -> list[GridRun]:
    """Read the runs of the grid that have begun."""
    return [
        GridRun(p.values, p.seed, report.read(folder / p.name))
        for p in grid.points
        if (folder / p.name / "run.toml").is_file()
    ]


def write_page(folder: Path, grid: SweepGrid) -> None:
    """Write the page and the figures of a sweep from the runs there are."""
    html, figures = report.grid(folder.name, grid.axes, members(folder, grid), len(grid.points))
    try:
        (folder / "figures").mkdir(exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder / "figures") from error
    for name, drawing in figures.items():
        write_atomic(folder / "figures" / f"{name}.svg", drawing)
    write_atomic(folder / PAGE, html.encode("utf-8", "replace"))


# The runs -----------------------------------------------------------------------------------------


class Watch(Protocol):
    """Callbacks of a sweep."""

    def begin(self, point: Point) -> Listener:
        """Return the listener of a run that is about to start or resume; may raise Interrupted."""
        ...

    def note(self, text: str) -> None:
        """Show a remark."""
        ...

    def end(self, point: Point, path: Path, reason: str) -> None:
        """Note that a run is over: `reason` is empty, "done before", or why it failed."""
        ...


def run(folder: RunDir, grid: SweepGrid, watch: Watch, *, offline: bool = False) -> list[Point]:
    """Do the unfinished runs of a sweep, one at a time; return those that failed.

    A run that fails is noted and the sweep continues.  What would stop the next one as well (a full disk,
    Ctrl-C) stops the sweep.
    """
    before = [done(folder.path, point, watch.note) for point in grid.points]
    failed = []
    folder.status("running")
    try:
        for point, had in zip(grid.points, before, strict=True):
            reason = "done before" if had else _one(folder, grid, point, watch.begin, offline)
            failed += [point] if reason and not had else []
            watch.end(point, folder.path / point.name, reason)
            if not had:
                write_page(folder.path, grid)
    except BaseException as error:
        folder.status(
            "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else f"failed: {error}"
        )
        raise
    write_page(folder.path, grid)
    folder.status(f"failed: {counted(len(failed), 'run')}" if failed else "done")
    return failed


def _other_base(folder: Path, grid: SweepGrid, point: Point, digest: str) -> UsageError | None:
    """Return the error that names the runs of the same model that stand on another base than `digest`; None without any."""

    def base(r: Recipe) -> tuple[object, ...]:
        return (
            r.model,
            r.dtype,
            r.labels,
            r.data,
            r.eval_data,
            r.limit,
        )  # a new head is as wide as the label words

    same = [p.name for p in grid.points if base(p.recipe) == base(point.recipe)]
    stated = {name: foundations.stated_by(folder / name) for name in same}
    other = [name for name, on in stated.items() if on is not None and on.base != digest]
    return _on_other(folder, other, f"another base than {point.recipe.model} is now") if other else None


def _one(
    folder: RunDir, grid: SweepGrid, point: Point, begin: Callable[[Point], Listener], offline: bool
) -> str:
    """Do one run; return why it failed, or nothing.  UsageError when the runs before it had another base."""
    listener = begin(point)
    try:
        with rundir.at(folder.path / point.name) as run:
            job = prepare.prepare(point.recipe, offline=offline, measure=False)
            if (other := _other_base(folder.path, grid, point, job.model.digest)) is None:
                jobs.tune(job, run, listener)
    except (StorageError, Interrupted):
        raise
    except FAULTS as error:
        reason = error.message if isinstance(error, FleetuneError) else fault(error)
        folder.log(f"{point.name} failed: {reason}")
        return reason
    if other is not None:
        raise other
    return ""
