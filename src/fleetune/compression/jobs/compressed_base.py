# SPDX-License-Identifier: Apache-2.0
"""Compress the untuned base for `measure --kept-gain`: with the same method, settings and windows as the tuned model.

Base and tuned model share a tokenizer, so the same text gives the same windows of tokens.  Text that the tuned model wrote
for its calibration serves for the base as well.  The head of each artefact
has the digest of its windows, and the two digests are compared.  An artefact that is there already is used when it was made
of the run's base weights, and is as it was written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fleetune import compression, models
from fleetune.common import sums
from fleetune.common.display import human_time
from fleetune.common.shell import quoted
from fleetune.compression.jobs import inputs, solve
from fleetune.errors import ModelError, UsageError
from fleetune.models import artefact
from fleetune.models.artefact import ArtefactHead, Master
from fleetune.models.cache.names import is_master
from fleetune.runs import compression_folder, rundir
from fleetune.runs.compression_folder import PARTS, CompressRequest
from fleetune.runs.listener import Listener
from fleetune.tuning.result import finished


def check(folder: Path) -> None:
    """Raise UsageError when the method of a compression cannot be run on the base as well."""
    _solver(compression_folder.request_of(folder))


def base_of(listener: Listener, folder: Path, *, offline: bool) -> Path:
    """Return the artefact of the compressed base; it is made now if it is missing, and resumed if it was stopped.

    UsageError when the calibration text has changed since the folder was made, ModelError when the artefact that is there
    is not the base's, or not what was written.
    """
    place = folder / "base"
    model, own = place / "model", Master(folder / "model").head
    if is_master(model) and _alike(_head_of(folder, model), own):
        compression_folder.drop_parts(place / PARTS)  # a kill may have left them
        return model
    job = _job(folder, offline, listener)
    head = solve.head(job)
    if not _alike(head, own):
        raise UsageError(
            f"the calibration text is not what {folder} was made with: the data has changed since",
            hint=f"compress again: fleetune compress {quoted(compression_folder.request_of(folder).model)}",
        )
    seconds = compression_folder.record(folder)["result"]["seconds"]
    listener.note(f"the base is compressed the same way, once: the tuned model took {human_time(seconds)}")
    found = solve.solve(listener, job, place, f"fleetune measure {quoted(folder)} --kept-gain")
    artefact.write(model, job.inputs.model, found.weights, head)
    compression_folder.drop_parts(place / PARTS)
    return model


def _head_of(folder: Path, model: Path) -> ArtefactHead:
    """Return the head of the base's artefact; ModelError when it is of other weights than the base's, or damaged."""
    remedy = f"rm -r {quoted(folder / 'base')}   and then: fleetune measure {quoted(folder)} --kept-gain"
    sums.check(model, remedy=remedy)
    head = Master(model).head
    expected = rundir.base_digest(Path(compression_folder.request_of(folder).model))
    if head.base != expected:
        raise ModelError(
            f"{model} is not the compressed base: it was made of weights with the SHA-256 {head.base[:16]}.., "
            f"the run's base has {expected[:16]}..",
            hint=remedy,
        )
    return head


def _solver(request: CompressRequest) -> compression.Solver:
    method = compression.make(request.method, request.set)
    if isinstance(method, compression.Trainer | compression.Pruner):
        raise UsageError(
            f"{request.method} works on the whole model, so the base would have to go through all of it as well",
            hint="--kept-gain is of methods that work layer by layer: fleetune compress --list",
        )
    return method


def _alike(a: ArtefactHead, b: ArtefactHead) -> bool:
    return (a.method, a.settings, a.calibration, a.tokenizer) == (
        b.method,
        b.settings,
        b.calibration,
        b.tokenizer,
    )


def _job(folder: Path, offline: bool, listener: Listener) -> solve.SolveJob:
    request = compression_folder.request_of(folder)
    found, recipe = inputs.load(request, offline=offline), finished.recipe_of(Path(request.model))
    job = solve.prepare(request, _solver(request), found, listener)  # the tuned model writes its text again
    found.model.net.to("meta")  # its weights go before the base's come
    base = models.load(recipe.model, dtype=recipe.dtype, device="cpu", offline=offline)
    return replace(job, inputs=replace(job.inputs, model=base))
