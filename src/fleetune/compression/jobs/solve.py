# SPDX-License-Identifier: Apache-2.0
"""Compress a model block by block with a solver, into the artefact of codes that `fleetune export` repacks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fleetune.common.display import counted, human_bytes
from fleetune.common.events import CompressStart
from fleetune.compression import Corrector, Solver
from fleetune.compression.jobs import budget, calibrating, progress, scales, weighing, windows
from fleetune.compression.jobs.contract import Devices, FileSize, Outcome
from fleetune.compression.jobs.inputs import Inputs
from fleetune.errors import Interrupted, RecipeError, UsageError
from fleetune.runs import compression_folder
from fleetune.runs.compression_folder import CLIENTS, FLEET, PARTS, RECORD, CompressRequest
from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from torch import Tensor

    from fleetune.compression.layerwise.blocks import BlockResult
    from fleetune.compression.layerwise.driver import Plan
    from fleetune.compression.layerwise.sums import HessianReply
    from fleetune.evaluation.losses import Reference
    from fleetune.models.artefact import ArtefactHead, Quantised
    from fleetune.planning.compression_cost import CompressionSize


@dataclass(frozen=True)
class SolveJob:
    """A checked request for a solver, with its model and calibration windows."""

    request: CompressRequest
    solver: Solver
    inputs: Inputs
    calibration: Tensor | None
    shares: Mapping[int, Tensor]  # client -> its windows; {} unless clients calibrate
    replies: list[HessianReply] = field(default_factory=list)  # of these clients, in order of arrival
    devices: Devices | None = None  # real ones, that calibrate
    agreed: dict[int, int] = field(default_factory=dict)  # client -> its windows, once they are known
    room: budget.Room | None = None  # that a budget leaves for the matrices; None without one

    def about(self) -> list[tuple[str, str]]:
        """Return rows of the header: calibration text, clients, planned memory."""
        memory = f"about {human_bytes(self.memory)}" + (
            " · one block at a time, read from its file" if self.request.low_memory else ""
        )
        if self.request.calibrate == FLEET:
            where = "real devices" if self.devices is None else self.devices.about(self.request)
            text = f"{self.inputs.source} · windows of {self.request.length} tokens"
            return [("text", text), ("clients", where), ("memory", memory)]
        if self.calibration is None:
            return [("memory", memory)]
        count, length = self.calibration.shape
        text = f"{self.inputs.source} · {counted(count, 'window')} of {length} tokens"
        text += " · true sequential" if self.in_turn else ""
        whose = [("clients", f"{len(self.shares)} of them, in turn")] if self.shares else []
        limit = [("budget", self.room.about)] if self.room else []
        return [("text", text), *whose, ("memory", memory), *limit]

    @property
    def in_turn(self) -> bool:
        """Whether a layer's inputs have passed the compressed layers of its own block."""
        return self.request.true_sequential or isinstance(self.solver, Corrector)

    @cached_property
    def memory(self) -> int:
        """Planned peak memory, in bytes."""
        from fleetune.models.shapes import shape_of
        from fleetune.planning import compression_cost

        return sum(compression_cost.memory(shape_of(self.inputs.model.net.config), self.cost).values())

    @property
    def cost(self) -> CompressionSize:
        """The quantities that memory and disk depend on."""
        from fleetune.models.families.number_types import WEIGHTS

        count, length = (0, 0) if self.calibration is None else self.calibration.shape
        if self.request.calibrate == FLEET:  # the windows are on the devices, the Hessians here
            count, length = 1, self.request.length
        found, limited = size_of(self.solver, count, length), budget.asked(self.request)
        return found._replace(
            size=WEIGHTS[self.inputs.model.dtype].size,
            low_memory=self.request.low_memory,
            measured=self.inputs.measured,
            clients=len(self.shares),
            heads=_written_heads(self.inputs.model.net.config),
            budget=limited,
            trained=bool(self.request.train_scales),
            bits=8 if limited else found.bits,
        )

    def run(self, listener: Listener, folder: Path) -> Outcome:
        """Solve all blocks and write the artefact; blocks that are finished in `folder` are not solved again.

        StorageError when the disk is too full.
        """
        _check_room(listener, self, folder)
        return _compress(listener, self, folder)


