# SPDX-License-Identifier: Apache-2.0
"""Add `--tracker` to commands that tune: a tracker does not change a run, so it is no part of its recipe."""

from __future__ import annotations

import argparse


def add(sub: argparse.ArgumentParser) -> None:
    """Add `--tracker NAME`, repeatable."""
    from fleetune.runs import trackers

    sub.add_argument(
        "--tracker",
        action="append",
        default=[],
        metavar="NAME",
        help=f"send the figures of the rounds there as well: {', '.join(trackers.names())}; repeat",
    )
