# SPDX-License-Identifier: Apache-2.0
"""Do a sweep for a listener, and return its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetune.common.files import resumable
from fleetune.errors import Interrupted
from fleetune.runs.events import Event, TuneDone
from fleetune.runs.listener import Listener
from fleetune.runs.rundir import RunDir
from fleetune.tuning import result, sweep
from fleetune.tuning.result import TuneResult
from fleetune.tuning.sweep_grid import Point, SweepGrid


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its folder, and its runs in the order of the grid."""

    folder: Path
    runs: tuple[TuneResult, ...]
    cells: Sequence[
        Mapping[str, Any]
    ]  # every combination: values, runs, base, tuned (mean and spread), bytes, seconds

    @property
    def page(self) -> Path:
        """The page of all runs together."""
        return self.folder / sweep.PAGE


class _Followed:
    """Callbacks of a sweep (`sweep.Watch`) that pass all on to one listener."""

    def __init__(self, listener: Listener, path: Path) -> None:
        self.listener, self.path = listener, path

    def begin(self, point: Point) -> Listener:
        if self.listener.stop_requested:
            raise Interrupted(
                "stopped between two runs of the sweep; nothing that was finished is lost",
                hint=sweep.resume_command(self.path),
            )
        return _OfRun(self.listener, point.words)

    def note(self, text: str) -> None:
        self.listener.note(text)

    def end(self, point: Point, path: Path, reason: str) -> None:
        self.listener.event(sweep.ended(point, path, reason))


class _OfRun:
    """The listener of one run of a sweep: without a header, and with the run's values before each remark."""

    def __init__(self, listener: Listener, words: str) -> None:
        self.listener, self.words = listener, words

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Do nothing: the sweep has a header of its own."""

    def event(self, event: Event) -> None:
        self.listener.event(event)
        if isinstance(event, TuneDone) and event.moved is False:
            self.note(event.remarks[-1])

    def note(self, text: str) -> None:
        self.listener.note(f"{self.words}: {text}")

    def step(self, client: int, step: int) -> None:
        self.listener.step(client, step)

    def progress(self, what: str, done: int, total: int, text: str = "") -> None:
        self.listener.progress(what, done, total, text)

    @property
    def stop_requested(self) -> bool:
        return self.listener.stop_requested


def perform(folder: RunDir, grid: SweepGrid, listener: Listener, *, offline: bool) -> SweepResult:
    """Do the unfinished runs of a sweep; FleetuneError, after the last, when some failed."""
    path = folder.path
    listener.header(*sweep.header(grid, path))
    listener.event(sweep.started(grid, path))
    with resumable(sweep.resume_command(path)):
        failed = sweep.run(folder, grid, _Followed(listener, path), offline=offline)
    done, table = sweep.finished(grid, path)
    listener.event(done)
    for caveat in table.caveats:
        listener.note(caveat)
    sweep.raise_failed(grid, path, failed)
    runs = tuple(result.read(path / point.name) for point in grid.points)
    return SweepResult(path.absolute(), runs, done.cells)
