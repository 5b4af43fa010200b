# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model on held-out rows by named tasks: loss, perplexity, accuracy, scores of answers.

Losses are in nats a token (`losses.py`), scores of answers (`answers.py`) in percent.

Other names are tasks of lm-evaluation-harness, with its own standard errors.
The harness (`lm_eval`, extra `fleetune[lm-eval]`) is imported when a task of it is asked for.  It runs the model as it is in
memory: base, view of a ledger or adapter.  Its tasks bring data from the Hub unless they are files of this machine.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np

from fleetune.common.events import TaskScore
from fleetune.common.paired import RowLosses
from fleetune.common.shell import pip_install
from fleetune.data.encode import Encoded, begun, encode_rows
from fleetune.data.read_rows import Example
from fleetune.errors import FleetuneError, RecipeError, UsageError, closest, cut_reason, fault
from fleetune.evaluation import objectives
from fleetune.evaluation.answers import (
    exact_match,
    generate,
    label_accuracy,
    require_text_model,
    rouge_l,
    token_f1,
)
from fleetune.evaluation.losses import OnRows, all_row_losses, class_rows, perplexity, token_mean, unheard
from fleetune.models.net.model import Model

TASKS: Final = ("loss", "rouge_l", "f1", "exact_match", "accuracy", "perplexity")
_SHORT = MappingProxyType({"rouge": "rouge_l", "em": "exact_match", "acc": "accuracy", "ppl": "perplexity"})


def is_known(task: str) -> bool:
    """Whether a task, or its short name, is one of `TASKS`."""
    return task in TASKS or task in _SHORT


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks' full names, each once; RecipeError naming every unknown one, with the nearest known."""
    names = tuple(dict.fromkeys(_SHORT.get(task, task) for task in tasks))
    _require(names, TASKS, f"the tasks are {', '.join(TASKS)}")
    return names


def _require(names: Iterable[str], known: Collection[str], hint: str) -> None:
    """Raise RecipeError that names every name which is not known, with the nearest known one."""
    near = {name: closest(name, known) for name in names if name not in known}
    if near:
        problems = [f"unknown task {n!r}" + (f"; did you mean {c!r}?" if c else "") for n, c in near.items()]
        raise RecipeError(problems, hint=hint)


class Evaluated(NamedTuple):
    """Measures by name, and the losses of the rows, None where "loss" is not among the tasks."""

    values: dict[str, float]
    rows: RowLosses | None


def evaluate(
    model: Model,
    examples: Sequence[Example],
    tasks: Sequence[str] = (),
    *,
    max_length: int = 512,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    answer_rows: int | None = None,
    labels: Sequence[str] = (),
    texts: Sequence[str] = (),
    told: Callable[[str], OnRows] = lambda what: unheard,
) -> Evaluated:
    """Return task name -> value on held-out `examples`: loss in nats, perplexity, the rest in percent.

    `tasks` are keys of `TASKS` or their short names (rouge, em, acc, ppl); by default loss and rouge_l, of an
    encoder loss and accuracy (it has no others), and perplexity where there are `texts` (alone where there
    are no examples).  `answer_rows`: how many examples, from the first, are answered for rouge_l, f1 and
    exact_match (default: all; answers are the slow part).
    `labels`: the label words of "accuracy" (default: the different responses).  `texts`: what "perplexity"
    reads (default: the responses).  `told` gives for what is counted ("rows", "answers") what is called after each batch.
    RecipeError for an unknown task, DataError for rows that do not fit one.
    """
    of_rows = ("loss", "accuracy" if model.labels else "rouge_l") if examples or not texts else ()
    names = check_tasks(tasks or (*of_rows, *(["perplexity"] if texts else [])))
    for name in names:
        if name not in ("loss", "accuracy"):
            require_text_model(model, f"task '{name}'")
    answered = [begun(example) for example in examples[:answer_rows]]

    @functools.cache
    def losses() -> tuple[np.ndarray, np.ndarray]:
        rows, _ = encode_rows(model, examples, max_length)
        return all_row_losses(model, rows, batch_size, told("rows"))

    @functools.cache
    def answers() -> tuple[
        list[str], list[str]
    ]:  # made once for all tasks that need them, and the references
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        made = generate(model, answered, on_rows=told("answers"), **how)
        return made, [example.response for example in answered]

    def read() -> float:
        responses = [example.response for example in examples]
        return perplexity(model, texts or responses, on_rows=told("rows of the text"))

    measure: Mapping[str, Callable[[], float]] = {
        "loss": lambda: token_mean(*losses()),
        "rouge_l": lambda: rouge_l(*answers()),
        "f1": lambda: token_f1(*answers()),
        "exact_match": lambda: exact_match(*answers()),
        "accuracy": lambda: label_accuracy(
            model, examples, labels, max_length=max_length, batch_size=batch_size
        ),
        "perplexity": read,
    }
    values = {name: measure[name]() for name in names}
    return Evaluated(values, row_losses_of(*losses()) if "loss" in names else None)


def row_losses_of(sums: np.ndarray, counts: np.ndarray) -> RowLosses:
    """Return what `losses.all_row_losses` gives as plain numbers."""
    return RowLosses(sums.tolist(), counts.tolist())


