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
from fleetune.tuning.prepare import client_rows

if TYPE_CHECKING:
    from fleetune.tuning.prepare.prepare import TuneJob

SEED: Final = "client rows"


@dataclass(frozen=True)
class ClientRows:
    """The rows that are measured: those of every client, in order, and whether they are held out or trained on."""

    rows: Sequence[Sequence[Encoded]]
    kind: str  # held-out or training

    def first(self, counts: Sequence[int]) -> ClientRows:
        """Return the first so many rows of each client: what a run measured that had fewer rounds."""
        return ClientRows([own[:n] for own, n in zip(self.rows, counts, strict=True)], self.kind)

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
    most = client_rows.of_each(job.recipe, [len(rows) for rows in job.rows])
    if not most:
        return None
    held = _held_out(job)
    if held and min(map(len, held)) >= min(client_rows.LEAST, most):
        return ClientRows([own[:most] for own in held], "held-out")
    key = derive(job.recipe.seed, SEED)
    picked = [[own[i] for i in keyed_order(key, c, len(own))[:most]] for c, own in enumerate(job.rows)]
    return ClientRows(picked, "training")


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
