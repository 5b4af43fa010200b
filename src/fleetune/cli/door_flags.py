# SPDX-License-Identifier: Apache-2.0
"""Make the flags of the commands that devices join, and the door from them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleetune.errors import UsageError
from fleetune.fleet import PORT

if TYPE_CHECKING:
    from fleetune.fleet.server import Served

FLAGS: Final = ("host", "port", "keys", "certificate", "wait", "grace", "round_deadline")


def add(group: argparse._ArgumentGroup, first: str) -> None:
    """Add the flags to a group; `first` is what waits for the devices: "the first round"."""
    group.add_argument("--host", help="address to listen on (default 127.0.0.1: this machine alone)")
    group.add_argument("--port", type=int, help=f"port to listen on (default {PORT})")
    group.add_argument(
        "--keys",
        metavar="DIR",
        help="let in the devices whose NAME.pub is in this folder, in the order of the names",
    )
    group.add_argument("--certificate", metavar="DIR", help="folder with server.pem and server.key")
    group.add_argument("--wait", type=int, metavar="N", help=f"devices before {first}")
    group.add_argument(
        "--grace", type=float, metavar="SECONDS", help="wait so long for a device that has gone (default 60)"
    )
    group.add_argument(
        "--round-deadline",
        type=float,
        metavar="SECONDS",
        help="go on without those that have not answered by then (default: wait)",
    )


def given(args: argparse.Namespace) -> list[str]:
    """Return the flags that were given, as they are written."""
    return [f"--{name.replace('_', '-')}" for name in FLAGS if getattr(args, name) is not None]


def served(args: argparse.Namespace) -> Served:
    """Return the door; UsageError for a number below 0, and for a place that others reach without TLS and keys."""
    from fleetune.fleet.remote import Pace
    from fleetune.fleet.server import Place, Served

    for name in ("wait", "grace", "round_deadline"):
        if (value := getattr(args, name)) is not None and value < 0:
            raise UsageError(f"--{name.replace('_', '-')} {value} cannot be negative")
    keys, certificate = (Path(v) if v else None for v in (args.keys, args.certificate))
    place = Place(args.host or "127.0.0.1", PORT if args.port is None else args.port, keys, certificate)
    usual = Pace()
    pace = Pace(
        usual.grace if args.grace is None else args.grace,
        usual.deadline if args.round_deadline is None else args.round_deadline,
    )
    return Served(place, args.wait or 0, pace)
