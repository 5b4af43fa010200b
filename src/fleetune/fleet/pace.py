# SPDX-License-Identifier: Apache-2.0
"""Say how long a server waits for its devices, and whether replies that come late are used."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fleetune.errors import UsageError
from fleetune.tuning.recipe.recipe import Recipe


@dataclass(frozen=True)
class Pace:
    """How long the server waits."""

    grace: float = 60.0  # seconds for a device that has gone, before the round goes on without it
    deadline: float = 0.0  # seconds for a round; 0: as long as devices work
    poll: float = 0.05  # seconds between two looks
    late: bool = False  # whether replies that come after their round are used
    again: float = 30.0  # seconds until devices that declined are asked again, where no other has worked

    def check(self, recipe: Recipe) -> None:
        """Raise UsageError where late replies are to be used and every round waits for all."""
        if recipe.late == "use" and not self.deadline and recipe.over_selection == 1:
            raise UsageError(
                "late = use does nothing: every round waits for all that are asked, so that no reply comes late",
                hint="add --round-deadline SECONDS, or --over-selection 1.3",
            )

    def of(self, recipe: Recipe) -> Pace:
        """Return the pace with what the recipe says of late replies."""
        return replace(self, late=recipe.late == "use")
