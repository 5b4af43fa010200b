"""Run a recipe in a folder, or resume one: the rounds, the answers before and after, the result and the report."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from fleetune.common import sums
from fleetune.common.display import counted, human_time, quoted
from fleetune.common.events import ClientReply, Recorded, RoundEvaluated, TuneDone, as_dict, round_evaluated
from fleetune.common.files import json_text, resumable
from fleetune.common.paired import RowLosses, difference
from fleetune.errors import Interrupted, fault
from fleetune.evaluation.losses import pad_id
from fleetune.models.net.model import Model
from fleetune.runs import rundir, trackers
from fleetune.runs.listener import Listener, Logged
from fleetune.seeds.noise import derive
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.methods import Method, entry
from fleetune.tuning.prepare import private
from fleetune.tuning.prepare.prepare import CheckMemory, TuneJob, check, prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.objects import data_name
from fleetune.tuning.result import foundations
from fleetune.tuning.result.finished import TuneResult
from fleetune.tuning.rounds import rounds
from fleetune.tuning.rounds.checkpoint import Releases, StandsOn
from fleetune.tuning.rounds.fleets import Fleet, wanted
from fleetune.tuning.rounds.local_work import Memories
from fleetune.tuning.rounds.sealed import Summing
from fleetune.tuning.rounds.simulated_fleet import Faults, LocalFleet
from fleetune.tuning.rounds.watch import Watch
from fleetune.tuning.run import describe, evaluation
from fleetune.tuning.run.save_result import finish, save

Step = Callable[[int, int], None]  # called with a client and the number of its next local step


class Fleets(Protocol):
    """Where a run's local work is done."""

    @property
    def simulated(self) -> bool:
        """Whether the clients are made from the recipe's data."""

    def about(self, job: TuneJob) -> str:
        """Return the fleet in a few words, for the header."""

    def make(self, job: TuneJob, run: rundir.RunDir, listener: Listener, step: Step) -> Fleet:
        """Return the fleet; a real one has then enough devices."""


class Simulated:
    """All clients in this process, in turn."""

    simulated = True

    def about(self, job: TuneJob) -> str:
        """Return where, and how many are asked."""
        recipe, count = job.recipe, len(job.rows)
        asked = len(rounds.sample(range(count), recipe.participation, recipe.seed, 1, recipe.over_selection))
        return f"this machine · {job.model.device} · {counted(count, 'client')}, {asked} a round"

    def make(self, job: TuneJob, run: rundir.RunDir, listener: Listener, step: Step) -> Fleet:
        """Return the fleet, with the faults that the recipe simulates."""
        recipe = job.recipe
        faults = Faults(recipe.drop, recipe.stragglers, recipe.deadline)
        memories = Memories(run.path / "memories")
        return LocalFleet(
            job.model,
            job.method,
            job.rows,
            recipe.seed,
            pad_id(job.model),
            faults,
            step,
            memories,
            wanted(job.method, recipe.kinds),
            functools.partial(private.of_rows, recipe, job.method) if recipe.privacy == "example" else None,
            private.sealed_of(job),
        )


SIMULATED: Final[Fleets] = Simulated()

log = logging.getLogger(__name__)

# A job seeds torch's generator and sets its threads, so two at a time in a process would disturb each other.
ONE_AT_A_TIME = threading.RLock()


def start(
    recipe: recipes.Recipe,
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
    # rows from standard input are stored
    recipe = dataclasses.replace(recipe, data=data_name(recipe.data, out))
    with ONE_AT_A_TIME:
        job = prepare(
            recipe,
            offline=offline,
            simulated=fleets.simulated,
            note=listener.note,
            progress=listener.progress,
            check_memory=check_memory,
        )
        recipe = job.recipe
        with rundir.create(out, recipe.method, recipe.model) as folder, goes_on(folder.path, fleets):
            return TuneResult(folder.path.absolute(), tune(job, folder, listener, fleets))


def goes_on(path: Path, fleets: Fleets) -> AbstractContextManager[None]:
    """Let a full disk's hint name the command that goes on with a run."""
    return resumable(_again(path, fleets))


def _again(path: Path, fleets: Fleets) -> str:
    return f"fleetune {'tune' if fleets.simulated else 'fleet serve'} --resume {quoted(path)}"


def tune(job: TuneJob, run: rundir.RunDir, listener: Listener, fleets: Fleets = SIMULATED) -> TuneDone:
    """Run (or resume) the job in its folder; its last event, which holds the final table.

    UsageError, with nothing changed, when the folder's run was begun on another recipe, model or rows.
    """
    stands_on = foundations.check(job, run.path)
    run.status("running")
    (run.path / sums.FILE).unlink(missing_ok=True)  # of a finished run that goes on
    try:
        with run.log_file.warned():
            return _tune(job, run, Logged(listener, run.log_file), fleets, stands_on)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | Interrupted)
        if isinstance(error, Interrupted):
            error.hint = error.hint or _again(run.path, fleets)
        elif isinstance(error, KeyboardInterrupt):
            error.add_note(_again(run.path, fleets))
        try:
            run.log(f"stopped: {type(error).__name__}: {error}")
            why = fault(error) if isinstance(error, SystemExit) else str(error)
            run.status("interrupted" if stopped else f"failed: {why}")
        except Exception as second:
            log.warning("the status could not be written: %s", second)
        raise


