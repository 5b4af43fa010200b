# SPDX-License-Identifier: Apache-2.0
"""Report the models that `measure` compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fleetune.runs.events.base import Compared, Event


@dataclass(frozen=True, kw_only=True)
class Measured(Compared):
    """A model in an engine: size, speed, memory and quality."""

    event: ClassVar[str] = "measured"
    name: str  # base, tuned, compressed, or the model's own
    engine: str  # torch or llama.cpp
    path: str  # of the model, or its name
    bytes: int  # size on disk
    bits_linear: float  # bits a weight of the blocks' matrices, scales included
    bits: float  # bits a weight, of all weights
    peak_rss: int  # peak memory of the process, bytes
    prefill: float | None  # tokens read a second
    generate: float | None  # tokens written a second
    loss_error: float | None = None  # standard error of the loss, over the rows
    change: float | None = None  # loss less that of the first line, on the same rows; None for the first
    change_error: float | None = None  # standard error of `change`, taken row by row


@dataclass(frozen=True, kw_only=True)
class MeasureDone(Event):
    """All models are measured."""

    event: ClassVar[str] = "done"
    folder: str | None  # of the compression that has the table as measure.json; else null
    rows: Sequence[Mapping[str, Any]]  # all `measured` events, without their name
    kept: Mapping[str, Mapping[str, Any]]  # by measure: gain of tuning; value, the share that is left
