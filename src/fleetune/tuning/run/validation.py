# SPDX-License-Identifier: Apache-2.0
"""Measure the model of a run on its held-out rows, and compare it with the base row by row.

The loss of every row, of base and result, is kept in the run's eval.json (`losses`): so it can be said how sure the change
is (`common/paired.py`), later also between two runs on the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetune.common.paired import Difference, RowLosses, difference
from fleetune.evaluation.measures import measure_rows
from fleetune.runs import rundir
from fleetune.tuning.prepare.prepare import batch_size_of

if TYPE_CHECKING:
    from fleetune.tuning.prepare.prepare import TuneJob

LOSSES: Final = "losses"  # in eval.json: tokens of each row, and loss sums of each under base and tuned
MEASURES: Final = ("loss", "accuracy", "objective")


def measure(job: TuneJob) -> tuple[dict[str, float], RowLosses]:
    """Measure the model as it stands on the held-out rows; also the loss of each row."""
    return measure_rows(
        job.model,
        job.held,
        job.examples,
        job.words,
        job.recipe.max_length,
        objective=job.objective,
        batch_size=batch_size_of(job.method),
    )


def score(objective: str, measured: Mapping[str, float]) -> float | None:
    """Return what of a round's measures is to be low: what the run minimises, else the loss; None where it is not there."""
    kind = objective.partition(":")[0]
    if kind == "accuracy" and "accuracy" in measured:
        return -measured["accuracy"]
    return measured.get("loss" if kind == "loss" else "objective", measured.get("loss"))


def losses_in(evaluation: Mapping[str, Any], which: str) -> RowLosses | None:
    """Return the losses of the rows under base or tuned, as an eval.json has them; None where it has none."""
    found = evaluation.get(LOSSES)
    try:
        sums, counts = found[which], found["tokens"]  # type: ignore[index]
        return (
            RowLosses([float(v) for v in sums], [int(n) for n in counts])
            if len(sums) == len(counts)
            else None
        )
    except (KeyError, TypeError, ValueError):
        return None


class Validation:
    """The measures of a run round by round; the rows' losses of the last round and of the best are at hand."""

    def __init__(self, job: TuneJob, base: RowLosses | None) -> None:
        self.job, self.base = job, base
        self._rows: RowLosses | None = None
        self._last: tuple[int, RowLosses] | None = None
        self._best: tuple[float, int, RowLosses] | None = None

    def measure(self) -> dict[str, float]:
        """Measure the model as it stands; `change_error` is that of the loss against the base."""
        measured, self._rows = measure(self.job)
        found = self.against_base(self._rows)
        return measured if found is None or found.error is None else measured | {"change_error": found.error}

    def against_base(self, rows: RowLosses) -> Difference | None:
        """Return the difference of the loss from the base's; None where the base's rows are not known."""
        return None if self.base is None else difference(self.base, rows)

    def score(self, measured: Mapping[str, float]) -> float | None:
        """Return what of the measures is to be low."""
        return score(self.job.objective, measured)

    def of_round(self, round: int, measured: Mapping[str, float]) -> None:
        """Note that the last measures are those of a round."""
        if self._rows is None:
            return
        found = self.score(measured)
        self._last = round, self._rows
        if found is not None and (self._best is None or found < self._best[0]):
            self._best = found, round, self._rows

    def rows_of(self, round: int) -> RowLosses | None:
        """Return the losses of the rows after a round (0: of the base), where they are at hand."""
        if not round:
            return self.base
        if self._last is not None and self._last[0] == round:
            return self._last[1]
        return self._best[2] if self._best is not None and self._best[1] == round else None


def recorded(run: Path, round: int) -> dict[str, float]:
    """The measures after a round, as they are recorded; {} where that line was lost."""
    last = [e for e in rundir.events(run) if e["event"] == "eval" and e.get("round") == round][-1:]
    return {name: e[name] for e in last for name in MEASURES if name in e}
