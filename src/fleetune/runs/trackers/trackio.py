# SPDX-License-Identifier: Apache-2.0
"""Log the figures of a run with Trackio: on this machine (TRACKIO_DIR), or where TRACKIO_SPACE_ID says.

`trackio show --project fleetune` shows them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from fleetune.common.settings import Value
from fleetune.errors import UsageError
from fleetune.runs.trackers import PROJECT, Place

NEEDS: Final = "trackio"
ORDER: Final = 40
ELSEWHERE: Final = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Tracker:
    """One run of Trackio; a resumed run goes on in it."""

    def __init__(self, place: Place) -> None:
        import trackio

        if place.offline and (named := next((n for n in ELSEWHERE if os.environ.get(n)), None)):
            raise UsageError(f"{named} is set, and nothing may be sent (--offline)")
        name = place.recall("trackio")
        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT, name=name or place.name,
            config=dict(place.facts), resume="allow" if name else "never", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        place.keep("trackio", str(self._run.name))

    def log(self, values: Mapping[str, float], round: int) -> None:
        """Log the figures, with the round as their step."""
        self._run.log(dict(values), step=round)

    def finish(self, summary: Mapping[str, Value], status: str) -> None:
        """Log the summary's numbers as `summary/..`, and wait until all is written."""
        numbers = {f"summary/{n}": v for n, v in summary.items() if isinstance(v, int | float)}
        if numbers:
            self._run.log(numbers)
        import trackio

        trackio.finish()  # of the run begun last: it is not finished a second time when the process ends
