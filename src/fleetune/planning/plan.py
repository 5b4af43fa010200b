# SPDX-License-Identifier: Apache-2.0
"""Tabulate what tuning a model will cost, from its configuration alone: memory, traffic, passes and time.

Nothing is loaded and nothing is downloaded but the configuration.  A `Shape` has the sizes that matter, a method's
`Footprint` the work of a device; `device_cost` and `traffic` compute memory, time and bytes from both.  This module
makes a table of them, with what fits a device.  Traffic is the size of the methods' own payloads after
`messages.encode`.  Time comes from a short measurement of this machine, so it is for devices like this one.

State alone (weights, gradients, moments; no activations, no process) is the comparison of MeZO (arXiv
2305.17333) and of Adam's 16 bytes a parameter: 14 GB to run LLaMA-7B in fp16, 112 GB to tune it with Adam.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from fleetune.common import ggml
from fleetune.common.display import counted, human_bytes, human_count, human_time
from fleetune.common.settings import parse_bytes, parse_rate
from fleetune.errors import UsageError
from fleetune.models.shapes import Shape, shape_of
from fleetune.planning import device_cost
from fleetune.planning.device_cost import Rates
from fleetune.planning.fitting import TIGHT, Search, Settings, longest
from fleetune.planning.traffic import traffic
from fleetune.planning.workload import Workload
from fleetune.tuning import methods
from fleetune.tuning.exchange.footprint import Footprint
from fleetune.tuning.recipe import recipe as recipes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "Rates",
    "Row",
    "Search",
    "Settings",
    "Workload",
    "cells",
    "columns",
    "describe",
    "order",
    "parse_bytes",
    "parse_rate",
    "state_bytes",
    "table",
]

log = logging.getLogger(__name__)

NO_SCALES: Final[Mapping[str, int]] = MappingProxyType({})
NO_KINDS: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True)
class Row:
    """The costs of one way to use a model, a device and round, in bytes and seconds; None where they are not known."""

    method: str  # or the name of a comparison
    note: str  # size of what is trained, such as r=8; "" for all weights
    tunes: bool  # False for a row shown only for comparison, such as inference
    peak: int | None  # peak memory; None (as `trainable`, `passes`) for a method without `footprint`
    parts: dict[str, int]  # bytes of the peak, by part: weights, activations, ..
    trainable: int | None  # number of trained weights; 0 for inference
    bytes_up: int | None  # from the device, in a round
    bytes_down: int | None  # to the device, in a round
    passes: int | None  # times that a step goes through all weights
    seconds: float | None  # computing of a round; None for inference
    sending: float | None  # seconds to send bytes_up at the stated uplink
    ram: int | None  # stated memory of the device

    @property
    def spare(self) -> int:
        """Bytes of the stated memory left over (negative: missing)."""
        peak = self.peak or 0
        return (self.ram or peak) - peak

    @property
    def fits(self) -> str:
        """ "yes", "yes, tight" (within a tenth), or "no: 3.9 GB short"; "" where the memory or the peak is not known."""
        if self.ram is None or self.peak is None:
            return ""
        if self.spare < 0:
            return f"no: {human_bytes(-self.spare)} short"
        return "yes" if self.peak <= TIGHT * self.ram else "yes, tight"


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
) -> list[Row]:
    """Return the costs of every method and of the comparisons, on one device and for one of its rounds.

    A method is left out where it has no place on the model (query and value projections that are not found), or does not
    `train` scales where these are to be trained; `scales` as in `Shape`.
    `ram` in bytes, `uplink` in bytes a second.  `rates` None measures this machine, which takes some tenths
    of a second.
    """
    shape = shape_of(config)._replace(scales=scales)
    speed = rates or device_cost.calibrate(work)

    whole = shape.params * work.size

    def row(name: str, footprint: Footprint, up: int | None, down: int | None) -> Row:
        module, infers = footprint.module, footprint.gradient == "none"
        parts = device_cost.memory(shape, work, footprint)
        seconds = None if infers else work.steps * device_cost.step_seconds(shape, work, footprint, speed)
        return Row(
            name,
            module.note,
            name not in device_cost.COMPARISON,
            sum(parts.values()),
            parts,
            0 if infers else module.size or shape.params,
            up,
            down,
            footprint.passes,
            seconds,
            up / uplink if up is not None and uplink else None,
            ram,
        )

    stated, unstated = _methods(shape, work, train)
    rows = [row(name, footprint, *traffic(method, footprint)) for name, method, footprint in stated]
    rows += [Row(name, "", True, None, {}, None, None, None, None, None, None, ram) for name in unstated]
    for name, footprint in device_cost.COMPARISON.items():
        sent = None if footprint.gradient == "none" else whole
        rows.append(row(name, footprint, sent, sent))
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

    rows: tuple[Row, ...]
    about: tuple[tuple[str, str], ...]  # (label, text): the model and the work
    search: Search  # for what fits the device

    def settings(self) -> Settings:
        """Return the method to begin with, and the settings under which it fits; FitError when nothing fits.

        Where no memory was stated they are the method's own.  `Settings.options` are arguments for `fleetune.tune`.
        """
        return self.search.best(order(self.rows))

    def best(self) -> str:
        """Return the method to begin with; FitError when none fits.  It may need the settings of `settings`."""
        return self.settings().method


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
    rows = table(config, work, ram=ram, uplink=uplink, train=train, scales=scales)
    search = Search(shape_of(config)._replace(scales=scales), ram, asked, train=train)
    about = describe(config, name, work, uplink=uplink)
    about[1:1] = [("trains", share)] if (share := ggml.share(kinds)) else []
    return Plan(tuple(rows), tuple(about), search)


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the headings of `cells`."""
    heads = ["method", "peak RAM", "up/round", "down/round", "passes/step", "round time"]
    ram = rows[0].ram
    return heads if ram is None else [*heads, f"fits {human_bytes(ram)}"]


