# SPDX-License-Identifier: Apache-2.0
"""Find the settings under which a method fits a device.

A method is tried as `tune` runs it by itself, then with a mapped base, which costs a little time, and then smaller and
smaller: `axes` says what is given up, and in which order.  Activations are not among it: a method that can compute them
again instead of keeping them does so by itself.

What must fit is the whole of `tune` on that machine: a step, the evaluations before and after it, and the sample answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from fleetune.common.display import human_bytes
from fleetune.errors import FitError
from fleetune.models.cache.cache import PLACES, SHARE
from fleetune.models.shapes import Shape
from fleetune.planning import device_cost
from fleetune.planning.workload import Workload
from fleetune.tuning import methods
from fleetune.tuning.exchange.footprint import Footprint
from fleetune.tuning.recipe import recipe as recipes

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
    """Return `most`, its half, the half of that, .. down to `least`."""
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
class Search:
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
                hint="leave out --set, or take another model (docs/models.md)",
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
        asked = {n: v for n, v in self.asked.items() if (n, v) != ("base", "mapped")}  # memory needs more
        flags = ", ".join(f"--{name}" for name in asked)
        if not self.shrinks:
            hint = "fleetune plan MODEL --ram SIZE finds settings that need less"
        else:
            other = "take a smaller model"
            if (self.ram or 0) < device_cost.FLOOR:
                needed = human_bytes(1.05 * least.peak).replace(" ", "")
                other = f"--ram {needed}: a process without any model takes {human_bytes(device_cost.FLOOR)}"
            hint = f"leave out {flags}, or {other}" if flags else other
        return FitError(
            f"no method fits {human_bytes(self.ram)}: the smallest, {least}, needs "
            f"{human_bytes(least.peak - (self.ram or 0))} more ({human_bytes(least.peak)}, of which "
            f"{human_bytes(least.weights)} are weights)",
            hint=hint,
        )
