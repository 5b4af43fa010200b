"""Be a device: take a run's job, load model and rows once, and do its work: rounds, an evaluation, a calibration.

A device runs what is installed on it.  An order is data: a method's name and settings, numbers, and the bytes that the method
itself would read in a simulated fleet.
"""

import hashlib
import logging
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch

from fleetune import errors, models
from fleetune.common import __version__
from fleetune.common.display import human_bytes, human_time, quoted, show, single_spaced
from fleetune.common.files import PRIVATE, regular, write_atomic
from fleetune.common.ggml import SCALES
from fleetune.common.hearing import hearing
from fleetune.common.memory import at_most, rss, usable_memory
from fleetune.data import Batches, Encoded, Example
from fleetune.data.encode import digest, encode_rows
from fleetune.evaluation import objectives
from fleetune.evaluation.losses import pad_id, response_loss
from fleetune.fleet import eval_device, orders
from fleetune.fleet.brings import Brings
from fleetune.fleet.calibration_device import Calibration
from fleetune.fleet.device_state import DeviceState
from fleetune.fleet.link import Sparing
from fleetune.models.cache.cache import BLOCKS, MAPPED, PLACES
from fleetune.models.lazy import memory_of
from fleetune.models.net.model import Model
from fleetune.models.shapes import shape_of
from fleetune.planning import device_cost
from fleetune.privacy import secagg
from fleetune.privacy.mechanism import Privacy
from fleetune.seeds.scale_view import moved_tensors
from fleetune.tuning import methods
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.exchange.footprint import Footprint
from fleetune.tuning.exchange.messages import decode
from fleetune.tuning.prepare.prepare import usual_threads
from fleetune.tuning.prepare.private import own_of
from fleetune.tuning.rounds.fleets import STEPS
from fleetune.tuning.rounds.local_work import Memories, work
from fleetune.tuning.rounds.sealed import ANYBODY, FILE, Identity, Participant

log = logging.getLogger(__name__)

ANSWER: Final = "answer"
PASSES: Final = 100  # over its rows that a device makes in a round, at most
MEMORIES: Final = 16  # rounds that it remembers, at most
SUMMED: Final = aggregation.Rule(aggregation.PRIVATE)
SILENT: Final = 5.0  # seconds of work until its first word, ..
WORD: Final = 30.0  # .. and until each other
FEW: Final = 256  # rows: a device that has fewer does as many passes as one with so many


@dataclass(frozen=True)
class Loaded:
    """A job with everything in memory."""

    job: orders.Job
    method: methods.Method | None  # None where a plain model is measured
    model: Model
    rows: Sequence[Encoded]
    held: Sequence[Encoded]  # never trained on
    held_words: str  # digest of these before they were encoded
    memories: Memories
    kinds: tuple[int, ...]  # kinds of the method's work that fit this device
    speed: float  # tokens a second of a forward pass
    calibration: Calibration
    hides: Privacy | None = None  # its own noise, where a local step hides each row


