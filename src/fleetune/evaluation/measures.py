# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model on held-out rows by named tasks: loss, perplexity, accuracy, scores of answers.

Losses are in nats a token (`losses.py`), scores of answers (`answers.py`, `scores.py`) in percent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fleetune.common.paired import RowLosses
from fleetune.data.encode import Encoded, begun, encode_rows
from fleetune.data.examples import Example
from fleetune.errors import RecipeError, closest
from fleetune.evaluation import objectives
from fleetune.evaluation.answers import generate, label_accuracy, require_text_model
from fleetune.evaluation.losses import OnRows, all_row_losses, class_rows, perplexity, token_mean, unheard
from fleetune.evaluation.scores import exact_match, rouge_l, token_f1
from fleetune.models.net.model import Model


@dataclass(frozen=True)
class _Work:
    """The input of the tasks; the greedy answers are made once for all tasks that need them."""

    model: Model
    examples: Sequence[Example]
    max_length: int
    batch_size: int
    max_new_tokens: int
    labels: Sequence[str]
    texts: Sequence[str]
    told: Callable[[str], OnRows]

    @functools.cached_property
    def answers(self) -> tuple[list[str], list[str]]:
        """Return the model's answers and the references."""
        made = generate(
            self.model,
            self.examples,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            on_rows=self.told("answers"),
        )
        return made, [example.response for example in self.examples]

    @functools.cached_property
    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss sums of the rows and their numbers of scored tokens."""
        rows, _ = encode_rows(self.model, self.examples, self.max_length)
        return all_row_losses(self.model, rows, self.batch_size, self.told("rows"))


def _loss_task(work: _Work) -> float:
    return token_mean(*work.losses)


def _perplexity_task(work: _Work) -> float:
    texts = work.texts or [example.response for example in work.examples]
    return perplexity(work.model, texts, on_rows=work.told("rows of the text"))


def _accuracy_task(work: _Work) -> float:
    return label_accuracy(
        work.model, work.examples, work.labels, max_length=work.max_length, batch_size=work.batch_size
    )


TASKS: Mapping[str, Callable[[_Work], float]] = MappingProxyType(
    {
        "loss": _loss_task,
        "rouge_l": lambda work: rouge_l(*work.answers),
        "f1": lambda work: token_f1(*work.answers),
        "exact_match": lambda work: exact_match(*work.answers),
        "accuracy": _accuracy_task,
        "perplexity": _perplexity_task,
    }
)
_SHORT = MappingProxyType({"rouge": "rouge_l", "em": "exact_match", "acc": "accuracy", "ppl": "perplexity"})


def is_known(task: str) -> bool:
    """Whether a task, or its short name, is one of `TASKS`."""
    return task in TASKS or task in _SHORT


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks' full names, each once; RecipeError naming every unknown one, with the nearest known."""
    names = tuple(dict.fromkeys(_SHORT.get(task, task) for task in tasks))
    problems = []
    for name in names:
        if name not in TASKS:
            near = closest(name, TASKS)
            problems.append(f"unknown task {name!r}" + (f"; did you mean {near!r}?" if near else ""))
    if problems:
        raise RecipeError(problems, hint=f"the tasks are {', '.join(TASKS)}")
    return names


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
    work = _Work(model, examples, max_length, batch_size, max_new_tokens, labels, texts, told)
    answered = replace(work, examples=[begun(example) for example in examples[:answer_rows]])
    of_answers = {"rouge_l", "f1", "exact_match"}
    values = {name: TASKS[name](answered if name in of_answers else work) for name in names}
    return Evaluated(values, row_losses_of(*work.losses) if "loss" in names else None)


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
