# SPDX-License-Identifier: Apache-2.0
"""Say what a reader must know about a run's figures: what the base is, where training began, whether anything moved.

The base row is the model with nothing attached to it.  Some modules (a prefix, a soft prompt) start as random numbers that
change what the model says; then the measures at that start are reported too, since the rounds set out from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fleetune.common.display import change as change_text
from fleetune.common.display import counted, human_time, show
from fleetune.common.paired import Difference
from fleetune.evaluation.losses import class_measures, response_loss
from fleetune.runs import rundir
from fleetune.runs.rundir import RunDir
from fleetune.seeds.weights import FOLD
from fleetune.tuning.rounds import watch

if TYPE_CHECKING:
    from fleetune.tuning.methods import Method
    from fleetune.tuning.prepare.prepare import TuneJob
    from fleetune.tuning.prepare.rates import Found
    from fleetune.tuning.rounds.rounds import Outcome

NEW_HEAD: Final = "the classification head is new and starts at random: the base row is of the encoder with that untrained head"
PROBE: Final = 8  # held-out rows that tell whether the start is the base
NOISE: Final = 1e-7  # of a loss, relative: kernels differ by less
PAST: Final = 0.01  # of the lowest validation loss: a result above it by more is past its best
SAME: Final = 1e-3  # nats; kernels differ by less, a random module makes more


def of_rate(found: Found) -> str:
    """Say which learning rate was found, and how."""
    return f"{found.setting} = {found.rate:g}, found in {human_time(found.seconds)}: {found.why}"


def of_law(method: Method) -> str:
    """Say that a law's directions are slow; "" where they are not."""
    law, K = getattr(method, "law", ""), getattr(method, "K", 0)
    if law != "gaussian" or K <= FOLD:
        return ""
    return (
        f"slow: every forward may compute {K:,} gaussian directions, whose sums are not kept; those of other laws are kept as "
        "one sum"
    )


def probe(job: TuneJob) -> float:
    """Return the loss (nats) of the model as it stands, on a few held-out rows."""
    few = job.held[:PROBE]
    return class_measures(job.model, few)[0] if job.model.labels else response_loss(job.model, few)


def starts_elsewhere(before: float, after: float) -> bool:
    """Whether attaching the untrained module has changed the loss of `probe`."""
    return not math.isclose(before, after, rel_tol=SAME, abs_tol=SAME)


def of_start(base: Mapping[str, float], start: Mapping[str, float]) -> str:
    """Say that the rounds set out from another loss than the base's."""
    return (
        f"the untrained module changes the model: its loss is {show('loss', start['loss'])} with it and "
        f"{show('loss', base['loss'])} without. Training starts at the former; the base row is the latter"
    )


def unmoved(first: Any, last: Any, digest: str, base: str) -> bool:
    """Whether a method's last state is its first one: the same tensors, or a ledger that leaves the base's weights.

    `digest` is the result's; `base` that of the base model.
    """
    if not hasattr(last, "tensors"):
        return digest == base
    return all(np.array_equal(tensor, first.tensors.get(name)) for name, tensor in last.tensors.items())


def shows_nothing(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether the validation loss is what it was, but for float noise."""
    return math.isclose(before["loss"], after["loss"], rel_tol=NOISE)


def of_unmoved(job: TuneJob, run: RunDir, *, stays: bool) -> str:
    """Say that nothing moved (`stays`) or that nothing shows, with the cause where the events tell it, and what to do."""
    events = list(rundir.events(run.path))
    replies = [e for e in events if e["event"] == "client"]
    good = [e for e in replies if e.get("status") == "ok"]
    counting = sum(e.get("accepted", 0) >= job.recipe.quorum for e in events if e["event"] == "round")
    if not good:
        why, remedy = f"none of {counted(len(replies), 'client')} gave a good reply", "see log.txt"
    elif not counting:
        why, remedy = f"no round had {_good(job.recipe.quorum)}", "lower --quorum"
    else:
        change = "no change of any weight" if stays else "a change too small to show"
        why = f"{_good(len(good))} added up to {change}"
        remedy = "raise the learning rate (--set lr=..), or the local steps and --rounds"
        if job.objective != "loss":
            remedy += "; an objective that gives equal values at two near points moves nothing: raise batch_size or eps"
    return f"{'nothing moved' if stays else 'the validation loss did not move'}: {why}; {remedy}"


def _good(replies: int) -> str:
    return counted(replies, "good reply", "good replies")


def of_change(
    job: TuneJob,
    before: Mapping[str, float],
    after: Mapping[str, float],
    change: Difference | None,
    outcome: Outcome,
) -> str:
    """Say that the validation loss rose, or that its change is within noise; "" where it fell by more."""
    if change is None or not math.isfinite(after["loss"]):
        return ""
    rows = counted(change.rows, "held-out row")
    if change.error is None:
        return f"{rows} cannot tell a change from noise: hold more out (--held-out, --eval-rows)"
    if change.noise:
        return (
            f"the change of the validation loss is within noise: two standard errors are {2 * change.error:.3f} on {rows}; "
            + (
                "tune longer or with a higher learning rate, or hold more rows out"
                if not _past_best(job, outcome, after)
                else watch.advice(job.method, 3)
            )
        )
    if after["loss"] <= before["loss"] or job.objective != "loss":
        return ""
    shown = change_text("loss", before["loss"], after["loss"], change.error)
    return f"the validation loss rose ({shown} on {rows}): {watch.advice(job.method, 3)}"


def _past_best(job: TuneJob, outcome: Outcome, after: Mapping[str, float]) -> bool:
    """Whether an earlier round had a clearly lower validation loss than the result."""
    best = outcome.course
    known = best.best is not None and job.objective == "loss" and math.isfinite(after["loss"])
    return known and (best.best or 0) < outcome.round and after["loss"] - best.score > PAST * abs(best.score)


def of_course(job: TuneJob, outcome: Outcome, after: Mapping[str, float]) -> list[str]:
    """Say which round's model the result is, and that the run was stopped before its last round."""
    recipe, found = job.recipe, []
    early = ", stopped early" if outcome.last < recipe.rounds else ""
    if _past_best(job, outcome, after) and not early:
        found.append(
            f"round {outcome.course.best} was the best ({show('loss', outcome.course.score)}), and the loss rose since: "
            "--keep best keeps its model, --patience ends a run there"
        )
    if recipe.keep == "best":
        best = f"round {outcome.round}" if outcome.round else "the start, since no round was better"
        found.append(f"the result is the best of {counted(outcome.last, 'round')}{early}: {best}")
    elif early:
        found.append(
            f"stopped early after round {outcome.last} of {recipe.rounds}: "
            f"{counted(outcome.course.stale, 'evaluated round')} in a row no better than round {outcome.course.best}"
            + (
                "; --keep best would have kept that round's model"
                if outcome.course.best != outcome.last
                else ""
            )
        )
    return found