def size_of(solver: Solver, windows: int, length: int) -> CompressionSize:
    """Return the quantities that memory and disk depend on, from a solver's settings and its calibration windows."""
    from fleetune.planning.compression_cost import CompressionSize

    bits, group = int(getattr(solver, "bits", 0)), int(getattr(solver, "group", 0))
    dense, weighted = isinstance(solver, Corrector), calibrating.weighs(solver)
    return CompressionSize(
        windows if solver.data else 0, length, bits=bits, group=group, dense=dense, weighted=weighted
    )


def prepare(
    request: CompressRequest,
    solver: Solver,
    inputs: Inputs,
    listener: Listener,
    devices: Devices | None = None,
    beside: FileSize | None = None,
    *,
    dry: bool = False,
) -> SolveJob:
    """Check the solver on every matrix and cut the calibration windows; `dry` as in `windows.windows`.

    UsageError when a matrix cannot be compressed, a budget cannot be met, the text is too short for a window, or a window is
    longer than the model's context.
    """
    from fleetune.compression.layerwise import driver
    from fleetune.models.families import table

    try:
        driver.check(inputs.model, solver, experts=_takes_experts(request))
    except RecipeError as error:
        if budget.asked(request):
            error.hint = f"leave out {budget.flag_of(request)}; then {error.hint}"
        raise
    if (why := table.misfit(inputs.model.net.config)) is not None:
        listener.note(f"no GGUF file can be made of the result: {why}")
    if not solver.data:
        for asked, flag in (
            (request.calibrate in (CLIENTS, FLEET), "--calibrate"),
            (request.true_sequential, "--true-sequential"),
        ):
            if asked:
                raise UsageError(f"{request.method} is not calibrated", hint=f"leave out {flag}")
        return SolveJob(request, solver, inputs, None, {})
    import torch

    if request.calibrate == FLEET:
        windows.check_length(request, inputs)
        return SolveJob(request, solver, inputs, None, {}, devices=devices)
    room = _room(request, solver, inputs, beside)  # before any text is written, which takes minutes
    if request.uses_held_out:
        calibration, inputs = windows.of_run(request, inputs, listener, dry=dry)
        return SolveJob(request, solver, inputs, calibration, {}, room=room)
    clients = request.calibrate == CLIENTS
    shares = windows.of_clients(request, inputs, listener) if clients else {}
    calibration = (
        torch.cat(list(shares.values())) if clients else windows.windows(request, inputs, listener, dry=dry)
    )
    agreed = {client: len(own) for client, own in shares.items()}
    return SolveJob(request, solver, inputs, calibration, shares, agreed=agreed, room=room)


def _room(
    request: CompressRequest, solver: Solver, inputs: Inputs, beside: FileSize | None
) -> budget.Room | None:
    """Return the room that a budget leaves for the matrices, None without one.  UsageError for one that is too small."""
    from fleetune.models.artefact import ArtefactHead

    if not budget.asked(request):
        return None
    if beside is None:
        raise ValueError("a budget needs the size of the file to come")
    model = inputs.model
    # a digest has 64 characters, whichever it is
    about = ArtefactHead(request.method, _settings(request, solver), "0" * 64, model.tokenizer_digest)
    name = f"0000-{compression_folder.stem_of(request)}"  # as `export` calls it
    return budget.room(model, request, lambda names: beside(model, names, about, name))


class Weights(NamedTuple):
    """What a solver found: of each block, and the weights by name, read on access."""

    blocks: Sequence[BlockResult]
    weights: Mapping[str, Quantised | Tensor]


