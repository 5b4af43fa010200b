"""Be the clients of a simulation: the node with a partition's number has the rows of the client with this number."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fleetune.common.settings import parse_bytes
from fleetune.data import Example
from fleetune.data.encode import encode_rows
from fleetune.errors import UsageError
from fleetune.fleet.orders import Declined
from fleetune.fleet.worker import Brings, Worker
from fleetune.tuning import methods
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.result import foundations
from fleetune.tuning.rounds.local_work import Memories

log = logging.getLogger("flwr")

NUMBER: Final = "partition-id"  # in a node's config: Flower's simulation gives every node one, from 0
FOLDER: Final = "flower"  # in a run's: what its clients keep

ONE_PROCESS: Final = ("drop", "stragglers", "deadline", "over_selection")  # options of a recipe


def check(recipe: recipes.Recipe) -> None:
    """Raise UsageError for what only `fleetune tune` simulates."""
    usual = recipes.fields()
    if odd := [name for name in ONE_PROCESS if getattr(recipe, name) != usual[name][1]]:
        raise UsageError(
            f"{', '.join(odd)} of the recipe: who fails or is late is simulated in one process alone",
            hint="leave it out, or run fleetune tune",
        )


def number_of(config: Mapping[str, Any]) -> int:
    """Return the number of a node's partition; Declined for a node that has rows of its own, or no number."""
    number = config.get(NUMBER)
    if type(number) is not int or "data" in config:
        raise Declined("no-data")
    return number


@dataclass(frozen=True)
class Partition(Brings):
    """What a simulated client brings: the rows that the recipe gives it."""

    clients: Callable[[int], Sequence[Example]] = lambda number: ()
    number: int = 0

    def divided(self, note: Callable[[str], None] = log.info) -> tuple[Sequence[Example], Sequence[Example]]:
        """Return (training rows, no held-out rows)."""
        return self.clients(self.number), []


class Clients:
    """The clients of a run that this process has been."""

    def __init__(self, run: Path, *, offline: bool = False) -> None:
        self.run, self.offline, self.recipe = run, offline, foundations.recipe_of(run)
        self.parts = prepare.split(self.recipe, methods.entry(self.recipe.method), offline=offline)
        self._workers: dict[int, Worker] = {}

    def rows(self, number: int) -> Sequence[Example]:
        """Return the rows of a client; Declined where the recipe has none of this number."""
        if not 0 <= number < len(self.parts.clients):
            raise Declined("no-data")
        return [self.parts.examples[i] for i in self.parts.clients[number].tolist()]

    def worker(self, number: int) -> Worker:
        """Return a client's worker; the model that another has loaded is its own as well."""
        if (worker := self._workers.get(number)) is None:
            worker = Worker(
                self._brings(self.recipe, number), self.run / FOLDER / f"{number:06d}", note=log.info
            )
            self._workers[number] = worker
        if worker.loaded is None and (other := next((w for w in self._workers.values() if w.loaded), None)):
            assert other.loaded is not None
            job, model = other.loaded.job, other.loaded.model
            rows, _ = encode_rows(model, self.rows(number), job.max_length)
            worker.loaded = replace(other.loaded, rows=rows, memories=Memories(worker.own.run(job.run)))
        return worker

    def _brings(self, recipe: recipes.Recipe, number: int) -> Partition:
        return Partition(
            recipe.data,
            recipe.model,
            recipe.device,
            recipe.threads,
            parse_bytes(recipe.ram or None) or 0,
            self.offline,
            base=recipe.base,
            clients=self.rows,
            number=number,
        )


@functools.lru_cache(maxsize=1)
def clients(run: Path, offline: bool) -> Clients:
    """Return the clients of a run; a process keeps those of one."""
    return Clients(run, offline=offline)
