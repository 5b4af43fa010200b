"""Evaluate a model on held-out rows by named tasks: loss, perplexity, accuracy, scores of answers."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np

from fleetune.common.paired import RowLosses
from fleetune.data.encode import Encoded, begun, encode_rows
from fleetune.data.read_rows import Example
from fleetune.errors import RecipeError, closest
from fleetune.evaluation import answers, objectives
from fleetune.evaluation.losses import OnRows, all_row_losses, class_rows, perplexity, token_mean, unheard
from fleetune.models.net.model import Model

TASKS: Final = ("loss", "rouge_l", "f1", "exact_match", "accuracy", "perplexity")
_SHORT = MappingProxyType({"rouge": "rouge_l", "em": "exact_match", "acc": "accuracy", "ppl": "perplexity"})


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks' full names, each once; RecipeError naming every unknown one, with the nearest known."""
    names = tuple(dict.fromkeys(_SHORT.get(task, task) for task in tasks))
    if near := {name: closest(name, TASKS) for name in names if name not in TASKS}:
        problems = [f"unknown task {n!r}" + (f"; did you mean {c!r}?" if c else "") for n, c in near.items()]
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
            answers.require_text_model(model, f"task '{name}'")
    answered = [begun(example) for example in examples[:answer_rows]]

    @functools.cache
    def losses() -> tuple[np.ndarray, np.ndarray]:
        rows, _ = encode_rows(model, examples, max_length)
        return all_row_losses(model, rows, batch_size, told("rows"))

    @functools.cache
    def pairs() -> tuple[list[str], list[str]]:
        """Answers, made once for all tasks that need them, and references."""
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        made = answers.generate(model, answered, on_rows=told("answers"), **how)
        return made, [example.response for example in answered]

    def read() -> float:
        responses = [example.response for example in examples]
        return perplexity(model, texts or responses, on_rows=told("rows of the text"))

    measure: Mapping[str, Callable[[], float]] = {
        "loss": lambda: token_mean(*losses()),
        "rouge_l": lambda: answers.rouge_l(*pairs()),
        "f1": lambda: answers.token_f1(*pairs()),
        "exact_match": lambda: answers.exact_match(*pairs()),
        "accuracy": lambda: answers.label_accuracy(
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
            measured["accuracy"] = answers.label_accuracy(model, examples, labels, max_length=max_length)
    kind = objective.partition(":")[0]
    if kind != "loss" and (kind != "accuracy" or "accuracy" not in measured):
        measured["objective"] = objectives.mean_value(model, rows, objective, batch_size=batch_size)
    return measured, found