class Worker:
    """Answers orders; `note(text)` is told what happens, `on_step(client, step)` is called before every piece of work."""

    def __init__(
        self,
        brings: Brings,
        state: Path,
        *,
        note: Callable[[str], None] = log.info,
        on_step: Callable[[int, int], None] = lambda client, step: None,
        declines: Callable[[], str] = lambda: "",
        identity: Identity = ANYBODY,
    ) -> None:
        self.identity = identity  # who it is in a secure sum, and whom it adds up with
        self.brings, self.state, self.note, self.on_step = brings, state, note, on_step
        self.declines = declines  # why it would rather not work now, by its code; "" for nothing
        self.own, self._spare = DeviceState(state), Sparing()
        self.loaded: Loaded | None = None
        self.ended = ""  # why the run is over for this device; "" while it is not
        self.error: errors.FleetuneError | None = None  # that keeps it from taking part

    def answer(self, data: bytes | bytearray) -> bytes:
        """Answer one order; what goes wrong in its work is the answer too.

        A bytearray is emptied when it has been read: an adapter's bytes need not be in memory while it is trained.
        """
        try:
            with self._bounded():
                order, digest = orders.Order.decode(data), hashlib.sha256(data).digest()
        except MemoryError as error:
            raise errors.MessageError(
                f"an order of {human_bytes(len(data))} does not fit this device's memory"
            ) from error
        if isinstance(data, bytearray):
            data.clear()
        self._doing = "loading" if order.what == "job" else _title(order)
        self._next_word = time.monotonic() + SILENT
        if order.what == "end":
            if self.loaded is not None and self.loaded.job.task == "calibrate":
                self.loaded.calibration.remove()
            self.ended = single_spaced(order.reason) or "the run is over"
            if order.body == orders.REFUSED:
                self.error = errors.FleetError(f"the server refuses this device: {self.ended}")
            return orders.DeviceReply("done", order.nonce, order.round).encode()
        with hearing(lambda: self._step(order.client, 0)):
            return self._ready(order) if order.what == "job" else self._once(order, digest)

    def _step(self, client: int, step: int) -> None:
        """Say that the work goes on, where nothing was said for a while; `on_step` may end it."""
        self.on_step(client, step)
        if time.monotonic() > self._next_word:
            self._next_word = time.monotonic() + WORD
            self.note(f"{self._doing} goes on{f': step {step + 1}' if step else ''}")

    # The job ----------------------------------------------------------------------------------------------

    def _ready(self, order: orders.Order) -> bytes:
        self.error, self.ended = None, ""
        try:
            job = orders.Job.from_json(order.body)
            if self.loaded is None or self.loaded.job != job:
                self.loaded = None  # two models need not be in memory
                self.loaded = load(job, self.brings, self.own)
                mapped = memory_of(self.loaded.model.net) is not None
                self.note("base mapped: the weights stay in their file" if mapped else "base in memory")
                if self.loaded.hides is not None:
                    self.note(f"privacy: each row is hidden by {self.loaded.hides.text}")
            if order.round > 1 and job.task == "tune":
                self.note(f"the run goes on at round {order.round} of {job.rounds}")
            loaded = self.loaded
            told = orders.Device(
                len(loaded.rows),
                self.own.keyed(job.reading + digest([loaded.rows])),
                self.brings.memory or models.device_memory(loaded.model.device),
                torch.get_num_threads(),
                __version__,
                loaded.speed,
                loaded.kinds,
                len(loaded.held),
                self.own.keyed(job.reading + digest([loaded.held])),
                str(torch.__version__),
                _processor(loaded.model.device),
            )
            return orders.DeviceReply("ready", order.nonce, order.round, told.to_json()).encode()
        except (errors.Interrupted, KeyboardInterrupt):
            raise
        except errors.FAULTS as error:
            self.error = (
                error if isinstance(error, errors.FleetuneError) else errors.FleetError(errors.fault(error))
            )
            self.ended = self.error.message = single_spaced(self.error.message)
            self.error.hint = self.error.hint and single_spaced(self.error.hint)
            return self._without("refused", order, error)

    def _without(
        self, what: Literal["refused", "failed"], order: orders.Order, error: BaseException
    ) -> bytes:
        """Return the answer that there is none, with the error's code."""
        code = orders.reason_of(error, self.brings.memory or usable_memory())
        return orders.DeviceReply(what, order.nonce, order.round, code=code).encode()

    # The work ---------------------------------------------------------------------------------------------

    def _once(self, order: orders.Order, digest: bytes) -> bytes:
        """Give the answer from the disk when this very order, which has this digest, was the last one answered."""
        file = self.state / ANSWER
        if (kept := _kept_answer(file, digest)) is not None:
            self.note(f"{_title(order)}: answered again from the disk")
            return kept
        if order.what == "work" and (code := self.declines()):
            self.note(f"{_title(order)}: declined ({orders.in_words(code)})")
            return orders.DeviceReply("declined", order.nonce, order.round, code=code).encode()
        try:
            encoded = self._work(order)
        except (errors.Interrupted, KeyboardInterrupt):
            raise
        except errors.FAULTS as error:
            why = single_spaced(
                error.message if isinstance(error, errors.FleetuneError) else errors.fault(error)
            )
            if line := self._spare.line(f"{_title(order)} failed: {errors.cut_reason(why)}"):
                log.error("%s", line, exc_info=log.isEnabledFor(logging.INFO))
            return self._without("failed", order, error)
        try:
            write_atomic(file, digest + encoded, mode=PRIVATE)
        except errors.StorageError as error:  # without it, a restarted device does the work again
            self.note(error.message)
        return encoded

    def _work(self, order: orders.Order) -> bytes:
        """Return the answer to an order; Declined for one that does not belong to the task that was agreed to."""
        began, loaded = time.monotonic(), self.loaded
        if loaded is None:
            raise orders.Declined("no-job")
        if order.what not in orders.TASKS[loaded.job.task]:
            raise errors.MessageError(f"the job is to {loaded.job.task}, and the order to {order.what}")
        with self._bounded():
            body = WORK[order.what](self, loaded, order)
        kept = loaded.memories.kept().get(order.client, orders.NOTHING_KEPT)
        seconds = round(time.monotonic() - began, 3)
        sends = [f"{human_bytes(len(body))} to send"] * (loaded.job.secure is None)  # else `_sum` says it
        told = [human_time(seconds), *sends, f"memory {human_bytes(rss())}"]
        if not loaded.hides and isinstance(loss := decode(body).payload.scalars.get("loss"), float):
            told.insert(0, f"loss {show('loss', loss)}")
        if order.what not in STEPS:
            self.note(f"{_title(order, loaded.job.rounds)}: {' · '.join(told)}")
        return orders.DeviceReply("done", order.nonce, order.round, body, kept, seconds, rss()).encode()

    def _bounded(self) -> AbstractContextManager[None]:
        """Let what a server sends, and the work, take the memory that the device gives; an accelerator's is not bounded."""
        own = self.loaded is None or self.loaded.model.device == "cpu"
        return at_most((self.brings.memory or usable_memory()) if own else 0)

    def _train(self, loaded: Loaded, order: orders.Order) -> bytes:
        assert loaded.method is not None  # a job to tune names one
        self._stand_on(loaded.memories, order)
        job, model = loaded.job, loaded.model
        batches = Batches(loaded.rows, pad_id(model), order.key, model.device, order.client, loaded.hides)
        received = decode(order.take())
        if received.round != order.round:
            raise errors.MessageError(f"the message is of round {received.round}, the order of {order.round}")
        hold = self._hold if job.secure else None
        reply = work(loaded.method, model, batches, order.key, received, loaded.memories, self._step, hold)
        if loaded.hides is not None:
            self._spend(job, loaded.hides, batches.taken)
        return reply

    def _spend(self, job: orders.Job, how: Privacy, releases: int) -> None:
        """Count in the device's own budget what is about to leave it; Declined where that is spent."""
        own = self.brings
        spent = self.own.spend(job, how, releases, own.delta, own.epsilon)
        if own.epsilon:
            self.note(f"privacy: epsilon {spent:.3g} of {own.epsilon:g} at delta {own.delta:g}")

    def _hold(self, round: int, moves: Mapping[str, np.ndarray]) -> None:
        """Keep how far a reply moves each number for a secure sum, and count it in the device's own budget."""
        assert self.loaded is not None
        sealed = self.loaded.job.sealed
        assert sealed is not None
        if sealed.noise:
            self._spend(self.loaded.job, sealed, 1)
        self._participant(self.loaded).hold(round, sealed.vector(moves))

    def _participant(self, loaded: Loaded) -> Participant:
        sealed = loaded.job.sealed
        assert sealed is not None
        folder = self.own.run(loaded.job.run)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Participant.kept(loaded.job.run, sealed, folder / FILE, self.identity)

    def _sum(self, loaded: Loaded, order: orders.Order) -> bytes:
        if loaded.job.secure is None:
            raise errors.MessageError(f"the job has no secure sum, and the order is {order.what}")
        said = self._participant(loaded).answer(order.what, order.round, order.client, order.take())
        if order.what == "masked":
            self.note(f"{_title(order, loaded.job.rounds)}: {human_bytes(len(said))} to send, masked")
        return said

    def _measure(self, loaded: Loaded, order: orders.Order) -> bytes:
        self.loaded = None  # the model is the tuned one afterwards: another order begins with the job
        return eval_device.measure(
            loaded.job, loaded.model, loaded.held, loaded.held_words, order.body, self.own
        )

    def _begin(self, loaded: Loaded, order: orders.Order) -> bytes:
        return loaded.calibration.begin(order.body)

    def _block(self, loaded: Loaded, order: orders.Order) -> bytes:
        def hold(number: int, units: np.ndarray) -> None:
            self._participant(loaded).hold(number, units)

        return loaded.calibration.block(order.round, order.body, hold)

    @staticmethod
    def _stand_on(memories: Memories, order: orders.Order) -> None:
        """Go back to the memory that the order names; Declined where it is not there."""
        round = order.kept[0]
        if others := memories.kept().keys() - {order.client}:
            raise errors.MessageError(f"this device is client {min(others)} of the run, not {order.client}")
        memories.rewind(round)
        if order.kept != orders.NOTHING_KEPT:
            try:
                memories.check({order.client: order.kept})
            except errors.MessageError as error:
                log.error("%s", error.message)
                raise orders.Declined("remembers", round) from error
        memories.forget_before(max(min(order.oldest, round), round - MEMORIES))


