"""Tabulate what tuning a model will cost, from its configuration alone: memory, traffic, passes and time, and what fits a device.

Traffic is the size of the methods' own payloads after `messages.encode`.  Time comes from a short measurement of this machine, so
it is for devices like this one.  State alone (weights, gradients, moments) is the comparison of MeZO (arXiv 2305.17333) and of
Adam's 16 bytes a parameter: 14 GB to run LLaMA-7B in fp16, 112 GB to tune it with Adam.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgpack
import numpy as np

from fleetune.common import ggml
from fleetune.common.display import counted, human_bytes, human_count, human_time
from fleetune.common.events import PlanRow
from fleetune.errors import FitError, FleetuneError, UsageError
from fleetune.models.cache.cache import PLACES, SHARE
from fleetune.models.shapes import Shape, shape_of
from fleetune.planning import compression_cost, device_cost
from fleetune.planning.device_cost import Rates, Workload
from fleetune.report.page import framed_table
from fleetune.tuning import methods
from fleetune.tuning.exchange.footprint import Footprint
from fleetune.tuning.exchange.messages import Message, Payload, encode
from fleetune.tuning.recipe import recipe as recipes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


ROWS: Final = 1000  # rows of a device: decides the width of one integer of its reply


def traffic(method: methods.Method, footprint: Footprint) -> tuple[int, int]:
    """Return (bytes up, bytes down) of a device in one round; sums at their full 32 bits."""
    state = footprint.state
    reply = method.expects(state)
    numbers = {n: 0.5 if kind is float else ROWS for n, (kind, _, _) in reply.scalars.items()}
    arrays = {n: (kind, tuple(abs(d or 0) for d in sizes)) for n, (kind, sizes) in reply.arrays.items()}
    down = method.broadcast(state)
    sent = {n: (a.dtype.name, a.shape) for n, a in down.arrays.items()}
    return message_bytes(arrays, numbers), message_bytes(sent, down.scalars)


def message_bytes(arrays: Mapping[str, tuple[str, tuple[int, ...]]], scalars: Mapping[str, Any]) -> int:
    """Return `len(messages.encode(..))` of a payload with these arrays (dtype, shape), without making them.

    An array adds as much as an empty one, plus its values and the wider encoding of its lengths.
    """

    def packed(value: object) -> int:
        return len(msgpack.packb(value))

    count = len(arrays)
    total = len(encode(Message(1, bytes(8), Payload({}, scalars)))) + (
        0 if count < 16 else 2 if count < 1 << 16 else 4
    )
    for name, (kind, shape) in arrays.items():
        raw = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        prefix = 2 if raw < 1 << 8 else 3 if raw < 1 << 16 else 5
        total += packed([name, 0, list(shape)]) + prefix + raw
    return total


TIGHT: Final = 0.9  # fuller than this is a tight fit: it is taken where no method has more room
SHORTEST: Final = 64  # tokens of a row, below which rows are not cut
# copies of an adapter in fp32 that a run holds at its peak beside a device's: its state, the message, replies, their mean in
# float64, the best so far, a checkpoint
SERVER: Final = 9
ANSWER: Final = 96  # tokens of a sample answer
HOLES: Final = 1.2  # keys and values grow token by token, and leave holes in memory
EVALUATED: Final = 8  # rows that an evaluation takes at a time
OPTIONS: Final = {"length": "max_length"}  # fields of `Workload` that a recipe calls otherwise


def axes(batch: int) -> dict[str, Sequence[Any]]:
    """Return what may change, by field of `Workload`: its values, the wanted one first.  The last field changes first.

    `batch` is the number of rows that a step of the method has by itself.
    """
    return {
        "dtype": ("fp32", "bf16"),
        "length": _halves(longest(), SHORTEST),
        "batch": _halves(batch, 1),
        "base": PLACES,
    }


def longest() -> int:
    """Return the tokens of a row at most in a run that states nothing else."""
    return int(recipes.fields()["max_length"][1])


def _halves(most: int, least: int) -> list[int]:
    found = [most]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


@dataclass(frozen=True)
class Settings:
    """A method, the work of its steps, and the memory that `tune` takes with both."""

    method: str
    work: Workload  # rows of a step (batch), tokens of a row at most (length), type of the weights (dtype)
    peak: int  # bytes
    weights: int  # bytes of the peak
    ram: int | None = None  # of the device, bytes; None where it is not stated
    train: str = "weights"  # or scales of a GGUF file

    def options(self) -> dict[str, Any]:
        """Return what to tell `fleetune.tune`, as keyword arguments; what it does by itself is left out.

        Such as `{"method": "fedit", "settings": {"batch_size": 2}, "max_length": 256, "dtype": "bf16"}`.
        """
        own = getattr(methods.make(self.method, {}), "batch_size", self.work.batch)
        usual = {name: default for name, (_, default, _) in recipes.fields().items()}
        stated = {OPTIONS.get(name, name): getattr(self.work, name) for name in reversed(axes(1))}
        if self.work.base == "memory" and (self.ram is None or self.weights <= SHARE * self.ram):
            del stated["base"]  # auto means memory then
        return {
            "method": self.method,
            **({"settings": {"batch_size": self.work.batch}} if self.work.batch != own else {}),
            **{n: value for n, value in stated.items() if n in usual and value != usual[n]},
            **({"train": self.train} if self.train != usual["train"] else {}),
        }

    def __str__(self) -> str:
        base = ", base mapped" * (self.work.base == "mapped")
        return f"{self.method} with {self.work.batch:,} x {self.work.length:,} tokens a step in {self.work.dtype}{base}"


def _cached(shape: Shape, work: Workload) -> int:
    """Return the bytes of the keys and values of the sample answers that a run writes, and of the holes as they grow."""
    widths = [width for _, width in shape.attention] or [shape.hidden] * shape.layers
    tokens = EVALUATED * (work.length + ANSWER)
    return int(HOLES * tokens * 2 * sum(widths) * work.size)


@dataclass(frozen=True)
class PlanSearch:
    """A search for the settings under which a model fits a device."""

    shape: Shape
    ram: int | None  # of the device, bytes; None fits everything
    asked: Mapping[str, Any] = field(default_factory=dict)  # fields of `Workload` that stay as they are
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the method
    shrinks: bool = True  # False tries every method as `tune` runs it by itself, and no smaller
    train: str = "weights"  # or scales of a GGUF file

    def best(self, order: Sequence[str]) -> Settings:
        """Return the first settings that fit, of the first method in `order` that has any; FitError where none has.

        A tight fit is taken only where no method has more room.
        """
        tried = [settings for name in order for settings in self.tried(name)]
        if not tried:
            raise FitError(
                f"no method that has these settings has a place on a {self.shape.family}",
                hint="leave out --set, or take another model (fleetune help models)",
            )
        if self.ram is None:
            return tried[0]
        for room in (TIGHT * self.ram, self.ram):
            for settings in tried:
                if settings.peak <= room:
                    return settings
        raise self._nothing_fits(min(reversed(tried), key=lambda settings: settings.peak))

    def tried(self, method_name: str) -> Iterator[Settings]:
        """Yield what is tried of a method, the wanted first; nothing where it has no place on the model."""
        method = methods.make(method_name, {**recipes.own_settings(self.train, method_name), **self.settings})
        values = axes(getattr(method, "batch_size", Workload.batch))
        values |= {name: (value,) for name, value in self.asked.items()}
        if not self.shrinks:
            values = {name: some if name == "base" else some[:1] for name, some in values.items()}
        for combination in itertools.product(*values.values()):
            work = Workload(**dict(zip(values, combination, strict=True)))
            sized = method.sized(work.steps, work.batch)
            footprint = sized.footprint(self.shape)
            if footprint is None:
                return
            step = device_cost.memory(self.shape, work, footprint)
            measure = device_cost.memory(self.shape, replace(work, batch=EVALUATED), Footprint("none"))
            of_server = SERVER * 4 * footprint.module.size
            forward = replace(work, batch=EVALUATED, length=1)
            answers = sum(device_cost.memory(self.shape, forward, Footprint("none")).values())
            answers += 0 if self.shape.labels else _cached(self.shape, work)
            peak = max(sum(step.values()), sum(measure.values()), answers) + of_server
            yield Settings(method_name, work, peak, step["weights"], self.ram, self.train)

    def _nothing_fits(self, least: Settings) -> FitError:
        flags = ", ".join(f"--{n}" for n, v in self.asked.items() if (n, v) != ("base", "mapped"))
        hint = f"leave out {flags}, or take a smaller model" if flags else "take a smaller model"
        if not self.shrinks:
            hint = "settings that need less: fleetune plan MODEL --ram SIZE"
        elif (self.ram or 0) < device_cost.FLOOR and not flags:
            needed = human_bytes(1.05 * least.peak).replace(" ", "")
            hint = f"--ram {needed}: a process without any model takes {human_bytes(device_cost.FLOOR)}"
        return FitError(
            f"no method fits {human_bytes(self.ram)}: the smallest, {least}, needs "
            f"{human_bytes(least.peak - (self.ram or 0))} more ({human_bytes(least.peak)}, of which "
            f"{human_bytes(least.weights)} are weights)",
            hint=hint,
        )


log = logging.getLogger(__name__)

NO_SCALES: Final[Mapping[str, int]] = MappingProxyType({})
NO_KINDS: Final[Mapping[str, str]] = MappingProxyType({})


def fit(peak: int | None, ram: int | None) -> str:
    """ "yes", "yes, tight" (within a tenth), or "no: 3.9 GB short"; "" where the memory or the peak is not known."""
    if ram is None or peak is None:
        return ""
    if peak > ram:
        return f"no: {human_bytes(peak - ram)} short"
    return "yes" if peak <= TIGHT * ram else "yes, tight"


# The table ------------------------------------------------------------------------------------------


def table(
    config: PretrainedConfig,
    work: Workload,
    *,
    ram: int | None = None,
    uplink: float | None = None,
    rates: Rates | None = None,
    train: str = "weights",
    scales: Mapping[str, int] = NO_SCALES,
    name: str = "",
) -> list[PlanRow]:
    """Return the costs of every method and of the comparisons, on one device and for one of its rounds.

    A method is left out where it has no place on the model (query and value projections that are not found), or does not
    `train` scales where these are to be trained; `scales` as in `Shape`.
    `ram` in bytes, `uplink` in bytes a second.  `rates` None measures this machine, which takes some tenths
    of a second.  `name` is the model's.
    """
    shape = shape_of(config)._replace(scales=scales)
    speed = rates or device_cost.calibrate(work)

    def row(method: str, footprint: Footprint, up: int | None, down: int | None) -> PlanRow:
        module, infers = footprint.module, footprint.gradient == "none"
        notes = [module.note] * bool(module.note)
        if ram and device_cost.keeps(shape, work, footprint, ram):
            footprint = footprint._replace(checkpointing=False)
            notes.append("keeps activations")
        parts = device_cost.memory(shape, work, footprint)
        peak = sum(parts.values())
        return PlanRow(
            model=name,
            method=method,
            note=", ".join(notes),
            tunes=method not in device_cost.COMPARISON,
            peak=peak,
            parts=parts,
            trainable=0 if infers else module.size or shape.params,
            bytes_up=up,
            bytes_down=down,
            passes=footprint.passes,
            seconds=None if infers else work.steps * device_cost.step_seconds(shape, work, footprint, speed),
            sending=up / uplink if up is not None and uplink else None,
            ram=ram,
            fits=fit(peak, ram),
        )

    stated, unstated = _methods(shape, work, train)
    rows = [row(each, footprint, *traffic(method, footprint)) for each, method, footprint in stated]
    unknown = dict.fromkeys(("peak", "trainable", "bytes_up", "bytes_down", "passes", "seconds", "sending"))
    same: dict[str, Any] = {
        "model": name,
        "note": "",
        "tunes": True,
        "parts": {},
        "ram": ram,
        "fits": "",
        **unknown,
    }
    rows += [PlanRow(method=each, **same) for each in unstated]
    for each, footprint in device_cost.COMPARISON.items():
        sent = None if footprint.gradient == "none" else shape.params * work.size
        rows.append(row(each, footprint, sent, sent))
    return rows


def _methods(
    shape: Shape, work: Workload, train: str
) -> tuple[list[tuple[str, methods.Method, Footprint]], list[str]]:
    """Return (name, method, footprint) of all that train `train` of a model, and the names of those that state no footprint.

    Forward passes come before back-propagation, all weights before a module, then as methods are recommended.
    """
    found, unstated = [], []
    able = recipes.SCALE_METHODS if train == "scales" else methods.entries()
    for entry in (entry for name, entry in methods.entries().items() if name in able):
        try:
            method = methods.make(entry.name, recipes.own_settings(train, entry.name))
            method = method.sized(work.steps, work.batch)
        except UsageError as error:  # of another package's module, which does not stop the table
            log.warning("%s is left out: %s", entry.name, error)
            continue
        if not method.has_own("footprint"):
            unstated.append(entry.name)
        elif (footprint := method.footprint(shape)) is not None:
            backward, part = footprint.gradient == "backward", bool(footprint.module.tensors)
            rank = (backward, part, entry.recommended or math.inf, entry.name)
            found.append((rank, (entry.name, method, footprint)))
    return [item for _, item in sorted(found, key=lambda pair: pair[0])], unstated


@dataclass(frozen=True)
class Plan:
    """The costs of every method for a model on a device."""

    rows: tuple[PlanRow, ...] = field(repr=False)
    about: tuple[tuple[str, str], ...]  # (label, text): the model and the work
    search: PlanSearch = field(repr=False)  # for what fits the device

    def _repr_html_(self) -> str:
        return framed_table("Costs", self.about, columns(self.rows), [cells(row) for row in self.rows])

    def settings(self) -> Settings:
        """Return the method to begin with, and the settings under which it fits; FitError when nothing fits.

        Where no memory was stated they are the method's own.  `Settings.options` are arguments for `fleetune.tune`.
        """
        return self.search.best(order(self.rows))


def make(
    config: PretrainedConfig,
    name: str,
    asked: Mapping[str, Any],
    *,
    steps: int = Workload.steps,
    ram: int | None = None,
    uplink: float | None = None,
    train: str = "weights",
    kinds: Mapping[str, str] = NO_KINDS,
) -> Plan:
    """Plan a model; `ram` in bytes, `uplink` in bytes a second; `train` as in `table`.

    `kinds` are the types of the matrices in its file, by layer, where scales are trained and the file is known.

    `asked` are the fields of `Workload` that are given: the table is of them and of that class's defaults, and the search
    for what fits leaves them as they are.
    """
    work, scales = Workload(steps=steps, **asked), ggml.scales_in(kinds)
    rows = table(config, work, ram=ram, uplink=uplink, train=train, scales=scales, name=name)
    search = PlanSearch(shape_of(config)._replace(scales=scales), ram, asked, train=train)
    about = describe(config, name, work, uplink, ggml.share(kinds))
    return Plan(tuple(rows), tuple(about.items()), search)


def columns(rows: Sequence[PlanRow]) -> list[str]:
    """Return the headings of `cells`."""
    heads = ["method", "peak RAM", "up/round", "down/round", "passes/step", "round time"]
    ram = rows[0].ram
    return heads if ram is None else [*heads, f"fits {human_bytes(ram)}"]


def cells(row: PlanRow) -> list[str]:
    """Write a row as text.  The round's time includes the sending where an uplink was stated."""
    name = f"{row.method} ({row.note})" if row.note else row.method
    time = None if row.seconds is None else row.seconds + (row.sending or 0.0)
    shown = [name, human_bytes(row.peak), human_bytes(row.bytes_up), human_bytes(row.bytes_down)]
    passes = "-" if row.passes is None else str(row.passes)
    return [*shown, passes, human_time(time), *([row.fits] if row.ram is not None else [])]


