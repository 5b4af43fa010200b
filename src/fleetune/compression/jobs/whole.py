"""Compress a whole model to a plain Hugging Face directory: distil a student from a teacher, or prune it and train the rest."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fleetune import models, subject
from fleetune.common import sums
from fleetune.common.display import counted, human_bytes
from fleetune.common.events import CompressStart, ModelPruned
from fleetune.common.memory import peak_rss
from fleetune.compression import Pruner, Trainer
from fleetune.compression.jobs import inputs, progress
from fleetune.compression.jobs.inputs import Inputs
from fleetune.data import Encoded
from fleetune.errors import RecipeError, UsageError
from fleetune.evaluation import losses
from fleetune.evaluation.losses import Reference
from fleetune.models.families import widths
from fleetune.models.net.model import Model
from fleetune.runs import compression_folder
from fleetune.runs.compression_folder import PARTS, CompressRequest
from fleetune.runs.listener import Listener
from fleetune.tuning.result import finished

SAME = "same"  # the teacher is the given model itself
KEPT = "the state that is kept and the result"


def _finished(model: Model, folder: Path, card: str, began: float) -> dict[str, Any]:
    """Save a model; return what both kinds of jobs report of the result."""
    written = folder / "model"
    models.save(model.net, model.tokenizer, written, card=card)
    sums.write(written)
    return {
        "bytes": compression_folder.size(written),
        "seconds": round(time.monotonic() - began, 3),
        "peak_rss": peak_rss(),
        "digest": models.digest(models.named_tensors(model.net)),
    }


# Distilling -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistilJob:
    """A checked request for a trainer, with student, rows and teacher."""

    request: CompressRequest
    method: Trainer
    inputs: Inputs
    teacher: Model

    def about(self) -> list[tuple[str, str]]:
        """Return rows of the header: teacher, rows, planned memory."""
        size = f"{self.teacher.n_params / 1e6:.1f} M parameters"
        rows = f"{self.inputs.source} · {counted(len(self.inputs.rows), 'row')} of {self.inputs.longest} tokens at most"
        memory = f"about {human_bytes(self.memory)}"
        return [("teacher", f"{self.teacher_name} · {size}"), ("rows", rows), ("memory", memory)]

    @cached_property
    def memory(self) -> int:
        """Planned peak memory, in bytes."""
        return self.method.memory(self.inputs.model, self.teacher, self.inputs.longest)

    @property
    def teacher_name(self) -> str:
        """The teacher as the user names it."""
        return self.request.model if self.method.teacher == SAME else self.method.teacher

    def run(self, listener: Listener, folder: Path) -> progress.JobResult:
        """Train the student and save it; resume from the checkpoint in `folder`.

        StorageError when the disk is too full.
        """
        progress.warn_of_memory(listener, self.memory, "a smaller batch_size")
        need = self.method.disk(self.inputs.model) + self.inputs.logits_size(self.teacher)
        progress.check_disk(folder, need, KEPT)
        began, teacher = time.monotonic(), self.teacher
        student = self.method.student(self.inputs.model)
        with self.inputs.reference(teacher, folder, listener) as reference:
            of_teacher = self.inputs.measure(
                teacher, listener, folder, known=reference.loss if reference else None
            )
            before = self._measure(listener, folder, student, reference)
            listener.event(
                CompressStart(
                    **asdict(self.request),
                    folder=str(folder),
                    before=before,
                    teacher=of_teacher,
                    planned=self.memory,
                )
            )
            on_step = progress.step_reporter(listener, folder, "divergence")
            rows, seed = self.inputs.rows, self.request.seed
            self.method.train(student, teacher, rows, seed, folder / PARTS, on_step)
            card = (
                f"# {Path(self.request.model).name}, smaller\n\n"
                f"Made by Fleetune ({self.request.method}); its teacher was {Path(self.teacher_name).name}.\n"
            )
            after = self._measure(listener, folder, student, reference)
            done = _finished(student, folder, card, began)
        done |= {"before": before, "after": after, "teacher": of_teacher, "planned": self.memory}
        sizes = {
            "before": progress.weight_bytes(student),
            "after": compression_folder.weights_size(folder / "model"),
            "teacher": progress.weight_bytes(teacher),
        }
        return progress.JobResult(done, sizes)

    def _measure(
        self, listener: Listener, folder: Path, student: Model, reference: Reference | None
    ) -> dict[str, float]:
        measures, rows = self.inputs.measure(student, listener, folder, reference), self.inputs.held_out
        if rows:
            measures["divergence"] = self.method.distance(student, self.teacher, rows)
        return measures


def prepare_distillation(
    request: CompressRequest, trainer: Trainer, out: Path, *, offline: bool
) -> DistilJob:
    """Load student, rows and teacher, and check them together.

    UsageError when there are no rows, the teacher is not a plain model or a run, or student and teacher do not match.
    """
    if request.text:
        raise RecipeError(
            [f"{request.method} trains on rows, not on plain text"],
            hint="give them with --data, without --text",
        )
    if not request.run and not request.data:
        raise UsageError(
            f"{request.method} needs rows to train on",
            hint="--data FILE, or compress a run, which has its own",
        )
    try:  # before the student is loaded
        found = None if trainer.teacher == SAME else subject.open_weights(trainer.teacher, out)
    except UsageError as error:
        raise UsageError(f"teacher={trainer.teacher}: {error.message}", hint=error.hint) from error
    loaded = inputs.load(request, offline=offline)
    if not loaded.rows:
        raise UsageError("there are no rows to train on", hint="give some with --data")
    teacher = loaded.model
    if isinstance(found, subject.Plain):
        teacher = found.load(dtype=request.dtype, offline=offline)
    elif found is not None:
        teacher = found.load(offline=offline)
        finished.merge_weights(teacher)
    trainer.check(loaded.model, teacher, loaded.longest)
    short = replace(request, length=min(request.length, losses.context_length(teacher)))
    return DistilJob(request, trainer, inputs.with_other(short, loaded), teacher)


# Pruning --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruneJob:
    """A checked request for a pruner, with its model and rows."""

    request: CompressRequest
    method: Pruner
    inputs: Inputs
    rows: Sequence[Encoded]

    def about(self) -> list[tuple[str, str]]:
        """Return the row of the header on the rows or windows that importance is measured on."""
        what = "row" if self.inputs.rows else "window"
        longest = max(len(row.ids) for row in self.rows)
        return [
            ("text", f"{self.inputs.source} · {counted(len(self.rows), what)} of {longest} tokens at most")
        ]

    def run(self, listener: Listener, folder: Path) -> progress.JobResult:
        """Prune, recover and save; resume from the checkpoint in `folder`.  StorageError when the disk is too full."""
        loaded, whole = self.inputs, self.inputs.model
        progress.check_disk(folder, self.method.disk(whole) + loaded.logits_size(whole), KEPT)
        began, parameters = time.monotonic(), whole.n_params
        sizes = {"before": progress.weight_bytes(whole)}

        def on_row(row: int, rows: int) -> None:
            listener.progress("rows", row, rows, "importance")
            progress.stop_if_asked(
                listener, f"stopped after {row} of {rows} rows", progress.resume_command(folder)
            )

        with loaded.reference(whole, folder, listener) as reference:
            before = loaded.measure(whole, listener, folder, known=reference.loss if reference else None)
            listener.event(CompressStart(**asdict(self.request), folder=str(folder), before=before))
            pruned = self.method.prune(whole, self.rows, on_row)
            _report(listener, parameters, pruned)
            after = cut = loaded.measure(pruned, listener, folder, reference)
            if self.method.recover != "none":
                sizes["pruned"] = progress.weight_bytes(pruned)
                on_step, place = progress.step_reporter(listener, folder, "loss"), folder / PARTS / "recovery"
                pruned = self.method.train(pruned, self.rows, self.request.seed, place, on_step)
                after = loaded.measure(pruned, listener, folder, reference)
            done = _finished(pruned, folder, self._card(pruned), began)
        done |= {"before": before, "pruned": cut, "after": after}
        done["parameters"] = {"before": parameters, "after": pruned.n_params}
        return progress.JobResult(done, sizes | {"after": compression_folder.weights_size(folder / "model")})

    def _card(self, pruned: Model) -> str:
        odd = (
            "\nIts blocks differ in width, which transformers cannot hold: it is loaded by `fleetune`, or exported with\n"
            "`fleetune export` to a GGUF file.\n"
            if widths.has_block_widths(pruned.net.config)
            else ""
        )
        return (
            f"# {Path(self.request.model).name}, smaller\n\nMade by Fleetune ({self.request.method}).\n{odd}"
        )


def prepare_pruning(request: CompressRequest, pruner: Pruner, *, offline: bool) -> PruneJob:
    """Load the model and its rows, and check the pruner on them; UsageError when it cannot use them."""
    loaded = inputs.with_other(request, inputs.load(request, offline=offline))
    if request.data and not loaded.rows:
        raise UsageError("there are no rows to prune with", hint="give some with --data")
    pruner.check(loaded.model)
    rows = loaded.rows
    if not rows:  # windows of text as rows: the loss of every token but the first counts
        windows = inputs.windows(request, loaded)
        rows = [Encoded(ids.numpy().astype(np.int32), 1) for ids in windows]
    return PruneJob(request, pruner, loaded, rows)


def _report(listener: Listener, parameters: int, pruned: Model) -> None:
    """Report how wide the blocks are that stay."""
    blocks, hidden = widths.block_widths(pruned.net.config), int(pruned.net.config.hidden_size)
    listener.event(
        ModelPruned(
            parameters=pruned.n_params,
            blocks=len(blocks),
            hidden_size=hidden,
            widths=[width._asdict() for width in blocks],
        )
    )
    heads = _span([width.num_key_value_heads for width in blocks])
    channels = _span([width.intermediate_size for width in blocks])
    listener.note(
        f"{1 - pruned.n_params / parameters:.1%} of the weights are gone: {len(blocks)} blocks with "
        f"{heads} key heads and {channels} channels, {hidden} wide"
    )


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"
