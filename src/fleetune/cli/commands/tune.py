"""`fleetune tune`: fine-tune a model over a simulated fleet, or resume a stopped run."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fleetune
from fleetune.api import tuning
from fleetune.cli import flags
from fleetune.cli.console import Bar, InterruptHandler, Ui
from fleetune.cli.parser import Parser
from fleetune.common.display import counted, human_bytes, human_time, quoted, show
from fleetune.common.events import ClientReply, Event, RoundDone, RoundEvaluated, TuneChecked
from fleetune.errors import Interrupted, RecipeError, UsageError
from fleetune.report import runlog
from fleetune.runs import rundir, trackers
from fleetune.tuning.recipe import recipe as recipes

if TYPE_CHECKING:
    from fleetune.tuning.result.finished import TuneResult

HELP = "fine-tune a model over a simulated fleet"
ORDER = 30
EXAMPLES = """\
fleetune tune smollm2-135m demo --method fedit --rounds 3
fleetune tune smollm2-135m data.jsonl --method fedkseed --clients 20 --set K=4096 --set lr=1e-6
fleetune tune smollm2-135m data.jsonl --partition dirichlet:0.5:category --dry-run
fleetune tune -c runs/0001-fedit-smollm2-135m/run.toml     the same run again
fleetune tune --resume latest                              continue after a stop
fleetune tune --resume latest --rounds 40                  give it more rounds: 40 in all
"""


def arguments(sub: Parser) -> None:
    """Add the command's arguments."""
    sub.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="hub id, HF directory, GGUF file or built-in name; with --train scales also a compressed model",
    )
    sub.add_argument("data", metavar="DATA", nargs="?", help="file of rows, hub id, or 'demo'")
    sub.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="a TOML recipe, recipe:NAME, or the YAML of axolotl, LLaMA-Factory or mlx-lm; flags override it",
    )
    sub.add_argument(
        "--resume",
        metavar="RUN",
        help="continue a stopped run (a path, a number, or latest); with --rounds N, also a finished one, up to N rounds; "
        "--base says where the base's weights are from now on",
    )
    sub.add_argument("--dry-run", action="store_true", help="check recipe, data and model, then stop")
    sub.add_argument(
        "--tracker",
        action="append",
        default=[],
        metavar="NAME",
        help=f"also log every round to {' or '.join(trackers.TRACKERS)} (repeatable)",
    )
    flags.add(sub)


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Tune, resume or check."""
    if args.resume:
        path = rundir.find(args.resume, Path(args.out))
        flags.check_resume(args, path, "fleetune tune --resume", ("rounds", "base"))
        from fleetune.tuning.run import resume

        given: dict[str, Any] = flags.given(args)
        rounds = resume.rounds_number(given["rounds"]) if "rounds" in given else 0
        if args.dry_run:
            raise UsageError("--dry-run is for a new run", hint=f"fleetune tune --resume {quoted(path)}")
        with screen(ui, path) as shown:
            result = fleetune.resume_run(
                path, rounds=rounds, base=given.get("base"), listener=shown, **flags.options(args, "tracker")
            )
            finish(ui, result, resumed=True)
        return
    recipe = recipe_of(args, ui.note)
    if args.dry_run:
        _check_only(recipe, args, ui)
    else:
        run_recipe(recipe, args, ui)


def run_recipe(recipe: recipes.Recipe, args: argparse.Namespace, ui: Ui) -> TuneResult:
    """Tune as a recipe says in a new folder, and print the final table."""
    with screen(ui) as shown:
        result = fleetune.tune(
            recipe, out=args.out, offline=args.offline, listener=shown, tracker=getattr(args, "tracker", ())
        )
    finish(ui, result)
    return result


def finish(ui: Ui, result: TuneResult, *, resumed: bool = False, then: str = "") -> None:
    """Print the final table, where things are, and what to do `then`; of a `resumed` run what its time counts."""
    done, run = result.done, result.done.run
    both = human_bytes(done.bytes_up + done.bytes_down)
    each = f"up {human_bytes(done.bytes_up)}, down {human_bytes(done.bytes_down)}"
    took = f"{human_time(done.wall)} · {human_bytes(done.peak_rss)}"
    counts = "of all sittings, without the time between; the peak is of the last" if resumed else ""
    costs = [("bytes over the fleet", both, each), ("wall time · peak memory", took, counts)]
    ui.final_table(
        done.base,
        done.tuned,
        rows=done.rows,
        answered=done.answered,
        costs=costs,
        remarks=done.remarks,
        errors=done.change_errors,
    )
    samples = Path(run) / "samples.md"
    ui.paths(
        [
            ("report", f"{run}/report.html"),
            ("result", f"{done.result} ({human_bytes(done.result_bytes)})"),
            ("digest", done.digest),
            *([("samples", str(samples))] if samples.is_file() else []),
            ("next", then or f"fleetune eval {quoted(run)}"),
        ]
    )
    say_what_is_shared(ui, Path(run))


def say_what_is_shared(ui: Ui, run: Path) -> None:
    """Note how many held-out rows a run's report shows the text of; nothing where it shows none."""
    if count := len(runlog.samples(run)):
        ui.note(
            f"the report shows the text of {counted(count, 'held-out row')}: share it only with those who may read them "
            "(a run with --no-samples keeps none)"
        )


