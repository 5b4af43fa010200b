"""Run a grid of recipes in one folder: check its runs, and run or resume them in turn.

runs/0007-sweep-case-study/
  sweep.toml      the recipe, and the table [sweep]: what varies, over which values, and how many seeds
  0001-alpha-0.5-k-64-seed-42/ ...     run folders as `tune` leaves them
  sweep.html      sweep.csv            the page and the numbers of all runs, written anew after every run
  status          log.txt
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fleetune import errors
from fleetune.common.display import quoted
from fleetune.common.events import Event, Recorded, RoundDone, SweepDone, SweepRun, SweepStart, TuneDone
from fleetune.common.files import resumable, write_atomic
from fleetune.common.settings import AUTO, Value
from fleetune.report import runlog
from fleetune.report import sweep as summary
from fleetune.report.page import framed
from fleetune.runs import rundir
from fleetune.runs.listener import Listener, Relay
from fleetune.tuning import methods
from fleetune.tuning.prepare import prepare, rates
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.result import finished, foundations
from fleetune.tuning.run import resume
from fleetune.tuning.run import run as jobs

SHOWN: Final = 8  # problems shown at once
MANY: Final = 10_000  # runs


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep: the values that vary, in the order of the axes, and all else that decides it."""

    values: tuple[Value, ...]
    seed: int
    recipe: recipes.Recipe
    name: str  # of its folder
    words: str  # "alpha 0.5 · K 64 · seed 42"


@dataclasses.dataclass(frozen=True)
class SweepGrid:
    """A checked sweep."""

    base: recipes.Recipe
    axes: tuple[summary.SweepAxis, ...]
    seeds: int
    points: tuple[Point, ...]


def make_grid(values: Mapping[str, Any], vary: Sequence[str] = (), seeds: int | None = None) -> SweepGrid:
    """Return the grid of a recipe's keys with its table [sweep]; `vary` (NAME=V1,V2,..) and `seeds` override that table.

    RecipeError lists every problem: unknown names, values of a wrong type, combinations a method refuses.
    """
    base = recipes.make({k: v for k, v in values.items() if k != "sweep"})
    table = values.get("sweep", {})
    if not isinstance(table, dict):
        raise errors.RecipeError(
            ["sweep is not a table"], hint="write [sweep], then a line such as K = [64, 512]"
        )
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
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def _guess(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)


def _axes(
    base: recipes.Recipe, wanted: Mapping[str, Any], problems: list[str]
) -> tuple[summary.SweepAxis, ...]:
    """Return what varies; an unknown method among its values is found when the runs are checked."""
    tried, entries = wanted.get("method", [base.method]), methods.entries()
    named = [
        m for m in (tried if isinstance(tried, list) else [tried]) if isinstance(m, str) and m in entries
    ]
    options = [n for n in recipes.fields() if n not in ("set", "seed")]
    known = ["alpha", *options, *dict.fromkeys(f"set.{s.name}" for m in named for s in methods.settings(m))]
    axes: dict[str, summary.SweepAxis] = {}
    for name, values in wanted.items():
        key = name if name in known else f"set.{name}"
        if name == "seed":
            problems.append("seed varies by seeds: --seeds N, or seeds = N in [sweep]")
        elif key not in known:
            guess = errors.suggest(
                name.removeprefix("set."), [k.removeprefix("set.") for k in known], cutoff=0.5
            )
            problems.append(f"nothing called '{name}' can vary.{guess}")
        elif not isinstance(values, list) or not values:
            problems.append(f"{name} = {values!r} is not a list of values")
        elif odd := [v for v in values if not isinstance(v, str | int | float)]:
            problems.append(f"{name}: {odd[0]!r} is not a value")
        elif key in axes or len(set(values)) < len(values):
            problems.append(f"{name} varies twice, or has a value twice")
        else:
            axes[key] = summary.SweepAxis(name, key, tuple(values))
    if "alpha" in axes and ("partition" in axes or base.partition.split(":")[0] != "dirichlet"):
        problems.append(
            f"alpha varies the Dirichlet partition: leave partition = {base.partition!r} out, or set it to "
            "dirichlet:0.5:COLUMN; the method's own alpha is set.alpha"
        )
    return tuple(axes.values())


