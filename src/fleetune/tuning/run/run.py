# SPDX-License-Identifier: Apache-2.0
"""Run a recipe in a folder, or resume one: the rounds, the answers before and after, the result and the report."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fleetune.common import sums
from fleetune.common.events import (
    ClientReply,
    Recorded,
    RoundEvaluated,
    TuneChecked,
    TuneDone,
    as_dict,
    round_evaluated,
)
from fleetune.common.files import json_text, resumable
from fleetune.common.paired import RowLosses
from fleetune.common.shell import quoted
from fleetune.errors import Interrupted, StorageError, fault
from fleetune.runs import env_file, rundir, trackers
from fleetune.runs.listener import Listener
from fleetune.runs.rundir import RunDir
from fleetune.seeds.noise import derive
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.methods import entry
from fleetune.tuning.prepare import estimate
from fleetune.tuning.prepare.prepare import CheckMemory, TuneJob, check, checked, prepare, timed
from fleetune.tuning.recipe import given_methods
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.objects_to_files import data_name
from fleetune.tuning.recipe.recipe import Recipe
from fleetune.tuning.result import finished, foundations, places
from fleetune.tuning.result.result import TuneResult, read
from fleetune.tuning.rounds import rounds
from fleetune.tuning.rounds.checkpoint import StandsOn
from fleetune.tuning.rounds.fleets import Fleet
from fleetune.tuning.rounds.watch import Watch
from fleetune.tuning.run import (
    describe,
    eval_file,
    extension,
    per_client,
    remarks,
    resumption,
    run_facts,
    validation,
)
from fleetune.tuning.run.eval_file import EVALUATION
from fleetune.tuning.run.save_result import ARTEFACTS, finish
from fleetune.tuning.run.simulation import SIMULATED, Fleets

log = logging.getLogger(__name__)

# A job seeds torch's generator and sets its threads, so two at a time in a process would disturb each other.
_ONE_AT_A_TIME = threading.RLock()


def start(
    recipe: Recipe,
    out: Path,
    listener: Listener,
    *,
    offline: bool,
    fleets: Fleets = SIMULATED,
    check_memory: CheckMemory = lambda rows, tokens: None,
) -> TuneResult:
    """Check a recipe, then run it in a new folder under `out`."""
    check(recipe)
    rundir.check_writable(out)
    recipe = dataclasses.replace(
        recipe, data=data_name(recipe.data, out)
    )  # rows from standard input are stored
    with _ONE_AT_A_TIME:
        job = prepare(
            recipe,
            offline=offline,
            simulated=fleets.simulated,
            note=listener.note,
            progress=listener.progress,
            check_memory=check_memory,
        )
        recipe = job.recipe
        with rundir.create(out, recipe.method, recipe.model) as folder, _resumable(folder.path, fleets):
            return TuneResult(folder.path.absolute(), tune(job, folder, listener, fleets))


def resume(
    path: Path,
    listener: Listener,
    *,
    offline: bool,
    fleets: Fleets = SIMULATED,
    rounds: int = 0,
    base: str = "",
) -> TuneResult:
    """Resume a stopped run by its own recipe; return the result of a finished one.

    With more `rounds` than it has it goes on until it has as many, finished or not; UsageError, with nothing written,
    where it cannot.
    `base` is where the base's weights are from now on, which changes no bit of the result.
    A file of a finished run that is damaged, its result among them, is made again from the last checkpoint.
    """
    recipe, had = _own_recipe(path, rounds, base)
    if recipe.rounds == had and is_done(path, listener.note):
        found = read(path)
        more = "; --rounds N gives it more rounds" if fleets.simulated else ""
        listener.note(f"{path} is finished already{more}")
        listener.event(found.done)
        return found
    places.check_rows(recipe, path)
    with _ONE_AT_A_TIME, _resumable(path, fleets), RunDir(path) as folder:
        rundir.check_writable(path)
        job = prepare(recipe, offline=offline, simulated=fleets.simulated, find=False, measure=False)
        if not any(round for round, _ in rundir.checkpoints(path)):  # no round tells how long one takes
            job = timed(job)
        if recipe.rounds != had:
            foundations.check(job, path, longer=True)  # a refusal leaves a finished run as it is
            extension.write(job.recipe, folder)
        return TuneResult(path.absolute(), tune(job, folder, listener, fleets))


def _own_recipe(path: Path, rounds: int, base: str) -> tuple[Recipe, int]:
    """Return the recipe by which a run is resumed, checked, and how many rounds the run has; arguments as for `resume`."""
    recipe = places.recipe_of(path, longer=rounds > 0)
    recipe = dataclasses.replace(recipe, base=base or recipe.base)
    had = recipe.rounds
    if rounds:
        recipe = extension.longer(recipe, path, rounds)
        had = extension.checkpoint_rounds(path) or had
    places.check_code(recipe, path)
    given_methods.check_known(recipe.method, path)
    check(recipe)
    return recipe, had


def check_resume(path: Path, *, offline: bool, rounds: int = 0, base: str = "") -> TuneChecked:
    """Check all that `resume` checks of a simulated run, and return how long the rounds that are left take; write nothing."""
    recipe, had = _own_recipe(path, rounds, base)
    places.check_rows(recipe, path)
    with _ONE_AT_A_TIME:
        job = prepare(recipe, offline=offline, find=False, measure=False)
        foundations.check(job, path, longer=recipe.rounds != had)
        done = max((round for round, _ in rundir.checkpoints(path)), default=0)
        remarks = [*job.about_rows(), f"goes on after round {done} of {recipe.rounds}"]
        if done < recipe.rounds and (whole := timed(job).estimate) is not None:
            left = estimate.rest(whole, done, recipe.eval_every)
            job, remarks = dataclasses.replace(job, estimate=left), [*remarks, f"left: {left.text}"]
        return checked(job, remarks)


def _resumable(path: Path, fleets: Fleets) -> AbstractContextManager[None]:
    """Let a full disk's hint name the command that goes on with a run."""
    verb = "tune" if fleets.simulated else "fleet serve"
    return resumable(f"fleetune {verb} --resume {quoted(path)}")


