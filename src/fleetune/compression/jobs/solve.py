# SPDX-License-Identifier: Apache-2.0
"""`fleetune compress` with a solver: block by block to the master artefact that `fleetune export` repacks."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetune.cli.console import Ui
from fleetune.cli.interrupt import InterruptHandler
from fleetune.common.display import human_bytes, human_time
from fleetune.compression import Solver
from fleetune.compression.jobs import work as subjects
from fleetune.compression.jobs.work import CLIENTS, PARTS, Subject, Work
from fleetune.errors import DataError, Interrupted, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from fleetune.compression.layerwise.driver import Block, Parts
    from fleetune.compression.layerwise.federated import Clients, Reply
    from fleetune.models.artefact import ArtefactHead
    from fleetune.planning.compression_cost import CompressionSize

ORIGIN: Final = "origin.json"  # in the folder of finished blocks: what they are a function of
REPLIES: Final = "replies.jsonl"  # there too: of the clients


@dataclass(frozen=True)
class Job:
    """A solver's work, checked and ready to be done."""

    work: Work
    solver: Solver
    subject: Subject
    calibration: Tensor | None
    shares: Mapping[int, Tensor]  # whose windows they are, where clients calibrate
    replies: list[Reply] = field(default_factory=list)  # of these clients, as they come

    def about(self) -> list[tuple[str, str]]:
        """What it works with and what that takes, for the header."""
        memory = f"about {human_bytes(self.memory)}" + (
            " · one block at a time, read from its file" if self.work.low_memory else ""
        )
        if self.calibration is None:
            return [("memory", memory)]
        count, length = self.calibration.shape
        text = f"{self.subject.source} · {count} windows of {length} tokens"
        text += " · true sequential" if self.work.true_sequential else ""
        whose = [("clients", f"{len(self.shares)} of them, in turn")] if self.shares else []
        return [("text", text), *whose, ("memory", memory)]

    @cached_property
    def memory(self) -> int:
        """Bytes of the peak, as planned."""
        from fleetune.planning import compression_cost
        from fleetune.planning.shapes import shape_of

        return sum(compression_cost.memory(shape_of(self.subject.model.net.config), self.cost).values())

    @property
    def cost(self) -> CompressionSize:
        """What the costs depend on."""
        from fleetune.planning.workload import SIZES

        count, length = (0, 0) if self.calibration is None else self.calibration.shape
        return size_of(self.solver, count, length)._replace(
            size=SIZES[self.subject.model.dtype], low_memory=self.work.low_memory,
            measured=self.subject.measured, clients=len(self.shares), together=self.work.true_sequential,
            heads=_written_heads(self.subject.model.net.config),
        )  # fmt: skip

    def run(self, ui: Ui, folder: Path) -> None:
        """Do it, into `folder`; finished blocks there are not done again.  StorageError for a disk too full."""
        _check_room(ui, self, folder)
        _compress(ui, self, folder)


def size_of(solver: Solver, windows: int, length: int) -> CompressionSize:
    """What the costs of a solver depend on, from its settings and its calibration windows."""
    from fleetune.planning.compression_cost import CompressionSize

    bits, group = int(getattr(solver, "bits", 0)), int(getattr(solver, "group", 0))
    return CompressionSize(windows if solver.data else 0, length, bits=bits, group=group)


def prepare(work: Work, solver: Solver, subject: Subject, ui: Ui) -> Job:
    """The job; UsageError for whatever is in its way."""
    from fleetune.compression.layerwise import driver

    driver.check(subject.model, solver)
    if not solver.data:
        if work.calibrate == CLIENTS:
            raise UsageError(f"{work.method} is not calibrated", hint="leave out --calibrate")
        if work.true_sequential:
            raise UsageError(f"{work.method} is not calibrated", hint="leave out --true-sequential")
        return Job(work, solver, subject, None, {})
    import torch

    shares = _shares(work, subject, ui) if work.calibrate == CLIENTS else {}
    calibration = torch.cat(list(shares.values())) if shares else windows(work, subject, ui)
    return Job(work, solver, subject, calibration, shares)


