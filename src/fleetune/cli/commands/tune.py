# SPDX-License-Identifier: Apache-2.0
"""`fleetune tune`: recipes to runs, with what the user sees of them and Ctrl-C."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetune.cli.console import Ui
from fleetune.cli.interrupt import InterruptHandler
from fleetune.cli.progress import RoundBar
from fleetune.common import settings
from fleetune.common.display import human_bytes, human_time, show
from fleetune.errors import Interrupted, RecipeError, UsageError
from fleetune.tuning import recipe as recipes


class Screen:
    """A run on the console: header, a line a round, the bar; and it hears Ctrl-C between two steps."""

    def __init__(self, ui: Ui, bar: RoundBar, interrupt: InterruptHandler, run: Path) -> None:
        self.ui, self.bar, self.interrupt, self.resume = ui, bar, interrupt, f"fleetune tune --resume {run}"
        self.round = self.clients = 0
        self.last: Mapping[str, Any] = {}

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The panel over the run."""
        self.ui.header(title, rows)

    def note(self, text: str) -> None:
        """A remark."""
        self.ui.note(text)

    def event(self, event: Mapping[str, Any]) -> None:
        """Show an event; JSON mode prints it as it is."""
        self.ui.event(event)
        shown = {"client": self._client, "round": self._round, "eval": self._eval}.get(str(event["event"]))
        if shown:
            shown(event)

    def step(self, client: int, step: int) -> None:
        """Move the bar; stop here if Ctrl-C was pressed."""
        self.bar.update(client=self.clients + 1, step=step)
        if self.stop_requested:
            raise Interrupted(
                f"stopped after round {self.round}; nothing that was finished is lost", hint=self.resume
            )

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        """Do nothing: a run counts rounds."""

    @property
    def stop_requested(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self.interrupt.requested

    def _client(self, event: Mapping[str, Any]) -> None:
        self.clients += 1
        if event["status"] in ("refused", "failed"):
            self.ui.note(
                f"round {event['round']}: client {event['client']} {event['status']}: {event['reason']}"
            )

    def _round(self, event: Mapping[str, Any]) -> None:
        self.last, self.round, self.clients = event, int(event["round"]), 0
        self.bar.update(round=self.round)

    def _eval(self, event: Mapping[str, Any]) -> None:
        last = self.last if event["round"] else {}
        asked, good = last.get("clients", 0), last.get("accepted", 0)
        notes = [f"accuracy {show('accuracy', event['accuracy'])}"] if "accuracy" in event else []
        notes += [f"{good} of {asked} clients"] if good < asked else []
        self.ui.round_line(
            int(event["round"]), event["loss"],
            sent=last["bytes_up"] / max(1, good) if last else None,
            received=last["bytes_down"] / asked if last else None,
            seconds=last.get("seconds"), rounds=self.bar.rounds,
            note="  ".join(notes),
        )  # fmt: skip


def tune(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.runs import rundir

    if args.resume:
        path = rundir.find(args.resume, Path(args.out))
        given = [a for a in ("model", "data", "config") if getattr(args, a)] + list(_flags(args)) + args.set
        if given:
            raise UsageError(
                f"--resume goes on with the run's own recipe; it takes no {given[0]}",
                hint=f"fleetune tune --resume {path}",
            )
        recipe = recipes.make(recipes.read(path / "run.toml"))
        run_recipe(recipe, args, ui, path)
        return
    run_recipe(_recipe(args), args, ui)


def _recipe(args: argparse.Namespace) -> recipes.Recipe:
    values = keys_of(args, args.config)
    if "sweep" in values:
        raise RecipeError([f"{args.config} is the recipe of a sweep"], hint=f"fleetune sweep {args.config}")
    for name in ("model", "data"):
        if (given := getattr(args, name)) and (flag := getattr(args, f"recipe_{name}")):
            raise UsageError(
                f"two values of {name}: '{given}' and --{name} '{flag}'", hint="give one of them"
            )
        values |= {name: given} if given else {}
    return recipes.make(values)


def keys_of(args: argparse.Namespace, file: str | None) -> dict[str, Any]:
    """The keys of a recipe's file, overridden by the flags; RecipeError for a setting without a value."""
    values: dict[str, Any] = recipes.read(Path(file)) if file else {}
    values |= _flags(args)
    return {**values, "set": {**values.get("set", {}), **settings.pairs(args.set)}}


def _flags(args: argparse.Namespace) -> dict[str, str]:
    given = {k.removeprefix("recipe_"): v for k, v in vars(args).items() if k.startswith("recipe_")}
    return {k: v for k, v in given.items() if v is not None}


def run_recipe(
    recipe: recipes.Recipe, args: argparse.Namespace, ui: Ui, resume: Path | None = None
) -> Mapping[str, Any]:
    """Tune as a recipe says, in a new run or on with a stopped one; the event that ended it ({} for a dry run)."""
    from fleetune.runs import rundir
    from fleetune.tuning import prepare, rounds
    from fleetune.tuning import run as jobs

    prepare.check(recipe)
    if resume is not None and (done := _already_done(resume)):
        ui.note(f"{resume} is finished already")
        ui.event(done)
        return _finished(done, ui)
    run = rundir.RunDir(resume) if resume else None
    rundir.check_writable(resume or Path(args.out))
    job = prepare.prepare(recipe, offline=args.offline)
    if getattr(args, "dry_run", False):
        ui.note(
            f"the recipe is good: {len(job.rows)} clients, {sum(map(len, job.rows))} rows, {len(job.held)} held out"
        )
        ui.event({"event": "checked", "clients": len(job.rows), "rows": sum(map(len, job.rows))})
        return {}
    with run or rundir.create(Path(args.out), recipe.method, recipe.model) as run:
        clients = len(rounds.sample(len(job.rows), recipe.participation, recipe.seed, 1))
        with ui.progress(recipe.rounds, clients) as bar, InterruptHandler(ui) as interrupt:
            done = jobs.tune(job, run, Screen(ui, bar, interrupt, run.path))
    return _finished(done, ui)


def _already_done(run: Path) -> Mapping[str, Any] | None:
    from fleetune.runs import rundir

    if (run / "status").is_file() and (run / "status").read_text().strip() == "done":
        return next((e for e in rundir.events(run) if e["event"] == "done"), None)
    return None


def _finished(done: Mapping[str, Any], ui: Ui) -> Mapping[str, Any]:
    costs = [
        ("bytes over the fleet", human_bytes(done["bytes_up"] + done["bytes_down"]),
         f"up {human_bytes(done['bytes_up'])}, down {human_bytes(done['bytes_down'])}"),
        ("wall time · peak memory", f"{human_time(done['wall'])} · {human_bytes(done['peak_rss'])}", ""),
    ]  # fmt: skip
    ui.final_table(done["base"], done["tuned"], rows=done["rows"], costs=costs)
    run = done["run"]
    rows = [
        ("report", f"{run}/report.html"),
        ("result", f"{done['result']} ({human_bytes(done['result_bytes'])})"),
    ]
    rows += [
        ("digest", str(done["digest"])),
        ("samples", f"{run}/samples.md"),
        ("next", f"fleetune eval {run}"),
    ]
    ui.paths(rows)
    return done