def recipe_of(args: argparse.Namespace, note: Callable[[str], None]) -> recipes.Recipe:
    """The recipe that the arguments make, from a file or by name; RecipeError for what it cannot be."""
    values = flags.keys(args, args.config, note)
    if "sweep" in values:
        raise RecipeError(
            [f"{args.config} is the recipe of a sweep"], hint=f"fleetune sweep {quoted(args.config)}"
        )
    for name in ("model", "data"):
        if (given := getattr(args, name)) and (flag := getattr(args, flags.PREFIX + name)):
            raise UsageError(
                f"two values of {name}: '{given}' and --{name} '{flag}'", hint="give one of them"
            )
        values |= {name: given} if given else {}
    return recipes.make(values)


def _check_only(recipe: recipes.Recipe, args: argparse.Namespace, ui: Ui) -> None:
    recipe = recipes.with_columns(recipe, ui.note, offline=args.offline)
    from fleetune.planning import choose
    from fleetune.tuning.prepare import prepare

    tuning.check_plain(recipe.model, Path(args.out), recipes.trained(recipe))
    with ui.bar("getting ready") as bar:
        recipe = tuning.with_file(recipe, Path(args.out), ui.note)
        recipe = choose.settled_method(recipe, ui.note, offline=args.offline)
        recipe, fits = choose.settled_base(recipe, ui.note, offline=args.offline)
        found = prepare.dry_run(recipe, offline=args.offline, check_memory=fits, progress=bar.show)
    _say_checked(found, ui)


def _say_checked(found: TuneChecked, ui: Ui) -> None:
    ui.note(
        f"the recipe is good: {counted(found.clients, 'client')}, {counted(found.rows, 'row')}, {found.held_out} held out"
    )
    for remark in found.remarks:
        ui.note(remark)
    ui.event(found)


@contextmanager
def screen(ui: Ui, resumed: Path | None = None) -> Iterator[RunScreen]:
    """Show a run for the time of the block: a new one, or the one in a folder that is `resumed`."""
    with ui.bar("getting ready") as bar, InterruptHandler(ui) as interrupt, _said_once(ui):
        interrupt.at_once = True
        yield RunScreen(ui, bar, interrupt, resumed)


@contextmanager
def _said_once(ui: Ui) -> Iterator[None]:
    """Leave out the log's line on a reply that was refused, which the screen shows as well."""
    log, shown = logging.getLogger("fleetune.tuning.rounds.replies"), ui.quiet < 1
    drop = logging.Filter("nothing" if shown else "")  # lets through what is logged under this name
    log.addFilter(drop)
    try:
        yield
    finally:
        log.removeFilter(drop)


class RunScreen:
    """Show a run on the console: header, one line per round, a bar.

    Ctrl-C stops between two steps; before the header, while rows are read and a learning rate is found, at once.
    """

    def __init__(self, ui: Ui, bar: Bar, interrupt: InterruptHandler, resumed: Path | None = None) -> None:
        self.ui, self.bar, self.interrupt = ui, bar, interrupt
        self.resumed = resumed  # whose record has the loss before the first line; None after that line
        self.rounds = self.clients = self.round = self.replies = 0
        self.sending = self.sent = 0  # replies with any bytes, refused ones too: of this round, of the last
        self.last: RoundDone | None = None

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show the panel over the run."""
        self.interrupt.at_once = False
        self.ui.header(title, rows)

    def note(self, text: str) -> None:
        """Show a remark."""
        self.ui.note(text)

    def event(self, event: Event) -> None:
        """Show an event; JSON mode prints it."""
        self.ui.event(event)
        if isinstance(event, ClientReply):
            self.replies += 1
            self.sending += event.bytes_up > 0
        elif isinstance(event, RoundDone):
            self.last, self.round, self.replies = event, event.round, 0
            self.sent, self.sending = self.sending, 0
            self._move(0)
        elif isinstance(event, RoundEvaluated):
            self._evaluated(event)

    def step(self, client: int, step: int) -> None:
        """Move the bar; stop here if Ctrl-C was pressed."""
        self._move(self.replies + 1)
        if self.stop_requested:
            raise Interrupted(f"stopped after round {self.round}; nothing that was finished is lost")

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Note how many rounds there are, and how many clients are asked in each; show any other count on the bar."""
        if what == "clients":
            self.clients = total
            return
        if what == "rounds":
            self.rounds, self.round = total, done
            self.bar.relabel(what, f"{done}/{total}")
        else:
            self.bar.show(what, done, total, text)

    def _move(self, client: int) -> None:
        """Move the bar to a client of the round that comes, from 1; 0 before any is at work."""
        inside = min((client - 1) / self.clients, 1.0) if client and self.clients else 0.0
        at_work = f"client {client}/{self.clients}" if client else ""
        fraction = (self.round + inside) / self.rounds if self.rounds else 0.0
        self.bar.set(fraction, [f"{self.round}/{self.rounds}", at_work])

    @property
    def stop_requested(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self.interrupt.requested

    def _evaluated(self, event: RoundEvaluated) -> None:
        last = self.last if event.round else None
        before = rundir.loss_before(self.resumed, event.round) if self.resumed else None
        self.resumed = None
        notes = [f"accuracy {show('accuracy', event.accuracy)}"] if event.accuracy is not None else []
        if last and last.report and "epsilon" in last.report:
            notes.append(f"epsilon {last.report['epsilon']:.3g}")
        if last and last.accepted < last.clients:
            notes.append(f"{last.accepted} of {last.clients} clients")
        self.ui.round_line(
            event.round,
            event.loss,
            sent=last.bytes_up / max(1, self.sent) if last else None,
            received=last.bytes_down / max(1, last.clients) if last else None,
            seconds=last.seconds if last else None,
            rounds=self.rounds,
            change=event.loss - before if event.loss is not None and before is not None else None,
            note="  ".join(notes),
        )