def solve(listener: Listener, job: SolveJob, folder: Path, resume_command: str) -> Weights:
    """Solve the blocks of the job's model, and train their scales where that is asked for; what `folder` holds is kept.

    `resume_command` is shown after Ctrl-C (Interrupted).  UsageError when the blocks in `folder` were made from other
    weights, settings or text.
    """
    from fleetune.compression.layerwise import driver

    origin = _origin_of(job)
    calibrating.check_origin(listener, origin, job.request.model, folder / PARTS)
    if job.calibration is not None:
        scales.warn(job.request, job.calibration, listener, experts=driver.solves_experts(job.inputs.model))

    def on_matrix(block: int, blocks: int, name: str) -> None:
        listener.progress("blocks", block, blocks, name.rsplit(".", 1)[-1])
        if listener.stop_requested:
            raise Interrupted(f"stopped in block {block}; finished blocks are kept", hint=resume_command)

    plan = _plan(listener, job, folder / PARTS, origin)
    if left := driver.experts_left(job.inputs.model, taken=_takes_experts(job.request)):
        listener.note(f"the experts of {counted(left, 'layer')} stay as they are: {_reason(job.request)}")
    blocks = driver.run(
        job.inputs.model,
        job.solver,
        calibrating.source(listener, job, folder / PARTS),
        folder / PARTS,
        on_matrix,
        lambda block, blocks: progress.report_block(listener, block, blocks),
        true_sequential=job.request.true_sequential,
        plan=plan,
        experts=_takes_experts(job.request),
        weights=weighing.weights(listener, job, folder / PARTS, origin),
    )
    if few := progress.of_few(note for b in blocks.blocks for m in b.matrices for note in m.notes):
        listener.note(f"{few}; {RECORD} has the numbers of each tensor")
    listener.note(progress.summary(blocks.blocks, plan is not None))
    if not job.request.train_scales:
        return Weights(blocks.blocks, blocks)
    assert job.calibration is not None
    trained = scales.train(
        listener, job.inputs.model, blocks, job.calibration, job.request, folder / PARTS, origin
    )
    return Weights(blocks.blocks, trained)


def _takes_experts(request: CompressRequest) -> bool:
    """Return whether a mixture's experts are compressed: not from the sums of clients."""
    return request.calibrate not in (CLIENTS, FLEET)


def _reason(request: CompressRequest) -> str:
    """Say why experts are not compressed."""
    if not _takes_experts(request):
        return "the devices send no sums of theirs"
    return "their matrices are stored the other way round, or have biases"


def _origin_of(job: SolveJob) -> str:
    """Return what finished blocks are made of, as text: weights, settings, calibration text."""
    from fleetune.compression.layerwise import driver

    model = job.inputs.model
    experts = _takes_experts(job.request) and driver.solves_experts(model)
    return json.dumps(
        [
            job.request.method,
            _settings(job.request, job.solver),
            model.digest,
            model.dtype,
            calibrating.stated(job),
            [[client, len(own)] for client, own in job.shares.items()],
            *(["experts"] if experts else []),
        ]
    )


def _plan(listener: Listener, job: SolveJob, parts: Path, origin: str) -> Plan | None:
    """Return the grid of each matrix where there is a budget: the choice in `parts`, or a new one, which is kept there."""
    if job.room is None:
        return None
    if (found := budget.saved(parts, origin, job.inputs.model)) is None:
        assert job.calibration is not None
        if any(parts.glob("block-*")):
            listener.note(
                "the choice of grids is damaged, gone or of other weights: it is made again, and the blocks are solved again"
            )
            for file in parts.glob("block-*"):
                file.unlink()
        found = budget.spend(listener, job.inputs.model, job.calibration, job.request.seed, job.room)
        budget.save(found, parts, origin)
    found.report(listener)
    return found.plan(job.solver)


def head(job: SolveJob) -> ArtefactHead:
    """Return the artefact's head: method, settings, and digests of the weights and calibration windows."""
    from fleetune import models
    from fleetune.models.artefact import ArtefactHead

    model = job.inputs.model
    return ArtefactHead(
        job.request.method,
        _settings(job.request, job.solver),
        models.digest(models.named_tensors(model.net)),
        model.tokenizer_digest,
        calibrating.stated(job),
    )