def _points(base: recipes.Recipe, axes: Sequence[summary.SweepAxis], seeds: int) -> tuple[Point, ...]:
    combinations = list(itertools.product(*(a.values for a in axes)))
    if len(combinations) * seeds > MANY:
        raise errors.RecipeError([f"{len(combinations) * seeds:,} runs are more than {MANY:,}"])
    points: list[Point] = []
    problems: list[str] = []
    plain = dataclasses.asdict(base)
    for seed, values in itertools.product(range(base.seed, base.seed + seeds), combinations):
        named = [*zip((a.name for a in axes), values, strict=True), ("seed", seed)]
        words = " · ".join(f"{name} {shown(value)}" for name, value in named)
        parts = "-".join(rundir.slug(f"{name}-{shown(value)}") for name, value in named)
        try:
            recipe = recipes.make(_changed(plain, axes, values) | {"seed": seed})
        except errors.RecipeError as error:
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


def _changed(
    plain: Mapping[str, Any], axes: Sequence[summary.SweepAxis], values: Sequence[Value]
) -> dict[str, Any]:
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


def searched(r: recipes.Recipe) -> recipes.Recipe:
    """Return a run's recipe with every open learning rate to be searched, however short the run is; else as it is."""
    asked = dataclasses.replace(r, set={**r.set, **dict.fromkeys(rates.wanted(r), AUTO)})
    return r if rates.problems(asked, methods.make(r.method, asked.set)) else asked


def _rates(grid: SweepGrid) -> str:
    """Say which learning rates are searched, given, and the method's own."""
    told: dict[str, dict[str, None]] = {}
    for r in (searched(point.recipe) for point in grid.points):
        for s in methods.settings(r.method):
            if s.found or (s.auto and s.name in r.set):
                value = r.set.get(s.name)
                how = "searched" if value == AUTO else "as published" if value is None else "given"
                told.setdefault(f"{s.name} {how}", {})[r.method] = None
    return "; ".join(f"{how} ({', '.join(names)})" for how, names in told.items())


def raise_together(problems: Sequence[str]) -> None:
    """Raise RecipeError with these problems, each once, if there are any."""
    different = list(dict.fromkeys(problems))
    if different:
        more = [f"and {len(different) - SHOWN} more problems"] if len(different) > SHOWN else []
        hint = "options: fleetune sweep --help; settings: fleetune methods NAME"
        raise errors.RecipeError(different[:SHOWN] + more, hint=hint)


FILE: Final = "sweep.toml"
PAGE: Final = "sweep.html"
TABLE: Final = "sweep.csv"


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its folder, and its runs in the order of the grid."""

    folder: Path
    runs: tuple[finished.TuneResult, ...]
    # combinations: values, runs, lr, base, tuned (mean and spread), bytes, seconds
    cells: Sequence[Mapping[str, Any]]

    @property
    def page(self) -> Path:
        """The page of all runs together."""
        return self.folder / PAGE

    @property
    def table(self) -> Path:
        """The CSV with a row a run."""
        return self.folder / TABLE

    def _repr_html_(self) -> str:
        return framed(self.page.read_text("utf-8"))


def check(grid: SweepGrid, *, offline: bool = False) -> None:
    """Check everything about the runs that needs no model: methods with their settings, and the data's split.

    RecipeError lists what methods refuse, DataError is of the first split that cannot be.
    """
    problems: list[str] = []
    for point in grid.points:
        try:
            prepare.check(point.recipe)
        except errors.RecipeError as error:
            problems += error.problems
        except errors.UsageError as error:
            problems.append(error.message)
    raise_together(problems)
    for point in {_of_data(point.recipe): point for point in reversed(grid.points)}.values():
        try:
            prepare.split(point.recipe, methods.entry(point.recipe.method), offline=offline)
        except errors.UsageError as error:
            error.message = f"{point.words}: {error.message}"
            raise


def _of_data(r: recipes.Recipe) -> tuple[object, ...]:
    clients = r.clients or methods.entry(r.method).clients
    return r.data, r.columns, r.eval_data, r.limit, r.partition, r.held_out, r.seed, clients


# The folder ---------------------------------------------------------------------------------------


def to_toml(grid: SweepGrid) -> str:
    """Write the grid as the text of `sweep.toml`; `read` is the inverse."""
    recipe = recipes.to_toml(grid.base).split("\n", 1)[1]
    table = {recipes.toml_key(a.name): ", ".join(map(recipes.toml_value, a.values)) for a in grid.axes}
    lines = [f"seeds = {grid.seeds}", *(f"{name} = [{values}]" for name, values in table.items())]
    head = f"# The recipe of a sweep. Run it again: fleetune sweep {FILE}\n"
    return head + recipe + "\n[sweep]\n" + "\n".join(lines) + "\n"


def create(out: Path, name: str, grid: SweepGrid) -> rundir.RunDir:
    """Create a new, numbered folder under `out` with the grid in it."""
    folder = rundir.RunDir(rundir.numbered(out, f"sweep-{rundir.slug(name) or 'grid'}"))
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
        raise errors.UsageError(f"no sweep '{name}' in {out}", hint="a sweep's folder has a file sweep.toml")
    return matches[0]


def read(folder: Path) -> SweepGrid:
    """Read the grid of a sweep's folder; RecipeError when its sweep.toml is damaged."""
    values = recipes.read(folder / FILE)
    try:
        return make_grid(values)
    except errors.RecipeError as error:
        raise errors.RecipeError(
            [f"{folder / FILE} is no sweep's", *error.problems], hint=error.hint
        ) from None


