"""Save and report the result of a run: the ledger or adapter, the last answers and measures, the last event, the report."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

from fleetune import adapters, models
from fleetune.common import sums
from fleetune.common.events import TuneDone, as_dict
from fleetune.common.memory import peak_rss
from fleetune.common.paired import Difference, RowLosses, difference
from fleetune.report import single
from fleetune.runs import rundir
from fleetune.runs.listener import Listener
from fleetune.runs.rundir import RunDir
from fleetune.seeds.view import View
from fleetune.tuning.prepare import private
from fleetune.tuning.prepare.prepare import TuneJob
from fleetune.tuning.rounds import rounds
from fleetune.tuning.run import describe, evaluation, model_card


def finish(
    job: TuneJob,
    run: RunDir,
    first: Any,
    outcome: rounds.Outcome,
    measured: tuple[dict[str, float], RowLosses],
    base_rows: RowLosses | None,
    listener: Listener,
    began: float,
) -> TuneDone:
    """Save and report the result, the model as it stands, of these measures.

    `first` is the state before round 1, `began` is when this sitting began, with its search.
    """
    state, totals = outcome.state, outcome.totals
    tuned = evaluation.answer(job, run, "tuned", *measured)
    clients = _clients(job, run)
    result = save(job, run, state, outcome.round, outcome.last, outcome.releases)
    record = evaluation.read(run)
    if record["samples"]:
        run.write("samples.md", describe.samples_page(record), private=True)
    change = None if base_rows is None else difference(base_rows, measured[1])
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
    sums.write(run.path, ["run.toml", rundir.ENVIRONMENT, rundir.METRICS, evaluation.EVALUATION, listed])
    run.status("done")
    single.write(run.path)
    done = dataclasses.replace(done, t=recorded["t"], report=str(run.path / "report.html"))
    listener.event(done)
    return done


def _clients(job: TuneJob, run: RunDir) -> dict[str, Any] | None:
    """Measure the clients whose losses before are known; None where there are none.  eval.json gets the losses too."""
    before, chosen = evaluation.read(run).get("per_client"), evaluation.client_rows(job)
    if not isinstance(before, dict) or chosen is None:
        return None
    # those of a run with fewer rounds
    own = [rows[:n] for rows, n in zip(chosen[1], before["n"], strict=True)]
    after = {**before, "tuned": evaluation.client_losses(job, own)}
    evaluation.add(run, {"per_client": after})
    return after


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
    start, base = record.get("start"), record["base"]
    stays = describe.unmoved(*states, digest, job.model.digest)
    words = job.about_rows() + ([describe.NEW_HEAD] if job.model.new_head else [])
    words += [describe.of_start(base, start)] if start else []
    if outcome.last and not outcome.round:
        pass  # the start is kept as the best: `of_course` says so
    elif stays or math.isclose((start or base)["loss"], tuned["loss"], rel_tol=describe.NOISE):
        words.append(describe.of_unmoved(job, run, stays=stays))
    elif word := describe.of_change(job, start or base, tuned, change, outcome):
        words.append(word)
    words += describe.of_course(job, outcome, tuned)
    if account := private.account(job):
        words.append(account.statement(outcome.last, outcome.releases))
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


def save(job: TuneJob, run: RunDir, state: Any, round: int, played: int, released: int) -> dict[str, Any]:
    """Write the ledger or the adapter of a state; return the fields of the last event that say where, and what it is.

    `round` is the state's; of a private run as many as `played` have spent privacy, in so many releases.
    """
    if job.entry.kind == "adapter":
        path = run.path / "adapter"
        adapters.save(job.model, path, private=True)
        size = sum(p.stat().st_size for p in path.iterdir())
        digest, listed, more = adapters.digest(state.tensors), path / sums.FILE, {}
    else:
        view, path = job.model.attachment, run.path / "ledger.safetensors"
        assert isinstance(view, View)
        digest, listed, more = models.digest(view.pieces()), path, {"entries": len(state.ledger)}
        ledger = state.ledger
        if account := private.account(job):
            head = dataclasses.replace(ledger.head, privacy=account.statement(played, released))
            ledger = dataclasses.replace(ledger, head=head)
        ledger.with_check(round, digest).save(path)
        size = path.stat().st_size
    sha256 = sums.sha256(listed)
    return {"result": str(path), "result_bytes": size, "digest": digest, "result_sha256": sha256, **more}
