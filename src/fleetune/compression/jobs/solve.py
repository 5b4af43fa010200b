"""Compress a model block by block with a solver, into the artefact of codes that `fleetune export` repacks.

For `measure --kept-gain` the base is compressed as its tuned model was, on the same windows (they share a tokenizer).
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor

from fleetune import compression, models
from fleetune.common import sums
from fleetune.common.display import counted, human_bytes, human_time, quoted
from fleetune.common.events import BlockSolved, CalibrationReply, CompressStart, MatrixSolved
from fleetune.common.files import json_text, read_json, write_atomic
from fleetune.common.hearing import hearing
from fleetune.common.memory import give_back, peak_rss
from fleetune.compression import DEFAULT_OF_DEVICES, Corrector, Solver
from fleetune.compression.jobs import budget, inputs, progress, scales
from fleetune.compression.jobs.inputs import Inputs
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.activations import HessianSource
from fleetune.compression.layerwise.blocks import BlockResult, FinishedBlocks
from fleetune.compression.layerwise.experts import FEW
from fleetune.compression.layerwise.federated import WARNING, ClientHessians, HessianReply
from fleetune.errors import ModelError, RecipeError, StorageError, UsageError
from fleetune.evaluation.losses import Reference
from fleetune.models import artefact
from fleetune.models.cache.names import is_master
from fleetune.models.families import table
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.lazy import memory_of
from fleetune.models.net.model import Model
from fleetune.models.shapes import shape_of
from fleetune.planning import compression_cost
from fleetune.runs import compression_folder, rundir
from fleetune.runs.compression_folder import CLIENTS, FLEET, PARTS, RECORD, CompressRequest
from fleetune.runs.listener import Listener
from fleetune.tuning.prepare import private
from fleetune.tuning.result import finished

ORIGIN: Final = "origin.json"  # in the folder of finished blocks: what made them
REPLIES: Final = "replies.jsonl"  # there too: of the clients

# real ones that calibrate, with `about` and `source`: `Calibrators` of `fleet/calibration_server.py`, which lies above
Devices: TypeAlias = Any
# (model, matrices' names, head, file's name) -> bytes of the GGUF file beside these matrices (`deploy/export.py`)
FileSize: TypeAlias = Callable[[Model, Collection[str], artefact.ArtefactHead, str], int]


@dataclass(frozen=True)
class SolveJob:
    """A checked request for a solver, with its model and calibration windows."""

    request: CompressRequest
    method: Solver
    inputs: Inputs
    calibration: Tensor | None = (
        None  # windows int64 [n, length]; None where devices have them, or none are needed
    )
    # client -> its windows; {} unless clients calibrate
    shares: Mapping[int, Tensor] = field(default_factory=dict)
    replies: list[HessianReply] = field(default_factory=list)  # of these clients, in order of arrival
    devices: Devices | None = None  # real ones, that calibrate
    agreed: dict[int, int] = field(default_factory=dict)  # client -> its number of windows, once it is known
    room: budget.Room | None = None  # that a budget leaves for the matrices; None without one

    def about(self) -> list[tuple[str, str]]:
        """Return rows of the header as (label, text): calibration text, clients, planned memory."""
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
        whose = [("clients", f"{len(self.shares)} of them, in turn")] if self.shares else []
        limit = [("budget", self.room.about)] if self.room else []
        return [("text", text), *whose, ("memory", memory), *limit]

    @cached_property
    def memory(self) -> int:
        """Planned peak memory, in bytes."""
        return sum(compression_cost.memory(shape_of(self.inputs.model.net.config), self.cost).values())

    @property
    def cost(self) -> compression_cost.CompressionSize:
        """The quantities that memory and disk depend on."""
        config = self.inputs.model.net.config
        count, length = (0, 0) if self.calibration is None else self.calibration.shape
        if self.request.calibrate == FLEET:  # the windows are on the devices, the Hessians here
            count, length = 1, self.request.length
        size, limited = size_of(self.method, count, length), self.request.limited
        return size._replace(
            size=WEIGHTS[self.inputs.model.dtype].size,
            low_memory=self.request.low_memory,
            measured=True,
            clients=len(self.shares),
            # attention scores are stored, unless attention is fused
            heads=int(getattr(config, "num_attention_heads", 0))
            if config._attn_implementation == "eager"
            else 0,
            budget=limited,
            trained=bool(self.request.train_scales),
            bits=8 if limited else size.bits,
        )

    @property
    def takes_experts(self) -> bool:
        """Whether a mixture's experts are compressed: not from the sums of clients."""
        return self.request.calibrate not in (CLIENTS, FLEET)

    @property
    def head(self) -> artefact.ArtefactHead:
        """The artefact's head: method, settings, and digests of the weights and calibration windows."""
        model, stated = self.inputs.model, settings_of(self.request, self.method)
        weights = models.digest(models.named_tensors(model.net))
        return artefact.ArtefactHead(self.request.method, stated, weights, model.tokenizer_digest, self.text)

    @property
    def text(self) -> dict[str, Any]:
        """What the head states of the calibration text: its size and digest; {} for none.

        Clients that calibrate keep the digest of their text to themselves: who guesses a text could confirm it.
        """
        if self.agreed:
            count = sum(self.agreed.values())
            return {"windows": count, "length": self.request.length, "clients": len(self.agreed)}
        if self.calibration is None:
            return {}
        count, length = self.calibration.shape
        return {"windows": count, "length": length, "sha256": sha256(self.calibration)}

    @property
    def origin(self) -> str:
        """What finished blocks are made of, as text: weights, settings, calibration text."""
        model, method = self.inputs.model, [self.request.method, settings_of(self.request, self.method)]
        clients = [[client, len(own)] for client, own in self.shares.items()]
        return json.dumps([*method, model.digest, model.dtype, self.text, clients])

    def run(self, listener: Listener, folder: Path) -> progress.JobResult:
        """Solve all blocks and write the artefact; blocks that are finished in `folder` are not solved again.

        StorageError when the disk is too full.
        """
        began, model = time.monotonic(), self.inputs.model
        progress.warn_of_memory(listener, self.memory, "" if self.request.low_memory else "--low-memory")
        need = compression_cost.disk(shape_of(model.net.config), self.cost) + self.inputs.logits_size(model)
        progress.check_disk(folder, need, "the finished blocks and the result")
        with self.inputs.reference(model, folder, listener) as reference:
            before = self.inputs.measure(model, listener, folder, known=reference.loss if reference else None)
            listener.event(
                CompressStart(**asdict(self.request), folder=str(folder), before=before, planned=self.memory)
            )
            solved = solve(listener, self, folder, progress.resume_command(folder))
            written = folder / "model"
            artefact.write(written, model, solved, self.head)
            after = _after(listener, self.inputs, folder, solved, reference)
        errors = _errors(solved.blocks)
        done = {
            "before": before,
            "after": after,
            "bytes": compression_folder.size(written),
            "seconds": round(time.monotonic() - began, 3),
            "peak_rss": peak_rss(),
            "digest": artefact.Master(written).digest(),
            **({"error": statistics.fmean(errors)} if errors else {}),
            "notes": {m.name: list(m.notes) for b in solved.blocks for m in b.matrices if m.notes},
            "planned": self.memory,
            **_traffic(listener, self),
        }
        sizes = {"before": progress.weight_bytes(model), "after": compression_folder.weights_size(written)}
        return progress.JobResult(done, sizes)


