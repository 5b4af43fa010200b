# SPDX-License-Identifier: Apache-2.0
"""Run a recipe in a folder, or resume one: the rounds, the answers before and after, the result and the report."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from fleetune import adapters, models
from fleetune.common import sums
from fleetune.common.energy import EnergyMeter
from fleetune.common.memory import peak_rss
from fleetune.common.paired import Difference, RowLosses
from fleetune.common.shell import quoted
from fleetune.errors import FleetuneError, Interrupted, RecipeError, StorageError, fault
from fleetune.evaluation.answers import generate
from fleetune.evaluation.losses import pad_id
from fleetune.evaluation.scores import rouge_l
from fleetune.runs import metrics, report, rundir, sealed, tracking
from fleetune.runs.events import ClientReply, Recorded, RoundEvaluated, TuneDone, as_dict, round_evaluated
from fleetune.runs.listener import Listener
from fleetune.runs.report.page import counted
from fleetune.runs.rundir import RunDir
from fleetune.seeds.noise import derive
from fleetune.seeds.view import View
from fleetune.tuning import (
    describe,
    finished,
    foundations,
    model_card,
    per_client,
    places,
    remarks,
    resumption,
    robust,
    rounds,
    row_digests,
    run_facts,
    validation,
)
from fleetune.tuning import recipe as recipes
from fleetune.tuning.checkpoint import StandsOn
from fleetune.tuning.fleets import OLDEST, Fleet
from fleetune.tuning.fleets.late import LateReplies
from fleetune.tuning.fleets.local import Faults, LocalFleet
from fleetune.tuning.fleets.memories import Memories
from fleetune.tuning.kinds import wanted
from fleetune.tuning.methods import entry
from fleetune.tuning.objects_to_files import data_name
from fleetune.tuning.prepare import TuneJob, check, prepare
from fleetune.tuning.recipe import Recipe
from fleetune.tuning.result import TuneResult, read
from fleetune.tuning.watch import Watch

log = logging.getLogger(__name__)

EVALUATION = "eval.json"

# A job seeds torch's generator and sets its threads, so two at a time in a process would disturb each other.
_ONE_AT_A_TIME = threading.RLock()


Step = Callable[[int, int], None]  # called with a client and the number of its next local step


class Fleets(Protocol):
    """Where a run's local work is done."""

    @property
    def simulated(self) -> bool:
        """Whether the clients are made from the recipe's data."""
        ...

    def check(self, recipe: Recipe) -> None:
        """Raise UsageError for what a recipe wants and this fleet does not do; called before any work."""
        ...

    def about(self, job: TuneJob) -> str:
        """Return the fleet in a few words, for the header."""
        ...

    def make(self, job: TuneJob, run: RunDir, listener: Listener, step: Step) -> Fleet:
        """Return the fleet; a real one has then enough devices."""
        ...


class Simulated:
    """All clients in this process, in turn."""

    simulated = True

    def check(self, recipe: Recipe) -> None:
        """Raise RecipeError where late replies are to be used and none comes late."""
        if recipe.late == "use" and not recipe.deadline and recipe.over_selection == 1:
            raise RecipeError(
                [
                    "late = use does nothing: no simulated client comes late without a deadline or over_selection"
                ],
                hint="add --stragglers 0.3 --deadline 3, or --over-selection 1.3",
            )

    def about(self, job: TuneJob) -> str:
        """Return where, and how many are asked."""
        recipe, count = job.recipe, len(job.rows)
        asked = len(rounds.sample(range(count), recipe.participation, recipe.seed, 1, recipe.over_selection))
        return f"this machine · {job.model.device} · {counted(count, 'client')}, {asked} a round"

    def make(self, job: TuneJob, run: RunDir, listener: Listener, step: Step) -> Fleet:
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
            LateReplies(run.path / "late") if recipe.late == "use" else None,
        )


SIMULATED: Final[Fleets] = Simulated()


def start(
    recipe: Recipe, out: Path, listener: Listener, *, offline: bool, fleets: Fleets = SIMULATED
) -> TuneResult:
    """Check a recipe, then run it in a new folder under `out`."""
    check(recipe)
    fleets.check(recipe)
    rundir.check_writable(out)
    recipe = dataclasses.replace(
        recipe, data=data_name(recipe.data, out)
    )  # rows from standard input are stored
    with _ONE_AT_A_TIME:
        job = prepare(recipe, offline=offline, simulated=fleets.simulated, note=listener.note)
        recipe = job.recipe
        with rundir.create(out, recipe.method, recipe.model) as folder:
            return TuneResult(folder.path.absolute(), tune(job, folder, listener, fleets))