OWN: Final = "checkpointing"  # of a method's settings, the one that a device's own memory decides
WORK: Final[Mapping[str, Callable[[Worker, Loaded, orders.Order], bytes]]] = {
    "work": Worker._train,
    **dict.fromkeys(STEPS, Worker._sum),
    "eval": Worker._measure,
    "begin": Worker._begin,
    "block": Worker._block,
}


def _title(order: orders.Order, of: int = 0) -> str:
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
                orders.DeviceReply.decode(answer)
                return answer
    except FileNotFoundError:
        pass
    except (OSError, errors.MessageError) as error:
        log.warning("%s cannot be used, the work is done again: %s", file, error)
    return None


def load(job: orders.Job, brings: Brings, own: DeviceState) -> Loaded:
    """Load what a job needs: method, model and rows; every problem is found here, before any work.

    Declined for a task that the device takes no part in.
    """
    training, aside = brings.divided()
    if job.task == "calibrate" and not brings.calibrate:
        raise orders.Declined("no-calibration")
    if job.task == "eval" and not aside:
        raise orders.Declined("no-evaluation")
    least = max(secagg.FEWEST, brings.least)
    if job.task != "eval" and brings.least and (job.secure is None or job.secure.least < least):
        raise orders.Declined("no-sum", least)
    if job.task == "tune" and brings.epsilon and not job.hidden and not (job.secure and job.secure.noise):
        raise orders.Declined("no-noise")
    if brings.epsilon and job.sealed is not None and job.task == "tune":
        own.spend(job, job.sealed, job.rounds, brings.delta, brings.epsilon, whole=True)
    folder = own.run(job.run)
    method = _method(job) if job.method else None
    name = _model(job, brings)
    kinds: tuple[int, ...] = (0,)
    base = BLOCKS if job.train == SCALES else brings.base
    if job.task == "tune" or not brings.model:  # what is fetched is known to fit
        kinds, base = fitting_kinds(job, method, name, brings, base)
    model = models.load(
        name,
        dtype=job.dtype,
        device=brings.device,
        offline=brings.offline,
        labels=job.labels,
        base=base,
        ram=brings.memory,
    )
    if model.digest != job.base:
        raise errors.ModelError(
            f"the run tunes a model with digest {job.base[:16]}.., this device has {model.digest[:16]}.. ({model.name})",
            hint=f"give the same model and revision: --model PATH   (the server calls it {job.model:.100})",
        )
    model.trains = job.train
    moved_tensors(model)  # refuses a base without blocks where these are trained
    torch.set_num_threads(brings.threads or usual_threads(model.n_params))
    rows = _encoded(model, training, job.max_length, brings.data)
    if method is not None and job.secure and (why := method.cannot_combine(SUMMED, job.secure.clients)):
        raise errors.UsageError(f"the run's replies cannot be summed: {why}")
    if method is not None and job.task == "tune":
        check_work(method, len(rows))
    hides = None
    if method is not None and (h := job.hidden):
        hides = own_of(method, len(rows), h.clip, h.epsilon, h.delta, job.rounds)
        steps = job.rounds * method.local_steps(len(rows))
        own.spend(job, hides, steps, brings.delta, brings.epsilon, whole=True)
    held = _encoded(model, aside, job.max_length, brings.eval_data or brings.data) if aside else []
    calibration = Calibration(model, rows, own, job)
    speed = measured_speed(model, rows) if job.task == "tune" else 0.0
    words, memories = eval_device.digest(aside), Memories(folder)
    return Loaded(job, method, model, rows, held, words, memories, kinds, speed, calibration, hides)


