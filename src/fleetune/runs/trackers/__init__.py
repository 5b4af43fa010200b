# SPDX-License-Identifier: Apache-2.0
"""List the trackers: where the figures of a run can go beside its own folder.  One file each; the folder is the registry.

A tracker's module states NEEDS, the package that it imports (of the extra `fleetune[NAME]`), and has a class `Tracker`:

    Tracker(place)                 the run begins, or goes on
    log(values, round)             the figures of a round, by name; 0 is the base model
    finish(summary, status)        the run is over: done, stopped or failed

What it is given are settings and figures: no row of the data, no name of a client, no path of the machine.  Another
package registers a module under the entry-point group `fleetune.trackers`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from fleetune.common.extras import pip_install
from fleetune.common.files import read_text, write_atomic
from fleetune.common.registry import Registry
from fleetune.common.settings import Value
from fleetune.errors import UsageError

TRACKERS: Final = Registry(
    "tracker", "fleetune.runs.trackers", "fleetune.trackers", ("NEEDS",), "fleetune tune --help"
)
PROJECT: Final = "fleetune"  # where the environment names no other project


@dataclass(frozen=True)
class Place:
    """What a tracker begins with."""

    folder: Path  # of the run; what the tracker leaves on the disk goes into `own`
    facts: Mapping[str, Value]  # settings of the run, by name
    next_round: int  # the first that will be logged: 0, or of a resumed run what its checkpoint has not
    offline: bool  # nothing may be sent

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.folder.resolve().name

    @property
    def own(self) -> Path:
        """The folder of the trackers in the run's folder, made if it is not there."""
        path = self.folder / "trackers"
        path.mkdir(exist_ok=True)
        return path

    def recall(self, tracker: str) -> str | None:
        """The id that a tracker has kept for this run (`keep`); None in a new run."""
        file = self.own / f"{tracker}.txt"
        return read_text(file).strip() if file.is_file() else None

    def keep(self, tracker: str, id: str) -> None:
        """Keep the id of the run at a tracker, so that a resumed run goes on there."""
        write_atomic(self.own / f"{tracker}.txt", id + "\n")


class Tracker(Protocol):
    """A run at one tracker."""

    def log(self, values: Mapping[str, float], round: int) -> None:
        """Take the figures of a round."""
        ...

    def finish(self, summary: Mapping[str, Value], status: str) -> None:
        """Take the last figures; `status` is done, stopped or failed."""
        ...


def names() -> list[str]:
    """Return the names of all trackers, those of other packages included."""
    return list(TRACKERS.members())


def check(wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the trackers' names, each once; UsageError, before any work, for an unknown one or a missing package."""
    found = []
    for name in dict.fromkeys(wanted):
        member = TRACKERS.member(name)
        needs, own = member.text("NEEDS"), member.module.startswith(f"{TRACKERS.package}.")
        if importlib.util.find_spec(needs) is None:
            raise UsageError(
                f"the tracker {member.name} needs the package {needs}, which is not installed",
                hint=pip_install(member.name) if own else f"pip install {needs}",
            )
        found.append(member.name)
    return tuple(found)


def begin(name: str, place: Place) -> Tracker:
    """Begin, or go on with, a run at a tracker; whatever its package raises passes on."""
    module: Any = TRACKERS.load(name)
    made: Tracker = module.Tracker(place)
    return made
