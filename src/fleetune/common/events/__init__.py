# SPDX-License-Identifier: Apache-2.0
"""Every event that Fleetune reports: what `--json` prints a line each, and what a `Listener` is given.

A line is one JSON object: `"v": 1`, `"event"` (the name below), then the fields.  A name is unique within one command,
not among all: `done` of `tune` and `done` of `compress` have different fields.  A required field is always in the line.
An optional field is left out when it is None.  A number that is not finite is printed as null.  Events of a tuning run
are also the lines of its `metrics.jsonl`, with the time `t` (seconds since 1970); there the last one ends with `crc`, a
checksum of the file.

Units: bytes, seconds, nats for losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Final

from fleetune.common.events import commands, models, tuning
from fleetune.common.events.base import VERSION, Event, Measures, Recorded, as_dict
from fleetune.common.events.commands import *  # noqa: F403
from fleetune.common.events.models import *  # noqa: F403
from fleetune.common.events.tuning import *  # noqa: F403
from fleetune.common.settings import Value

# The files of this folder under the headings of docs/events.md, in order.
SECTIONS: Final[Mapping[str, ModuleType]] = {
    "Tuning, sweeps, runs and fleets": tuning,
    "Compression, export and measurement": models,
    "Planning, lists, ledgers, serving": commands,
}


def classes() -> list[type[Event]]:
    """Every event, in the order of `SECTIONS`."""
    return [c for c in _made() if isinstance(c, type) and issubclass(c, Event) and c.event]


def _made() -> Iterator[Any]:
    """Yield what the files of this folder define: events, their parts, functions that make them."""
    for file in SECTIONS.values():
        yield from (c for c in vars(file).values() if getattr(c, "__module__", "") == file.__name__)


__all__ = ["SECTIONS", "VERSION", "Event", "Measures", "Recorded", "Value", "as_dict", "classes"]
__all__ += [c.__name__ for c in _made()]
