# SPDX-License-Identifier: Apache-2.0
"""Show the loss of every client before and after tuning: who got worse, the worst tenth, and the spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fleetune.common.display import change, improved, show
from fleetune.runs.report import page, rows
from fleetune.runs.report.page import TableCell, counted, span, true_minus
from fleetune.runs.report.runlog import RunLog, list_of, map_of, number, text_of

MOST = 64  # clients that are drawn; those that changed worst come first
NAMED = 3  # clients that the words name


class ClientLoss(NamedTuple):
    """A client's loss (nats) before and after, on so many of its rows."""

    client: int
    before: float
    after: float
    rows: int

    @property
    def better(self) -> bool | None:
        """Return whether it is lower after than before, None where no digit that is shown differs."""
        return improved("loss", self.before, self.after)


def measured(run: RunLog) -> list[ClientLoss]:
    """Return the clients that were measured before and after, in order; [] where none were."""
    found = map_of(run.final, "per_client") or map_of(run.done, "per_client")
    columns = [list_of(found, key) for key in ("base", "tuned", "n")]
    out = []
    for client, (before, after, n) in enumerate(zip(*columns, strict=False)):
        b, a, count = number(before), number(after), number(n)
        if b is not None and a is not None and count is not None:
            out.append(ClientLoss(client, float(b), float(a), int(count)))
    return out


def worst_tenth(values: Sequence[float]) -> float:
    """Return the mean of the highest tenth of the values, of one at least."""
    count = math.ceil(len(values) / 10)
    return statistics.fmean(sorted(values)[-count:])


def figure(run: RunLog, name: Callable[[int], str]) -> str:
    """Return the clients as a row each, worst change first, with the words and the numbers; nothing without any."""
    found = measured(run)
    if len(found) < 2:
        return ""
    kind = text_of("rows", map_of(run.final, "per_client"), map_of(run.done, "per_client")) or "own"
    ordered = sorted(found, key=lambda c: (c.before - c.after, c.client))
    shown = ordered[:MOST]
    names = [name(c.client) for c in shown]
    tips = [
        f"client {n}: {show('loss', c.before)} before, {show('loss', c.after)} after, {counted(c.rows, f'{kind} row')}"
        for n, c in zip(names, shown, strict=True)
    ]
    title = "Loss of each client before and after"
    words = _words(found, ordered, kind, name)
    drawing = rows.dumbbells(
        "per-client", title, words, names, [(c.before, c.after) for c in shown], tips, [c.better for c in shown],
        label=f"loss on {kind} rows (hollow: before)",
    )  # fmt: skip
    return page.figure(drawing, title, words, data=_summary(found) + _table(ordered, name))


def _words(
    found: Sequence[ClientLoss], ordered: Sequence[ClientLoss], kind: str, name: Callable[[int], str]
) -> str:
    worse = [c for c in ordered if c.better is False]
    better = sum(c.better is True for c in found)
    listed = ", ".join(f"{name(c.client)} +{c.after - c.before:.3f}" for c in worse[:NAMED])
    more = f" and {len(worse) - NAMED} more" if len(worse) > NAMED else ""
    who = f"{len(worse)} worse ({listed}{more})" if worse else "none worse"
    tenth = [show("loss", worst_tenth([getattr(c, at) for c in found])) for at in ("before", "after")]
    few = counted(max(c.rows for c in found), f"{kind} row") if len({c.rows for c in found}) == 1 else (
        f"{span([c.rows for c in found])} {kind} rows"
    )  # fmt: skip
    trained = ", which were trained on" if kind == "training" else ""
    return (
        f"{better} of {len(found)} clients got better, {who}. The worst tenth: {tenth[0]} before, {tenth[1]} "
        f"after. Measured on {few} of each{trained}: few rows, so a single client's change is a hint, no proof."
    )


def _summary(found: Sequence[ClientLoss]) -> str:
    sides = [[c.before for c in found], [c.after for c in found]]
    body: list[list[str | TableCell]] = []
    for label, of in (
        ("mean over clients", statistics.fmean), ("worst tenth", worst_tenth), ("highest", max),
        ("standard deviation", statistics.stdev),
    ):  # fmt: skip
        b, a = of(sides[0]), of(sides[1])
        body.append(
            [
                label,
                TableCell(show("loss", b)),
                TableCell(show("loss", a)),
                TableCell(f"{a - b:+.3f}".replace("-", "−")),
            ]
        )
    return page.table("Over the clients", ["", "before", "after", "change"], body)


def _table(ordered: Sequence[ClientLoss], name: Callable[[int], str]) -> str:
    body: list[list[str | TableCell]] = []
    for c in ordered[:1000]:
        kind, _ = page.verdict(c.better)
        moved = true_minus(change("loss", c.before, c.after))
        cells = [TableCell(show("loss", v)) for v in (c.before, c.after)]
        body.append([name(c.client), *cells, TableCell(moved, kind), TableCell(str(c.rows))])
    return page.table("Loss of each client", ["client", "before", "after", "change", "rows"], body)
