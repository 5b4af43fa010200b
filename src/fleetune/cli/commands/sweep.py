# SPDX-License-Identifier: Apache-2.0
"""`fleetune sweep`: tune over a grid of values and seeds, on one page."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.cli import recipe_flags
from fleetune.cli.console import Ui
from fleetune.cli.interrupt import InterruptHandler
from fleetune.cli.progress import CountBar
from fleetune.common.display import changes, counted, human_time
from fleetune.common.shell import quoted
from fleetune.errors import Interrupted, UsageError
from fleetune.runs import rundir
from fleetune.runs.events import (
    Event,
    Recorded,
    RoundDone,
    SweepPlanned,
    TuneDone,
)

if TYPE_CHECKING:
    from fleetune.tuning.sweep_grid import Point, SweepGrid


HELP = "tune over a grid of values and seeds, on one page"
ORDER = 40
EXAMPLES = """\
fleetune sweep recipe.toml --vary K=64,512 --seeds 3
fleetune sweep recipe.toml --vary method=fedit,fedkseed --dry-run
fleetune sweep --resume latest
"""


class SweepScreen:
    """Show a sweep on the console: one line per run, one bar over all rounds; Ctrl-C stops between two steps."""

    def __init__(self, ui: Ui, bar: CountBar, interrupt: InterruptHandler, resume: str, runs: int) -> None:
        self.ui, self.bar, self.interrupt, self.resume, self.runs = ui, bar, interrupt, resume, runs
        self.number = self.rounds = 0  # runs that are over, and their rounds
        self.name = self.words = ""
        self.began = 0.0

    def begin(self, point: Point) -> SweepScreen:
        """Begin a run; return this screen, which is the run's listener too."""
        self.name, self.words, self.began = point.name, point.words, time.monotonic()
        self.bar.update(self.rounds, note=self.words)
        self._stop()
        return self

    def end(self, point: Point, path: Path, reason: str) -> None:
        """Print the line of a run that is over."""
        from fleetune.tuning import sweep as sweeps

        self.number += 1
        self.rounds += point.recipe.rounds
        self.bar.update(self.rounds)
        over = sweeps.ended(point, path, reason)
        self.ui.event(over)
        time_taken = human_time(time.monotonic() - self.began)
        words = [point.words, *changes(over.base, over.tuned), "done before" if over.skipped else time_taken]
        if over.failed:
            words = [point.words, f"failed: {reason}"]
        self.ui.note(f"{self.number:{len(str(self.runs))}}/{self.runs}  " + "  ".join(words))

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Do nothing: the sweep has a header of its own."""

    def note(self, text: str) -> None:
        """Show a remark on the current run."""
        self.ui.note(f"{self.words}: {text}" if self.words else text)

    def event(self, event: Event) -> None:
        """Report an event of the current run with its folder's name; `end` reports its end."""
        if isinstance(event, Recorded):
            self.ui.event(dataclasses.replace(event, run=self.name))
        if isinstance(event, RoundDone):
            self.bar.update(self.rounds + event.round, note=self.words)
        if isinstance(event, TuneDone) and event.moved is False:
            self.note(event.remarks[-1])

    def step(self, client: int, step: int) -> None:
        """Stop here if Ctrl-C was pressed."""
        self._stop()

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Do nothing: a sweep counts rounds."""

    @property
    def stop_requested(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self.interrupt.requested

    def _stop(self) -> None:
        if self.stop_requested:
            said = f"stopped in run {self.number + 1} of {self.runs}; nothing that was finished is lost"
            raise Interrupted(said, hint=self.resume)


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a TOML recipe; a table [sweep] says what varies"
    )
    sub.add_argument(
        "--vary", action="append", default=[], metavar="NAME=V1,V2,..",
        help="alpha (of the Dirichlet partition), an option, or a setting of the method (K, set.K); repeat",
    )  # fmt: skip
    sub.add_argument(
        "--seeds", type=int, help="seeds of every combination, from the recipe's own on (default 1)"
    )
    sub.add_argument(
        "--resume", metavar="SWEEP", help="continue a stopped sweep (a path, a number, or latest)"
    )
    sub.add_argument("--dry-run", action="store_true", help="check all runs and list them, then stop")
    recipe_flags.add(sub)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Begin a sweep or resume one."""
    from fleetune.api.sweeping import with_files
    from fleetune.tuning import sweep as sweeps
    from fleetune.tuning import sweep_grid

    out = Path(args.out)
    if args.resume:
        path = sweeps.find(args.resume, out)
        if args.recipe or args.vary or args.set or args.seeds or recipe_flags.given(args):
            raise UsageError(
                "--resume follows the sweep's own recipe; it takes no other option",
                hint=f"fleetune sweep --resume {quoted(path)}",
            )
        grid = sweeps.read(path)
    else:
        if not args.recipe:
            raise UsageError(
                "a sweep needs a RECIPE", hint="fleetune sweep recipe.toml --vary K=64,512 --seeds 3"
            )
        grid = sweep_grid.make(
            _with_method(recipe_flags.keys(args, args.recipe), args, ui), args.vary, args.seeds
        )
        for model, train in {(point.recipe.model, point.recipe.train) for point in grid.points}:
            recipe_flags.check_model(model, args.out, train)
    sweeps.check(grid, folder=path if args.resume else None, offline=args.offline)
    if args.dry_run:
        _plan(grid, ui)
        return
    rundir.check_writable(path if args.resume else out)
    grid = with_files(grid, out, ui.note)
    with rundir.RunDir(path) if args.resume else sweeps.create(out, Path(args.recipe).stem, grid) as folder:
        _start(grid, folder, args, ui)


