# SPDX-License-Identifier: Apache-2.0
"""`fleetune compress` with a solver: block by block to the master artefact that `fleetune export` repacks."""

from __future__ import annotations

import hashlib
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.commands import subject as subjects
from fleetune.commands.brake import Brake
from fleetune.commands.subject import PARTS, Subject, Work
from fleetune.compress import Solver
from fleetune.errors import Interrupted, UsageError
from fleetune.text import human_time
from fleetune.ui import Ui

if TYPE_CHECKING:
    from torch import Tensor

    from fleetune.compress.calibrate import Block, Parts


@dataclass(frozen=True)
class Job:
    """A solver's work, checked and ready to be done."""

    work: Work
    solver: Solver
    subject: Subject
    calibration: Tensor | None

    def about(self) -> list[tuple[str, str]]:
        """What it works with, for the header."""
        if self.calibration is None:
            return []
        count, length = self.calibration.shape
        return [("text", f"{self.subject.source} · {count} windows of {length} tokens")]

    def run(self, ui: Ui, folder: Path) -> None:
        """Do it, into `folder`; finished blocks there are not done again."""
        _compress(ui, self, folder)


def prepare(work: Work, solver: Solver, subject: Subject, ui: Ui) -> Job:
    """The job; UsageError for whatever is in its way."""
    from fleetune.compress import calibrate

    calibrate.check(subject.model, solver)
    return Job(work, solver, subject, _windows(work, subject, ui) if solver.data else None)


def _windows(work: Work, subject: Subject, ui: Ui) -> Tensor:
    import numpy as np

    from fleetune import data
    from fleetune.compress import calibrate
    from fleetune.losses import context

    model = subject.model
    if work.length > (longest := context(model)):
        raise UsageError(
            f"windows of {work.length} tokens are longer than the model's {longest}",
            hint=f"--length {min(longest, 512)}",
        )
    if subject.rows:
        ids = [np.asarray(row.ids) for row in subject.rows]
    elif work.text:
        encode = model.tokenizer
        ids = [np.asarray(encode(text, verbose=False)["input_ids"]) for text in data.read_text(work.text)]
    else:
        ui.note(f"no calibration text is given: the model writes {work.windows} windows itself")
        return calibrate.written(model, work.length, work.windows, work.seed)
    return calibrate.windows(ids, work.length, work.windows)


def _compress(ui: Ui, job: Job, folder: Path) -> None:
    from fleetune import models, rounds
    from fleetune.compress import calibrate
    from fleetune.deploy import master

    began, subject, solver = time.monotonic(), job.subject, job.solver
    model, before = subject.model, subjects.measure(subject.model, subject)
    ui.event({"event": "start", **asdict(job.work), "folder": str(folder), "before": before})
    with ui.count("blocks", 0) as bar, Brake(ui) as brake:

        def on_matrix(block: int, blocks: int, name: str) -> None:
            bar.update(block, blocks, name.rsplit(".", 1)[-1])
            if brake.pulled:
                raise Interrupted(
                    f"stopped in block {block}; finished blocks are kept",
                    hint=f"fleetune compress --resume {folder}",
                )

        parts = calibrate.run(
            model, solver, job.calibration, folder / PARTS, on_matrix, lambda b, n: _told(ui, b, n)
        )
    head = master.Head(
        job.work.method, {**asdict(solver)}, models.digest(models.named_tensors(model.net)), model.tokenizer_digest,  # type: ignore[call-overload]
        _calibration(job.calibration),
    )  # fmt: skip
    master.write(folder / "model", model, parts, head)
    after = _after(subject, parts)
    shutil.rmtree(folder / PARTS)
    size = subjects.folder_bytes(folder / "model")
    done = {
        "before": before, "after": after, "bytes": size,
        "seconds": round(time.monotonic() - began, 3), "peak_rss": rounds.peak_rss(),
        "digest": master.Master(folder / "model").digest(), "error": _mean_error(parts.blocks),
        "notes": _notes(parts.blocks),
    }  # fmt: skip
    sizes = {"before": subjects.weight_bytes(model), "after": size}
    subjects.finish(ui, job.work, folder, done, sizes)


def _told(ui: Ui, block: Block, blocks: int) -> None:
    errors = [m.error for m in block.matrices]
    ui.event({
        "event": "block", "block": block.number, "blocks": blocks, "seconds": block.seconds,
        "matrices": [{"name": m.name, "error": m.error, "notes": list(m.notes)} for m in block.matrices],
    })  # fmt: skip
    told = (
        "" if math.isnan(errors[0]) else f"  error {statistics.fmean(errors):.4f}, at most {max(errors):.4f}"
    )
    ui.note(f"block {block.number + 1}/{blocks}{told}  {human_time(block.seconds)}")
    for matrix in block.matrices:
        for note in matrix.notes:
            ui.note(f"  {matrix.name}: {note}")


def _mean_error(blocks: Sequence[Block]) -> float | None:
    errors = [m.error for b in blocks for m in b.matrices]
    return None if math.isnan(errors[0]) else statistics.fmean(errors)


def _notes(blocks: Sequence[Block]) -> dict[str, list[str]]:
    return {m.name: list(m.notes) for b in blocks for m in b.matrices if m.notes}


def _calibration(calibration: Tensor | None) -> dict[str, Any]:
    if calibration is None:
        return {}
    tokens = calibration.numpy().astype("<i8").tobytes()
    count, length = calibration.shape
    return {"windows": count, "length": length, "sha256": hashlib.sha256(tokens).hexdigest()}


def _after(subject: Subject, parts: Parts) -> dict[str, float]:
    from fleetune.compress import calibrate

    linears = {name: m for _, found in calibrate.linears_of(subject.model) for name, m in found.items()}
    with calibrate.placed(linears, parts):
        return subjects.measure(subject.model, subject)
