# SPDX-License-Identifier: Apache-2.0
"""`fleetune compress` with a pruner: parts of a model go, what is left is trained; the result is a plain directory.

A model whose blocks differ in width is a directory that only fleetune loads (`widths.py`); its README says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.cli.console import Ui
from fleetune.cli.interrupt import InterruptHandler
from fleetune.compression import Pruner
from fleetune.compression.jobs import solve
from fleetune.compression.jobs import work as subjects
from fleetune.compression.jobs.work import PARTS, Subject, Work
from fleetune.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from fleetune.data import Encoded
    from fleetune.models.model import Model


@dataclass(frozen=True)
class Job:
    """A pruner's work, checked and ready to be done."""

    work: Work
    pruner: Pruner
    subject: Subject
    rows: Sequence[Encoded]

    def about(self) -> list[tuple[str, str]]:
        """What it works with, for the header."""
        what = "rows" if self.subject.rows else "windows"
        longest = max(len(row.ids) for row in self.rows)
        return [("text", f"{self.subject.source} · {len(self.rows)} {what} of {longest} tokens at most")]

    def run(self, ui: Ui, folder: Path) -> None:
        """Do it, into `folder`; what is decided and the steps that are kept there are not done again.

        StorageError for a disk too full.
        """
        subjects.check_disk(
            folder, self.pruner.disk(self.subject.model), "the state that is kept and the result"
        )
        _prune(ui, self, folder)


def prepare(work: Work, pruner: Pruner, *, offline: bool, ui: Ui) -> Job:
    """The job; UsageError for whatever is in its way."""
    subject = subjects.load(work, offline=offline)
    if work.data and not subject.rows:
        raise UsageError("there are no rows to prune with", hint="give some with --data")
    longest = max((len(row.ids) for row in subject.rows), default=work.length)
    pruner.check(subject.model, longest, plain=not subject.rows)
    return Job(work, pruner, subject, subject.rows or _windows(work, subject, ui))


def _windows(work: Work, subject: Subject, ui: Ui) -> list[Encoded]:
    """Text as rows whose tokens all count."""
    import numpy as np

    from fleetune.data import Encoded

    return [Encoded(ids.numpy().astype(np.int32), 1) for ids in solve.windows(work, subject, ui)]


def _prune(ui: Ui, job: Job, folder: Path) -> None:
    from fleetune import models
    from fleetune.tuning import rounds

    began, subject = time.monotonic(), job.subject
    before, whole = subjects.measure(subject.model, subject), subjects.weight_bytes(subject.model)
    parameters = subject.model.n_params
    ui.event({"event": "start", **asdict(job.work), "folder": str(folder), "before": before})
    with InterruptHandler(ui) as brake:
        pruned = _cut(ui, job, folder, brake)
        _told(ui, parameters, pruned)
        cut, sizes = subjects.measure(pruned, subject), {"before": whole}
        trained = job.pruner.recover != "none"
        if trained:
            sizes["pruned"] = subjects.weight_bytes(pruned)
            pruned = _train(ui, job, pruned, folder, brake)
    models.save(pruned.net, pruned.tokenizer, folder / "model", card=_card(job, pruned))
    after = subjects.measure(pruned, subject) if trained else cut
    size = subjects.folder_bytes(folder / "model")
    done = {
        "before": before, "pruned": cut, "after": after, "bytes": size,
        "parameters": {"before": parameters, "after": pruned.n_params},
        "seconds": round(time.monotonic() - began, 3), "peak_rss": rounds.peak_rss(),
        "digest": models.digest(models.named_tensors(pruned.net)),
    }  # fmt: skip
    subjects.finish(ui, job.work, folder, done, sizes | {"after": subjects.stored_bytes(folder / "model")})


def _cut(ui: Ui, job: Job, folder: Path, brake: InterruptHandler) -> Model:
    """The pruned model; Ctrl-C while its importance is measured leaves nothing to go on with."""
    with ui.count("rows", 0) as bar:

        def on_row(row: int, rows: int) -> None:
            bar.update(row, rows, "importance")
            if brake.requested:
                raise Interrupted(
                    f"stopped after {row} of {rows} rows", hint=f"fleetune compress --resume {folder}"
                )

        return job.pruner.prune(job.subject.model, job.rows, folder / PARTS, on_row)


def _told(ui: Ui, parameters: int, pruned: Model) -> None:
    from fleetune.models.families import widths

    found, wide = widths.block_widths(pruned.net.config), int(pruned.net.config.hidden_size)
    ui.event({
        "event": "pruned", "parameters": pruned.n_params, "blocks": len(found), "hidden_size": wide,
        "widths": [w._asdict() for w in found],
    })  # fmt: skip
    heads = sorted({w.num_key_value_heads for w in found})
    channels = sorted({w.intermediate_size for w in found})
    ui.note(
        f"{1 - pruned.n_params / parameters:.1%} of the weights are gone: {len(found)} blocks with "
        f"{_span(heads)} key heads and {_span(channels)} channels, {wide} wide"
    )


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _train(ui: Ui, job: Job, pruned: Model, folder: Path, brake: InterruptHandler) -> Model:
    """The recovery, told as it goes."""
    at = folder / PARTS / "recovery"
    with subjects.told(ui, brake, folder, "loss") as on_step:
        return job.pruner.train(pruned, job.subject.model, job.rows, job.work.seed, at, on_step)


def _card(job: Job, pruned: Model) -> str:
    from fleetune.models.families import widths

    odd = (
        "\nIts blocks differ in width, which transformers cannot hold: it is loaded by `fleetune`, or exported with\n"
        "`fleetune export` to a GGUF file.\n"
        if widths.has_block_widths(pruned.net.config)
        else ""
    )
    return f"# {Path(job.work.model).name}, smaller\n\nMade by Fleetune ({job.work.method}).\n{odd}"