def done(folder: Path, point: Point, note: Callable[[str], None]) -> bool:
    """Tell whether a run is finished.

    UsageError when its folder holds another run than the sweep now states, RecipeError when its recipe is damaged.
    """
    path = folder / point.name
    if not (path / "run.toml").is_file():
        return False
    try:
        have = foundations.stated_recipe(path)
    except errors.RecipeError as error:
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
        raise errors.UsageError(
            f"{path} was made by another recipe than {folder / FILE} states now",
            hint=f"put {FILE} back as it was, or begin a new sweep with the changed one",
        )
    return resume.is_done(path, note)


def write_results(folder: Path, grid: SweepGrid) -> tuple[SweepDone, list[str]]:
    """Write the page and the CSV from the runs there are; return the sweep's last event, and why losses do not compare."""
    members = [
        summary.GridRun(p.values, p.seed, runlog.read(folder / p.name))
        for p in grid.points
        if (folder / p.name / "run.toml").is_file()
    ]
    page = summary.html(folder.name, header(grid, folder), grid.axes, members, len(grid.points))
    write_atomic(folder / PAGE, page.encode("utf-8", "replace"))
    write_atomic(folder / TABLE, summary.csv(grid.axes, members).encode("utf-8", "replace"))
    cells = summary.combinations(grid.axes, members)
    ended = SweepDone(path=str(folder), page=str(folder / PAGE), table=str(folder / TABLE), cells=cells)
    return ended, summary.apart(members)


def header(grid: SweepGrid, path: Path) -> tuple[str, list[tuple[str, str]]]:
    """Return the title and the rows of a sweep's header."""
    base = grid.base
    rows = [("model", base.model), ("data", f"{Path(base.data).name} · {base.partition}")]
    rows += [(axis.name, ", ".join(map(shown, axis.values))) for axis in grid.axes]
    seeds = f"{base.seed} to {base.seed + grid.seeds - 1}" if grid.seeds > 1 else str(base.seed)
    rows += [("rates", _rates(grid)), ("seeds", seeds), ("runs", f"{len(grid.points)} · in {path}")]
    return f"fleetune sweep · {', '.join(dict.fromkeys(p.recipe.method for p in grid.points))}", rows


# The runs -----------------------------------------------------------------------------------------


