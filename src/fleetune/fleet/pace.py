# SPDX-License-Identifier: Apache-2.0
"""Say how long a server waits for its devices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """How long the server waits."""

    grace: float = 60.0  # seconds for a device that has gone, before the round goes on without it
    deadline: float = 0.0  # seconds for a round; 0: as long as devices work
    poll: float = 0.05  # seconds between two looks
    again: float = 30.0  # seconds until devices that declined are asked again, where no other has worked
