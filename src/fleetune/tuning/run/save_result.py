# SPDX-License-Identifier: Apache-2.0
"""Save and report the result of a run: the ledger or adapter, the last answers and measures, the last event, the report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleetune import adapters, models, report
from fleetune.common import sums
from fleetune.common.events import TuneDone, as_dict
from fleetune.common.files import read_json
from fleetune.common.memory import peak_rss
from fleetune.common.paired import Difference
from fleetune.runs import metrics, rundir
from fleetune.runs.listener import Listener
from fleetune.runs.rundir import RunDir
from fleetune.seeds.view import View
from fleetune.tuning.prepare.prepare import TuneJob
from fleetune.tuning.rounds import rounds
from fleetune.tuning.run import describe, evaluation, model_card


def finish(
    job: TuneJob,
    run: RunDir,
    first: Any,
    outcome: rounds.Outcome,
    check: evaluation.Validation,
    listener: Listener,
    began: float,
) -> TuneDone:
    """Save and report the result; `first` is the state before round 1, `began` is when this sitting began, with its search."""
    state, totals = outcome.state, outcome.totals
    job.method.apply(job.model, state)
    measured, rows = evaluation.recorded(run.path, outcome.round), check.rows_of(outcome.round)
    elsewhere = not outcome.round and "start" in read_json(run.path / evaluation.EVALUATION, "")
    if not measured or rows is None or elsewhere:
        measured, rows = evaluation.measure(job)
    tuned = evaluation.answer(job, run, "tuned", measured, rows)
    clients = _clients(job, run)
    result = ARTEFACTS[job.entry.kind](job, run, state, outcome.round)
    record = evaluation.read(run)
    if record["samples"]:
        run.write("samples.md", describe.samples_page(record), private=True)
    change = check.against_base(rows)
    done = TuneDone(
        base=record["base"],
        tuned=tuned,
        rows=len(job.held),
        run=str(run.path),
        rounds=outcome.last,
        bytes_up=totals.bytes_up,
        bytes_down=totals.bytes_down,
        seconds=round(totals.seconds, 3),
        wall=round(totals.wall + time.monotonic() - began, 3),
        peak_rss=peak_rss(),
        **result,
        per_client=clients,
        **_about(job, run, (first, state), record, tuned, result["digest"], outcome, change),
    )
    if job.entry.kind == "adapter":
        size = model_card.complete(Path(done.result), as_dict(done))
        done = dataclasses.replace(done, result_bytes=size)
    recorded = run.record(as_dict(done))
    listed = Path(done.result).name + (f"/{sums.FILE}" if job.entry.kind == "adapter" else "")
    sums.write(run.path, ["run.toml", rundir.ENVIRONMENT, metrics.FILE, evaluation.EVALUATION, listed])
    run.status("done")
    report.write(run.path)
    done = dataclasses.replace(done, t=recorded["t"], report=str(run.path / "report.html"))
    listener.event(done)
    return done


def _clients(job: TuneJob, run: RunDir) -> dict[str, Any] | None:
    """Measure the clients whose losses before are known; None where there are none.  eval.json gets the losses too."""
    before = evaluation.read(run).get("per_client")
    own = evaluation.client_rows(job) if isinstance(before, dict) else None
    if own is None or not isinstance(before, dict):
        return None
    own = own.first(before["n"])
    found = own.record(base=before["base"], tuned=own.losses(job))
    evaluation.add(run, {"per_client": found})
    return found


def _about(
    job: TuneJob,
    run: RunDir,
    states: tuple[Any, Any],
    record: dict[str, Any],
    tuned: dict[str, float],
    digest: str,
    outcome: rounds.Outcome,
    change: Difference | None,
) -> dict[str, Any]:
    """The fields of the last event that say what its figures mean."""
    start, base = record.get("start"), record["base"]
    stays = describe.unmoved(*states, digest, job.model.digest)
    words = job.about_rows() + ([describe.NEW_HEAD] if job.model.new_head else [])
    words += [describe.of_start(base, start)] if start else []
    if outcome.last and not outcome.round:
        pass  # the start is kept as the best: `of_course` says so
    elif stays or describe.shows_nothing(start or base, tuned):
        words.append(describe.of_unmoved(job, run, stays=stays))
    elif word := describe.of_change(job, start or base, tuned, change, outcome):
        words.append(word)
    words += describe.of_course(job, outcome, tuned)
    answered = min(job.recipe.rouge_rows, len(job.prompts)) or None
    return {
        "start": start,
        "moved": not stays,
        "remarks": words,
        "answered": answered,
        "change_errors": {"loss": change.error} if change is not None and change.error is not None else None,
        "best": outcome.round if job.recipe.keep == "best" else None,
        "stopped_early": outcome.last < job.recipe.rounds or None,
    }


# What a run leaves behind, by the method's kind -----------------------------------------------------


def _ledger(job: TuneJob, run: RunDir, state: Any, round: int) -> dict[str, Any]:
    view = job.model.attachment
    assert isinstance(view, View)
    digest = models.digest(view.pieces())
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