def resume(path: Path, listener: Listener, *, offline: bool, fleets: Fleets = SIMULATED) -> TuneResult:
    """Resume a stopped run by its own recipe; return the result of a finished one.

    A file of a finished run that is damaged, its result among them, is made again from the last checkpoint.
    """
    recipe = places.recipe_of(path)
    places.check_code(recipe, path)
    check(recipe)
    fleets.check(recipe)
    if is_done(path, listener.note):
        found = read(path)
        listener.note(f"{path} is finished already")
        listener.event(found.done)
        return found
    places.check_rows(recipe, path)
    with _ONE_AT_A_TIME, RunDir(path) as folder:
        rundir.check_writable(path)
        job = prepare(recipe, offline=offline, simulated=fleets.simulated, find=False, measure=False)
        return TuneResult(path.absolute(), tune(job, folder, listener, fleets))


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
    if not metrics.is_intact(path):
        return metrics.FILE
    try:
        rundir.base_digest(path)
    except StorageError:
        return rundir.ENVIRONMENT
    if not _evaluation(path, "tuned"):
        return EVALUATION
    try:
        finished.result_of(path)
    except FleetuneError as error:
        log.warning("%s", error.message)
        return finished.RESULT[entry(foundations.recipe_of(path).method).kind]
    return ""


def tune(job: TuneJob, run: RunDir, listener: Listener, fleets: Fleets = SIMULATED) -> TuneDone:
    """Run (or resume) the job in its folder; its last event, which holds the final table.

    UsageError, with nothing changed, when the folder's run was begun on another recipe, model or rows.
    """
    stands_on = foundations.check(job, run.path)
    run.status("running")
    try:
        return _tune(job, run, listener, fleets, stands_on)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | Interrupted)
        if isinstance(error, Interrupted):
            error.hint = error.hint or f"fleetune tune --resume {quoted(run.path)}"
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
    tracking.begin(listener, run.path, run_facts.of_job(job))
    began = time.monotonic()

    def step(client: int, number: int) -> None:
        listener.step(client, number)
        if listener.stop_requested:
            raise Interrupted("stopped between two steps; finished rounds are kept")

    whole = _evaluation(run.path, "base") if rundir.checkpoints(run.path) else {}
    base = None if whole else _base(job, run)
    check = validation.Validation(job, base.rows if base else validation.losses_in(whole, "base"))
    meter = EnergyMeter() if not rundir.checkpoints(run.path) else None  # of a whole run alone
    params = model.n_params  # before a module is attached to it
    first = _first(job)
    fleet = fleets.make(job, run, listener, step)

    start = None if base else whole.get("start", {}).get("loss")
    watch = Watch(method, job.objective, rundir.events(run.path) if whole else (), start)

    def measure(state: Any) -> dict[str, float]:
        method.apply(model, state)
        return check.measure()

    def emit(event: Recorded) -> None:
        listener.event(dataclasses.replace(event, t=run.record(as_dict(event))["t"]))
        if isinstance(event, ClientReply):
            fleet.heard(event)
        if isinstance(event, RoundEvaluated) and event.round:
            check.of_round(
                event.round,
                event.values | ({} if event.objective is None else {"objective": event.objective}),
            )
        if (advice := watch.heard(event)) is not None:
            listener.note(advice.text)
            emit(advice)

    def begin() -> dict[str, float]:
        assert base is not None
        emit(describe.start(job, fleet.rows, params))
        for rate in job.found:
            emit(describe.rate(rate))
        emit(round_evaluated(0, base.measured))
        if found := _start(job, run, base, first, listener):
            watch.starts_at(found["loss"])
        return found or base.measured

    def resumed() -> None:
        listener.note(resumption.progress(run.path, recipe.rounds))
        if base is not None:
            listener.note(f"{run.path / EVALUATION} is damaged or gone: the base model has answered again")
            _start(job, run, base, first, listener)

    plan = rounds.RoundPlan(
        recipe.rounds, recipe.participation, recipe.quorum, recipe.seed, recipe.eval_every,
        bytes.fromhex(model.digest)[:8], stands_on, robust.parse(recipe.aggregation), recipe.over_selection,
        OLDEST if recipe.late == "use" else 0, recipe.patience, recipe.keep == "best",
    )  # fmt: skip
    hooks = rounds.Hooks(
        begin, measure, emit, resumed, listener.note, lambda: time.monotonic() - began, check.score
    )
    try:
        outcome = rounds.run(method, fleet, first, run, plan, hooks)
    except rounds.ModelLostError as lost:
        if lost.round:  # else there is only the base
            method.apply(model, lost.state)
            ARTEFACTS[job.entry.kind](job, run, lost.state, lost.round)
        raise
    return _finish(job, run, first, outcome, check, listener, began, meter)