def _shares(work: Work, subject: Subject, ui: Ui) -> dict[int, Tensor]:
    """Each client's windows, its equal part of `work.windows`, at least one; a client that fills none is left out."""
    import numpy as np
    import torch

    from fleetune.compression.layerwise import driver

    _check_length(work, subject)
    each, found = max(1, work.windows // len(subject.clients)), dict[int, torch.Tensor]()
    for client, rows in subject.clients.items():
        try:
            found[client] = driver.windows([np.asarray(row.ids) for row in rows], work.length, each)
        except DataError as error:
            ui.note(f"client {client} is left out: {error.message}")
    if not found:
        raise DataError(
            f"no client has text for a window of {work.length} tokens", hint="give a smaller --length"
        )
    return found


def _check_length(work: Work, subject: Subject) -> None:
    from fleetune.evaluation.losses import context_length

    if work.length > (longest := context_length(subject.model)):
        raise UsageError(
            f"windows of {work.length} tokens are longer than the model's {longest}",
            hint=f"--length {min(longest, 512)}",
        )


def windows(work: Work, subject: Subject, ui: Ui) -> Tensor:
    """int64 [N, length]: the work's rows or text, or what the model writes where there is neither."""
    import numpy as np

    from fleetune import data
    from fleetune.compression.layerwise import driver

    model = subject.model
    _check_length(work, subject)
    if subject.rows:
        ids = [np.asarray(row.ids) for row in subject.rows]
    elif work.text:
        encode = model.tokenizer
        ids = [np.asarray(encode(text, verbose=False)["input_ids"]) for text in data.read_text(work.text)]
    elif work.low_memory:
        raise UsageError(
            "with --low-memory the model cannot write its own text: each token would read all of it anew",
            hint="give some: --text FILE or --data FILE",
        )
    else:
        ui.note(f"no calibration text is given: the model writes {work.windows} windows itself")
        return driver.written(model, work.length, work.windows, work.seed)
    return driver.windows(ids, work.length, work.windows)


def solve(ui: Ui, job: Job, folder: Path, again: str) -> Parts:
    """The blocks of the job's model; those that `folder` holds are not done again.

    Interrupted after Ctrl-C, with `again` as the command that goes on.  UsageError when those blocks were made of
    other weights, settings or text.
    """
    from fleetune.compression.layerwise import driver

    _check_origin(job, folder / PARTS)
    with ui.count("blocks", 0) as bar, InterruptHandler(ui) as brake:

        def on_matrix(block: int, blocks: int, name: str) -> None:
            bar.update(block, blocks, name.rsplit(".", 1)[-1])
            if brake.requested:
                raise Interrupted(f"stopped in block {block}; finished blocks are kept", hint=again)

        return driver.run(
            job.subject.model,
            job.solver,
            _source(ui, job, folder / PARTS),
            folder / PARTS,
            on_matrix,
            lambda b, n: _told(ui, b, n),
            true_sequential=job.work.true_sequential,
        )


def _check_origin(job: Job, parts: Path) -> None:
    from fleetune.common.files import write_atomic

    model = job.subject.model
    own = json.dumps([
        job.work.method, asdict(job.solver), model.digest, model.dtype,  # type: ignore[call-overload]
        _calibration(job), [[client, len(own)] for client, own in job.shares.items()],
    ])  # fmt: skip
    file = parts / ORIGIN
    if file.is_file() and file.read_text(encoding="utf-8") != own:
        raise UsageError(
            f"the blocks in {parts} were made of other weights or another text: something has changed since",
            hint=f"compress again: fleetune compress {job.work.model}",
        )
    parts.mkdir(parents=True, exist_ok=True)
    write_atomic(file, own)


def _source(ui: Ui, job: Job, parts: Path) -> Tensor | Clients | None:
    from fleetune.compression.layerwise.federated import WARNING, Clients

    if not job.shares:
        return job.calibration
    log = parts / REPLIES
    job.replies.extend(_earlier(log))
    gone = {reply.client for reply in job.replies if reply.reason}
    left = {client: own for client, own in job.shares.items() if client not in gone}

    def told(reply: Reply) -> None:
        ui.event({"event": "client", **asdict(reply)})
        if reply.reason:
            ui.note(f"block {reply.block + 1}: client {reply.client} is left out: {reply.reason}")
        job.replies.append(reply)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(reply)) + "\n")

    ui.note(WARNING)
    return Clients(job.subject.model, left or job.shares, parts, told)


def _earlier(log: Path) -> list[Reply]:
    """The replies before a stop: what they sent counts, and who was left out stays so."""
    from fleetune.compression.layerwise.federated import Reply

    found = list[Reply]()
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        with suppress(ValueError, TypeError):  # cut short by a kill
            found.append(Reply(**json.loads(line)))
    return found


def head(job: Job) -> ArtefactHead:
    """How the artefact is made."""
    from fleetune import models
    from fleetune.models.artefact import ArtefactHead
    from fleetune.models.paged import tensors_of

    model = job.subject.model
    return ArtefactHead(
        job.work.method, {**asdict(job.solver)}, models.digest(tensors_of(model)),  # type: ignore[call-overload]
        model.tokenizer_digest, _calibration(job),
    )  # fmt: skip


