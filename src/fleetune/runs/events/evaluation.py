# SPDX-License-Identifier: Apache-2.0
"""Report the measures of one model, for `eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fleetune.common import paired
from fleetune.common.paired import RowLosses
from fleetune.runs.events.base import Compared


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A metric of a task of lm-evaluation-harness, in the harness's own unit (an accuracy is a share of 1)."""

    task: str  # name of the task, group or tag
    metric: str  # name of the metric
    filter: str  # how answers were read; none for as they are
    value: float  # of the metric
    stderr: float | None  # standard error, as the harness states it; null where it states none
    rows: int | None  # questions asked; null for a group of tasks, as the next two
    of: int | None  # questions that the task has
    shots: int | None  # examples before each question
    version: str | None  # of the task
    higher_is_better: bool | None  # null where the harness does not say


@dataclass(frozen=True, kw_only=True)
class EvalDone(Compared):
    """`eval`: the measures of one model."""

    event: ClassVar[str] = "eval"
    model: str  # as a command takes it
    rows: int  # number of rows measured
    of: int  # number of rows there are; more than `rows` where a limit left some out
    max_length: int  # tokens of a row at most: those of the run that the model comes from
    loss_error: float | None = None  # standard error of the loss, over the rows
    base_loss: float | None = None  # of a run: loss of its base model on the same rows
    change_error: float | None = None  # standard error of `loss` less `base_loss`, taken row by row
    harness: Sequence[TaskScore] | None = None  # of the tasks of lm-evaluation-harness


def evaluated(
    model: str,
    rows: int,
    measures: Mapping[str, float],
    *,
    of: int,
    max_length: int,
    rows_of: tuple[RowLosses | None, RowLosses | None] = (None, None),
    harness: Sequence[TaskScore] = (),
) -> EvalDone:
    """The event for the measures of one model on the first `rows` of so many rows, and of tasks of the harness.

    `rows_of` are the losses of the rows under the base model and under this one, where they were measured.
    """
    values: dict[str, Any] = dict(measures)
    base, own = rows_of
    if own is not None:
        values["loss_error"] = paired.ratio(own.sums, own.counts)[1]
    if base is not None and own is not None:
        change = paired.difference(base, own)
        values |= {
            "base_loss": paired.ratio(base.sums, base.counts)[0],
            "change_error": change and change.error,
        }
    return EvalDone(
        model=model, rows=rows, of=of, max_length=max_length, harness=tuple(harness) or None, **values
    )
