# SPDX-License-Identifier: Apache-2.0
"""`fleetune compress` with a trainer: a student learns from a teacher; the result is a plain Hugging Face directory."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.cli.console import Ui
from fleetune.cli.interrupt import InterruptHandler
from fleetune.common.display import human_bytes
from fleetune.compression import Trainer
from fleetune.compression.jobs import work as subjects
from fleetune.compression.jobs.work import PARTS, Subject, Work
from fleetune.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from fleetune.models.model import Model

SAME = "same"  # the teacher is the model that is given


@dataclass(frozen=True)
class Job:
    """A trainer's work, checked and ready to be done."""

    work: Work
    trainer: Trainer
    subject: Subject
    teacher: Model

    def about(self) -> list[tuple[str, str]]:
        """What it works with and what that takes, for the header."""
        size = f"{self.teacher.n_params / 1e6:.1f} M parameters"
        longest = _longest(self.subject)
        rows = f"{self.subject.source} · {len(self.subject.rows)} rows of {longest} tokens at most"
        memory = f"about {human_bytes(self.memory)}"
        return [("teacher", f"{self.taught_by} · {size}"), ("rows", rows), ("memory", memory)]

    @cached_property
    def memory(self) -> int:
        """Bytes of the peak, as planned."""
        return self.trainer.memory(self.subject.model, self.teacher, _longest(self.subject))

    @property
    def taught_by(self) -> str:
        """The teacher as the user names it."""
        return self.work.model if self.trainer.teacher == SAME else self.trainer.teacher

    def run(self, ui: Ui, folder: Path) -> None:
        """Do it, into `folder`; steps that are kept there are not done again.  StorageError for a disk too full."""
        subjects.warn_of_memory(ui, self.memory, ["with a smaller batch_size"])
        need = self.trainer.disk(self.subject.model)
        subjects.check_disk(folder, need, "the state that is kept and the result")
        _train(ui, self, folder)


def prepare(work: Work, trainer: Trainer, out: Path, *, offline: bool) -> Job:
    """The job; UsageError for whatever is in its way."""
    if work.text:
        raise RecipeError(
            [f"{work.method} trains on rows, not on plain text"], hint="give them with --data, without --text"
        )
    if not work.run and not work.data:
        raise UsageError(
            f"{work.method} needs rows to train on", hint="--data FILE, or compress a run, which has its own"
        )
    if not (same := trainer.teacher == SAME):
        _check_teacher(trainer.teacher, out)
    subject = subjects.load(work, offline=offline)
    if not subject.rows:
        raise UsageError("there are no rows to train on", hint="give some with --data")
    teacher = subject.model if same else _teacher(trainer.teacher, work.dtype, out, offline=offline)
    trainer.check(subject.model, teacher, _longest(subject))
    return Job(work, trainer, subject, teacher)


def _longest(subject: Subject) -> int:
    return max(len(row.ids) for row in subject.rows)


def _check_teacher(name: str, out: Path) -> None:
    """UsageError for one that cannot be, before the student is loaded."""
    from fleetune.cli.commands import compress

    try:
        compress.check_plain(name, out)
    except UsageError as error:
        raise UsageError(f"teacher={name}: {error.message}", hint=error.hint) from error


def _teacher(name: str, dtype: str, out: Path, *, offline: bool) -> Model:
    """A finished run's model, or a model of that name."""
    from fleetune import models
    from fleetune.runs import rundir
    from fleetune.tuning import finished

    if (
        name == "latest"
        or name.isdigit()
        or any((p / "run.toml").is_file() for p in (Path(name), out / name))
    ):
        model = finished.load(rundir.find(name, out), offline=offline, device="cpu")
        finished.merge_weights(model)
        return model
    return models.load(name, dtype=dtype, device="cpu", offline=offline)


def _train(ui: Ui, job: Job, folder: Path) -> None:
    from fleetune import models
    from fleetune.tuning import rounds

    began, teacher = time.monotonic(), job.teacher
    taught = subjects.measure(teacher, job.subject)
    student = job.trainer.student(job.subject.model)
    before = _measure(job, student)
    ui.event({
        "event": "start", **asdict(job.work), "folder": str(folder), "before": before, "teacher": taught,
        "planned": job.memory,
    })  # fmt: skip
    _steps(ui, job, student, folder)
    models.save(student.net, student.tokenizer, folder / "model", card=_card(job))
    after = _measure(job, student)
    size = subjects.folder_bytes(folder / "model")
    done = {
        "before": before, "after": after, "teacher": taught, "bytes": size,
        "seconds": round(time.monotonic() - began, 3), "peak_rss": rounds.peak_rss(),
        "digest": models.digest(models.named_tensors(student.net)), "planned": job.memory,
    }  # fmt: skip
    sizes = {
        "before": subjects.weight_bytes(student),
        "after": subjects.stored_bytes(folder / "model"),
    }
    subjects.finish(ui, job.work, folder, done, sizes | {"teacher": subjects.weight_bytes(teacher)})


def _steps(ui: Ui, job: Job, student: Model, folder: Path) -> None:
    """The training itself, told as it goes."""
    with InterruptHandler(ui) as brake, subjects.told(ui, brake, folder, "divergence") as on_step:
        job.trainer.train(student, job.teacher, job.subject.rows, job.work.seed, folder / PARTS, on_step)


def _measure(job: Job, student: Model) -> dict[str, float]:
    found, held = subjects.measure(student, job.subject), job.subject.held
    return found | ({"divergence": job.trainer.distance(student, job.teacher, held)} if held else {})


def _card(job: Job) -> str:
    return (
        f"# {Path(job.work.model).name}, smaller\n\n"
        f"Made by Fleetune ({job.work.method}); its teacher was {Path(job.taught_by).name}.\n"
    )
