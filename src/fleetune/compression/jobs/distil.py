# SPDX-License-Identifier: Apache-2.0
"""Distil a student from a teacher; the result is a plain Hugging Face directory."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune import subject
from fleetune.common import sums
from fleetune.common.display import counted, human_bytes
from fleetune.common.events import CompressStart
from fleetune.compression import Trainer
from fleetune.compression.jobs import inputs as loading
from fleetune.compression.jobs import progress
from fleetune.compression.jobs.contract import Outcome
from fleetune.compression.jobs.inputs import Inputs
from fleetune.errors import RecipeError, UsageError
from fleetune.runs import compression_folder
from fleetune.runs.compression_folder import PARTS, CompressRequest
from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from fleetune.evaluation.losses import Reference
    from fleetune.models.net.model import Model

SAME = "same"  # the teacher is the given model itself


@dataclass(frozen=True)
class DistilJob:
    """A checked request for a trainer, with student, rows and teacher."""

    request: CompressRequest
    trainer: Trainer
    inputs: Inputs
    teacher: Model

    def about(self) -> list[tuple[str, str]]:
        """Return rows of the header: teacher, rows, planned memory."""
        size = f"{self.teacher.n_params / 1e6:.1f} M parameters"
        rows = f"{self.inputs.source} · {counted(len(self.inputs.rows), 'row')} of {_longest(self.inputs)} tokens at most"
        memory = f"about {human_bytes(self.memory)}"
        return [("teacher", f"{self.teacher_name} · {size}"), ("rows", rows), ("memory", memory)]

    @cached_property
    def memory(self) -> int:
        """Planned peak memory, in bytes."""
        return self.trainer.memory(self.inputs.model, self.teacher, _longest(self.inputs))

    @property
    def teacher_name(self) -> str:
        """The teacher as the user names it."""
        return self.request.model if self.trainer.teacher == SAME else self.trainer.teacher

    def run(self, listener: Listener, folder: Path) -> Outcome:
        """Train the student and save it; resume from the checkpoint in `folder`.

        StorageError when the disk is too full.
        """
        progress.warn_of_memory(listener, self.memory, ["with a smaller batch_size"])
        need = self.trainer.disk(self.inputs.model) + self.inputs.logits_size(self.teacher)
        progress.check_disk(folder, need, "the state that is kept and the result")
        return _train(listener, self, folder)


def prepare(request: CompressRequest, trainer: Trainer, out: Path, *, offline: bool) -> DistilJob:
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
    teacher = None if trainer.teacher == SAME else _find_teacher(trainer.teacher, out)
    inputs = loading.load(request, offline=offline)
    if not inputs.rows:
        raise UsageError("there are no rows to train on", hint="give some with --data")
    model = inputs.model if teacher is None else _load(teacher, request.dtype, offline=offline)
    trainer.check(inputs.model, model, _longest(inputs))
    return DistilJob(request, trainer, inputs, model)


def _longest(inputs: Inputs) -> int:
    return max(len(row.ids) for row in inputs.rows)


def _find_teacher(name: str, out: Path) -> subject.Run | subject.Plain:
    """Return what the teacher's name means; UsageError when it cannot teach, before the student is loaded."""
    try:
        return subject.open_weights(name, out)
    except UsageError as error:
        raise UsageError(f"teacher={name}: {error.message}", hint=error.hint) from error


def _load(teacher: subject.Run | subject.Plain, dtype: str, *, offline: bool) -> Model:
    from fleetune.tuning.result import finished

    if isinstance(teacher, subject.Plain):
        return teacher.load(dtype=dtype, offline=offline)
    model = teacher.load(offline=offline)
    finished.merge_weights(model)
    return model


def _train(listener: Listener, job: DistilJob, folder: Path) -> Outcome:
    from fleetune import models
    from fleetune.common.memory import peak_rss

    began, teacher = time.monotonic(), job.teacher
    of_teacher = job.inputs.measure(teacher, listener, folder)
    student = job.trainer.student(job.inputs.model)
    with job.inputs.reference(teacher, folder, listener) as reference:
        before = _measure(listener, job, folder, student, reference)
        listener.event(
            CompressStart(
                **asdict(job.request),
                folder=str(folder),
                before=before,
                teacher=of_teacher,
                planned=job.memory,
            )
        )
        on_step = progress.step_reporter(listener, folder, "divergence")
        job.trainer.train(student, teacher, job.inputs.rows, job.request.seed, folder / PARTS, on_step)
        written = folder / "model"
        models.save(student.net, student.tokenizer, written, card=_card(job))
        sums.write(written)
        after = _measure(listener, job, folder, student, reference)
    done = {
        "before": before,
        "after": after,
        "teacher": of_teacher,
        "bytes": compression_folder.size(written),
        "seconds": round(time.monotonic() - began, 3),
        "peak_rss": peak_rss(),
        "digest": models.digest(models.named_tensors(student.net)),
        "planned": job.memory,
    }
    return Outcome(
        done,
        {
            "before": progress.weight_bytes(student),
            "after": compression_folder.weights_size(written),
            "teacher": progress.weight_bytes(teacher),
        },
    )


def _measure(
    listener: Listener, job: DistilJob, folder: Path, student: Model, reference: Reference | None
) -> dict[str, float]:
    found, rows = job.inputs.measure(student, listener, folder, reference), job.inputs.held_out
    return found | ({"divergence": job.trainer.distance(student, job.teacher, rows)} if rows else {})


def _card(job: DistilJob) -> str:
    return (
        f"# {Path(job.request.model).name}, smaller\n\n"
        f"Made by Fleetune ({job.request.method}); its teacher was {Path(job.teacher_name).name}.\n"
    )