def size_of(solver: Solver, windows: int, length: int) -> compression_cost.CompressionSize:
    """Return the quantities that memory and disk depend on, from a solver's settings and its calibration windows."""
    bits, group = int(getattr(solver, "bits", 0)), int(getattr(solver, "group", 0))
    return compression_cost.CompressionSize(
        windows if solver.data else 0, length, bits=bits, group=group, dense=isinstance(solver, Corrector)
    )


def settings_of(request: CompressRequest, solver: Solver) -> dict[str, Any]:
    """Return the settings that an artefact states; a budget takes the place of those that it chooses."""
    stated: dict[str, Any] = asdict(solver)  # type: ignore[call-overload]
    if request.limited:
        limit = {"bytes": request.bytes} if request.bytes else {"bits": request.bits}
        stated = {name: value for name, value in stated.items() if name not in budget.CHOSEN} | limit
    return stated | ({"train_scales": request.train_scales} if request.train_scales else {})


def sha256(windows: Tensor) -> str:
    """Return the SHA-256 of windows int64 [n, length], hexadecimal."""
    return hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest()


# Before ---------------------------------------------------------------------------------------------


def check(request: CompressRequest, solver: Solver) -> None:
    """Raise UsageError for options that the solver, or those who calibrate, have no place for."""
    budget.check(request, solver)
    scales.check(request, solver)
    if request.calibrate == "server":
        return
    if not solver.data:
        raise UsageError(f"{request.method} is not calibrated", hint="leave out --calibrate")
    flag, methods = budget.flag_of(request), f"--method {DEFAULT_OF_DEVICES}"
    for needs_text, what, hint in (
        (isinstance(solver, Corrector), f"{request.method} compares with the dense model, which", methods),
        (request.limited, flag, f"leave out {flag}"),
        (request.train_scales, scales.FLAG, f"leave out {scales.FLAG}"),
    ):
        if needs_text:
            raise UsageError(
                f"{what} needs the text on this machine, and --calibrate {request.calibrate} leaves it where it is",
                hint=f"{hint}, or calibrate on --text",
            )