def _settings(request: CompressRequest, solver: Solver) -> dict[str, Any]:
    """Return the settings that an artefact states; with a budget it takes the place of those that it chooses.

    Tokens that count alike are left out.
    """
    every: dict[str, Any] = asdict(solver)  # type: ignore[call-overload]
    settings = {name: value for name, value in every.items() if (name, value) != ("tokens", "equal")}
    if budget.asked(request):
        limit = {"bytes": request.bytes} if request.bytes else {"bpw": request.bpw}
        settings = {name: value for name, value in settings.items() if name not in budget.CHOSEN} | limit
    if request.train_scales:
        settings |= {"train_scales": request.train_scales}
    return settings


def _check_room(listener: Listener, job: SolveJob, folder: Path) -> None:
    """Remark when memory is short; raise StorageError when the disk is too full."""
    from fleetune.models.shapes import shape_of
    from fleetune.planning import compression_cost

    ways = [] if job.request.low_memory else ["with --low-memory"]
    progress.warn_of_memory(listener, job.memory, ways)
    need = compression_cost.disk(shape_of(job.inputs.model.net.config), job.cost)
    need += job.inputs.logits_size(job.inputs.model)
    progress.check_disk(folder, need, "the finished blocks and the result")


def _written_heads(config: Any) -> int:
    """Return the number of heads whose attention scores are stored; 0 for fused attention."""
    return int(getattr(config, "num_attention_heads", 0)) if config._attn_implementation == "eager" else 0


def _compress(listener: Listener, job: SolveJob, folder: Path) -> Outcome:
    from fleetune.common.memory import peak_rss
    from fleetune.models import artefact

    began, model = time.monotonic(), job.inputs.model
    before = job.inputs.measure(model, listener, folder)
    request = asdict(job.request) | {"true_sequential": job.in_turn}
    listener.event(CompressStart(**request, folder=str(folder), before=before, planned=job.memory))
    with job.inputs.reference(model, folder, listener) as reference:
        found = solve(listener, job, folder, progress.resume_command(folder))
        written = folder / "model"
        artefact.write(written, model, found.weights, head(job))
        after = _after(listener, job.inputs, folder, found.weights, reference)
    done = {
        "before": before,
        "after": after,
        "bytes": compression_folder.size(written),
        "seconds": round(time.monotonic() - began, 3),
        "peak_rss": peak_rss(),
        "digest": artefact.Master(written).digest(),
        **progress.mean_error(progress.errors_of(found.blocks)),
        "notes": progress.notes_of(found.blocks),
        "planned": job.memory,
        **_traffic(listener, job),
    }
    sizes = {"before": progress.weight_bytes(model), "after": compression_folder.weights_size(written)}
    return Outcome(done, sizes)


def _traffic(listener: Listener, job: SolveJob) -> dict[str, int]:
    """Return the bytes that all clients sent and received; {} unless clients calibrate."""
    if not job.agreed:
        return {}
    up, down = sum(r.bytes_up for r in job.replies), sum(r.bytes_down for r in job.replies)
    count = len(job.agreed)
    listener.note(f"a client sent {human_bytes(up / count)} and got {human_bytes(down / count)}")
    return {"bytes_up": up, "bytes_down": down}


def _after(
    listener: Listener,
    inputs: Inputs,
    folder: Path,
    weights: Mapping[str, Quantised | Tensor],
    reference: Reference | None,
) -> dict[str, float]:
    """Measure the compressed model.  Its weights take the place of the model's own, which are not needed any more."""
    from fleetune.common.memory import give_back
    from fleetune.models.artefact import dense
    from fleetune.models.lazy import memory_of

    if not inputs.measured:
        return {}
    model = inputs.model
    if lazy := memory_of(model.net):
        lazy.changed = lambda name: dense(weights[name]) if name in weights else None
        return inputs.measure(model, listener, folder, reference)
    for name in weights:
        own = model.net.get_parameter(name)
        own.data = dense(weights[name]).to(own)
    give_back()  # what the model's own weights leave behind
    return inputs.measure(model, listener, folder, reference)