def order(rows: Sequence[PlanRow]) -> list[str]:
    """Return the methods of a table that can be counted, the one to begin with first.

    Methods state an order in which they are recommended (`RECOMMENDED`): those that learn most from a step.  They come
    first, unless a round takes longer to send than to compute; the others come as in the table.
    """
    entries = methods.entries()

    def rank(row: PlanRow) -> float:
        slow = (row.sending or 0.0) > (row.seconds or 0.0)
        return math.inf if slow else entries[row.method].recommended or math.inf

    return [row.method for row in sorted((r for r in rows if r.tunes and r.peak is not None), key=rank)]


def describe(
    config: PretrainedConfig, name: str, work: Workload, uplink: float | None = None, share: str = ""
) -> dict[str, str]:
    """Return label -> text of the lines over the table: model, work, the state alone of running and tuning it, time.

    `share` says what of a quantised file is trained.
    """
    shape = shape_of(config)
    size = human_count(shape.params)
    fp16, adam = human_bytes(2 * shape.params), human_bytes(16 * shape.params)
    about = {
        "model": f"{name} · {shape.family} · {size} parameters · {work.dtype} · base {work.base}",
        "trains": share,
        "round": f"{counted(work.steps, 'step')} of {work.batch:,} x {work.length:,} tokens on every device",
        "tune": f"cuts rows at {longest()} tokens (--max-length)",
        "state only": f"{fp16} to run in fp16 · {adam} to tune with Adam (16 bytes a weight)",
    }
    about["compress"] = "" if shape.labels else _compression(shape, work)
    sending = f", and sending at {human_bytes(uplink)} a second" if uplink else ""
    about["time"] = f"computing at this machine's speed of just now{sending}"
    return {label: FleetuneError.spoken(text) for label, text in about.items() if text}


def _compression(shape: Shape, work: Workload) -> str:
    paged = compression_cost.CompressionSize(32, 512, work.size, low_memory=True, measured=True, dense=True)
    jobs = (paged._replace(bits=8, low_memory=False, budget=True), paged)
    whole, less = (human_bytes(sum(compression_cost.memory(shape, size).values())) for size in jobs)
    return f"by default, over 32 windows of 512 tokens: {whole} · --low-memory: {less}"
