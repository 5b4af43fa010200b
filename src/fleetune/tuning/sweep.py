# SPDX-License-Identifier: Apache-2.0
"""Run a grid of recipes in one folder: check its runs, and run or resume them in turn.

    runs/0007-sweep-case-study/
      sweep.toml      the recipe, and the table [sweep]: what varies, over which values, and how many seeds
      0001-alpha-0.5-k-64-seed-42/ ...      run folders as `tune` leaves them
      sweep.html      figures/*.svg         all runs together, written anew after every run
      status          log.txt

The folder is the record: a run whose status is `done` is not run again, an unfinished one resumes from its
last checkpoint, so a sweep can be killed at any time and resumed.  What varies is in `sweep_grid.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from fleetune.common.display import counted
from fleetune.common.files import storage_error, write_atomic
from fleetune.common.settings import AUTO
from fleetune.common.shell import quoted
from fleetune.errors import (
    FAULTS,
    FleetuneError,
    Interrupted,
    RecipeError,
    StorageError,
    UsageError,
    fault,
)
from fleetune.runs import folder_names, report, rundir
from fleetune.runs.events import SweepDone, SweepRun, SweepStart
from fleetune.runs.listener import Listener
from fleetune.runs.report.cells import GridRun
from fleetune.runs.report.grid import Tables
from fleetune.runs.rundir import RunDir
from fleetune.tuning import foundations, methods, prepare, sweep_grid
from fleetune.tuning import recipe as recipes
from fleetune.tuning import run as jobs
from fleetune.tuning.recipe import Recipe
from fleetune.tuning.sweep_grid import SHOWN, Point, SweepGrid, raise_together, shown

DONE_BEFORE = "done before"  # why a run is over that was finished by an earlier sitting
FILE = "sweep.toml"
PAGE = "sweep.html"


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
    raise_together(problems)
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
    """Write the grid as the text of `sweep.toml`; `read` is the inverse."""
    recipe = recipes.to_toml(grid.base).split("\n", 1)[1]
    table = {recipes.toml_key(a.name): ", ".join(map(recipes.toml_value, a.values)) for a in grid.axes}
    lines = [f"seeds = {grid.seeds}", *(f"{name} = [{values}]" for name, values in table.items())]
    text = recipe + "\n[sweep]\n" + "\n".join(lines) + "\n"
    return f"# The recipe of a sweep. Run it again: fleetune sweep {FILE}\n{text}"


def create(out: Path, name: str, grid: SweepGrid) -> RunDir:
    """Create a new, numbered folder under `out` with the grid in it."""
    folder = RunDir(rundir.numbered(out, f"sweep-{folder_names.slug(name) or 'grid'}"))
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
    values = recipes.read(folder / FILE)
    try:
        return sweep_grid.make(values)
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
    # what the sweep leaves open a run has written out: the labels of an encoder, a learning rate that it found
    stated = {name: value for name, value in point.recipe.set.items() if value != AUTO}
    now = dataclasses.replace(
        point.recipe, set={**have.set, **stated}, labels=point.recipe.labels or have.labels
    )
    if not foundations.same(have, now):
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
        """Note that a run is over: `reason` is empty, `DONE_BEFORE`, or why it failed."""
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
            reason = DONE_BEFORE if had else _one(folder, grid, point, watch.begin, offline)
            failed += [point] if reason and not had else []
            watch.end(point, folder.path / point.name, reason)
            if not had:
                write_page(folder.path, grid)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            error.add_note(resume_command(folder.path))
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


# What is said of it -------------------------------------------------------------------------------


def header(grid: SweepGrid, path: Path) -> tuple[str, list[tuple[str, str]]]:
    """Return the title and the rows of a sweep's header."""
    base = grid.base
    rows = [("model", base.model), ("data", f"{Path(base.data).name} · {base.partition}")]
    rows += [(axis.name, ", ".join(map(shown, axis.values))) for axis in grid.axes]
    seeds = f"{base.seed} to {base.seed + grid.seeds - 1}" if grid.seeds > 1 else str(base.seed)
    rows += [("seeds", seeds), ("runs", f"{len(grid.points)} · in {path}")]
    return f"fleetune sweep · {base.method}", rows


def started(grid: SweepGrid, path: Path) -> SweepStart:
    """Return the first event of a sweep."""
    axes = {a.name: list(a.values) for a in grid.axes}
    return SweepStart(path=str(path), runs=len(grid.points), seeds=grid.seeds, axes=axes)


def ended(point: Point, path: Path, reason: str) -> SweepRun:
    """Return the event of a run that is over (`Watch.end`)."""
    base, tuned = report.measures(report.read(path))
    had = reason == DONE_BEFORE
    return SweepRun(
        run=str(path), values=list(point.values), seed=point.seed, skipped=had,
        failed="" if had else reason, base=base, tuned=tuned,
    )  # fmt: skip


def finished(grid: SweepGrid, path: Path) -> tuple[SweepDone, Tables]:
    """Return the last event of a sweep, and its results as text."""
    table = report.grid_tables(grid.axes, members(path, grid))
    figures = sorted(str(p) for p in (path / "figures").glob("*.svg"))
    return SweepDone(path=str(path), page=str(path / PAGE), figures=figures, **table.record), table


def raise_failed(grid: SweepGrid, path: Path, failed: Sequence[Point]) -> None:
    """FleetuneError when runs of a sweep have failed."""
    if failed:
        names = ", ".join(p.name for p in failed[:3])
        raise FleetuneError(
            f"{len(failed)} of {len(grid.points)} runs failed: {names}", hint=resume_command(path)
        )


def resume_command(path: Path) -> str:
    """Return the command that goes on with a sweep."""
    return f"fleetune sweep --resume {quoted(path)}"
