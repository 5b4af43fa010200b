# SPDX-License-Identifier: Apache-2.0
"""Show the clients: whose data, who got better or worse, and which replies did not count."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fleetune.common.display import change, counted, improved, one_line, show
from fleetune.report import charts, page, svg
from fleetune.report.page import TableCell, span, true_minus
from fleetune.report.runlog import Event, RunLog, list_of, map_of, num_of, number, text_of

MAX_COLUMNS = 60  # above it, or above `svg.COLOURS` categories, the partition is a heat map


class ClientRows(NamedTuple):
    """Rows of each client by category: `names` of clients, then (category, rows of each client)."""

    names: list[str]
    rows: list[tuple[str, list[float]]]

    def sizes(self) -> list[float]:
        return [sum(values[i] for _, values in self.rows) for i in range(len(self.names))]

    def tip(self, i: int) -> str:
        parts = [f"{name} {values[i]:g}" for name, values in self.rows if values[i] and len(self.rows) > 1]
        return f"client {self.names[i]}: {self.sizes()[i]:g} rows{': ' if parts else ''}{', '.join(parts)}"

    def take(self, order: Sequence[int]) -> ClientRows:
        return ClientRows([self.names[i] for i in order], [(n, [v[i] for i in order]) for n, v in self.rows])


def _client_rows(run: RunLog, most: int) -> ClientRows:
    """Return the data partition of the start event, its `most` largest categories and the others as one."""
    counts: dict[str, list[float]] = {}
    for name, values in map_of(run.start, "counts").items():
        if isinstance(values, list):
            counts[str(name)] = [number(v) or 0 for v in values]
    if not counts:
        counts = {"rows": [number(v) or 0 for v in list_of(run.start, "rows_per_client")]}
    clients = max(map(len, counts.values()))
    padded = {name: values + [0] * (clients - len(values)) for name, values in counts.items()}
    ordered = sorted((n for n in padded if any(padded[n])), key=lambda name: (-sum(padded[name]), name))
    rows = [(name, padded[name]) for name in ordered[:most]]
    if rest := ordered[most:]:
        others = [sum(padded[name][i] for name in rest) for i in range(clients)]
        rows = [
            *rows[:-1],
            (f"{len(rest) + 1} others", [a + b for a, b in zip(rows[-1][1], others, strict=True)]),
        ]
    return ClientRows([client_name(run, i) for i in range(clients)], rows)


def client_name(run: RunLog, client: object) -> str:
    """Return a client's name in the data, where the clients are the data's own; else its number."""
    names = list_of(run.start, "names")
    if isinstance(client, int) and 0 <= client < len(names) and isinstance(names[client], str):
        return one_line(str(names[client]))
    return str(client)


def partition(run: RunLog) -> str:
    """Return the rows of each client: bars, or a heat map of many clients or categories."""
    split = _client_rows(run, 24)
    clients = len(split.names)
    if not clients:
        return ""
    column = text_of("column", run.start) or "category"
    title = f"Rows of the clients: {partition_words(run) or 'as they are'}"
    sizes = split.sizes()
    each = f", {span(sizes)} each" if clients > 1 else ""
    desc = f"{counted(clients, 'client')}, {sum(sizes):,.0f} rows{each}."
    words = f"{desc} Coloured by {column}." if len(split.rows) > 1 else desc
    if len(split.rows) <= svg.COLOURS and (clients <= MAX_COLUMNS or len(split.rows) == 1):
        tips = [split.tip(i) for i in range(clients)]
        drawing = charts.stacked_rows("partition", title, desc, split.names, split.rows, tips, label="rows")
    else:
        drawing, words = _heat(split, title, desc), f"{desc} A stronger shade is a larger share."
    head = ["client", *(name for name, _ in split.rows), "all"]
    body: list[list[str | TableCell]] = [
        [split.names[i], *(TableCell(f"{v[i]:g}") for _, v in split.rows), TableCell(f"{sizes[i]:g}")]
        for i in range(min(clients, 1000))
    ]
    return page.figure(drawing, title, words, data=page.table(f"Rows of each client by {column}", head, body))


def _heat(split: ClientRows, title: str, desc: str) -> str:
    """Draw clients side by side, sorted by their main category so that equal ones stand together."""
    sizes = split.sizes()

    def place(i: int) -> tuple[float, float]:
        values = [v[i] for _, v in split.rows]
        main = max(range(len(values)), key=values.__getitem__)
        return main, -values[main] / (sizes[i] or 1)

    order = sorted(range(len(split.names)), key=place)
    shown = split.take(order)
    chunk = math.ceil(len(order) / 250)
    label = f"{len(order)} clients, sorted by their main category"
    if chunk > 1:
        label += f", {chunk} to a column"
        groups = [range(i, min(i + chunk, len(order))) for i in range(0, len(order), chunk)]
        names = [f"{shown.names[g[0]]}+" for g in groups]
        shown = ClientRows(names, [(n, [sum(v[i] for i in g) for g in groups]) for n, v in shown.rows])
    tips = [shown.tip(i) for i in range(len(shown.names))]
    return charts.heat_map("partition", title, desc, shown.names, shown.rows, tips, label=label)


def partition_words(run: RunLog) -> str:
    """Return the partition in words: "dirichlet:0.5:category" is "Dirichlet α 0.5 over category"."""
    spec = text_of("partition", run.start, run.config)
    kind, *rest = spec.split(":")
    if kind == "dirichlet" and len(rest) == 2:
        return f"Dirichlet α {rest[0]} over {rest[1]}"
    if kind == "column" and len(rest) == 1:
        return "the clients that the data names" if rest[0] == "client" else f"one client per {rest[0]}"
    if kind == "shards" and rest:
        return f"shards of {rest[0]}"
    return spec


def fleet(run: RunLog) -> str:
    """Return the section: whose data, who got better or worse, and which replies did not count."""
    figures = partition(run) + figure(run, lambda client: client_name(run, client)) + replies(run)
    lost = [e for e in run.clients if str(e.get("status", "ok")) != "ok"]
    words = "" if lost or not run.clients else f"<p>All {len(run.clients):,} replies were accepted.</p>"
    return (f'<div class="figures">{figures}</div>' if figures else "") + words


def replies(run: RunLog) -> str:
    """Return bars of what became of the replies, and the reasons; nothing when all counted."""
    if not run.clients:
        return ""
    lost = [e for e in run.clients if str(e.get("status", "ok")) != "ok"]
    if not lost:
        return ""
    kinds = {"ok": 0, "late": 4, "dropped": 7, "declined": 2, "failed": 3, "refused": 1}
    rounds = sorted({int(num_of(e, "round") or 0) for e in run.clients})
    tally = {kind: [0.0] * len(rounds) for kind in kinds}
    reasons: dict[tuple[str, str], list[Event]] = {}
    for event in run.clients:
        status = str(event.get("status", "ok"))
        status = status if status in kinds else "refused"
        tally[status][rounds.index(int(num_of(event, "round") or 0))] += 1
        if status != "ok":
            reasons.setdefault((status, str(event.get("reason") or "no reason given")), []).append(event)
    series = [(("accepted" if k == "ok" else k), v) for k, v in tally.items() if any(v)]
    shades = [colour for kind, colour in kinds.items() if any(tally[kind])]
    tips = [f"round {r}: " + ", ".join(f"{v[i]:g} {n}" for n, v in series) for i, r in enumerate(rounds)]
    desc = f"{len(lost)} of {len(run.clients)} replies did not count."
    drawing = charts.stacked_bars(
        "replies",
        "Replies by round",
        desc,
        [str(r) for r in rounds],
        series,
        tips,
        labels=("round", "clients"),
        colours=shades,
    )
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    listed: list[list[str | TableCell]] = [
        [
            status,
            reason,
            TableCell(str(len(events))),
            _some([client_name(run, e.get("client")) for e in events]),
            _some([str(e.get("round")) for e in events]),
        ]
        for (status, reason), events in ordered[:100]
    ]
    table = page.table("Replies that did not count", ["what", "why", "times", "clients", "rounds"], listed)
    return page.figure(drawing, "Replies by round", desc, data=table)


def _some(names: Sequence[str]) -> str:
    """List distinct names, the first twelve of them."""
    found = sorted(set(names), key=lambda name: (len(name), name) if name.isdecimal() else (99, name))
    return ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")


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
    drawing = charts.dumbbells(
        "per-client",
        title,
        words,
        names,
        [(c.before, c.after) for c in shown],
        tips,
        [c.better for c in shown],
        label=f"loss on {kind} rows (hollow: before)",
    )
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
    few = (
        counted(max(c.rows for c in found), f"{kind} row")
        if len({c.rows for c in found}) == 1
        else (f"{span([c.rows for c in found])} {kind} rows")
    )
    trained = ", which were trained on" if kind == "training" else ""
    return (
        f"{better} of {len(found)} clients got better, {who}. The worst tenth: {tenth[0]} before, {tenth[1]} "
        f"after. Measured on {few} of each{trained}: few rows, so a single client's change is a hint, no proof."
    )


def _summary(found: Sequence[ClientLoss]) -> str:
    sides = [[c.before for c in found], [c.after for c in found]]
    body: list[list[str | TableCell]] = []
    for label, of in (
        ("mean over clients", statistics.fmean),
        ("worst tenth", worst_tenth),
        ("highest", max),
        ("standard deviation", statistics.stdev),
    ):
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