def _with_method(values: dict[str, Any], args: argparse.Namespace, ui: Ui) -> dict[str, Any]:
    """Return the keys of a sweep's recipe with a method, unless the method is what varies."""
    from fleetune.api import plain_models
    from fleetune.planning import choose

    varied = [text.partition("=")[0].strip() for text in args.vary]
    configured = functools.partial(plain_models.with_artefact, out=Path(args.out))
    return choose.settled_sweep(values, varied, ui.note, configured=configured, offline=args.offline)


def _plan(grid: SweepGrid, ui: Ui) -> None:
    for point in grid.points:
        ui.event(SweepPlanned(name=point.name, values=list(point.values), seed=point.seed))
    if not ui.json:
        ui.table(["run", "values"], [[p.name, p.words] for p in grid.points])
    ui.note(f"the sweep is good: {counted(len(grid.points), 'run')}")


def _start(grid: SweepGrid, folder: rundir.RunDir, args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.tuning import sweep as sweeps

    path = folder.path
    ui.header(*sweeps.header(grid, path))
    ui.event(sweeps.started(grid, path))
    rounds = sum(p.recipe.rounds for p in grid.points)
    with ui.count("rounds", rounds) as bar, InterruptHandler(ui) as interrupt:
        screen = SweepScreen(ui, bar, interrupt, sweeps.resume_command(path), len(grid.points))
        failed = sweeps.run(folder, grid, screen, offline=args.offline)
    _results(grid, path, ui)
    sweeps.raise_failed(grid, path, failed)


def _results(grid: SweepGrid, path: Path, ui: Ui) -> None:
    from fleetune.tuning import sweep as sweeps

    done, table = sweeps.finished(grid, path)
    ui.event(done)
    if not ui.json:
        ui.table(
            table.head, table.rows, align="l" * len(grid.axes) + "r" * (len(table.head) - len(grid.axes))
        )
        if table.effects:
            ui.table(table.effects_head, table.effects, align="llrrrr")
    for caveat in table.caveats:
        ui.note(caveat)
    ui.paths(
        [
            ("report", done.page),
            ("figures", str(path / "figures")),
            ("next", f"fleetune runs --out {quoted(path)}"),
        ]
    )