def measure_rows(
    model: Model,
    rows: Sequence[Encoded],
    examples: Sequence[Example],
    labels: Sequence[str],
    max_length: int,
    *,
    objective: str = "loss",
    batch_size: int = 8,
) -> tuple[dict[str, float], RowLosses]:
    """Return what a run measures at every evaluation: loss of the held-out rows, accuracy by label words, its objective.

    Also the loss of each row.

    An encoder always has an accuracy, a causal model where `labels` are given.  `rows` are the encoded `examples`.
    An objective (`objectives.py`) that is neither the loss nor this accuracy is averaged over batches of `batch_size`.
    """
    if model.labels:
        losses, right = class_rows(model, rows)
        found = row_losses_of(losses, np.ones(len(losses), np.int64))
        measured = {"loss": float(losses.mean()), "accuracy": 100.0 * float(right.mean())}
    else:
        sums, counts = all_row_losses(model, rows, 8)
        found, measured = row_losses_of(sums, counts), {"loss": token_mean(sums, counts)}
        if labels:
            measured["accuracy"] = label_accuracy(model, examples, labels, max_length=max_length)
    kind = objective.partition(":")[0]
    if kind != "loss" and (kind != "accuracy" or "accuracy" not in measured):
        measured["objective"] = objectives.mean_value(model, rows, objective, batch_size=batch_size)
    return measured, found


# --- lm-evaluation-harness ----------------------------------------------------------------------------------

BATCH: Final = 8  # questions at a time
INSTALL: Final = pip_install("lm-eval")


def installed() -> bool:
    """Whether the harness is there."""
    return importlib.util.find_spec("lm_eval") is not None


def divided(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide task names into Fleetune's own and others, which only the harness may have."""
    return [t for t in tasks if is_known(t)], [t for t in tasks if not is_known(t)]


class HarnessTasks:
    """Tasks of the harness, found by name; checked before a model is loaded."""

    def __init__(self, names: Sequence[str], files: str | Path | None = None) -> None:
        """`files` is a folder with task files (YAML) of one's own.

        UsageError without the harness or the folder; RecipeError that lists every unknown name.
        """
        self.names = list(dict.fromkeys(names))
        if not installed():
            hint = f"the tasks are {', '.join(TASKS)}; for those of lm-evaluation-harness: {INSTALL}"
            _require(self.names, TASKS, hint)
        if files is not None and not Path(files).is_dir():
            raise UsageError(f"no folder of task files at {files}", hint="check the path")
        self._manager = self._find(files)

    def _find(self, files: str | Path | None) -> Any:
        """The harness's index of tasks that has all names; the one of its own tasks takes seconds to read."""
        from lm_eval.tasks import TaskManager

        given = str(files) if files is not None else None
        own = TaskManager(include_path=given, include_defaults=False) if given else None
        if own is not None and all(name in own.all_tasks for name in self.names):
            return own
        every = TaskManager(include_path=given)
        hint = f"the tasks are {', '.join(TASKS)}, and those of lm-evaluation-harness: lm_eval ls tasks"
        _require(self.names, [*TASKS, *every.all_tasks], hint)
        return every

    def evaluate(self, model: Model, *, limit: int) -> list[TaskScore]:
        """Run the model on at most `limit` questions of each task; the scores in the order of the harness.

        DataError for an encoder; FleetuneError for what the harness raises, such as data that cannot be fetched.
        """
        require_text_model(model, f"task '{self.names[0]}'")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        for noisy in ("lm_eval", "datasets", "fsspec"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        try:
            with redirect_stdout(sys.stderr):
                wrapped = HFLM(pretrained=model.net, tokenizer=model.tokenizer, batch_size=BATCH)
                found = simple_evaluate(
                    wrapped,
                    tasks=list(self.names),
                    limit=limit,
                    task_manager=self._manager,
                    log_samples=False,
                )
        except Exception as error:
            raise FleetuneError(
                f"lm-evaluation-harness could not run {', '.join(self.names)}: {cut_reason(fault(error))}",
                hint="its data comes from the Hub: check the network; some tasks need packages of their own",
            ) from error
        return scores(found or {})


def scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """Return the scores in the harness's results; a value that is no number is left out."""
    found = []
    for task, values in results.get("results", {}).items():
        counts = results.get("n-samples", {}).get(task, {})
        better = results.get("higher_is_better", {}).get(task, {})
        version = results.get("versions", {}).get(task)
        for key, value in values.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            found.append(
                TaskScore(
                    task=task,
                    metric=metric,
                    filter=how,
                    value=float(value),
                    stderr=_number(values.get(f"{metric}_stderr,{how}")),
                    rows=counts.get("effective"),
                    of=counts.get("original"),
                    shots=results.get("n-shot", {}).get(task),
                    version=None if version is None else str(version),
                    higher_is_better=better.get(metric),
                )
            )
    return found


def by_name(found: Sequence[TaskScore]) -> dict[str, float]:
    """Return TASK.METRIC -> value; of several filters of a metric, TASK.METRIC.FILTER but for the one called none."""
    return {f"{s.task}.{s.metric}" + ("" if s.filter == "none" else f".{s.filter}"): s.value for s in found}


def _number(value: Any) -> float | None:
    """A standard error; None for the harness's "N/A" and for one that is not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