def _tune(
    job: TuneJob, run: rundir.RunDir, listener: Listener, fleets: Fleets, stands_on: StandsOn
) -> TuneDone:
    recipe, model, method = job.recipe, job.model, job.method
    _announce(job, run, listener, fleets.about(job), simulated=fleets.simulated)
    trackers.begin(listener, run.path, describe.facts_of(job))
    # none is found of a run that is resumed
    began = time.monotonic() - sum(rate.seconds for rate in job.found_rates)

    def step(client: int, number: int) -> None:
        listener.step(client, number)
        if listener.stop_requested:
            raise Interrupted("stopped between two steps; finished rounds are kept")

    known = evaluation.of_base(run.path) if rundir.checkpoints(run.path) else {}
    base = None if known else _base(job, run, listener)
    _count(job, run, listener)
    params = model.n_params  # before a module is attached to it
    account = private.account(job)
    releases = Releases(run, account.spent, account.rounds_within) if account else None
    rule = private.rule_of(job)
    first = first_state(recipe, method, model, rule)
    fleet = fleets.make(job, run, listener, step)
    start = None if base else known.get("start", {}).get("loss")
    watch = Watch(method, job.objective, rundir.events(run.path) if known else (), start, job.recipe.noise)
    base_rows = base.rows if base else evaluation.losses_in(known, "base")
    sitting = _Sitting(job, run, listener, fleet, first, base, params, base_rows, watch)
    plan = rounds.RoundPlan(
        recipe.rounds,
        recipe.participation,
        recipe.quorum,
        recipe.seed,
        recipe.eval_every,
        bytes.fromhex(model.digest)[:8],
        stands_on,
        rule,
        recipe.over_selection,
        recipe.patience,
        recipe.keep == "best",
        recipe.max_rows,
        releases,
        _summing(job, run, listener, fleet, fleets),
        recipe.keep_replies,
    )
    hooks = rounds.Hooks(
        sitting.begin,
        sitting.measure,
        sitting.emit,
        sitting.resumed,
        listener.note,
        lambda: time.monotonic() - began,
        lambda measured: evaluation.score(job.objective, measured),
    )
    try:
        outcome = rounds.run(method, fleet, first, run, plan, hooks)
    except rounds.ModelLostError as lost:
        rounds.keep_best_of(lost, run, plan)
        if lost.round:  # else there is only the base
            method.apply(model, lost.state)
            save(job, run, lost.state, lost.round, lost.round + 1, releases.count if releases else 0)
        raise
    method.apply(model, outcome.state)
    listener.progress("measuring the result", 0, 0)
    measured = sitting.measured if outcome.round == sitting.round else None
    return finish(job, run, first, outcome, measured or evaluation.measure(job), base_rows, listener, began)


def _summing(
    job: TuneJob, run: rundir.RunDir, listener: Listener, fleet: Fleet, fleets: Fleets
) -> Summing | None:
    """Return how the run's replies are added up; None where that is by no secure sum."""
    if (sealed := private.sealed_of(job)) is None:
        return None
    return Summing(sealed, fleet.run, None if fleets.simulated else run.path, listener.note)


