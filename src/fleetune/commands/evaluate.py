# SPDX-License-Identifier: Apache-2.0
"""`fleetune eval`: a model, a finished run or a compressed one, on given rows or on its own held-out ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.errors import UsageError
from fleetune.ui import Ui

if TYPE_CHECKING:
    from fleetune.data import Example
    from fleetune.models import Model


def run(args: argparse.Namespace, ui: Ui, of_run: Path | None) -> None:
    """Carry out `fleetune eval`; `of_run` is the folder where the subject is a tuned run."""
    from fleetune import data, evaluate

    tasks = evaluate.check_tasks([t.strip() for t in args.tasks.split(",") if t.strip()])
    model, examples = _compressed(args, of_run) or (_of_run(args, of_run) if of_run else _model(args))
    values = evaluate.evaluate(
        model, examples[: args.limit], tasks, max_new_tokens=args.answer_tokens,
        labels=args.labels.split(",") if args.labels else (), texts=data.read_text(args.text) if args.text else (),
    )  # fmt: skip
    ui.event({"event": "eval", "model": args.model, "rows": len(examples[: args.limit]), **values})
    if not ui.json:
        ui.table(["task", "value"], [[k, round(v, 4)] for k, v in values.items()])


def _of_run(args: argparse.Namespace, run: Path) -> tuple[Model, Sequence[Example]]:
    from fleetune import tuned

    examples = _given(args) or held_out(run, offline=args.offline)
    return tuned.load(run, offline=args.offline, device=args.device), examples


def held_out(run: Path, *, offline: bool) -> list[Example]:
    """The rows that a run never trains on."""
    from fleetune import job, methods, tuned

    recipe = tuned.recipe_of(run)
    parts = job.split(recipe, methods.entry(recipe.method), offline=offline)
    return [parts.examples[i] for i in parts.held.tolist()]


def _compressed(args: argparse.Namespace, of_run: Path | None) -> tuple[Model, Sequence[Example]] | None:
    """A compressed model on given rows or, of a run, on the held-out rows that it was not made with."""
    from fleetune.commands import compress
    from fleetune.deploy import exports
    from fleetune.deploy.master import is_master

    if is_master(Path(args.model)):
        folder, source = None, Path(args.model)
    elif folder := compress.named(args.model, Path(args.out), of_run):
        source = compress.artefact(folder)
    else:
        return None
    examples = _given(args) or (compress.held_out(folder, offline=args.offline) if folder else [])
    if not examples and not args.text:
        raise UsageError("eval of this model needs DATA", hint=f"fleetune eval {args.model} data.jsonl")
    return exports.load(source), examples


def _model(args: argparse.Namespace) -> tuple[Model, Sequence[Example]]:
    from fleetune import models, rundir
    from fleetune.recipe import label_words

    rundir.check_name(args.model, Path(args.out))
    if not args.data and not args.text:
        raise UsageError("eval of a model needs DATA", hint=f"fleetune eval {args.model} data.jsonl")
    examples = _given(args)
    labels = label_words(args.labels or "") or sorted({e.response.strip() for e in examples})
    model = models.load(args.model, dtype=args.dtype, device=args.device, offline=args.offline, labels=labels)
    return model, examples


def _given(args: argparse.Namespace) -> list[Example]:
    from fleetune import data

    return data.read(args.data, offline=args.offline) if args.data else []