def cells(row: Row) -> list[str]:
    """Write a row as text.  The round's time includes the sending where an uplink was stated."""
    name = f"{row.method} ({row.note})" if row.note else row.method
    time = None if row.seconds is None else row.seconds + (row.sending or 0.0)
    shown = [name, human_bytes(row.peak), human_bytes(row.bytes_up), human_bytes(row.bytes_down)]
    passes = "-" if row.passes is None else str(row.passes)
    return [*shown, passes, human_time(time), *([row.fits] if row.ram is not None else [])]


def order(rows: Sequence[Row]) -> list[str]:
    """Return the methods of a table that can be counted, the one to begin with first.

    Methods state an order in which they are recommended (`RECOMMENDED`): those that learn most from a step.  They come
    first, unless a round takes longer to send than to compute; the others come as in the table.
    """
    entries = methods.entries()

    def rank(row: Row) -> float:
        slow = (row.sending or 0.0) > (row.seconds or 0.0)
        return math.inf if slow else entries[row.method].recommended or math.inf

    return [row.method for row in sorted((r for r in rows if r.tunes and r.peak is not None), key=rank)]


def describe(
    config: PretrainedConfig, name: str, work: Workload, *, uplink: float | None = None
) -> list[tuple[str, str]]:
    """Return the (label, text) lines over the table: model, work, the state alone of running and tuning it, time."""
    shape = shape_of(config)
    adam, fp16 = state_bytes(shape.params, "adam"), state_bytes(shape.params, "inference")
    sending = f", and sending at {human_bytes(uplink)} a second" if uplink else ""
    smaller = [] if shape.labels else [("compress", _compression(shape, work))]
    return [
        (
            "model",
            f"{name} · {shape.family} · {human_count(shape.params)} parameters · {work.dtype} · base {work.base}",
        ),
        (
            "round",
            f"{counted(work.steps, 'step')} of {work.batch:,} x {work.length:,} tokens on every device",
        ),
        (
            "tune",
            f"cuts rows at {longest()} tokens (--max-length); unless told, its steps have {_usual_batches()}",
        ),
        (
            "state only",
            f"{human_bytes(fp16)} to run in fp16 · {human_bytes(adam)} to tune with Adam (16 bytes a weight)",
        ),
        *smaller,
        ("time", f"computing at this machine's speed of just now{_busy()}{sending}"),
    ]


def _busy() -> str:
    """Say that this machine has more to do than half of its processors can; "" where not, or where it cannot be told."""
    load, processors = (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0), os.cpu_count() or 1
    if load <= processors / 2:
        return ""
    return f" (busy: load {load:.1f} on {counted(processors, 'processor')}, so it may be faster)"


def _usual_batches() -> str:
    """Return the rows of a step by method, as each states them: "1 (fedkseed), 8 (fedit, fedpeptao) rows"."""
    found: dict[int, list[str]] = {}
    for name in methods.entries():
        with suppress(UsageError):  # of another package's module
            for s in methods.settings(name):
                if s.name == "batch_size":
                    found.setdefault(s.default, []).append(name)
    parts = [f"{batch} ({', '.join(sorted(names))})" for batch, names in sorted(found.items())]
    return ", ".join(parts) + " rows"


def _compression(shape: Shape, work: Workload) -> str:
    """Describe the peak memory of `fleetune compress` with its default method and windows."""
    from fleetune.planning import compression_cost as compress

    job = compress.CompressionSize(128, 512, size=work.size, dense=True)
    whole, paged = (
        sum(compress.memory(shape, job._replace(low_memory=low)).values()) for low in (False, True)
    )
    return f"the default method over 128 windows of 512 tokens: {human_bytes(whole)} · with --low-memory {human_bytes(paged)}"


def state_bytes(params: int, use: str) -> int:
    """Return the bytes of state alone: "inference" is fp16 weights; "adam" fp32 weights, gradients and two moments."""
    return params * {"inference": 2, "adam": 16}[use]