def check_work(method: methods.Method, rows: int) -> None:
    """Declined for more work in a round than `PASSES` passes over so many rows."""
    steps = max(method.local_steps(rows), int(getattr(method, "backprop_steps", 0)))
    batch, products = int(getattr(method, "batch_size", 1)), 2 * int(getattr(method, "lanczos", 0))
    asked = steps * objectives.rows_of(getattr(method, "objective", "loss"), batch) + products * max(
        batch, int(getattr(method, "curvature_rows", 0))
    )
    if asked > (most := PASSES * max(rows, FEW)):
        raise orders.Declined("work", asked, most)


def _encoded(model: Model, examples: Sequence[Example], max_length: int, source: str) -> list[Encoded]:
    """Return the rows that fit; DataError when none does."""
    rows, kept = encode_rows(model, examples, max_length)
    if not rows:
        raise errors.DataError(
            f"no row of {source} fits {max_length} tokens", hint="the run's max_length is the server's"
        )
    if len(kept) < len(examples):
        log.warning(
            "%d of %d rows do not fit %d tokens", len(examples) - len(kept), len(examples), max_length
        )
    return rows


def _method(job: orders.Job) -> methods.Method:
    entry = methods.entry(job.method)
    objective = str(job.set.get("objective", "loss"))
    if objective.partition(":")[0] not in objectives.BUILT_IN:
        raise errors.FleetError(
            f"the run optimises {objective:.100}, a function of the server's: a device runs only what is installed on it",
            hint="use a built-in objective",
        )
    return methods.make(entry.name, {n: v for n, v in job.set.items() if n != OWN})


