# SPDX-License-Identifier: Apache-2.0
"""Measure the model of a run on its held-out rows, and compare it with the base row by row.

The loss of every row, of base and result, is kept in the run's eval.json (`losses`): so it can be said how sure the change
is (`common/paired.py`), later also between two runs on the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fleetune.common.files import json_text, read_json
from fleetune.common.paired import Difference, RowLosses, difference
from fleetune.common.shell import quoted
from fleetune.data import Encoded
from fleetune.data.partition import keyed_order
from fleetune.errors import StorageError
from fleetune.evaluation.answers import generate, rouge_l
from fleetune.evaluation.losses import all_row_losses
from fleetune.evaluation.measures import measure_rows
from fleetune.runs import rundir
from fleetune.runs.rundir import RunDir
from fleetune.seeds.noise import derive
from fleetune.tuning.prepare import estimate
from fleetune.tuning.prepare.prepare import TuneJob, batch_size_of

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


SEED: Final = "client rows"


@dataclass(frozen=True)
class ClientRows:
    """The rows that are measured: those of every client, in order, and whether they are held out or trained on."""

    rows: Sequence[Sequence[Encoded]]
    kind: str  # held-out or training

    def first(self, counts: Sequence[int]) -> ClientRows:
        """Return the first so many rows of each client: what a run measured that had fewer rounds."""
        return ClientRows([own[:n] for own, n in zip(self.rows, counts, strict=True)], self.kind)

    def losses(self, job: TuneJob) -> list[float]:
        """Return each client's mean loss (nats per token of the answers; of an encoder per row), of the model as it stands."""
        every = [row for own in self.rows for row in own]
        sums, counts = all_row_losses(job.model, every, 8)
        ends = np.cumsum([len(own) for own in self.rows])[:-1]
        pairs = zip(np.split(sums, ends), np.split(counts, ends), strict=True)
        return [float(s.sum() / max(1, n.sum())) for s, n in pairs]

    def record(self, **losses: list[float]) -> dict[str, Any]:
        """Return what eval.json keeps: the kind of the rows, their number, and the `losses` that are known."""
        return {"rows": self.kind, "n": [len(own) for own in self.rows], **losses}


def client_rows(job: TuneJob) -> ClientRows | None:
    """Return the rows to measure; None where the recipe wants none, or there are no simulated clients, or too many."""
    most = estimate.client_rows_of_each(job.recipe, [len(rows) for rows in job.rows])
    if not most:
        return None
    held = _held_out(job)
    if held and min(map(len, held)) >= min(estimate.LEAST_CLIENT_ROWS, most):
        return ClientRows([own[:most] for own in held], "held-out")
    key = derive(job.recipe.seed, SEED)
    picked = [[own[i] for i in keyed_order(key, c, len(own))[:most]] for c, own in enumerate(job.rows)]
    return ClientRows(picked, "training")


def _held_out(job: TuneJob) -> list[list[Encoded]]:
    """Return the held-out rows of each client; [] where the clients are not the values of a column."""
    parts = job.split
    if not parts.column or not job.recipe.partition.startswith("column"):
        return []
    if len(job.held) != len(job.examples):  # long texts are several rows each
        return []
    names = [parts.examples[int(part[0])].meta.get(parts.column) for part in parts.clients]
    own: dict[object, list[Encoded]] = {name: [] for name in names}
    for row, example in zip(job.held, job.examples, strict=True):
        if (name := example.meta.get(parts.column)) in own:
            own[name].append(row)
    return [own[name] for name in names]


EVALUATION: Final = "eval.json"


def answer(
    job: TuneJob, run: RunDir, which: str, measured: dict[str, float], rows: RowLosses
) -> dict[str, float]:
    """Answer the fixed prompts with the model as it stands; put answers, measures and the rows' losses into eval.json.

    `which` is base or tuned.  Gives the measures, with Rouge-L if the recipe asks for it.
    """
    recipe = job.recipe
    prompts = job.prompts
    # a prompt is cut as rows are: keys and values of one that is many times as long would be the peak of the run
    made = (
        generate(job.model, prompts, max_new_tokens=recipe.answer_tokens, max_length=recipe.max_length)
        if prompts
        else []
    )
    if recipe.rouge_rows:
        references = [e.response for e in prompts[: recipe.rouge_rows]]
        measured = measured | {"rouge_l": rouge_l(made[: recipe.rouge_rows], references)}
    content: dict[str, Any] = {"rows": len(job.held), "samples": _prompts(job)}
    if which == "tuned":
        content = read(run)
    for sample, text in zip(content["samples"], made, strict=False):
        sample[which] = text
    content[which] = measured
    found = content.get(LOSSES)
    content[LOSSES] = (found or {}) | {"tokens": rows.counts, which: rows.sums}
    run.write(EVALUATION, json_text(content), private=True)
    return measured


def read(run: RunDir) -> dict[str, Any]:
    """Return the content of eval.json; StorageError when it is damaged or gone."""
    return read_json(run.path / EVALUATION, f"fleetune tune --resume {quoted(run.path)}")


def add(run: RunDir, more: dict[str, Any]) -> None:
    """Put more into eval.json; StorageError when it is damaged or gone."""
    run.write(EVALUATION, json_text(read(run) | more), private=True)


def having(path: Path, which: str) -> dict[str, Any]:
    """Return the content of the eval.json of the run at `path`; {} where it is damaged or lacks answers of `which`."""
    try:
        found = read_json(path / EVALUATION, "")
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
