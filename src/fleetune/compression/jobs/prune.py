# SPDX-License-Identifier: Apache-2.0
"""Prune a model and train the rest; the result is a plain Hugging Face directory.

A model whose blocks differ in width can be loaded by Fleetune alone (`families/widths.py`); its README says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.common import sums
from fleetune.common.display import counted
from fleetune.common.events import CompressStart, ModelPruned
from fleetune.compression import Pruner
from fleetune.compression.jobs import inputs as loading
from fleetune.compression.jobs import progress, windows
from fleetune.compression.jobs.contract import Outcome
from fleetune.compression.jobs.inputs import Inputs
from fleetune.errors import Interrupted, UsageError
from fleetune.runs import compression_folder
from fleetune.runs.compression_folder import PARTS, CompressRequest
from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from fleetune.data import Encoded
    from fleetune.models.net.model import Model


@dataclass(frozen=True)
class PruneJob:
    """A checked request for a pruner, with its model and rows."""

    request: CompressRequest
    pruner: Pruner
    inputs: Inputs
    rows: Sequence[Encoded]

    def about(self) -> list[tuple[str, str]]:
        """Return the row of the header on the rows or windows that importance is measured on."""
        what = "row" if self.inputs.rows else "window"
        longest = max(len(row.ids) for row in self.rows)
        return [
            ("text", f"{self.inputs.source} · {counted(len(self.rows), what)} of {longest} tokens at most")
        ]

    def run(self, listener: Listener, folder: Path) -> Outcome:
        """Prune, recover and save; resume from the decision and the checkpoint in `folder`.

        StorageError when the disk is too full.
        """
        need = self.pruner.disk(self.inputs.model) + self.inputs.logits_size(self.inputs.model)
        progress.check_disk(folder, need, "the state that is kept and the result")
        return _prune(listener, self, folder)


def prepare(
    request: CompressRequest, pruner: Pruner, listener: Listener, *, offline: bool, dry: bool = False
) -> PruneJob:
    """Load the model and its rows, and check the pruner on them; UsageError when it cannot use them.

    `dry` as in `windows.windows`.
    """
    inputs = loading.load(request, offline=offline)
    if request.data and not inputs.rows:
        raise UsageError("there are no rows to prune with", hint="give some with --data")
    longest = max((len(row.ids) for row in inputs.rows), default=request.length)
    pruner.check(inputs.model, longest, plain=not inputs.rows)
    return PruneJob(request, pruner, inputs, inputs.rows or _text_rows(request, inputs, listener, dry))


def _text_rows(request: CompressRequest, inputs: Inputs, listener: Listener, dry: bool) -> list[Encoded]:
    """Return windows of text as rows: the loss of every token but the first counts."""
    import numpy as np

    from fleetune.data import Encoded

    found = windows.windows(request, inputs, listener, dry=dry)
    return [Encoded(ids.numpy().astype(np.int32), 1) for ids in found]


def _prune(listener: Listener, job: PruneJob, folder: Path) -> Outcome:
    from fleetune import models
    from fleetune.common.memory import peak_rss

    began, inputs = time.monotonic(), job.inputs
    parameters, sizes = inputs.model.n_params, {"before": progress.weight_bytes(inputs.model)}
    before = inputs.measure(inputs.model, listener, folder)
    listener.event(CompressStart(**asdict(job.request), folder=str(folder), before=before))
    with inputs.reference(inputs.model, folder, listener) as reference:
        pruned = _cut(listener, job, folder)
        _report(listener, parameters, pruned)
        after = cut = inputs.measure(pruned, listener, folder, reference)
        trained = job.pruner.recover != "none"
        if trained:
            sizes["pruned"] = progress.weight_bytes(pruned)
            pruned = _recover(listener, job, pruned, folder)
        written = folder / "model"
        models.save(pruned.net, pruned.tokenizer, written, card=_card(job, pruned))
        sums.write(written)
        if trained:
            after = inputs.measure(pruned, listener, folder, reference)
    done = {
        "before": before,
        "pruned": cut,
        "after": after,
        "bytes": compression_folder.size(written),
        "parameters": {"before": parameters, "after": pruned.n_params},
        "seconds": round(time.monotonic() - began, 3),
        "peak_rss": peak_rss(),
        "digest": models.digest(models.named_tensors(pruned.net)),
    }
    return Outcome(done, sizes | {"after": compression_folder.weights_size(written)})


def _cut(listener: Listener, job: PruneJob, folder: Path) -> Model:
    """Return the pruned model; Ctrl-C while importance is measured leaves nothing to resume from."""

    def on_row(row: int, rows: int) -> None:
        listener.progress("rows", row, rows, "importance")
        if listener.stop_requested:
            raise Interrupted(f"stopped after {row} of {rows} rows", hint=progress.resume_command(folder))

    return job.pruner.prune(job.inputs.model, job.rows, folder / PARTS, on_row)


def _report(listener: Listener, parameters: int, pruned: Model) -> None:
    from fleetune.models.families import widths

    found, wide = widths.block_widths(pruned.net.config), int(pruned.net.config.hidden_size)
    listener.event(
        ModelPruned(
            parameters=pruned.n_params,
            blocks=len(found),
            hidden_size=wide,
            widths=[w._asdict() for w in found],
        )
    )
    heads = sorted({w.num_key_value_heads for w in found})
    channels = sorted({w.intermediate_size for w in found})
    listener.note(
        f"{1 - pruned.n_params / parameters:.1%} of the weights are gone: {len(found)} blocks with "
        f"{_span(heads)} key heads and {_span(channels)} channels, {wide} wide"
    )


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _recover(listener: Listener, job: PruneJob, pruned: Model, folder: Path) -> Model:
    """Train the pruned model, and report each step."""
    on_step = progress.step_reporter(listener, folder, "loss")
    place = folder / PARTS / "recovery"
    return job.pruner.train(pruned, job.inputs.model, job.rows, job.request.seed, place, on_step)


def _card(job: PruneJob, pruned: Model) -> str:
    from fleetune.models.families import widths

    odd = (
        "\nIts blocks differ in width, which transformers cannot hold: it is loaded by `fleetune`, or exported with\n"
        "`fleetune export` to a GGUF file.\n"
        if widths.has_block_widths(pruned.net.config)
        else ""
    )
    return f"# {Path(job.request.model).name}, smaller\n\nMade by Fleetune ({job.request.method}).\n{odd}"
