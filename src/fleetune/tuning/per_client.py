# SPDX-License-Identifier: Apache-2.0
"""Measure every simulated client's loss before and after a run, on a few of its own rows.

The rows are the client's held-out ones where every client has some (`column:COLUMN`), else rows that it trains on; the
record says which.  Which rows, and how many, is a function of the recipe and the rows alone, so a resumed run measures the
same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fleetune.data import Encoded
from fleetune.data.partition import keyed_order
from fleetune.evaluation.losses import all_row_losses
from fleetune.seeds.noise import derive
from fleetune.tuning import rounds

if TYPE_CHECKING:
    from fleetune.tuning.prepare import TuneJob
    from fleetune.tuning.recipe import Recipe

USUAL: Final = 4  # rows of a client, unless the recipe says otherwise
LEAST: Final = 2  # and that few in a short run
MOST_CLIENTS: Final = 64  # more are not measured, unless the recipe asks for more rows than usual
SHARE: Final = 0.05  # of the forward passes of a run, which its usual measures may take
PASSES: Final = 3  # forward passes that a training row costs at least, its backward pass counted as two
SEED: Final = "client rows"


@dataclass(frozen=True)
class ClientRows:
    """The rows that are measured: those of every client, in order, and whether they are held out or trained on."""

    rows: Sequence[Sequence[Encoded]]
    kind: str  # held-out or training

    def losses(self, job: TuneJob) -> list[float]:
        """Return each client's mean loss (nats per token of the answers; of an encoder per row), of the model as it stands."""
        every = [row for own in self.rows for row in own]
        sums, counts = all_row_losses(job.model, every, 8)
        ends = np.cumsum([len(own) for own in self.rows])[:-1]
        pairs = zip(np.split(sums, ends), np.split(counts, ends), strict=True)
        return [float(s.sum() / max(1, n.sum())) for s, n in pairs]

    def record(self, **losses: list[float]) -> dict[str, Any]:
        """Return what eval.json keeps: the kind of the rows, their number, and the `losses` that are known."""
        return {"rows": self.kind, "n": [len(own) for own in self.rows], **losses}


def chosen(job: TuneJob) -> ClientRows | None:
    """Return the rows to measure; None where the recipe wants none, or there are no simulated clients, or too many."""
    recipe, clients = job.recipe, len(job.rows)
    usual = recipe.client_rows <= USUAL
    if not recipe.client_rows or clients < 2 or (usual and clients > MOST_CLIENTS):
        return None
    most = most_rows(recipe, [len(rows) for rows in job.rows]) if usual else recipe.client_rows
    held = _held_out(job)
    if held and min(map(len, held)) >= min(LEAST, most):
        return ClientRows([own[:most] for own in held], "held-out")
    key = derive(recipe.seed, SEED)
    picked = [[own[i] for i in keyed_order(key, c, len(own))[:most]] for c, own in enumerate(job.rows)]
    return ClientRows(picked, "training")


def most_rows(recipe: Recipe, sizes: Sequence[int]) -> int:
    """Return how many rows of a client are measured at most, so that all take no more than `SHARE` of a run's passes.

    Both measures together are two passes of a row.  At least `LEAST`, since one row says nothing.
    """
    asked = len(rounds.sample(range(len(sizes)), recipe.participation, recipe.seed, 1))
    trained = recipe.rounds * asked * float(np.mean(sizes)) * PASSES
    return min(recipe.client_rows, max(LEAST, int(SHARE * trained / (2 * len(sizes)))))


def _held_out(job: TuneJob) -> list[list[Encoded]]:
    """Return the held-out rows of each client; [] where the clients are not the values of a column."""
    parts = job.split
    if not parts.column or not job.recipe.partition.startswith("column"):
        return []
    if len(job.held) != len(job.examples):  # long texts are several rows each
        return []
    names = [parts.examples[int(part[0])].meta.get(parts.column) for part in parts.clients]
    own: dict[object, list[Encoded]] = {name: [] for name in names}
    for row, example in zip(job.held, job.examples, strict=True):
        if (name := example.meta.get(parts.column)) in own:
            own[name].append(row)
    return [own[name] for name in names]
