# SPDX-License-Identifier: Apache-2.0
"""Be a device: take a run's job, load model and rows once, and do its work: rounds, an evaluation, a calibration.

    state/
      run-3f2a../client-000002.round-000005.ckpt     what the method remembers here
      run-3f2a../result/, calibration/               a result that is measured or compressed
      answer                                         the last answer: given again when its order comes again

A device runs what is installed on it.  An order is data: a method's name and settings, numbers, and the bytes that the
method itself would read in a simulated fleet.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from fleetune import models
from fleetune.common.display import human_bytes, human_time, show
from fleetune.common.files import PRIVATE, regular, write_atomic
from fleetune.common.ggml import PARTS
from fleetune.common.memory import rss, total_memory
from fleetune.common.shell import quoted
from fleetune.common.version import __version__, processor
from fleetune.data import Batches, Encoded, Example
from fleetune.data.encode import digest
from fleetune.data.labelled import encode_rows
from fleetune.errors import (
    FAULTS,
    DataError,
    FitError,
    FleetError,
    FleetuneError,
    Interrupted,
    MessageError,
    ModelError,
    StorageError,
    fault,
)
from fleetune.evaluation.losses import pad_id, response_loss
from fleetune.fleet import eval_device
from fleetune.fleet.calibration_device import Calibration
from fleetune.fleet.held_out import divided
from fleetune.fleet.orders import NOTHING_KEPT, REFUSED, Device, Job, Order, Reply, is_path
from fleetune.models.bases import BLOCKS
from fleetune.models.model import Model
from fleetune.models.shapes import shape_of
from fleetune.planning import device_cost
from fleetune.planning.plan import Workload
from fleetune.seeds.trained import moved_tensors
from fleetune.tuning import methods
from fleetune.tuning.fleets.local_work import work
from fleetune.tuning.fleets.memories import Memories
from fleetune.tuning.messages import decode
from fleetune.tuning.methods import Method
from fleetune.tuning.prepare import usual_threads

log = logging.getLogger(__name__)

ANSWER: Final = "answer"


@dataclass(frozen=True)
class Brings:
    """What a device brings: its rows, perhaps its own copy of the model, and how it computes."""

    data: str
    model: str = ""  # "": as the job names it, unless that is a path
    device: str = "auto"
    threads: int = 0  # 0: as many as a simulated run of the model would take
    memory: int = 0  # bytes that the work may take; 0: all that the machine has
    offline: bool = False
    held_out: float = 0  # of the rows: a share (below 1) or a number, that is never trained on
    eval_data: str = ""  # or a file of its own with rows to measure on
    columns: str = ""  # which columns of the rows are which
    base: str = "auto"  # where the base's weights are, as in `models.load`

    def divided(self, note: Callable[[str], None] = log.info) -> tuple[Sequence[Example], Sequence[Example]]:
        """Return (training rows, held-out rows); DataError as in `held_out.divided`."""
        return divided(
            self.data, self.held_out, self.eval_data, columns=self.columns, note=note, offline=self.offline
        )


@dataclass(frozen=True)
class Loaded:
    """A job with everything in memory."""

    job: Job
    method: Method | None  # None where a plain model is measured
    model: Model
    rows: Sequence[Encoded]
    held: Sequence[Encoded]  # never trained on
    memories: Memories
    kinds: tuple[int, ...]  # kinds of the method's work that fit this device
    speed: float  # tokens a second of a forward pass
    folder: Path  # what the device keeps of this job
    calibration: Calibration


class Worker:
    """Answers orders; `note(text)` is told what happens, `on_step(client, step)` is called before every local step."""

    def __init__(
        self,
        brings: Brings,
        state: Path,
        *,
        note: Callable[[str], None] = log.info,
        on_step: Callable[[int, int], None] = lambda client, step: None,
        declines: Callable[[], str] = lambda: "",
    ) -> None:
        self.brings, self.state, self.note, self.on_step = brings, state, note, on_step
        self.declines = declines  # why it would rather not work now, "" for nothing
        self.loaded: Loaded | None = None
        self.ended = ""  # why the run is over for this device; "" while it is not
        self.error: FleetuneError | None = None  # that keeps it from taking part

    def answer(self, data: bytes | bytearray) -> bytes:
        """Answer one order; what goes wrong in its work is the answer too.

        A bytearray is emptied when it has been read: an adapter's bytes need not be in memory while it is trained.
        """
        order, digest = Order.decode(data), hashlib.sha256(data).digest()
        if isinstance(data, bytearray):
            data.clear()
        if order.what == "end":
            if self.loaded is not None:
                self.loaded.calibration.remove()
            self.ended = order.reason or "the run is over"
            if order.body == REFUSED:
                self.error = FleetError(f"the server refuses this device: {self.ended}")
            return Reply("done", order.nonce, order.round).encode()
        return self._ready(order) if order.what == "job" else self._once(order, digest)

    # The job ----------------------------------------------------------------------------------------------

    def _ready(self, order: Order) -> bytes:
        try:
            job = Job.from_json(order.body.decode("utf-8", "replace"))
            if self.loaded is None or self.loaded.job != job:
                self.loaded = load(job, self.brings, self.state)
            told = Device(
                len(self.loaded.rows), digest([self.loaded.rows]), self.brings.memory or total_memory(),
                torch.get_num_threads(), __version__, self.loaded.speed, self.loaded.kinds, len(self.loaded.held),
                digest([self.loaded.held]), torch.__version__, processor(self.loaded.model.device),
            )  # fmt: skip
            return Reply("ready", order.nonce, order.round, told.to_json()).encode()
        except FleetuneError as error:
            self.error = error
            self.ended = error.message
            return Reply("refused", order.nonce, order.round, reason=error.message).encode()

    # The work ---------------------------------------------------------------------------------------------

    def _once(self, order: Order, digest: bytes) -> bytes:
        """Give the answer from the disk when this very order, which has this digest, was the last one answered."""
        file = self.state / ANSWER
        if (kept := _kept_answer(file, digest)) is not None:
            self.note(f"{_title(order)}: answered again from the disk")
            return kept
        if order.what == "work" and (reason := self.declines()):
            self.note(f"{_title(order)}: declined ({reason})")
            return Reply("declined", order.nonce, order.round, reason=reason).encode()
        reply = self._work(order)
        done, encoded = reply.what == "done", reply.encode()
        del reply  # its bytes are in `encoded`
        if done:
            try:
                write_atomic(file, digest + encoded, mode=PRIVATE)
            except StorageError as error:  # without it, a restarted device does the work again
                self.note(error.message)
        return encoded

    def _work(self, order: Order) -> Reply:
        began = time.monotonic()
        loaded = self.loaded
        try:
            if loaded is None:
                raise MessageError("the device has no job yet; does another process use its key?")
            body = WORK[order.what](self, loaded, order)
        except (Interrupted, KeyboardInterrupt):
            raise
        except FAULTS as error:
            reason = error.message if isinstance(error, FleetuneError) else fault(error)
            log.error("%s failed: %s", _title(order), reason, exc_info=log.isEnabledFor(logging.INFO))
            return Reply("failed", order.nonce, order.round, seconds=time.monotonic() - began, reason=reason)
        kept = loaded.memories.kept().get(order.client, NOTHING_KEPT)
        seconds = round(time.monotonic() - began, 3)
        told = [f"{human_time(seconds)}", f"{human_bytes(len(body))} to send", f"memory {human_bytes(rss())}"]
        if isinstance(loss := decode(body).payload.scalars.get("loss"), float):
            told.insert(0, f"loss {show('loss', loss)}")
        self.note(f"{_title(order, loaded.job.rounds)}: {' · '.join(told)}")
        return Reply("done", order.nonce, order.round, body, kept, seconds, rss())

    def _train(self, loaded: Loaded, order: Order) -> bytes:
        if loaded.method is None:
            raise MessageError("a plain model is measured, not trained")
        self._stand_on(loaded.memories, order)
        batches = Batches(loaded.rows, pad_id(loaded.model), order.key, loaded.model.device, order.client)
        received = decode(order.take())
        return work(loaded.method, loaded.model, batches, order.key, received, loaded.memories, self.on_step)

    def _measure(self, loaded: Loaded, order: Order) -> bytes:
        self.loaded = None  # the model is the tuned one afterwards: another order begins with the job
        return eval_device.measure(
            loaded.model, loaded.held, order.body, loaded.folder / "result", loaded.job.result
        )

    def _begin(self, loaded: Loaded, order: Order) -> bytes:
        return loaded.calibration.begin(order.body, lambda step: self.on_step(order.client, step))

    def _block(self, loaded: Loaded, order: Order) -> bytes:
        return loaded.calibration.block(
            order.round, order.body, lambda step: self.on_step(order.client, step)
        )

    @staticmethod
    def _stand_on(memories: Memories, order: Order) -> None:
        """Go back to the memory that the order names; MessageError where it is not there."""
        round = order.kept[0]
        memories.rewind(round)
        if order.kept != NOTHING_KEPT:
            memories.check({order.client: order.kept})
        memories.forget_before(min(order.oldest, round))


WORK: Final[Mapping[str, Callable[[Worker, Loaded, Order], bytes]]] = {
    "work": Worker._train, "eval": Worker._measure, "begin": Worker._begin, "block": Worker._block,
}  # fmt: skip


def _title(order: Order, of: int = 0) -> str:
    """Return what an order is about, for the console."""
    if order.what in ("eval", "begin"):
        return {"eval": "evaluation", "begin": "calibration"}[order.what]
    number = order.round + (order.what == "block")
    return f"{'block' if order.what == 'block' else 'round'} {number}" + (f" of {of}" if of else "")


def _kept_answer(file: Path, digest: bytes) -> bytes | None:
    """Return the last answer where it is whole, and the order with this digest is what it answered."""
    try:
        with open(file, "rb", opener=regular) as kept:
            if kept.read(len(digest)) == digest:
                answer = kept.read()
                Reply.decode(answer)
                return answer
    except FileNotFoundError:
        pass
    except (OSError, MessageError) as error:
        log.warning("%s cannot be used, the work is done again: %s", file, error)
    return None


def load(job: Job, brings: Brings, state: Path) -> Loaded:
    """Load what a job needs: method, model and rows; every problem is found here, before any work."""
    method = _method(job) if job.method else None
    name = _model(job, brings)
    kinds = fitting_kinds(job, method, name, brings) if job.task == "tune" and method is not None else (0,)
    model = models.load(
        name, dtype=job.dtype, device=brings.device, offline=brings.offline, labels=job.labels,
        base=BLOCKS if job.train in PARTS else brings.base,
    )  # fmt: skip
    if model.digest != job.base:
        raise ModelError(
            f"the run tunes a model with digest {job.base[:16]}.., this device has {model.digest[:16]}.. ({model.name})",
            hint=f"give the same model and revision: --model PATH   (the server calls it {job.model})",
        )
    model.trains = job.train
    moved_tensors(model)  # refuses a base without blocks where these are trained
    torch.set_num_threads(brings.threads or usual_threads(model.n_params))
    training, held_out = brings.divided()
    rows = _encoded(model, training, job.max_length, brings.data)
    held = _encoded(model, held_out, job.max_length, brings.eval_data or brings.data) if held_out else []
    folder = state / f"run-{job.run}"
    calibration = Calibration(model, rows, folder, job.result)
    speed = measured_speed(model, rows) if job.task == "tune" else 0.0
    return Loaded(job, method, model, rows, held, Memories(folder), kinds, speed, folder, calibration)


def _encoded(model: Model, examples: Sequence[Example], max_length: int, source: str) -> list[Encoded]:
    """Return the rows that fit; DataError when none does."""
    rows, kept = encode_rows(model, examples, max_length)
    if not rows:
        raise DataError(
            f"no row of {source} fits {max_length} tokens",
            hint="the run's max_length is the server's",
        )
    if len(kept) < len(examples):
        log.warning(
            "%d of %d rows do not fit %d tokens", len(examples) - len(kept), len(examples), max_length
        )
    return rows


def _method(job: Job) -> Method:
    entry = methods.entry(job.method)
    if ":" in (objective := str(job.set.get("objective", "loss"))) or "." in objective:
        raise FleetError(
            f"the run optimises {objective}, a function of the server's: a device runs only what is installed on it",
            hint="use a built-in objective",
        )
    return methods.make(entry.name, job.set)


def measured_speed(model: Model, rows: Sequence[Encoded]) -> float:
    """Return the tokens a second of a forward pass, measured on the first row, after a pass that warms up."""
    response_loss(model, rows[:1])
    began = time.monotonic()
    response_loss(model, rows[:1])
    return round(len(rows[0].ids) / max(1e-6, time.monotonic() - began), 1)


def fitting_kinds(job: Job, method: Method, model: str, brings: Brings) -> tuple[int, ...]:
    """Return those of the method's kinds of work that fit the device's memory.

    FitError, before the model is loaded, where none does.  Work that the planner cannot count is let through.
    """
    have = brings.memory or total_memory()
    if not have:
        return tuple(range(len(methods.kind_names(method))))
    shape = shape_of(models.load_config(model, offline=brings.offline))
    rows = int(getattr(method, "batch_size", 1))
    base = "mapped" if job.train in PARTS or brings.base == "mapped" else "memory"
    work = Workload(batch=rows, length=job.max_length, dtype=job.dtype, base=base)
    needs = [
        sum(device_cost.memory(shape, work, footprint).values()) if footprint is not None else 0
        for footprint in methods.footprints_of(method, shape)
    ]
    fitting = tuple(kind for kind, need in enumerate(needs) if need <= have)
    if not fitting:
        need = min(needs)
        raise FitError(
            f"{job.method} on this model takes about {human_bytes(need)} at {rows} rows of {job.max_length} tokens, "
            f"and this device has {human_bytes(have)}",
            hint=f"see what fits: fleetune plan {quoted(model)} --ram {human_bytes(have).replace(' ', '')}",
        )
    return fitting


def _model(job: Job, brings: Brings) -> str:
    if brings.model:
        return brings.model
    if is_path(job.model):
        raise ModelError(
            f"the run tunes {Path(job.model).name}, a folder of the server's",
            hint="give this device's copy: --model PATH",
        )
    return job.model