def is_done(path: Path, note: Callable[[str], None]) -> bool:
    """Whether a run is finished, and its record, answers and result are as they were written; if not so, it is said.

    StorageError when a file of a finished run is damaged, and there is no checkpoint to make it from.
    """
    if rundir.status_of(path) != "done":
        return False
    if damaged := damaged_file(path):
        if not rundir.checkpoints(path):
            raise StorageError(
                f"{path / damaged} of a finished run is damaged, and no checkpoint is left to make it from",
                hint=f"bring it back; or tune anew: fleetune tune -c {quoted(path / 'run.toml')}",
            )
        note(f"{path / damaged} is damaged or gone: it is made again from the last checkpoint")
    return not damaged


def damaged_file(path: Path) -> str:
    """The first file of a finished run that is not as it was written, "" where all are."""
    result = path / finished.RESULT[entry(foundations.recipe_of(path).method).kind]
    found = [*sums.faults(path), *((f"{result.name}/{name}", why) for name, why in sums.faults(result))]
    if not result.exists():
        return result.name
    return found[0][0] if found else ""


def tune(job: TuneJob, run: RunDir, listener: Listener, fleets: Fleets = SIMULATED) -> TuneDone:
    """Run (or resume) the job in its folder; its last event, which holds the final table.

    UsageError, with nothing changed, when the folder's run was begun on another recipe, model or rows.
    """
    stands_on = foundations.check(job, run.path)
    run.status("running")
    (run.path / sums.FILE).unlink(missing_ok=True)  # of a finished run that goes on
    try:
        return _tune(job, run, listener, fleets, stands_on)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | Interrupted)
        if isinstance(error, Interrupted):
            error.hint = error.hint or f"fleetune tune --resume {quoted(run.path)}"
        elif isinstance(error, KeyboardInterrupt):
            error.add_note(f"fleetune tune --resume {quoted(run.path)}")
        try:
            run.log(f"stopped: {type(error).__name__}: {error}")
            why = fault(error) if isinstance(error, SystemExit) else str(error)
            run.status("interrupted" if stopped else f"failed: {why}")
        except Exception as second:
            log.warning("the status could not be written: %s", second)
        raise


def _tune(job: TuneJob, run: RunDir, listener: Listener, fleets: Fleets, stands_on: StandsOn) -> TuneDone:
    recipe, model, method = job.recipe, job.model, job.method
    _announce(job, run, listener, fleets.about(job))
    trackers.begin(listener, run.path, run_facts.of_job(job))
    searched = sum(found.seconds for found in job.found)  # none of a run that is resumed: it has its rates
    began = time.monotonic() - searched

    def step(client: int, number: int) -> None:
        listener.step(client, number)
        if listener.stop_requested:
            raise Interrupted("stopped between two steps; finished rounds are kept")

    whole = eval_file.having(run.path, "base") if rundir.checkpoints(run.path) else {}
    base = None if whole else _base(job, run)
    check = validation.Validation(job, base.rows if base else validation.losses_in(whole, "base"))
    params = model.n_params  # before a module is attached to it
    first = _first(job)
    fleet = fleets.make(job, run, listener, step)
    start = None if base else whole.get("start", {}).get("loss")
    watch = Watch(method, job.objective, rundir.events(run.path) if whole else (), start)
    sitting = _Sitting(job, run, listener, fleet, first, base, params, check, watch)
    plan = rounds.RoundPlan(
        recipe.rounds,
        recipe.participation,
        recipe.quorum,
        recipe.seed,
        recipe.eval_every,
        bytes.fromhex(model.digest)[:8],
        stands_on,
        aggregation.parse(recipe.aggregation),
        recipe.over_selection,
        recipe.patience,
        recipe.keep == "best",
        recipe.max_rows,
    )
    try:
        outcome = rounds.run(method, fleet, first, run, plan, sitting.hooks(began))
    except rounds.ModelLostError as lost:
        rounds.keep_best_of(lost, run, plan)
        if lost.round:  # else there is only the base
            method.apply(model, lost.state)
            ARTEFACTS[job.entry.kind](job, run, lost.state, lost.round)
        raise
    return finish(job, run, first, outcome, check, listener, began)


