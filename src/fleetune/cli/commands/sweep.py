"""`fleetune sweep`: tune over a grid of values and seeds, on one page."""

import argparse
from contextlib import ExitStack
from pathlib import Path

from fleetune.api import tuning
from fleetune.cli import flags
from fleetune.cli.console import ConsoleListener, Ui
from fleetune.cli.parser import Parser
from fleetune.common.display import counted, quoted
from fleetune.common.events import Event, SweepDone, SweepPlanned, SweepRun, SweepStart
from fleetune.errors import Interrupted, UsageError
from fleetune.report import sweep as summary
from fleetune.runs.listener import run_words

HELP = "tune over a grid of values and seeds, on one page"
ORDER = 40
EXAMPLES = """\
fleetune sweep recipe.toml --vary K=64,512 --seeds 3
fleetune sweep recipe.toml --vary method=fedit,fedkseed --dry-run
fleetune sweep --resume latest
"""


class SweepScreen(ConsoleListener):
    """Show a sweep on the console: one line per run, one bar over all rounds, the table; Ctrl-C stops between two steps."""

    runs = over = 0

    def event(self, event: Event) -> None:
        """Print the event in JSON mode; show the end of a run and of the sweep."""
        super().event(event)
        if isinstance(event, SweepStart):
            self.runs = event.runs
        elif isinstance(event, SweepRun):
            self.over += 1
            self.ui.note(f"{self.over:{len(str(self.runs))}}/{self.runs}  {run_words(event)}")
        elif isinstance(event, SweepDone):
            self.bars.close()
            _results(event, self.ui)

    def step(self, client: int, step: int) -> None:
        """Stop here if Ctrl-C was pressed."""
        if self.stop_requested:
            raise Interrupted("stopped between two steps")


def arguments(sub: Parser) -> None:
    """Add the command's arguments."""
    sub.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a TOML recipe; a table [sweep] says what varies"
    )
    sub.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME=V1,V2,..",
        help="alpha (of the Dirichlet partition), an option, or a setting of the method (K, set.K); repeatable",
    )
    sub.add_argument(
        "--seeds", type=int, help="seeds of every combination, from the recipe's own on (default 1)"
    )
    sub.add_argument(
        "--resume", metavar="SWEEP", help="continue a stopped sweep (a path, a number, or latest)"
    )
    sub.add_argument("--dry-run", action="store_true", help="check all runs and list them, then stop")
    flags.add(sub)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Begin a sweep or resume one."""
    from fleetune.planning import choose
    from fleetune.tuning import sweep as sweeps

    out = Path(args.out)
    resumed = sweeps.find(args.resume, out) if args.resume else None
    if resumed:
        if args.recipe or args.vary or args.set or args.seeds or flags.given(args):
            raise UsageError(
                "--resume follows the sweep's own recipe; it takes no other option",
                hint=sweeps.resume_command(resumed),
            )
        grid = sweeps.read(resumed)
    else:
        if not args.recipe:
            raise UsageError(
                "a sweep needs a RECIPE", hint="fleetune sweep recipe.toml --vary K=64,512 --seeds 3"
            )
        varied = [text.partition("=")[0].strip() for text in args.vary]
        values = flags.keys(args, args.recipe, ui.note)
        values = choose.settled_sweep(values, varied, ui.note, offline=args.offline)
        grid = sweeps.make_grid(values, args.vary, args.seeds)
        for model in {point.recipe.model for point in grid.points}:
            tuning.check_plain(model, out, "weights")
    sweeps.check(grid, offline=args.offline)
    if args.dry_run:
        for point in grid.points:
            ui.event(SweepPlanned(name=point.name, values=list(point.values), seed=point.seed))
        ui.table(["run", "values"], [[p.name, p.words] for p in grid.points])
        ui.note(f"the sweep is good: {counted(len(grid.points), 'run')}")
        return
    with ExitStack() as stack:
        screen = SweepScreen(ui, stack, resumes=True)
        name = Path(args.recipe or "").stem
        sweeps.start(grid, out, screen, name=name, resumed=resumed, offline=args.offline)


def _results(done: SweepDone, ui: Ui) -> None:
    head, rows = summary.table(done.cells)
    if rows and not ui.json:
        varied = len(done.cells[0]["values"])
        ui.table(head, rows, align="l" * varied + "r" * (len(head) - varied))
    next_ = f"fleetune runs --out {quoted(done.path)}"
    ui.paths([("report", done.page), ("numbers", done.table), ("next", next_)])
