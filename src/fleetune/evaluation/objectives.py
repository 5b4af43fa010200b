"""Define what zeroth-order methods minimise: any function `objective(model, batch) -> float` (docs/objectives.md lists them).

A two-point estimate needs only the value, so it may be one that cannot be differentiated: accuracy, or the score of generated
text (MeZO, arXiv 2305.17333, section 3.3).  A row's prompt is where `attention_mask` is 1 and `labels` are -100, its reference is
`ids[labels != -100]`.  A function is code that runs here: never take its path from a peer.
"""

import hashlib
import importlib
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Final, cast

import numpy as np
from torch import Tensor

from fleetune.common import settings
from fleetune.data.encode import MASKED, Batch, Encoded, collate
from fleetune.errors import FAULTS, FleetuneError, RecipeError, fault
from fleetune.evaluation import answers
from fleetune.evaluation.losses import batch_loss, class_logits, eval_mode, pad_id, token_losses
from fleetune.models.net.model import Model

Objective = Callable[[Model, Batch], float]
Score = Callable[[Sequence[str], Sequence[str]], float]

MAX_NEW_TOKENS = 128  # FedKSeed's evaluation
TOKENS = 8  # are generated in about the time of a row's forward


def get(name: str = "loss") -> Objective:
    """Return the objective of that name, or the function at that import path.

    RecipeError when there is none, its argument is wrong, or the path cannot be imported or is not callable:
    call this before any slow work.  Later, an imported function that fails or returns no finite number raises a
    RecipeError too.
    """
    kind, _, argument = name.partition(":")
    if kind in BUILT_IN:
        return BUILT_IN[kind](argument)
    return _checked(name, import_function(name, "objective", BUILT_IN, "objective(model, batch)"))


def label_words(name: str) -> list[str]:
    """Return the label words that an objective names: ["yes", "no"] of accuracy:yes,no, else none."""
    kind, _, argument = name.partition(":")
    return settings.split_words(argument) if kind == "accuracy" and argument else []


def rows_of(name: str, rows: int) -> int:
    """Return how many rows' forwards the objective of that name takes for a batch of so many, at most."""
    kind, _, argument = name.partition(":")
    if kind == "accuracy":  # each row with each choice
        return rows * (len(label_words(name)) or rows)
    generates = kind in ("rouge_l", "f1")
    return rows * (1 + int(argument or MAX_NEW_TOKENS) // TOKENS if generates else 1)


def mean_value(model: Model, rows: Sequence[Encoded], name: str, *, batch_size: int) -> float:
    """Return an objective's mean over `rows`, taken in batches in their order and weighted by rows."""
    function, total = get(name), 0.0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad_id(model), model.device)
        total += len(batch.labels) * function(model, batch)
    return total / len(rows)


def split(batch: Batch) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return each row's prompt ids and reference ids (its end of turn included), without padding: int [T] each."""
    ids, labels = batch.input_ids.cpu().numpy(), batch.labels.cpu().numpy()
    real, scored = batch.attention_mask.cpu().numpy() != 0, labels != MASKED
    rows = range(len(ids))
    return [ids[i][real[i] & ~scored[i]] for i in rows], [ids[i][scored[i]] for i in rows]


def loss_tensor(model: Model, batch: Batch) -> Tensor:
    """Return the "loss" objective as a tensor to back-propagate: float32 scalar, mean over the response tokens.

    Runs in the current mode and under the current gradient setting.
    """
    losses, _ = token_losses(model.net, batch)
    return losses.mean()


# --- built in ---------------------------------------------------------------------------------------------


def _loss(argument: str) -> Objective:
    if argument:
        raise RecipeError([f"objective 'loss' takes no argument, got {argument!r}"], hint="write just loss")
    return batch_loss


def _accuracy(argument: str) -> Objective:
    among = label_words(f"accuracy:{argument}")
    if argument and (len(set(among)) < 2 or len(set(among)) < len(among) or "" in among):
        raise RecipeError(
            [f"objective 'accuracy:{argument}' needs two or more different label words"],
            hint="for example accuracy:yes,no",
        )
    return lambda model, batch: negative_accuracy(model, batch, among)


def negative_accuracy(model: Model, batch: Batch, labels: Sequence[str] = ()) -> float:
    """Return -(share of rows whose own answer has the best mean log-probability among the labels), from 0 to -1.

    `labels` defaults to the different answers of the batch.  A batch in which all are equal then scores -1 at
    any weights: that step moves nothing.  RecipeError for a batch of one row without `labels`, and for an
    answer that is not among the labels.
    """
    if batch.labels.ndim == 1:
        with eval_mode(model.net):
            right = class_logits(model.net, batch).argmax(1) == batch.labels
        return -float(right.double().mean())
    prompts, references = split(batch)
    own = [tuple(answers.without_end(model, ids).tolist()) for ids in references]
    if labels:
        choices = [tuple(answers.answer_ids(model, label).tolist()) for label in labels]
    else:
        choices = sorted(set(own))
    missing = sorted(set(own) - set(choices))
    if missing or (not labels and len(own) < 2):
        seen = answers.decode_answer(model, (missing or choices)[0])
        raise RecipeError(
            [f"objective 'accuracy': the label words {list(labels)} do not cover the answer {seen!r}"],
            hint="name all label words, for example accuracy:yes,no; free text needs rouge_l or f1",
        )
    words = [np.asarray(choice, np.int32) for choice in choices]
    best = answers.answer_scores(model, prompts, words, batch_size=max(8, len(prompts))).argmax(1)
    return -sum(choices[int(i)] == mine for i, mine in zip(best, own, strict=True)) / len(own)