def measured_speed(model: Model, rows: Sequence[Encoded]) -> float:
    """Return the tokens a second of a forward pass, measured on the first row, after a pass that warms up."""
    response_loss(model, rows[:1])
    began = time.monotonic()
    response_loss(model, rows[:1])
    return round(len(rows[0].ids) / max(1e-6, time.monotonic() - began), 1)


def fitting_kinds(
    job: orders.Job, method: methods.Method | None, model: str, brings: Brings, base: str
) -> tuple[tuple[int, ...], str]:
    """Return those of the method's kinds of work that fit the device's memory, and the base: mapped for auto if more fit so.

    FitError, before the model is loaded, where none does.  Work that the planner cannot count takes at least a measurement's.
    """
    device = models.check_device(brings.device, job.dtype, base)
    have = brings.memory or models.device_memory(device)
    trains = method if job.task == "tune" else None
    if not have:
        return tuple(range(len(trains.kind_names) if trains is not None else 1)), base
    shape = shape_of(models.load_config(model, offline=brings.offline))
    rows = int(getattr(trains, "batch_size", 1))
    footprints = trains.footprints(shape) if trains is not None else [Footprint("none")]

    def needs(place: str) -> list[int]:
        work = device_cost.Workload(batch=rows, length=job.max_length, dtype=job.dtype, base=place)
        return [sum(device_cost.memory(shape, work, f or Footprint("none")).values()) for f in footprints]

    either = base == "auto" and device == "cpu"
    stated = "mapped" if base in MAPPED else "memory"
    places = {place: needs(place) for place in (PLACES if either else (stated,))}
    fitting = {
        place: tuple(kind for kind, need in enumerate(found) if need <= have)
        for place, found in places.items()
    }
    place = max(fitting, key=lambda place: len(fitting[place]))  # memory, the first, where as many fit
    if not fitting[place]:
        need = min(map(min, places.values()))
        raise errors.FitError(
            f"{'measuring' if trains is None else job.method} on this model takes about {human_bytes(need)} at {rows} rows "
            f"of {job.max_length} tokens, and this device has {human_bytes(have)}",
            hint=f"see what fits: fleetune plan {quoted(model)} --ram {human_bytes(have).replace(' ', '')}",
        )
    return fitting[place], "mapped" if either and place == "mapped" else base


def _model(job: orders.Job, brings: Brings) -> str:
    """Return the device's own model, or the name by which the job's is fetched; ModelError for a path, which is not looked at."""
    if brings.model:
        return brings.model
    if orders.is_path(job.model) or Path(job.model).exists():
        raise errors.ModelError(
            f"the run tunes {Path(job.model).name:.100}, which a device does not fetch by itself: it is no built-in model",
            hint="give this device's copy, or the hub id if you trust it: --model PATH",
        )
    return job.model


def _processor(device: str | torch.device) -> str:
    """Return the kind of processor behind a device of torch's, with the instructions that torch uses on it."""
    if str(device) == "cuda":
        return re.sub(f"{orders.ODD}+", " ", torch.cuda.get_device_name())[:64].strip()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}".strip()
