# SPDX-License-Identifier: Apache-2.0
"""Give Flower's server a clock that does not jump.

Flower reads the wall clock to tell which devices are online.  When an administrator or a time server sets that clock forward
by a day, all devices are offline at once.  So its modules get the time at which the server was started plus the seconds since,
of a clock that nobody can set.

The time that a device signs is compared with both clocks: after the wall clock was set right, devices whose own clock is
right have to come in; and while it is wrong, those that are connected stay.
"""

from __future__ import annotations

import datetime
import time
from typing import Final

from flwr.server.superlink.linkstate import in_memory_linkstate
from flwr.superlink.routers.fleet import node_auth

from fleetune.errors import FleetError
from fleetune.fleet.flower import state as ours

READERS: Final = (ours, in_memory_linkstate)
EARLIEST: Final = datetime.datetime(2025, 3, 1, tzinfo=datetime.UTC)  # some machines begin in 1970


def wall() -> datetime.datetime:
    """Return the time of the machine's clock, which may jump."""
    return datetime.datetime.now(datetime.UTC)


class Steady:
    """A clock that starts with the machine's and cannot be set."""

    def __init__(self) -> None:
        self._began, self._since = wall(), time.monotonic()

    def now(self) -> datetime.datetime:
        """Return the time."""
        return self._began + datetime.timedelta(seconds=time.monotonic() - self._since)

    def age(self, signed: datetime.datetime) -> float:
        """Return how many seconds ago a time was, by this clock or the machine's, whichever is nearer."""
        return (_Both(self.now()) - signed).total_seconds()


class _Both:
    """The present by two clocks: a time is as old as the clock says that is nearer to it."""

    def __init__(self, steady: datetime.datetime) -> None:
        self._clocks = (wall(), steady)

    def __sub__(self, other: datetime.datetime) -> datetime.timedelta:
        return min((clock - other for clock in self._clocks), key=abs)


def install() -> Steady:
    """Make Flower's server in this process read a steady clock; FleetError where the machine's is years behind."""
    if wall() < EARLIEST:
        raise FleetError(
            f"this machine's clock says {wall():%Y-%m-%d}",
            hint="set the clock (timedatectl set-ntp true), then start the server again",
        )
    steady = Steady()
    for module in READERS:
        module.__dict__["now"] = steady.now
    node_auth.__dict__["now"] = lambda: _Both(steady.now())
    return steady
