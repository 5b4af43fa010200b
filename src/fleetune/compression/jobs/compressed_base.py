# SPDX-License-Identifier: Apache-2.0
"""The base of a compressed run, compressed the same way: method, settings and calibration windows are the run's.

What a run was calibrated on is text, made into tokens by a tokenizer that base and tuned model share; so the windows are
the same, and the artefact's head, which holds their digest, says whether they are.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune import compression as methods
from fleetune.cli.commands import compress
from fleetune.cli.console import Ui
from fleetune.common.display import human_time
from fleetune.compression.jobs import solve
from fleetune.compression.jobs import work as subjects
from fleetune.compression.jobs.work import PARTS, RECORD, Work
from fleetune.errors import UsageError
from fleetune.models import artefact
from fleetune.models.artefact import ArtefactHead, Master, is_master

if TYPE_CHECKING:
    from fleetune.models.model import Model


def check(folder: Path) -> None:
    """UsageError for a compression that has no gain to keep, or that cannot be done again with the base."""
    work = compress.read(folder)
    if not work.run:
        raise UsageError(
            f"{folder} was made from a model, not from a run: no tuning, no gain to keep",
            hint="fleetune compress RUN",
        )
    _solver(work)


def _solver(work: Work) -> methods.Solver:
    method = methods.make(work.method, work.set)
    if isinstance(method, methods.Trainer | methods.Pruner):
        raise UsageError(
            f"{work.method} works on the whole model, so the base would have to go through all of it as well",
            hint="--kept-gain is of methods that work layer by layer: fleetune compress --list",
        )
    return method


def base_of(ui: Ui, folder: Path, *, offline: bool) -> Path:
    """The artefact of the compressed base, made now if it is not there; a stopped one is gone on with.

    UsageError when the calibration text is not what the folder was made with any more.
    """
    place = folder / "base"
    model, own = place / "model", Master(folder / "model").head
    if is_master(model) and _alike(Master(model).head, own):
        subjects.drop(place / PARTS)  # a kill may have left them
        return model
    job = _job(folder, offline, ui)
    made = solve.head(job)
    if not _alike(made, own):
        raise UsageError(
            f"the calibration text is not what {folder} was made with: the data has changed since",
            hint=f"compress again: fleetune compress {compress.read(folder).model}",
        )
    seconds = json.loads((folder / RECORD).read_text(encoding="utf-8"))["result"]["seconds"]
    ui.note(f"the base is compressed the same way, once: the tuned model took {human_time(seconds)}")
    parts = solve.solve(ui, job, place, f"fleetune measure {folder} --kept-gain")
    artefact.write(model, job.subject.model, parts, made)
    subjects.drop(place / PARTS)
    return model


def _alike(a: ArtefactHead, b: ArtefactHead) -> bool:
    return (a.method, a.settings, a.calibration, a.tokenizer) == (
        b.method, b.settings, b.calibration, b.tokenizer,
    )  # fmt: skip


def _job(folder: Path, offline: bool, ui: Ui) -> solve.Job:
    from fleetune import models
    from fleetune.tuning import finished

    work = compress.read(folder)
    subject, recipe = subjects.load(work, offline=offline), finished.recipe_of(Path(work.model))
    subject.model.net.to("meta")  # only its rows are wanted: its weights go before the base's come
    base: Model = models.load(recipe.model, dtype=recipe.dtype, device="cpu", offline=offline)
    return solve.prepare(work, _solver(work), replace(subject, model=base), ui)