def prepare(
    request: CompressRequest,
    solver: Solver,
    loaded: Inputs,
    listener: Listener,
    devices: Devices | None = None,
    beside: FileSize | None = None,
) -> SolveJob:
    """Check the solver on every matrix and cut the calibration windows.

    UsageError when a matrix cannot be compressed, a budget cannot be met, the text is too short for a window, or a window is
    longer than the model's context.
    """
    loaded = inputs.with_other(request, loaded)
    job = SolveJob(request, solver, loaded, devices=devices)
    try:
        driver.check(loaded.model, solver, experts=job.takes_experts)
    except RecipeError as error:
        if request.limited and not request.bits:
            error.hint = f"leave out {budget.flag_of(request)}; then {error.hint}"
        raise
    if (why := table.misfit(loaded.model.net.config)) is not None:
        listener.note(f"no GGUF file can be made of the result: {why}")
    if not solver.data:
        return job
    if request.calibrate == FLEET:
        inputs.check_length(request, loaded)
        return job
    if request.calibrate == CLIENTS:
        shares = inputs.of_clients(request, loaded, listener)
        agreed = {client: len(own) for client, own in shares.items()}
        return replace(job, calibration=torch.cat(list(shares.values())), shares=shares, agreed=agreed)
    if request.limited:
        job = _limited(job, beside, listener)
    if request.uses_held_out:
        calibration, loaded = inputs.of_run(request, loaded, listener)
        return replace(job, calibration=calibration, inputs=loaded)
    return replace(job, calibration=inputs.windows(request, loaded))


def _limited(job: SolveJob, beside: FileSize | None, listener: Listener) -> SolveJob:
    """Return the job with the room for its matrices; with one grid where no GGUF file has the size of so many bits."""
    try:
        return replace(job, room=_room(job, beside))
    except UsageError as error:
        if not job.request.bits:
            raise
        listener.note(f"{error.message}: all matrices get the same grid")
        solver = replace(cast(Any, job.method), bits=job.request.bits)
        return replace(job, request=replace(job.request, bits=0), method=solver)


def _room(job: SolveJob, beside: FileSize | None) -> budget.Room:
    """Return the room that a budget leaves for the matrices.  UsageError for one that is too small."""
    if beside is None:
        raise ValueError("a budget needs the size of the file to come")
    model, request, size = job.inputs.model, job.request, beside
    # a digest has 64 characters, whichever it is
    stated = settings_of(request, job.method)
    head = artefact.ArtefactHead(request.method, stated, "0" * 64, model.tokenizer_digest)
    name = f"0000-{compression_folder.stem_of(request)}"  # as `export` calls it
    return budget.room(model, request, lambda names: size(model, names, head, name))


# Solving --------------------------------------------------------------------------------------------


def solve(listener: Listener, job: SolveJob, folder: Path, resume_command: str) -> FinishedBlocks:
    """Solve the blocks of the job's model, and train their scales where that is asked for; what `folder` holds is kept.

    `resume_command` is shown after Ctrl-C (Interrupted).  UsageError when the blocks in `folder` were made from other
    weights, settings or text.
    """
    model, parts, origin = job.inputs.model, folder / PARTS, job.origin
    check_origin(origin, job.request.model, parts)
    if job.calibration is not None:
        scales.warn(job.request, job.calibration, listener, experts=any(driver.experts_in(model)))

    def on_matrix(block: int, blocks: int, name: str) -> None:
        listener.progress("blocks", block, blocks, name.rsplit(".", 1)[-1])
        stop_if_asked()

    def stop_if_asked() -> None:
        progress.stop_if_asked(listener, "stopped in a block; finished blocks are kept", resume_command)

    plan = _plan(listener, job, parts, origin)
    if left := driver.experts_left(model, taken=job.takes_experts):
        why = (
            "their matrices are stored the other way round, or have biases"
            if job.takes_experts
            else "the devices send no sums of theirs"
        )
        listener.note(f"the experts of {counted(left, 'layer')} stay as they are: {why}")
    with hearing(stop_if_asked):
        blocks = driver.run(
            model,
            job.method,
            _source(listener, job, parts),
            parts,
            on_matrix,
            lambda block, blocks: _report_block(listener, block, blocks),
            plan=plan,
            experts=job.takes_experts,
        )
    if few := sum(FEW in note for b in blocks.blocks for m in b.matrices for note in m.notes):
        listener.note(
            f"experts {FEW} columns, in {counted(few, 'tensor')}: solved on all tokens of their layer. More --windows give "
            f"them more; {RECORD} has the numbers of each tensor"
        )
    listener.note(_summary(blocks.blocks, plan is not None))
    if job.request.train_scales:
        assert job.calibration is not None
        scales.trained(listener, model, blocks, job.calibration, job.request, origin)
    return blocks