def _check_room(ui: Ui, job: Job, folder: Path) -> None:
    """A note when memory is short; StorageError when the disk is."""
    from fleetune.planning import compression_cost
    from fleetune.planning.shapes import shape_of

    ways = [] if job.work.low_memory else ["with --low-memory"]
    ways += ["without --true-sequential"] if job.work.true_sequential else []
    subjects.warn_of_memory(ui, job.memory, ways)
    need = compression_cost.disk(shape_of(job.subject.model.net.config), job.cost)
    subjects.check_disk(folder, need, "the finished blocks and the result")


def _written_heads(config: Any) -> int:
    """The heads of an attention that writes its scores down; 0 for a fused one."""
    return int(config.num_attention_heads) if config._attn_implementation == "eager" else 0


def _compress(ui: Ui, job: Job, folder: Path) -> None:
    from fleetune.models import artefact
    from fleetune.tuning import rounds

    began, subject = time.monotonic(), job.subject
    model, before = subject.model, subjects.measure(subject.model, subject)
    ui.event(
        {"event": "start", **asdict(job.work), "folder": str(folder), "before": before, "planned": job.memory}
    )
    parts = solve(ui, job, folder, f"fleetune compress --resume {folder}")
    artefact.write(folder / "model", model, parts, head(job))
    after = _after(subject, parts)
    size = subjects.folder_bytes(folder / "model")
    done = {
        "before": before, "after": after, "bytes": size,
        "seconds": round(time.monotonic() - began, 3), "peak_rss": rounds.peak_rss(),
        "digest": artefact.Master(folder / "model").digest(), "error": _mean(_errors(parts.blocks)),
        "notes": _notes(parts.blocks), "planned": job.memory, **_traffic(ui, job),
    }  # fmt: skip
    sizes = {"before": subjects.weight_bytes(model), "after": subjects.stored_bytes(folder / "model")}
    subjects.finish(ui, job.work, folder, done, sizes)


def _traffic(ui: Ui, job: Job) -> dict[str, int]:
    """Bytes that the clients sent and got, where they calibrate."""
    if not job.shares:
        return {}
    up, down = sum(r.bytes_up for r in job.replies), sum(r.bytes_down for r in job.replies)
    count = len(job.shares)
    ui.note(f"a client sent {human_bytes(up / count)} and got {human_bytes(down / count)}")
    return {"bytes_up": up, "bytes_down": down}


def _told(ui: Ui, block: Block, blocks: int) -> None:
    errors = _errors([block])
    ui.event({
        "event": "block", "block": block.number, "blocks": blocks, "seconds": block.seconds,
        "matrices": [{"name": m.name, "error": m.error, "notes": list(m.notes)} for m in block.matrices],
    })  # fmt: skip
    told = f"  error {statistics.fmean(errors):.4f}, at most {max(errors):.4f}" if errors else ""
    ui.note(f"block {block.number + 1}/{blocks}{told}  {human_time(block.seconds)}")
    for matrix in block.matrices:
        for note in matrix.notes:
            ui.note(f"  {matrix.name}: {note}")


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _errors(blocks: Sequence[Block]) -> list[float]:
    """Those of the layers that anything has reached."""
    return [m.error for b in blocks for m in b.matrices if not math.isnan(m.error)]


def _notes(blocks: Sequence[Block]) -> dict[str, list[str]]:
    return {m.name: list(m.notes) for b in blocks for m in b.matrices if m.notes}


def _calibration(job: Job) -> dict[str, Any]:
    if job.calibration is None:
        return {}
    tokens = job.calibration.numpy().astype("<i8").tobytes()
    count, length = job.calibration.shape
    how = {"true_sequential": True} if job.work.true_sequential else {}
    return {"windows": count, "length": length, "sha256": hashlib.sha256(tokens).hexdigest(), **how}


def _after(subject: Subject, parts: Parts) -> dict[str, float]:
    from fleetune.compression.layerwise import driver
    from fleetune.models.artefact import dense
    from fleetune.models.paged import pages_of

    if not subject.measured:
        return {}
    if pages := pages_of(subject.model):
        pages.changed = lambda name: dense(parts[name]) if name in parts else None
        return subjects.measure(subject.model, subject)
    linears = {name: m for _, found in driver.linears_of(subject.model) for name, m in found.items()}
    with driver.placed(linears, parts):
        return subjects.measure(subject.model, subject)
