"""Measure the model of a run before and after, and keep answers, measures and the loss of every row in its eval.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from fleetune.common.display import quoted
from fleetune.common.files import json_text, read_json
from fleetune.common.paired import RowLosses
from fleetune.data import Encoded
from fleetune.data.partition import keyed_order
from fleetune.errors import StorageError
from fleetune.evaluation.answers import generate, rouge_l
from fleetune.evaluation.losses import all_row_losses
from fleetune.evaluation.measures import measure_rows
from fleetune.runs.rundir import RunDir
from fleetune.seeds.noise import derive
from fleetune.tuning.prepare import estimate
from fleetune.tuning.prepare.prepare import TuneJob, batch_size_of

EVALUATION: Final = "eval.json"
LOSSES: Final = "losses"  # in eval.json: tokens of each row, and loss sums of each under base and tuned
SEED: Final = "client rows"


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


# eval.json ----------------------------------------------------------------------------------------


def answer(
    job: TuneJob, run: RunDir, which: str, measured: dict[str, float], rows: RowLosses
) -> dict[str, float]:
    """Answer the fixed prompts with the model as it stands; put answers, measures and the rows' losses into eval.json.

    `which` is base or tuned.  Gives the measures, with Rouge-L if the recipe asks for it.
    """
    recipe, prompts = job.recipe, job.prompts
    # a prompt is cut as rows are: keys and values of one that is many times as long would be the peak of the run
    made: list[str] = []
    if prompts:
        most = recipe.answer_tokens
        made = generate(job.model, prompts, max_new_tokens=most, max_length=recipe.max_length)
    if recipe.rouge_rows:
        references = [e.response for e in prompts[: recipe.rouge_rows]]
        measured = measured | {"rouge_l": rouge_l(made[: recipe.rouge_rows], references)}
    if which == "tuned":
        content = read(run)
    else:
        named = [
            {"prompt": e.messages[-1][1], "reference": e.response, "client": e.meta.get("client", "")}
            for e in prompts[: recipe.samples]
        ]
        content = {"rows": len(job.held), "samples": named}
    for sample, text in zip(content["samples"], made, strict=False):
        sample[which] = text
    losses = content.get(LOSSES) or {}
    content |= {which: measured, LOSSES: losses | {"tokens": rows.counts, which: rows.sums}}
    run.write(EVALUATION, json_text(content), private=True)
    return measured


def read(run: RunDir) -> dict[str, Any]:
    """Return the content of eval.json; StorageError when it is damaged or gone."""
    return read_json(run.path / EVALUATION, f"fleetune tune --resume {quoted(run.path)}")


def add(run: RunDir, more: dict[str, Any]) -> None:
    """Put more into eval.json; StorageError when it is damaged or gone."""
    run.write(EVALUATION, json_text(read(run) | more), private=True)


def of_base(path: Path) -> dict[str, Any]:
    """Return the content of the eval.json of the run at `path`; {} where it is damaged or lacks the base's answers."""
    try:
        content = read_json(path / EVALUATION, "")
    except StorageError:
        return {}
    samples = content.get("samples")
    good = isinstance(samples, list) and all(isinstance(s, dict) and "base" in s for s in samples)
    return content if good and isinstance(content.get("base"), dict) else {}


def losses_in(content: Mapping[str, Any], which: str) -> RowLosses | None:
    """Return the losses of the rows under base or tuned, as an eval.json has them; None where it has none."""
    try:
        sums, counts = content[LOSSES][which], content[LOSSES]["tokens"]
        losses = RowLosses([float(v) for v in sums], [int(n) for n in counts])
    except (KeyError, TypeError, ValueError):
        return None
    return losses if len(sums) == len(counts) else None


# Each client's own loss ---------------------------------------------------------------------------


def client_rows(job: TuneJob) -> tuple[str, list[list[Encoded]]] | None:
    """Return (held-out or training, the rows of each client on which its loss is measured).

    They are the client's held-out ones where every client has some (`column:COLUMN`), else rows that it trains on: a
    function of the recipe and the rows alone, so a resumed run measures the same ones.  None where the recipe wants none,
    or there are no simulated clients, or too many.
    """
    most = estimate.client_rows_of_each(job.recipe, [len(rows) for rows in job.rows])
    if not most:
        return None
    held = _held_out(job)
    if held and min(map(len, held)) >= min(estimate.LEAST_CLIENT_ROWS, most):
        return "held-out", [own[:most] for own in held]
    key = derive(job.recipe.seed, SEED)
    return "training", [
        [own[i] for i in keyed_order(key, c, len(own))[:most]] for c, own in enumerate(job.rows)
    ]


def client_losses(job: TuneJob, rows: Sequence[Sequence[Encoded]]) -> list[float]:
    """Return each client's mean loss (nats per token of the answers; of an encoder per row), of the model as it stands."""
    sums, counts = all_row_losses(job.model, [row for own in rows for row in own], 8)
    ends = np.cumsum([len(own) for own in rows])[:-1]
    pairs = zip(np.split(sums, ends), np.split(counts, ends), strict=True)
    return [float(s.sum() / max(1, n.sum())) for s, n in pairs]


def _held_out(job: TuneJob) -> list[list[Encoded]]:
    """Return the held-out rows of each client; [] where the clients are not the values of a column."""
    parts = job.split
    by_column = parts.column and job.recipe.partition.startswith("column")
    if not by_column or len(job.held) != len(job.examples):  # long texts are several rows each
        return []
    assert parts.column is not None
    names = [parts.examples[int(part[0])].meta.get(parts.column) for part in parts.clients]
    own: dict[object, list[Encoded]] = {name: [] for name in names}
    for row, example in zip(job.held, job.examples, strict=True):
        if (name := example.meta.get(parts.column)) in own:
            own[name].append(row)
    return [own[name] for name in names]