def check_origin(own: str, model: str, parts: Path) -> None:
    """Note in `parts` what the blocks there are made of, `own`.

    UsageError for blocks of other weights, settings or text, or of unknown ones; `model` names what to compress again.
    """
    file = parts / ORIGIN
    with suppress(StorageError):
        if any(parts.glob("block-*")) and read_json(file, "").get("origin") == own:
            return
    if any(parts.glob("block-*")):
        raise UsageError(
            f"the blocks in {parts} were made of other weights or another text: something has changed since",
            hint=f"compress again: fleetune compress {quoted(model)}",
        )
    parts.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json_text({"origin": own}))


def _plan(listener: Listener, job: SolveJob, parts: Path, origin: str) -> driver.SolverPlan | None:
    """Return the grid of each matrix where there is a budget: the choice in `parts`, or a new one, which is kept there."""
    if job.room is None:
        return None
    if (choice := budget.saved_choice(parts, origin)) is None:
        assert job.calibration is not None
        if any(parts.glob("block-*")):
            listener.note(
                "the choice of grids is damaged or gone: it is made again, and the blocks are solved again"
            )
            for file in parts.glob("block-*"):
                file.unlink()
        costs = budget.measured(listener, job.inputs.model, job.calibration, job.request.seed)
        choice = budget.make_budget(costs, job.room)
        budget.save_choice(choice, parts, origin)
    choice.report(listener)
    return choice.plan(job.method)


def _source(listener: Listener, job: SolveJob, parts: Path) -> Tensor | HessianSource | None:
    """Return the windows of a job, or its clients' or devices' Hessians; None for a solver without data."""
    if not job.shares and job.devices is None:
        return job.calibration
    log = parts / REPLIES
    # what was sent before a stop counts, and a client that was left out stays out
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        with suppress(ValueError, TypeError):  # cut short by a kill
            job.replies.append(HessianReply(**json.loads(line)))
    gone = frozenset(reply.client for reply in job.replies if reply.reason)

    def on_reply(reply: HessianReply) -> None:
        listener.event(CalibrationReply(**asdict(reply)))
        if reply.reason:
            listener.note(f"block {reply.block + 1}: client {reply.client} is left out: {reply.reason}")
        job.replies.append(reply)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(reply)) + "\n")

    listener.note(WARNING)
    model = job.inputs.model
    if job.devices is not None:
        source: HessianSource
        source, agreed = job.devices.source(job.request, model, parts.parent, gone, on_reply, listener)
        job.agreed.update(agreed)
        return source
    left = {client: own for client, own in job.shares.items() if client not in gone}
    least = private.least_of_run(finished.recipe_of(Path(job.request.model)))
    return ClientHessians(model, left or job.shares, parts, on_reply, least)


# After ----------------------------------------------------------------------------------------------


def _report_block(listener: Listener, block: BlockResult, blocks: int) -> None:
    """Report a finished block as an event, and what a solver noted on its layers, but for experts that saw few tokens."""
    matrices = [MatrixSolved(name=m.name, error=m.error, notes=list(m.notes)) for m in block.matrices]
    listener.event(BlockSolved(block=block.number, blocks=blocks, seconds=block.seconds, matrices=matrices))
    for matrix in block.matrices:
        for note in matrix.notes:
            if FEW not in note:
                listener.note(f"{matrix.name}: {note}")


def _summary(blocks: Sequence[BlockResult], ends: bool) -> str:
    """Return a line on all blocks: how many, the errors of their layers, the time that solving took.

    `ends` tells whether the last one is embedding and head.
    """
    errors = _errors(blocks)
    of_layers = f"  error {statistics.fmean(errors):.4f}, at most {max(errors):.4f}" if errors else ""
    what = counted(len(blocks) - ends, "block") + ", embedding and head" * ends
    return f"{what}{of_layers}  {human_time(sum(block.seconds for block in blocks))}"


