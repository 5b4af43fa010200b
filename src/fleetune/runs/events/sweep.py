# SPDX-License-Identifier: Apache-2.0
"""Report a sweep: the plan of its grid, its runs, its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fleetune.common.settings import Value
from fleetune.runs.events.base import Event


@dataclass(frozen=True, kw_only=True)
class SweepPlanned(Event):
    """`sweep --dry-run`: a run of the grid."""

    event: ClassVar[str] = "planned"
    name: str  # folder of the run
    values: Sequence[Value]  # what varies, in the order of the axes
    seed: int  # of the run


@dataclass(frozen=True, kw_only=True)
class SweepStart(Event):
    """A sweep begins."""

    event: ClassVar[str] = "sweep"
    path: str  # folder of the sweep
    runs: int  # number of runs
    seeds: int  # number of seeds of each combination
    axes: Mapping[str, Sequence[Value]]  # what varies: its values, by name


@dataclass(frozen=True, kw_only=True)
class SweepRun(Event):
    """A run of a sweep is over."""

    event: ClassVar[str] = "run"
    run: str  # path of the run's folder
    values: Sequence[Value]  # what varies, in the order of the axes
    seed: int  # of the run
    skipped: bool  # whether it was finished before
    failed: str  # why it failed; "" if it did not
    base: Mapping[str, float | None]  # measures of the base model, by name
    tuned: Mapping[str, float | None]  # measures of the tuned model, by name


@dataclass(frozen=True, kw_only=True)
class SweepDone(Event):
    """A sweep is over, with its table."""

    event: ClassVar[str] = "done"
    path: str  # folder of the sweep
    page: str  # path of sweep.html
    table: str  # path of sweep.csv, a row a run
    cells: Sequence[Mapping[str, Any]]  # a combination: values, runs, base, tuned, bytes, seconds