def _first(job: TuneJob) -> Any:
    """Return the state before round 1; a ledger states the rule by which replies are combined."""
    state = job.method.init(job.model, derive(job.recipe.seed, "init"))
    rule = robust.parse(job.recipe.aggregation)
    if job.entry.kind != "ledger" or rule == robust.MEAN:
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
    measured = answers(job, run, "base", measured, rows)
    if own := per_client.chosen(job):
        _add_to_evaluation(run, {"per_client": own.record(base=own.losses(job))})
    return _Base(measured, rows, remarks.probe(job))


def _start(job: TuneJob, run: RunDir, base: _Base, first: Any, listener: Listener) -> dict[str, float]:
    """Where the first state is not the base model, measure it too, say so, and return its measures; else {}."""
    job.method.apply(job.model, first)
    if not remarks.starts_elsewhere(base.probed, remarks.probe(job)):
        return {}
    found, _ = validation.measure(job)
    _add_to_evaluation(run, {"start": found})
    listener.note(remarks.of_start(base.measured, found))
    return found


def _announce(job: TuneJob, run: RunDir, listener: Listener, fleet: str) -> None:
    """Write down what is run, and tell the listener."""
    recipe = job.recipe
    run.write("run.toml", recipes.to_toml(places.as_stated(recipe, run.path)))
    made_of = describe.of_model(job) | describe.of_data(job, run.path)
    before, now = places.record(run.path), rundir.environment(made_of)
    run.write(rundir.ENVIRONMENT, sealed.to_text(now) + "\n")
    row_digests.write(run, job.split.examples)
    listener.header(f"fleetune tune · {job.entry.name}", describe.header(job, run, fleet))
    for remark in (*map(remarks.of_rate, job.found), *job.about_time()[1:]):
        listener.note(remark)
    if told := resumption.changes(before, now):
        listener.note(told)
    clients = range(len(job.rows) or recipe.clients)
    asked = len(rounds.sample(clients, recipe.participation, recipe.seed, 1, recipe.over_selection))
    listener.progress("rounds", 0, recipe.rounds)
    listener.progress("clients", 0, asked)


def _finish(
    job: TuneJob,
    run: RunDir,
    first: Any,
    outcome: rounds.Outcome,
    check: validation.Validation,
    listener: Listener,
    began: float,
    meter: EnergyMeter | None,
) -> TuneDone:
    """Save and report the result; `first` is the state before round 1, `began` is when this sitting began."""
    state, totals = outcome.state, outcome.totals
    job.method.apply(job.model, state)
    measured, rows = validation.recorded(run.path, outcome.round), check.rows_of(outcome.round)
    elsewhere = not outcome.round and "start" in sealed.read(run.path / EVALUATION, "")
    if not measured or rows is None or elsewhere:
        measured, rows = validation.measure(job)
    tuned = answers(job, run, "tuned", measured, rows)
    clients = _after(job, run)
    result = ARTEFACTS[job.entry.kind](job, run, state, outcome.round)
    evaluation = sealed.read(run.path / EVALUATION, f"fleetune tune --resume {quoted(run.path)}")
    if evaluation["samples"]:
        run.write("samples.md", describe.samples_page(evaluation), private=True)
    change = check.against_base(rows)
    done = TuneDone(
        base=evaluation["base"], tuned=tuned, rows=len(job.held), run=str(run.path), rounds=outcome.last,
        bytes_up=totals.bytes_up, bytes_down=totals.bytes_down, seconds=round(totals.seconds, 3),
        wall=round(totals.wall + time.monotonic() - began, 3), peak_rss=peak_rss(), **result,
        per_client=clients, energy=meter.joules() if meter else None,
        **_about(job, run, (first, state), evaluation, tuned, result["digest"], outcome, change),
    )  # fmt: skip
    if job.entry.kind == "adapter":
        size = model_card.complete(Path(done.result), as_dict(done))
        done = dataclasses.replace(done, result_bytes=size)
    recorded = run.record(as_dict(done), last=True)
    run.status("done")
    report.write(run.path)
    done = dataclasses.replace(done, t=recorded["t"], report=str(run.path / "report.html"))
    listener.event(done)
    return done


def _after(job: TuneJob, run: RunDir) -> dict[str, Any] | None:
    """Measure the clients whose losses before are known; None where there are none.  eval.json gets the losses too."""
    before = sealed.read(run.path / EVALUATION, f"fleetune tune --resume {run.path}").get("per_client")
    own = per_client.chosen(job) if isinstance(before, dict) else None
    if own is None or not isinstance(before, dict):
        return None
    found = own.record(base=before["base"], tuned=own.losses(job))
    _add_to_evaluation(run, {"per_client": found})
    return found


