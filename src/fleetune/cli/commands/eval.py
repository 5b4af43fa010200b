# SPDX-License-Identifier: Apache-2.0
"""`fleetune eval`: a model, a finished run or a compressed one, on given rows or on its own held-out ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.cli.console import Ui
from fleetune.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from fleetune.data import Example
    from fleetune.models.model import Model


def run(args: argparse.Namespace, ui: Ui, of_run: Path | None) -> None:
    """Carry out `fleetune eval`; `of_run` is the folder where the subject is a tuned run."""
    from fleetune import data
    from fleetune.evaluation import measures

    tasks = _check(args)
    model, examples = _compressed(args, of_run) or (_of_run(args, of_run) if of_run else _model(args))
    values = measures.evaluate(
        model, examples[: args.limit], tasks, max_new_tokens=args.answer_tokens,
        labels=args.labels.split(",") if args.labels else (), texts=data.read_text(args.text) if args.text else (),
    )  # fmt: skip
    ui.event({"event": "eval", "model": args.model, "rows": len(examples[: args.limit]), **values})
    if not ui.json:
        ui.table(["task", "value"], [[k, round(v, 4)] for k, v in values.items()])


def _check(args: argparse.Namespace) -> tuple[str, ...]:
    """The tasks; UsageError for what cannot be, before anything is loaded."""
    from fleetune.evaluation import measures

    problems = [f"{n} = {v} is below 1" for n in ("limit", "answer_tokens") if (v := getattr(args, n)) < 1]
    asked = [t.strip() for t in (args.tasks or "").split(",") if t.strip()]
    problems += ["--tasks names no task"] if args.tasks is not None and not asked else []
    problems += [f"no text file at {args.text}"] if args.text and not Path(args.text).is_file() else []
    if problems:
        raise RecipeError(problems, hint="fleetune eval --help")
    return measures.check_tasks(asked)


def _of_run(args: argparse.Namespace, run: Path) -> tuple[Model, Sequence[Example]]:
    from fleetune import models
    from fleetune.tuning import finished

    dtype = finished.recipe_of(run).dtype
    if args.dtype not in (None, dtype):
        raise UsageError(f"a run has a dtype of its own, here {dtype}", hint="leave out --dtype")
    models.check_device(args.device, dtype)
    examples = _given(args) or held_out(run, offline=args.offline)
    return finished.load(run, offline=args.offline, device=args.device), examples


def held_out(run: Path, *, offline: bool) -> list[Example]:
    """The rows that a run never trains on."""
    from fleetune.tuning import finished, methods, prepare

    recipe = finished.recipe_of(run)
    parts = prepare.split(recipe, methods.entry(recipe.method), offline=offline)
    return [parts.examples[i] for i in parts.held.tolist()]


def _compressed(args: argparse.Namespace, of_run: Path | None) -> tuple[Model, Sequence[Example]] | None:
    """A compressed model on given rows or, of a run, on the held-out rows that it was not made with."""
    from fleetune import models
    from fleetune.cli.commands import compress
    from fleetune.deploy import export
    from fleetune.models.artefact import is_master

    if is_master(Path(args.model)):
        folder, source = None, Path(args.model)
    elif folder := compress.named(args.model, Path(args.out), of_run):
        source = compress.artefact(folder)
    else:
        return None
    dtype = args.dtype or "fp32"
    models.check_device(args.device, dtype)
    examples = _given(args) or (compress.held_out(folder, offline=args.offline) if folder else [])
    if not examples and not args.text:
        raise UsageError("eval of this model needs DATA", hint=f"fleetune eval {args.model} data.jsonl")
    return models.move_model(export.load(source), dtype=dtype, device=args.device), examples


def _model(args: argparse.Namespace) -> tuple[Model, Sequence[Example]]:
    from fleetune import models
    from fleetune.runs import rundir
    from fleetune.tuning.recipe import label_words

    rundir.check_name(args.model, Path(args.out))
    if not args.data and not args.text:
        raise UsageError("eval of a model needs DATA", hint=f"fleetune eval {args.model} data.jsonl")
    examples = _given(args)
    labels = label_words(args.labels or "") or sorted({e.response.strip() for e in examples})
    model = models.load(
        args.model, dtype=args.dtype or "fp32", device=args.device, offline=args.offline, labels=labels
    )
    return model, examples


def _given(args: argparse.Namespace) -> list[Example]:
    from fleetune import data

    return data.read(args.data, offline=args.offline) if args.data else []
