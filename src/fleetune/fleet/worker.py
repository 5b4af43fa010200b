# SPDX-License-Identifier: Apache-2.0
"""Be a device: take a run's job, load model and rows once, and do the local work of every round.

    state/
      run-3f2a../client-000002.round-000005.ckpt     what the method remembers here
      answer                                         the last answer: given again when its order comes again

A device runs what is installed on it.  An order is data: a method's name and settings, numbers, and the bytes that the
method itself would read in a simulated fleet.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from fleetune import data, models
from fleetune.common.display import human_bytes, human_time, show
from fleetune.common.files import PRIVATE, read_bytes, write_atomic
from fleetune.common.memory import rss, total_memory
from fleetune.common.version import __version__
from fleetune.data import Batches, Encoded
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
from fleetune.evaluation.losses import pad_id
from fleetune.fleet.orders import NOTHING_KEPT, Device, Job, Order, Reply
from fleetune.models.model import Model
from fleetune.models.shapes import shape_of
from fleetune.planning import device_cost
from fleetune.planning.plan import Workload
from fleetune.tuning import methods
from fleetune.tuning.fleets.local_work import work
from fleetune.tuning.fleets.memories import Memories
from fleetune.tuning.messages import decode
from fleetune.tuning.methods import Method

log = logging.getLogger(__name__)

ANSWER: Final = "answer"


@dataclass(frozen=True)
class Brings:
    """What a device brings: its rows, perhaps its own copy of the model, and how it computes."""

    data: str
    model: str = ""  # "": as the job names it, unless that is a path
    device: str = "auto"
    threads: int = 0
    memory: int = 0  # bytes that the work may take; 0: all that the machine has
    offline: bool = False


@dataclass(frozen=True)
class Loaded:
    """A job with everything in memory."""

    job: Job
    method: Method
    model: Model
    rows: Sequence[Encoded]
    memories: Memories


class Worker:
    """Answers orders; `note(text)` is told what happens, `on_step(client, step)` is called before every local step."""

    def __init__(
        self,
        brings: Brings,
        state: Path,
        *,
        note: Callable[[str], None] = log.info,
        on_step: Callable[[int, int], None] = lambda client, step: None,
    ) -> None:
        self.brings, self.state, self.note, self.on_step = brings, state, note, on_step
        self.loaded: Loaded | None = None
        self.ended = ""  # why the run is over for this device; "" while it is not
        self.error: FleetuneError | None = None  # that keeps it from taking part

    def answer(self, data: bytes) -> bytes:
        """Answer one order; what goes wrong in its work is the answer too."""
        order = Order.decode(data)
        if order.what == "end":
            self.ended = order.reason or "the run is over"
            return Reply("done", order.nonce, order.round).encode()
        return self._ready(order) if order.what == "job" else self._once(order, data)

    # The job ----------------------------------------------------------------------------------------------

    def _ready(self, order: Order) -> bytes:
        try:
            job = Job.from_json(order.body.decode("utf-8", "replace"))
            if self.loaded is None or self.loaded.job != job:
                self.loaded = load(job, self.brings, self.state)
            told = Device(
                len(self.loaded.rows), digest([self.loaded.rows]), self.brings.memory or total_memory(),
                torch.get_num_threads(), __version__,
            )  # fmt: skip
            return Reply("ready", order.nonce, order.round, told.to_json()).encode()
        except FleetuneError as error:
            self.error = error
            self.ended = error.message
            return Reply("refused", order.nonce, order.round, reason=error.message).encode()

    # The work ---------------------------------------------------------------------------------------------

    def _once(self, order: Order, data: bytes) -> bytes:
        """Give the answer from the disk when this very order was the last one answered."""
        digest, file = hashlib.sha256(data).digest(), self.state / ANSWER
        if (kept := _kept_answer(file, digest)) is not None:
            self.note(f"round {order.round}: answered again from the disk")
            return kept
        reply = self._work(order)
        encoded = reply.encode()
        if reply.what == "done":
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
            self._stand_on(loaded.memories, order)
            batches = Batches(loaded.rows, pad_id(loaded.model), order.key, loaded.model.device, order.client)
            body = work(
                loaded.method, loaded.model, batches, order.key, order.body, loaded.memories, self.on_step
            )
        except (Interrupted, KeyboardInterrupt):
            raise
        except FAULTS as error:
            log.exception("round %d failed", order.round)
            reason = error.message if isinstance(error, FleetuneError) else fault(error)
            return Reply("failed", order.nonce, order.round, seconds=time.monotonic() - began, reason=reason)
        kept = loaded.memories.kept().get(order.client, NOTHING_KEPT)
        seconds = round(time.monotonic() - began, 3)
        told = [f"{human_time(seconds)}", f"{human_bytes(len(body))} to send", f"memory {human_bytes(rss())}"]
        if isinstance(loss := decode(body).payload.scalars.get("loss"), float):
            told.insert(0, f"loss {show('loss', loss)}")
        self.note(f"round {order.round} of {loaded.job.rounds}: {' · '.join(told)}")
        return Reply("done", order.nonce, order.round, body, kept, seconds, rss())

    @staticmethod
    def _stand_on(memories: Memories, order: Order) -> None:
        """Go back to the memory that the order names; MessageError where it is not there."""
        round = order.kept[0]
        memories.rewind(round)
        if order.kept != NOTHING_KEPT:
            memories.check({order.client: order.kept})
        memories.forget_before(min(order.oldest, round))


def _kept_answer(file: Path, digest: bytes) -> bytes | None:
    """Return the last answer where it is whole, and the order with this digest is what it answered."""
    try:
        kept = read_bytes(file)
        if kept[: len(digest)] == digest:
            Reply.decode(kept[len(digest) :])
            return kept[len(digest) :]
    except FileNotFoundError:
        pass
    except (OSError, MessageError) as error:
        log.warning("%s cannot be used, the work is done again: %s", file, error)
    return None


def load(job: Job, brings: Brings, state: Path) -> Loaded:
    """Load what a job needs: method, model and rows; every problem is found here, before any work."""
    entry = methods.entry(job.method)
    if ":" in (objective := str(job.set.get("objective", "loss"))) or "." in objective:
        raise FleetError(
            f"the run optimises {objective}, a function of the server's: a device runs only what is installed on it",
            hint="use a built-in objective",
        )
    method = methods.make(entry.name, job.set)
    name = _model(job, brings)
    check_memory(job, method, name, brings)
    model = models.load(
        name, dtype=job.dtype, device=brings.device, offline=brings.offline,
        labels=job.labels,
    )  # fmt: skip
    if model.digest != job.base:
        raise ModelError(
            f"the run tunes a model with digest {job.base[:16]}.., this device has {model.digest[:16]}.. ({model.name})",
            hint=f"give the same model and revision: --model PATH   (the server calls it {job.model})",
        )
    if brings.threads:
        torch.set_num_threads(brings.threads)
    examples = data.read(brings.data, offline=brings.offline)
    rows, kept = encode_rows(model, examples, job.max_length)
    if not rows:
        raise DataError(
            f"no row of {brings.data} fits {job.max_length} tokens",
            hint="the run's max_length is the server's",
        )
    if len(kept) < len(examples):
        log.warning(
            "%d of %d rows do not fit %d tokens", len(examples) - len(kept), len(examples), job.max_length
        )
    folder = state / f"run-{job.run}"
    return Loaded(job, method, model, rows, Memories(folder))


def check_memory(job: Job, method: Method, model: str, brings: Brings) -> None:
    """Raise FitError, before the model is loaded, where the work needs more memory than the device has.

    A method that the planner cannot count is let through.
    """
    have = brings.memory or total_memory()
    if not isinstance(method, methods.Planned) or not have:
        return
    shape = shape_of(models.load_config(model, offline=brings.offline))
    if (footprint := method.footprint(shape)) is None:
        return
    rows = int(getattr(method, "batch_size", 1))
    work = Workload(batch=rows, length=job.max_length, dtype=job.dtype)
    need = sum(device_cost.memory(shape, work, footprint).values())
    if need > have:
        raise FitError(
            f"{job.method} on this model takes about {human_bytes(need)} at {rows} rows of {job.max_length} tokens, "
            f"and this device has {human_bytes(have)}",
            hint=f"see what fits: fleetune plan {model} --ram {human_bytes(have).replace(' ', '')}",
        )


def _model(job: Job, brings: Brings) -> str:
    if brings.model:
        return brings.model
    if Path(job.model).is_absolute() or job.model.count("/") > 1 or job.model.startswith("."):
        raise ModelError(
            f"the run tunes {Path(job.model).name}, a folder of the server's",
            hint="give this device's copy: --model PATH",
        )
    return job.model