class _OfRun(Relay):
    """The listener of one run of a sweep: its rounds move the sweep's count, its remarks begin with its values."""

    def __init__(self, inner: Listener, point: Point, rounds: int, total: int) -> None:
        super().__init__(inner)
        self.point, self.rounds, self.total = point, rounds, total  # rounds of the runs before, of all runs

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Do nothing: the sweep has a header of its own."""

    def event(self, event: Event) -> None:
        """Pass it on with the run's name."""
        super().event(
            dataclasses.replace(event, run=self.point.name) if isinstance(event, Recorded) else event
        )
        if isinstance(event, RoundDone):
            self.inner.progress("rounds", self.rounds + event.round, self.total, self.point.words)
        if isinstance(event, TuneDone) and event.moved is False:
            self.note(event.remarks[-1])

    def note(self, text: str) -> None:
        """Pass it on with the run's values."""
        super().note(f"{self.point.words}: {text}")

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Pass on the search for a rate; else a sweep counts rounds."""
        if what.startswith("finding "):
            super().progress(what, done, total, text)


def start(
    grid: SweepGrid,
    out: Path,
    listener: Listener,
    *,
    name: str = "",
    resumed: Path | None = None,
    offline: bool,
) -> SweepResult:
    """Do the unfinished runs of a checked grid, one at a time, and return all of them.

    They are in a new folder under `out` whose name contains `name`, or in the folder of a `resumed` sweep.  A run that fails
    is noted and the sweep continues; after the last run, FleetuneError names those that failed.  A cause that would stop the
    next run as well (a full disk, Ctrl-C) stops the sweep.
    """
    rundir.check_writable(resumed or out)
    with rundir.RunDir(resumed) if resumed else create(out, name, grid) as folder:
        return _runs(folder, grid, listener, offline=offline)


def _runs(folder: rundir.RunDir, grid: SweepGrid, listener: Listener, *, offline: bool) -> SweepResult:
    path, again = folder.path, resume_command(folder.path)
    before = [done(path, point, listener.note) for point in grid.points]
    listener.header(*header(grid, path))
    axes = {a.name: list(a.values) for a in grid.axes}
    listener.event(SweepStart(path=str(path), runs=len(grid.points), seeds=grid.seeds, axes=axes))
    folder.status("running")
    failed: list[str] = []
    over, rounds, total = 0, 0, sum(point.recipe.rounds for point in grid.points)
    try:
        with resumable(again):
            for point, had in zip(grid.points, before, strict=True):
                listener.progress("rounds", rounds, total, point.words)
                if listener.stop_requested and not had:
                    raise errors.Interrupted("stopped between two runs")
                reason = "" if had else _one(folder, point, _OfRun(listener, point, rounds, total), offline)
                failed += [point.name] if reason else []
                over, rounds = over + 1, rounds + point.recipe.rounds
                base, tuned = runlog.measures(runlog.read(path / point.name))
                listener.event(
                    SweepRun(
                        run=str(path / point.name),
                        values=list(point.values),
                        seed=point.seed,
                        skipped=had,
                        failed=reason,
                        base=base,
                        tuned=tuned,
                    )
                )
                if not had:
                    write_results(path, grid)
            ended, caveats = write_results(path, grid)
    except BaseException as error:
        stopped = isinstance(error, errors.Interrupted | KeyboardInterrupt)
        if isinstance(error, errors.Interrupted):
            error.message = (
                f"stopped in run {over + 1} of {len(grid.points)}; nothing that was finished is lost"
            )
            error.hint = again
        elif stopped:
            error.add_note(again)
        folder.status("interrupted" if stopped else f"failed: {error}")
        raise
    listener.event(ended)
    for caveat in caveats:
        listener.note(caveat)
    if failed:
        what = f"{len(failed)} of {len(grid.points)} runs failed: {', '.join(failed[:3])}"
        folder.status(f"failed: {what}")
        raise errors.FleetuneError(what, hint=again)
    folder.status("done")
    return SweepResult(path.absolute(), tuple(finished.read(path / p.name) for p in grid.points), ended.cells)


def _one(folder: rundir.RunDir, point: Point, listener: Listener, offline: bool) -> str:
    try:
        with rundir.at(folder.path / point.name) as run:
            recipe, told = searched(point.recipe), listener.progress
            job = prepare.prepare(recipe, offline=offline, measure=False, progress=told)
            jobs.tune(job, run, listener)
    except (errors.StorageError, errors.Interrupted):
        raise
    except errors.FAULTS as error:
        reason = error.message if isinstance(error, errors.FleetuneError) else errors.fault(error)
        folder.log(f"{point.name} failed: {reason}")
        return reason
    return ""


def resume_command(path: Path) -> str:
    """Return the command that goes on with a sweep."""
    return f"fleetune sweep --resume {quoted(path)}"
