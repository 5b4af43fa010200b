"""Measure a model on rows, or ask it one thing, in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetune import subject as subjects
from fleetune.api.names import Base, Device, Dtype, Rows, words
from fleetune.common.display import command, counted
from fleetune.common.events import evaluated
from fleetune.data import Example, read, read_text, readers
from fleetune.deploy.serve import Sampling
from fleetune.errors import DataError, RecipeError, UsageError
from fleetune.runs.listener import Listener, heard_by
from fleetune.subject import Compressed, Run, Subject
from fleetune.tuning.recipe import objects

if TYPE_CHECKING:
    from fleetune.evaluation.losses import OnRows

WHOLE: Final = 1 << 20  # tokens: a prompt is not cut


def evaluate(
    model: object,
    data: Rows | None = None,
    *,
    tasks: Sequence[str] = (),
    columns: str | Mapping[str, str] = "",
    limit: int = 200,
    answer_tokens: int = 96,
    text: str | Path | None = None,
    labels: Sequence[str] = (),
    dtype: Dtype | None = None,
    device: Device = "auto",
    base: Base | None = None,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> dict[str, float]:
    """Measure a model on rows and return task -> value; a run or a compressed run has held-out rows of its own.

    `columns` says which columns of the rows are which, as in `tune`; a run's are used where none are given and they fit.
    `tasks` are loss, rouge_l, f1, exact_match, accuracy (by the words in `labels`) and perplexity (of the file `text`); the
    default is loss and rouge_l; for an encoder, loss and accuracy; with a `text`, perplexity too.  At most `limit` rows are
    measured, cut to the `max_length` of the run that the model comes from (512 tokens for others).  The event of a run has
    the loss of its base model on the same rows as well, and how sure the change is.  Losses are in nats per token (of an
    encoder: per row); perplexity has no unit; the others are in percent.
    `base` is memory or mapped: where the base's weights are (a run: as while it was tuned).
    """
    found = subjects.open(model, out=out)  # before torch is imported
    _check_options(found, limit, answer_tokens, text)
    from fleetune.data.encode import check_answers
    from fleetune.evaluation import measures

    heard, labels = heard_by(listener, progress), words(labels)
    wanted = measures.check_tasks(words(tasks))
    if text and wanted and "perplexity" not in wanted:
        problem = f"{text} is for the task perplexity, which --tasks does not name"
        raise RecipeError([problem], hint="fleetune eval --help")
    where: dict[str, Any] = {"dtype": dtype, "device": device, "offline": offline}
    longest = found.max_length
    given = _rows(data, Path(out), columns, found.columns, offline=offline)
    if labels and "accuracy" in wanted:
        answers = [example.response.strip() for example in given[:limit]]
        check_answers(answers, labels, f"labels = {', '.join(labels)}", "name all label words of the data")
    if given:
        _note_trained_on(found, given[:limit], heard, offline=offline)
    texts = read_text(str(text)) if text else []

    def told(what: str) -> OnRows:
        return lambda done, total: heard.progress(what, done, total)

    loaded, every = subjects.load_with_rows(
        found, given, labels=labels, base=base, needs_rows=not texts, **where
    )
    measured = every[:limit]
    values, rows = measures.evaluate(
        loaded,
        measured,
        wanted,
        max_length=longest,
        max_new_tokens=answer_tokens,
        labels=labels,
        texts=texts,
        told=told,
    )
    before = subjects.base_losses(found, loaded, measured, told) if rows else None  # makes `loaded` the base
    counts = {"of": len(every), "max_length": longest}
    heard.event(evaluated(found.argument, len(measured), values, **counts, rows_of=(before, rows)))
    return values


def _rows(
    data: Rows | None, out: Path, columns: str | Mapping[str, str], usual: str, *, offline: bool
) -> list[Example]:
    """Read the rows that were given, none for None: by `columns` or, without, by the `usual` ones where they fit."""
    file = objects.data_name(data, out)
    if not file:
        return []
    if columns or not usual:
        return read(file, columns=columns, offline=offline)
    try:
        return read(file, columns=usual, offline=offline)
    except DataError:
        return read(file, offline=offline)


def _note_trained_on(found: Subject, rows: Sequence[Example], heard: Listener, *, offline: bool) -> None:
    from fleetune.tuning.result import finished

    run = found.run if isinstance(found, Compressed) else found if isinstance(found, Run) else None
    if run is not None and (count := finished.trained_on(run.folder, rows, offline=offline)):
        heard.note(
            f"{count:,} of {counted(len(rows), 'row')} were trained on in {run.folder}: values on them say little of other rows"
        )


def _check_options(found: Subject, limit: int, answer_tokens: int, text: str | Path | None) -> None:
    if text:
        readers.require_text(str(text), hint=command("eval", found.argument, text))
    numbers: dict[str, object] = {"limit": limit, "answer_tokens": answer_tokens}
    wrong = {n: v for n, v in numbers.items() if not isinstance(v, int) or v < 1}
    problems = [f"{n} = {v!r} is not an integer of at least 1" for n, v in wrong.items()]
    if text and not Path(text).is_file():
        problems.append(f"no text file at {text}")
    if problems:
        raise RecipeError(problems, hint="fleetune eval --help")


def generate(
    model: object,
    prompt: str,
    *,
    system: str = "",
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 42,
    out: str | Path = "runs",
    offline: bool = False,
) -> str:
    """Return a model's answer to a prompt, through its chat template, in torch; for an engine that is faster, `chat`.

    `model` is a loaded model (`fleetune.open(..).load()`, `run.model()`), which is the fast way for many prompts, or a name
    or result, which is loaded for this answer.  Temperature 0 gives the likeliest answer, the same each time; above it the
    answer is drawn with `seed`.  It has at most `max_tokens` tokens.  RecipeError for an encoder; UsageError for an empty
    prompt, for one that leaves no room for an answer, or for a number that means nothing.
    """
    Sampling(temperature, max_tokens, seed).check()
    if not prompt.strip():
        raise UsageError("the prompt is empty", hint='fleetune.generate(model, "What is ..")')
    from fleetune.data.encode import prompt_ids
    from fleetune.evaluation import answers, losses
    from fleetune.models.net.model import Model

    loaded = model if isinstance(model, Model) else subjects.open(model, out).load(offline=offline)
    answers.require_text_model(loaded, "generation")
    turns = ([("system", system)] if system else []) + [("user", prompt)]
    longest = losses.context_length(loaded)
    ids = prompt_ids(Example(tuple(turns), "", {}), loaded.tokenizer, WHOLE)
    if len(ids) >= longest:
        raise UsageError(
            f"the prompt has {len(ids):,} tokens, the model is made for {longest:,}",
            hint="ask something shorter",
        )
    room = min(max_tokens, longest - len(ids))
    if temperature == 0:
        return answers.generate_from_ids(loaded, [ids], max_new_tokens=room)[0]
    drawn = answers.sample_from_ids(loaded, [ids], temperature=temperature, max_new_tokens=room, seed=seed)
    return answers.decode_answer(loaded, drawn[0].tolist())
