# SPDX-License-Identifier: Apache-2.0
"""Keep a run's eval.json: answers, measures and losses of every row, under the base and the tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from fleetune.common.files import json_text, read_json
from fleetune.common.paired import RowLosses
from fleetune.common.shell import quoted
from fleetune.errors import StorageError
from fleetune.evaluation.answers import generate, rouge_l
from fleetune.runs.rundir import RunDir
from fleetune.tuning.prepare.prepare import TuneJob
from fleetune.tuning.run import validation

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
    found = content.get(validation.LOSSES)
    content[validation.LOSSES] = (found or {}) | {"tokens": rows.counts, which: rows.sums}
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