def _of_answers(name: str, score: Score) -> Callable[[str], Objective]:
    """Return the maker of an objective on greedy answers: -(score in percent) / 100."""

    def make(argument: str) -> Objective:
        if argument and not (argument.isdecimal() and int(argument) > 0):
            raise RecipeError(
                [f"objective '{name}:{argument}': {argument!r} is not a number of new tokens"],
                hint=f"for example {name}:64",
            )
        return lambda model, batch: negative_score(model, batch, score, int(argument or 0))

    return make


def negative_score(model: Model, batch: Batch, score: Score, max_new_tokens: int = 0) -> float:
    """Return -(score of the greedy answers to the batch's prompts against its references), from 0 to -1.

    `max_new_tokens` 0: twice the longest reference, at most 128, so that rambling costs precision but not
    time.
    """
    answers.require_text_model(model, "an objective on answers (rouge_l, f1)")
    prompts, references = split(batch)
    limit = max_new_tokens or min(MAX_NEW_TOKENS, 2 * max(map(len, references)))
    written = answers.generate_from_ids(model, prompts, max_new_tokens=limit, batch_size=len(prompts))
    return -score(written, [answers.decode_answer(model, ids.tolist()) for ids in references]) / 100.0


BUILT_IN: Mapping[str, Callable[[str], Objective]] = MappingProxyType(
    {
        "loss": _loss,
        "accuracy": _accuracy,
        "rouge_l": _of_answers("rouge_l", answers.rouge_l),
        "f1": _of_answers("f1", answers.token_f1),
    }
)


# --- a function of one's own ------------------------------------------------------------------------------


def import_function(name: str, kind: str, known: Iterable[str], call: str) -> Callable[..., Any]:
    """Import the callable at "package.module:function" or "file.py:function".

    RecipeError when there is none.  For its text, `kind` names the sort of function, `known` the built-in ones, and
    `call` shows how it is called.
    """
    what = f"{kind} {name!r}"
    where, colon, function = name.rpartition(":")
    if not colon or not where or not function:
        raise RecipeError(
            [f"unknown {what}"],
            hint=f"choose {', '.join(known)}, or give package.module:function or file.py:function",
        )
    module = _load_file(what, Path(where)) if where.endswith(".py") else _load_module(what, where)
    found = getattr(module, function, None)
    if not callable(found):
        why = (
            f"{function} is a {type(found).__name__}, not a function"
            if found is not None
            else f"{where} has no {function!r}"
        )
        raise RecipeError(
            [f"{what}: {why}"], hint=f"check its spelling; it must be {call} and return a float"
        )
    if fault := _call_fault(found, call):
        raise RecipeError(
            [f"{what} is called as {call}, but {function} {fault}"],
            hint=f"begin it with: def {function}{call[call.index('(') :]}:   and return a float",
        )
    return cast(Callable[..., Any], found)


def _call_fault(function: Callable[..., Any], call: str) -> str:
    """Return why `function` cannot be called as `call` shows ("objective(model, batch)"); "" where it can, or is compiled."""
    names = [name.strip() for name in call.partition("(")[2].rstrip(")").split(",")]
    if inspect.isclass(function):
        return "is a class"
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        return "is async or a generator"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*names)
    except TypeError as error:
        return f"takes {signature}: {error}"
    taken = [name for name in signature.parameters if name in names]
    return f"takes {signature}: in another order" if taken != sorted(taken, key=names.index) else ""


GIVEN: Final = (
    "fleetune_given_"  # modules that hold a function of this process alone (`tuning/recipe/objects.py`)
)


def _load_module(what: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except FAULTS as error:
        hint = "is it installed? a file is given as file.py:function"
        if where.startswith(GIVEN):
            hint = "the function was given in memory to another process: put it into a file, and start anew"
        raise _import_error(what, error, hint) from error


def _load_file(what: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError([f"{what}: no file {path}"], hint="check the path")
    # A name that no package has.  The same file is the same module, so what it keeps outlives a round.
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _import_error(what, error, "check the path and the file's permissions") from error
    key = hashlib.sha256(str(path.resolve()).encode() + b"\0" + content).hexdigest()[:16]
    label = f"fleetune_objective_{key}"
    if label not in sys.modules:
        module = ModuleType(label)
        module.__file__ = str(path)
        sys.modules[label] = module  # dataclasses and pickle look their module up there
        try:
            exec(compile(content, str(path), "exec"), vars(module))
        except FAULTS as error:
            del sys.modules[label]
            hint = "run the file with Python by itself to see the whole error"
            raise _import_error(what, error, hint) from error
    return sys.modules[label]


def _import_error(what: str, error: BaseException, hint: str) -> RecipeError:
    return RecipeError([f"{what} cannot be imported: {fault(error)}"], hint=hint)


def _checked(name: str, function: Callable[..., Any]) -> Objective:
    """Wrap `function` to run without gradients, and check that its result is a finite number."""

    def objective(model: Model, batch: Batch) -> float:
        try:
            with eval_mode(model.net):
                value = function(model, batch)
        except FleetuneError:
            raise
        except FAULTS as error:
            raise RecipeError(
                [f"objective {name!r} failed: {fault(error)}"],
                hint="it is called as objective(model, batch); see fleetune help objectives",
            ) from error
        return finite_number(value, f"objective {name!r}")

    return objective


def finite_number(value: Any, what: str) -> float:
    """Return `value`, the result of `what`, as a float; RecipeError when it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        shown = float(value) if number else f"a {type(value).__name__}, not a float"
        raise RecipeError(
            [f"{what} returned {shown}"],
            hint="end it with float(...), or .item() for a tensor of one element; guard divisions and logarithms",
        )
    return float(value)