def _errors(blocks: Iterable[BlockResult]) -> list[float]:
    """Return the errors of all layers, without those that are not a number."""
    return [m.error for b in blocks for m in b.matrices if not math.isnan(m.error)]


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
    loaded: Inputs,
    folder: Path,
    weights: Mapping[str, artefact.Quantised | Tensor],
    reference: Reference | None,
) -> dict[str, float]:
    """Measure the compressed model.  Its weights take the place of the model's own, which are not needed any more."""
    net = loaded.model.net
    if lazy := memory_of(net):
        lazy.changed = lambda name: artefact.dense(weights[name]) if name in weights else None
    else:
        for name in weights:
            # in place: the weights may share one mapping of a file, which is given back only when all of them are gone
            net.get_parameter(name).data.copy_(artefact.dense(weights[name]))
        give_back()  # what the model's own weights leave behind
    return loaded.measure(loaded.model, listener, folder, reference)


# The base of a tuned model --------------------------------------------------------------------------


def compressed_base(listener: Listener, folder: Path, beside: FileSize, *, offline: bool) -> Path:
    """Return the artefact of the compressed base; it is made now if it is missing, and resumed if it was stopped.

    Where a size was asked for, grids are chosen for the base's own weights, within that size (`beside` as in `prepare`).
    UsageError when the calibration text has changed since the folder was made, ModelError when the artefact that is there
    is not the base's, or not what was written.
    """
    place = folder / "base"
    model, own = place / "model", artefact.Master(folder / "model").head
    if is_master(model) and _alike(_head_of(folder, model), own):
        compression_folder.drop_parts(place / PARTS)  # a kill may have left them
        return model
    job = _base_job(folder, beside, offline, listener)
    head = job.head
    if not _alike(head, own):
        raise UsageError(
            f"the calibration text is not what {folder} was made with: the data has changed since",
            hint=f"compress again: fleetune compress {quoted(compression_folder.request_of(folder).model)}",
        )
    seconds = compression_folder.record(folder)["result"]["seconds"]
    listener.note(f"the base is compressed the same way, once: the tuned model took {human_time(seconds)}")
    solved = solve(listener, job, place, f"fleetune measure {quoted(folder)} --kept-gain")
    artefact.write(model, job.inputs.model, solved, head)
    compression_folder.drop_parts(place / PARTS)
    return model


def _head_of(folder: Path, model: Path) -> artefact.ArtefactHead:
    """Return the head of the base's artefact; ModelError when it is of other weights than the base's, or damaged."""
    remedy = f"rm -r {quoted(folder / 'base')}   and then: fleetune measure {quoted(folder)} --kept-gain"
    sums.check(model, remedy=remedy)
    head = artefact.Master(model).head
    expected = rundir.made_on(Path(compression_folder.request_of(folder).model))["base"]
    if head.base != expected:
        raise ModelError(
            f"{model} is not the compressed base: it was made of weights with the SHA-256 {head.base[:16]}.., "
            f"the run's base has {expected[:16]}..",
            hint=remedy,
        )
    return head


def solver_of(request: CompressRequest) -> Solver:
    """Return the method of a request; UsageError for one that cannot be run on the base as well."""
    method = compression.make(request.method, request.set)
    if isinstance(method, compression.Trainer | compression.Pruner):
        raise UsageError(
            f"{request.method} works on the whole model, so the base would have to go through all of it as well",
            hint="--kept-gain is of methods that work layer by layer: fleetune compress --list",
        )
    return method


def _alike(a: artefact.ArtefactHead, b: artefact.ArtefactHead) -> bool:
    names = ("method", "settings", "calibration", "tokenizer")
    return all(getattr(a, name) == getattr(b, name) for name in names)


def _base_job(folder: Path, beside: FileSize, offline: bool, listener: Listener) -> SolveJob:
    request = compression_folder.request_of(folder)
    loaded, recipe = inputs.load(request, offline=offline), finished.recipe_of(Path(request.model))
    job = prepare(request, solver_of(request), loaded, listener, beside=beside)
    loaded.model.net.to("meta")  # its weights go before the base's come
    base = models.load(recipe.model, dtype=recipe.dtype, device="cpu", offline=offline)
    return replace(job, inputs=replace(job.inputs, model=base))