@dataclass(frozen=True)
class _Sitting:
    """The part of a run from its start or resume to its end or stop, as the rounds see it."""

    job: TuneJob
    run: RunDir
    listener: Listener
    fleet: Fleet
    first: Any  # state before round 1
    base: _Base | None  # None: eval.json has it
    params: int  # weights of the base model
    check: validation.Validation
    watch: Watch

    def hooks(self, began: float) -> rounds.Hooks:
        """Return what the rounds call; `began` is when the sitting began, with its search for rates."""
        return rounds.Hooks(
            self.begin,
            self.measure,
            self.emit,
            self.resumed,
            self.listener.note,
            lambda: time.monotonic() - began,
            self.check.score,
        )

    def begin(self) -> dict[str, float]:
        """Record the start of the run; return the measures that round 1 starts from."""
        assert self.base is not None
        self.emit(describe.start(self.job, self.fleet.rows, self.params))
        for rate in self.job.found:
            self.emit(describe.rate(rate))
        self.emit(round_evaluated(0, self.base.measured))
        if found := _start(self.job, self.run, self.base, self.first, self.listener):
            self.watch.starts_at(found["loss"])
        return found or self.base.measured

    def resumed(self) -> None:
        """Say how far the run is, and where eval.json has lost the base that it was measured again."""
        self.listener.note(resumption.progress(self.run.path, self.job.recipe.rounds))
        if self.base is not None:
            self.listener.note(
                f"{self.run.path / EVALUATION} is damaged or gone: the base model has answered again"
            )
            _start(self.job, self.run, self.base, self.first, self.listener)

    def measure(self, state: Any) -> dict[str, float]:
        """Return the measures of a state on the held-out rows."""
        self.job.method.apply(self.job.model, state)
        return self.check.measure()

    def emit(self, event: Recorded) -> None:
        """Record an event, pass it on, and say what is to be said of it."""
        self.listener.event(dataclasses.replace(event, t=self.run.record(as_dict(event))["t"]))
        if isinstance(event, ClientReply):
            self.fleet.heard(event)
        if isinstance(event, RoundEvaluated) and event.round:
            objective = {} if event.objective is None else {"objective": event.objective}
            self.check.of_round(event.round, event.values | objective)
        if (advice := self.watch.heard(event)) is not None:
            self.listener.note(advice.text)
            self.emit(advice)


def _first(job: TuneJob) -> Any:
    """Return the state before round 1; a ledger states the rule by which replies are combined."""
    state = job.method.init(job.model, derive(job.recipe.seed, "init"))
    rule = aggregation.parse(job.recipe.aggregation)
    if job.entry.kind != "ledger" or rule == aggregation.MEAN:
        return state
    head = dataclasses.replace(state.ledger.head, aggregation=rule.text)
    return state._replace(ledger=dataclasses.replace(state.ledger, head=head))


class _Base(NamedTuple):
    """The base model with nothing attached to it: its measures, and its loss on a few rows (`remarks.probe`)."""

    measured: dict[str, float]
    rows: RowLosses
    probed: float


def _base(job: TuneJob, run: RunDir) -> _Base:
    """Measure the base and let it answer; call it before the method's `init`, which may attach a module."""
    measured, rows = validation.measure(job)
    measured = eval_file.answer(job, run, "base", measured, rows)
    if own := per_client.chosen(job):
        eval_file.add(run, {"per_client": own.record(base=own.losses(job))})
    return _Base(measured, rows, remarks.probe(job))


def _start(job: TuneJob, run: RunDir, base: _Base, first: Any, listener: Listener) -> dict[str, float]:
    """Where the first state is not the base model, measure it too, say so, and return its measures; else {}."""
    job.method.apply(job.model, first)
    if not remarks.starts_elsewhere(base.probed, remarks.probe(job)):
        return {}
    found, _ = validation.measure(job)
    eval_file.add(run, {"start": found})
    listener.note(remarks.of_start(base.measured, found))
    return found


def _announce(job: TuneJob, run: RunDir, listener: Listener, fleet: str) -> None:
    """Write down what is run, and tell the listener."""
    recipe = job.recipe
    run.write("run.toml", recipes.to_toml(places.as_stated(recipe, run.path)))
    made_of = describe.of_model(job) | describe.of_data(job, run.path)
    before, now = places.record(run.path), env_file.environment(made_of)
    run.write(env_file.ENVIRONMENT, json_text(now))
    listener.header(f"fleetune tune · {job.entry.name}", describe.header(job, run, fleet))
    for remark in (*map(remarks.of_rate, job.found), *job.about_time()[1:], remarks.of_law(job.method)):
        if remark:
            listener.note(remark)
    if told := resumption.changes(before, now):
        listener.note(told)
    clients = range(len(job.rows) or recipe.clients)
    asked = len(rounds.sample(clients, recipe.participation, recipe.seed, 1, recipe.over_selection))
    done = max((round for round, _ in rundir.checkpoints(run.path)), default=0)
    listener.progress("rounds", done, recipe.rounds)
    listener.progress("clients", 0, asked)
