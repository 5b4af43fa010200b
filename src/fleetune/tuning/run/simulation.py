# SPDX-License-Identifier: Apache-2.0
"""Say where a run's local work is done: the contract, and the simulation of all clients in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from fleetune.common.display import counted
from fleetune.evaluation.losses import pad_id
from fleetune.runs.listener import Listener
from fleetune.runs.rundir import RunDir
from fleetune.tuning.prepare.prepare import TuneJob
from fleetune.tuning.rounds import rounds
from fleetune.tuning.rounds.fleets import Fleet, wanted
from fleetune.tuning.rounds.local_work import Memories
from fleetune.tuning.rounds.simulated_fleet import Faults, LocalFleet

Step = Callable[[int, int], None]  # called with a client and the number of its next local step


class Fleets(Protocol):
    """Where a run's local work is done."""

    @property
    def simulated(self) -> bool:
        """Whether the clients are made from the recipe's data."""
        ...

    def about(self, job: TuneJob) -> str:
        """Return the fleet in a few words, for the header."""
        ...

    def make(self, job: TuneJob, run: RunDir, listener: Listener, step: Step) -> Fleet:
        """Return the fleet; a real one has then enough devices."""
        ...


class Simulated:
    """All clients in this process, in turn."""

    simulated = True

    def about(self, job: TuneJob) -> str:
        """Return where, and how many are asked."""
        recipe, count = job.recipe, len(job.rows)
        asked = len(rounds.sample(range(count), recipe.participation, recipe.seed, 1, recipe.over_selection))
        return f"this machine · {job.model.device} · {counted(count, 'client')}, {asked} a round"

    def make(self, job: TuneJob, run: RunDir, listener: Listener, step: Step) -> Fleet:
        """Return the fleet, with the faults that the recipe simulates."""
        recipe = job.recipe
        faults = Faults(recipe.drop, recipe.stragglers, recipe.deadline)
        memories = Memories(run.path / "memories")
        return LocalFleet(
            job.model,
            job.method,
            job.rows,
            recipe.seed,
            pad_id(job.model),
            faults,
            step,
            memories,
            wanted(job.method, recipe.kinds),
        )


SIMULATED: Final[Fleets] = Simulated()