def _about(
    job: TuneJob,
    run: RunDir,
    states: tuple[Any, Any],
    evaluation: dict[str, Any],
    tuned: dict[str, float],
    digest: str,
    outcome: rounds.Outcome,
    change: Difference | None,
) -> dict[str, Any]:
    """The fields of the last event that say what its figures mean."""
    start, base = evaluation.get("start"), evaluation["base"]
    stays = remarks.unmoved(*states, digest, job.model.digest)
    words = job.about_rows() + ([remarks.NEW_HEAD] if job.model.new_head else [])
    words += [remarks.of_start(base, start)] if start else []
    if outcome.last and not outcome.round:
        pass  # the start is kept as the best: `of_course` says so
    elif stays or remarks.shows_nothing(start or base, tuned):
        words.append(remarks.of_unmoved(job, run, stays=stays))
    elif word := remarks.of_change(job, start or base, tuned, change, outcome):
        words.append(word)
    words += remarks.of_course(job, outcome, tuned)
    answered = min(job.recipe.rouge_rows, len(job.prompts)) or None
    return {
        "start": start, "moved": not stays, "remarks": words, "answered": answered,
        "change_errors": {"loss": change.error} if change is not None and change.error is not None else None,
        "best": outcome.round if job.recipe.keep == "best" else None,
        "stopped_early": outcome.last < job.recipe.rounds or None,
    }  # fmt: skip


def _add_to_evaluation(run: RunDir, more: dict[str, Any]) -> None:
    content = sealed.read(run.path / EVALUATION, f"fleetune tune --resume {quoted(run.path)}") | more
    run.write(EVALUATION, sealed.to_text(content) + "\n", private=True)


def answers(
    job: TuneJob, run: RunDir, which: str, measured: dict[str, float], rows: RowLosses
) -> dict[str, float]:
    """Answer the fixed prompts with the model as it stands; put answers, measures and the rows' losses into eval.json.

    `which` is base or tuned.  Gives the measures, with Rouge-L if the recipe asks for it.
    """
    recipe = job.recipe
    prompts = job.prompts
    made = generate(job.model, prompts, max_new_tokens=recipe.answer_tokens) if prompts else []
    if recipe.rouge_rows:
        references = [e.response for e in prompts[: recipe.rouge_rows]]
        measured = measured | {"rouge_l": rouge_l(made[: recipe.rouge_rows], references)}
    content: dict[str, Any] = {"rows": len(job.held), "samples": _prompts(job)}
    if which == "tuned":
        content = sealed.read(run.path / EVALUATION, f"fleetune tune --resume {quoted(run.path)}")
    for sample, answer in zip(content["samples"], made, strict=False):
        sample[which] = answer
    content[which] = measured
    found = content.get(validation.LOSSES)
    content[validation.LOSSES] = (found or {}) | {"tokens": rows.counts, which: rows.sums}
    run.write(EVALUATION, sealed.to_text(content) + "\n", private=True)
    return measured


def _evaluation(path: Path, which: str) -> dict[str, Any]:
    """The content of a run's eval.json with the answers of `which`; {} where it is damaged or lacks them."""
    try:
        found = sealed.read(path / EVALUATION, "")
    except StorageError:
        return {}
    samples = found.get("samples")
    good = isinstance(samples, list) and all(isinstance(s, dict) and which in s for s in samples)
    return found if good and isinstance(found.get(which), dict) else {}


def _prompts(job: TuneJob) -> list[dict[str, str]]:
    return [
        {"prompt": e.messages[-1][1], "reference": e.response, "client": e.meta.get("client", "")}
        for e in job.prompts[: job.recipe.samples]
    ]


# What a run leaves behind, by the method's kind -----------------------------------------------------


def _ledger(job: TuneJob, run: RunDir, state: Any, round: int) -> dict[str, Any]:
    view = job.model.attachment
    assert isinstance(view, View)
    digest = models.digest(view.tensors())
    path = run.path / "ledger.safetensors"
    state.ledger.with_check(round, digest).save(path)
    return {
        "result": str(path),
        "result_bytes": path.stat().st_size,
        "digest": digest,
        "result_sha256": sums.sha256(path),
        "entries": len(state.ledger),
    }


def _adapter(job: TuneJob, run: RunDir, state: Any, round: int) -> dict[str, Any]:
    path = run.path / "adapter"
    adapters.save(job.model, path, private=True)
    size = sum(p.stat().st_size for p in path.iterdir())
    return {
        "result": str(path),
        "result_bytes": size,
        "digest": adapters.digest(state.tensors),
        "result_sha256": sums.sha256(path / sums.FILE),
    }


ARTEFACTS: dict[str, Callable[[TuneJob, RunDir, Any, int], dict[str, Any]]] = {
    "ledger": _ledger,
    "adapter": _adapter,
}