@dataclasses.dataclass
class _Sitting:
    """The part of a run from its start or resume to its end or stop, as the rounds see it."""

    job: TuneJob
    run: rundir.RunDir
    listener: Listener
    fleet: Fleet
    first: Any  # state before round 1
    base: _Base | None  # None: eval.json has it
    params: int  # weights of the base model
    base_rows: RowLosses | None  # losses of the held-out rows under the base, where they are known
    watch: Watch
    measured: tuple[dict[str, float], RowLosses] | None = None  # the last measures, and the rows' losses
    round: int = 0  # that they are of; 0: of none

    def begin(self) -> dict[str, float]:
        """Record the start of the run; return the measures that round 1 starts from."""
        assert self.base is not None
        self.emit(describe.start_event(self.job, self.fleet.rows, self.params))
        for rate in self.job.found_rates:
            self.emit(rate)
        self.emit(round_evaluated(0, self.base.measured))
        if start := self._start():
            self.watch.starts_at(start["loss"])
        return start or self.base.measured

    def resumed(self) -> None:
        """Say how far the run is, and where eval.json has lost the base that it was measured again."""
        account = private.account(self.job)
        self.listener.note(describe.progress_words(self.run.path, self.job.recipe.rounds, account))
        if self.base is not None:
            file = self.run.path / evaluation.EVALUATION
            self.listener.note(f"{file} is damaged or gone: the base model has answered again")
            self._start()

    def measure(self, state: Any) -> dict[str, float]:
        """Return the measures of a state on the held-out rows; `change_error` is that of the loss against the base."""
        self.job.method.apply(self.job.model, state)
        self.measured = measured, rows = evaluation.measure(self.job)
        change = None if self.base_rows is None else difference(self.base_rows, rows)
        return (
            measured if change is None or change.error is None else measured | {"change_error": change.error}
        )

    def emit(self, event: Recorded) -> None:
        """Record an event, pass it on, and say what is to be said of it."""
        self.listener.event(dataclasses.replace(event, t=self.run.record(as_dict(event))["t"]))
        if isinstance(event, ClientReply) and (word := self.fleet.heard(event)):
            self.listener.note(word)
        if isinstance(event, RoundEvaluated):
            self.round = event.round
        if (advice := self.watch.heard(event)) is not None:
            self.listener.note(advice.text)
            self.emit(advice)

    def _start(self) -> dict[str, float]:
        """Where the first state is not the base model, measure it too, say so, and return its measures; else {}."""
        assert self.base is not None
        self.job.method.apply(self.job.model, self.first)
        if math.isclose(
            self.base.probed, describe.probe(self.job), rel_tol=describe.SAME, abs_tol=describe.SAME
        ):
            return {}
        start, _ = evaluation.measure(self.job)
        evaluation.add(self.run, {"start": start})
        self.listener.note(describe.of_start(self.base.measured, start))
        return start


def first_state(recipe: recipes.Recipe, method: Method, model: Model, rule: aggregation.Rule) -> Any:
    """Return the state before round 1; a ledger states the rule by which replies are combined, and no path."""
    state = method.init(model, derive(recipe.seed, "init"))
    if entry(recipe.method).kind != "ledger":
        return state
    head = state.ledger.head
    hyper = {n: describe.public(v) if n == "objective" else v for n, v in head.hyper.items()}
    head = dataclasses.replace(head, hyper=hyper)
    if rule != aggregation.MEAN:
        head = dataclasses.replace(head, aggregation=rule.text, privacy=recipe.privacy)
    return state._replace(ledger=dataclasses.replace(state.ledger, head=head))


class _Base(NamedTuple):
    """The base model with nothing attached to it: its measures, and its loss on a few rows (`describe.probe`)."""

    measured: dict[str, float]
    rows: RowLosses
    probed: float


def _base(job: TuneJob, run: rundir.RunDir, listener: Listener) -> _Base:
    """Measure the base and let it answer; call it before the method's `init`, which may attach a module."""
    listener.progress("measuring the base", 0, 0)
    measured, rows = evaluation.measure(job)
    measured = evaluation.answer(job, run, "base", measured, rows)
    if chosen := evaluation.client_rows(job):
        kind, own = chosen
        losses = evaluation.client_losses(job, own)
        evaluation.add(run, {"per_client": {"rows": kind, "n": list(map(len, own)), "base": losses}})
    return _Base(measured, rows, describe.probe(job))


def _announce(job: TuneJob, run: rundir.RunDir, listener: Listener, fleet: str, *, simulated: bool) -> None:
    recipe = job.recipe
    run.write("run.toml", recipes.to_toml(foundations.as_stated(recipe, run.path)))
    made_of = describe.model_facts(job) | describe.data_facts(job, run.path)
    before, now = foundations.environment_of(run.path), rundir.environment(made_of)
    run.write(rundir.ENVIRONMENT, json_text(now))
    verb = "tune" if simulated else "fleet serve"
    listener.header(f"fleetune {verb} · {job.entry.name}", describe.header(job, run, fleet))
    rates = [f"{r.setting} = {r.rate:g}, found in {human_time(r.seconds)}: {r.why}" for r in job.found_rates]
    changes = filter(None, [describe.machine_changes(before, now)])
    for remark in (*rates, *job.about_time()[1:], *changes):
        listener.note(remark)


def _count(job: TuneJob, run: rundir.RunDir, listener: Listener) -> None:
    """Say how many rounds there are and were, and how many clients are asked in each."""
    recipe = job.recipe
    clients = range(len(job.rows) or recipe.clients)
    asked = len(rounds.sample(clients, recipe.participation, recipe.seed, 1, recipe.over_selection))
    done = max((round for round, _ in rundir.checkpoints(run.path)), default=0)
    listener.progress("rounds", done, recipe.rounds)
    listener.progress("clients", 0, asked)
