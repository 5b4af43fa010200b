# SPDX-License-Identifier: Apache-2.0
"""Read the rows of a run, hold some out, and give every other row to a client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fleetune.common.display import counted
from fleetune.data.columns import CLIENT, parse
from fleetune.data.examples import is_folder, read
from fleetune.data.forms import FIELDS, Example
from fleetune.data.partition import AUTO, column_of, hold_out, partition
from fleetune.errors import DataError

FEW_CLIENTS: Final = 8  # most methods' usual number, which stands however few the rows are
CLIENTS: Final = (
    "client",
    "user",
    "device",
    "site",
    "author",
    "speaker",
)  # columns that look like clients, also with "id"
ROWS_EACH: Final = 8  # rows of a client at least where a method's usual clients are more than that


@dataclass(frozen=True)
class Split:
    """The rows of a run: who holds what, and what nobody trains on."""

    examples: Sequence[Example]
    clients: Sequence[np.ndarray]  # indices of examples
    held: np.ndarray
    column: str | None
    partition: str = "iid"  # as it was done: never `auto`
    notes: tuple[str, ...] = ()  # what of the rows was left out


@dataclass(frozen=True)
class Rows:
    """Where rows come from and how they are divided, as the recipe's options of these names say."""

    data: str
    columns: str = ""
    eval_data: str = ""
    limit: int = 0
    partition: str = AUTO
    held_out: float = 0.1
    clients: int = 0
    seed: int = 42

    @property
    def rule(self) -> str:
        """The partition; `auto` is column:client where the data name clients, as a folder of files does, else iid."""
        if self.partition != AUTO:
            return self.partition
        return f"column:{CLIENT}" if is_folder(self.data) or CLIENT in parse(self.columns, FIELDS) else "iid"


def split(rows: Rows, usual_clients: int, *, fewer: bool = False, offline: bool = False) -> Split:
    """Read the data, hold rows out, and give every other row to a client; `usual_clients` where no number is asked for.

    With `fewer`, these are as many as there are rows where the rows are too few.
    DataError when the data do not allow it.
    """
    notes: list[str] = []
    examples = read(
        rows.data, limit=rows.limit or None, offline=offline, columns=rows.columns, note=notes.append
    )
    rule = rows.rule
    column = column_of(rule)
    if rows.eval_data:
        train = np.arange(len(examples))
        more = read(rows.eval_data, offline=offline, columns=rows.columns, note=notes.append)
        examples = [*examples, *more]
        held = np.arange(len(train), len(examples))
    else:
        aside = int(rows.held_out) if rows.held_out >= 1 else rows.held_out
        train, held = hold_out(examples, aside, rows.seed, column)
    if not len(held) or not len(train):
        raise DataError(
            f"the rows are too few: {len(examples)} in all, {len(train)} to train on and {len(held)} held out",
            hint="use more rows, or another --held-out",
        )
    usual_clients = min(usual_clients, len(train)) if fewer else usual_clients
    if (most := max(FEW_CLIENTS, len(train) // ROWS_EACH)) < usual_clients and not rows.clients:
        if not rule.startswith("column:"):
            notes.append(
                f"{counted(len(train), 'row')} are few for the method's usual {usual_clients} clients: {most} take part "
                "(--clients)"
            )
        usual_clients = most
    if rule == "iid" and (name := _like_clients(examples)):
        notes.append(
            f"the column {name!r} looks like clients, and is not used: --partition column:{name} follows it"
        )
    clients = rows.clients or (None if rule.startswith("column:") else usual_clients)
    parts = partition([examples[i] for i in train], rule, clients, rows.seed)
    return Split(examples, [train[part] for part in parts], held, column, rule, tuple(notes))


def _like_clients(examples: Sequence[Example]) -> str:
    """Return the column that looks like clients: it has such a name, several values, and fewer than there are rows; else ""."""
    for name in examples[0].meta:
        if name.lower().removesuffix("id").rstrip("_- ") in CLIENTS:
            values = {example.meta.get(name, "") for example in examples}
            if 1 < len(values) < len(examples):
                return name
    return ""
