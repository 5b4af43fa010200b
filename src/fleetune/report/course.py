"""Show a run round by round, and its clients: loss, whose data, who got better or worse, which replies did not count."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fleetune.common.display import change, counted, human_bytes, human_time, improved, metric, one_line, show
from fleetune.report import page, svg
from fleetune.report.page import TableCell, span, true_minus
from fleetune.report.runlog import Event, Number, RunLog, Step, list_of, map_of, num_of, number, text_of

EQUAL = 0.02  # bytes of rounds that differ by less than this share are told in a sentence
MOST = 64  # clients that are drawn
LISTED = 1000  # clients in a table
UNIT = "nats per token"
NAMED = 3  # clients that the words name


def course(run: RunLog, steps: Sequence[Step], facts: Mapping[str, object]) -> str:
    """Return a plot of the loss, the costs in words, and the table of all rounds."""
    measured = [s for s in steps if "loss" in s.losses]
    moved = [float(s.up or 0) + float(s.down or 0) for s in steps if s.up or s.down]
    title, note = "Validation loss by round", "Round 0 is the model before tuning."
    figures = page.figure(losses(measured), title, note) if len(measured) > 1 else ""
    words = [] if (peak := number(facts["peak_rss"])) is None else [f"Peak memory {human_bytes(peak)}."]
    if moved and max(moved) - min(moved) <= EQUAL * max(moved):
        each = human_bytes(statistics.fmean(moved))
        words.insert(0, f"In every round the clients sent and received {each} together.")
    body = f'<div class="figures">{figures}</div>' if figures else ""
    told = f"<p>{page.esc(' '.join(words))}</p>" if words else ""
    return body + told + (_every_round(steps, shut=bool(figures)) if run.rounds else "")


def losses(measured: Sequence[Step]) -> str:
    """Draw the validation loss by round."""
    losses, rounds = [float(s.losses["loss"]) for s in measured], [float(s.round) for s in measured]
    tips = [f"round {s.round}: {show('loss', s.losses['loss'])}, {human_bytes(s.total)}" for s in measured]
    first, last = measured[0].round, measured[-1].round
    desc = f"From {losses[0]:.3f} in round {first} to {losses[-1]:.3f} in round {last}."
    title, x, y = (
        "Validation loss by round",
        svg.integers(rounds, "round"),
        svg.numbers(losses, f"validation loss, {UNIT}"),
    )
    plot = svg.Plot("loss-round", title, desc, x, y, right=50.0)
    plot.end((rounds[-1], losses[-1]), f"{losses[-1]:.3f}", 0)
    if first == 0:
        plot.reference(losses[0], f"base {losses[0]:.3f}")
    plot.line(list(zip(rounds, losses, strict=True)), 0, tips)
    return plot.svg()


def _every_round(steps: Sequence[Step], *, shut: bool) -> str:
    names = list(dict.fromkeys(name for s in steps for name in s.losses))
    own_names = list(dict.fromkeys(name for s in steps for name in s.own))
    labels = [metric(n).label for n in (*names, *own_names)]
    head = ["round", *labels, "replies", "sent", "received", "so far", "time", "memory"]
    rows: list[list[str | TableCell]] = []
    for s in steps:
        row: list[str | TableCell] = [str(s.round)]
        row += [TableCell(show(n, s.losses.get(n))) for n in names]
        row += [TableCell(_figure(s.own.get(n))) for n in own_names]
        used = "-" if s.accepted is None else str(s.accepted)
        if s.accepted is not None and s.asked is not None:
            used += f" of {s.asked}"
        row += [TableCell(used), *(TableCell(human_bytes(v)) for v in (s.up, s.down, s.total))]
        rows.append([*row, TableCell(human_time(s.seconds)), TableCell(human_bytes(s.rss))])
    table = page.table("Every round: bytes are sums over its clients", head, rows)
    return page.folded("Every round in numbers", table, shut=shut)


def _figure(value: Number | None) -> str:
    """Format a method's own figure, which may be of any size: four digits, a count whole."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def rates(run: RunLog) -> str:
    """Return a sentence for each rate that was found; "" for a run that found none."""
    told = ""
    for event in run.rates:
        rate, seconds, name = num_of(event, "rate"), num_of(event, "seconds"), text_of("setting", event)
        words = f"{name} = {rate:g} was found" if rate is not None else "No rate was found"
        took = f" in {human_time(seconds)}" if seconds is not None else ""
        told += f"<p>{page.esc(words + took + ': ' + text_of('why', event) + '.')}</p>"
    return told


# ---------------------------------------------------------------- the clients


def client_name(run: RunLog, client: object) -> str:
    """Return a client's name in the data, where the clients are the data's own; else its number."""
    names = list_of(run.start, "names")
    if isinstance(client, int) and 0 <= client < len(names) and isinstance(names[client], str):
        return one_line(str(names[client]))
    return str(client)


def fleet(run: RunLog) -> str:
    """Return the section: whose data, who got better or worse, and which replies did not count."""
    figures = partition(run) + client_losses(run)
    return (f'<div class="figures">{figures}</div>' if figures else "") + replies(run)


def partition(run: RunLog) -> str:
    """Return the rows of each client by category: the largest categories, and the others as one; of many clients the largest."""
    counts: dict[str, list[float]] = {}
    for name, values in map_of(run.start, "counts").items():
        if isinstance(values, list):
            counts[str(name)] = [number(v) or 0 for v in values]
    if not counts:
        counts = {"rows": [number(v) or 0 for v in list_of(run.start, "rows_per_client")]}
    clients = max(map(len, counts.values()))
    if not clients:
        return ""
    padded = {name: values + [0] * (clients - len(values)) for name, values in counts.items() if any(values)}
    ordered = sorted(padded.items(), key=lambda pair: (-sum(pair[1]), pair[0]))
    rows, rest = ordered[: svg.COLOURS], ordered[svg.COLOURS :]
    if rest:
        rest.append(rows.pop())
        rows.append(
            (f"{len(rest)} others", [sum(column) for column in zip(*(v for _, v in rest), strict=True)])
        )
    names, sizes = (
        [client_name(run, i) for i in range(clients)],
        [sum(v[i] for _, v in rows) for i in range(clients)],
    )
    column = text_of("column", run.start) or "category"
    title = f"Rows of the clients: {partition_words(run) or 'as they are'}"
    each = f", {span(sizes)} each" if clients > 1 else ""
    desc = f"{counted(clients, 'client')}, {sum(sizes):,.0f} rows{each}."
    shown = list(range(clients))
    if clients > MOST:
        shown = sorted(shown, key=lambda i: (-sizes[i], i))[:MOST]
        desc += f" The {MOST} largest are drawn."
    tips = []
    for i in shown:
        parts = ", ".join(f"{name} {v[i]:g}" for name, v in rows if v[i]) if len(rows) > 1 else ""
        tips.append(f"client {names[i]}: {sizes[i]:g} rows" + (f": {parts}" if parts else ""))
    drawn = [(name, [values[i] for i in shown]) for name, values in rows]
    drawing = svg.stacked_rows("partition", title, desc, [names[i] for i in shown], drawn, tips, label="rows")
    body: list[list[str | TableCell]] = [
        [names[i], *(TableCell(f"{v[i]:g}") for _, v in rows), TableCell(f"{sizes[i]:g}")]
        for i in range(min(clients, LISTED))
    ]
    table = page.table(f"Rows of each client by {column}", ["client", *(n for n, _ in rows), "all"], body)
    words = f"{desc} Coloured by {column}." if len(rows) > 1 else desc
    return page.figure(drawing, title, words, data=table)


def partition_words(run: RunLog) -> str:
    """Return the partition in words: "dirichlet:0.5:category" is "Dirichlet α 0.5 over category"."""
    spec = text_of("partition", run.start, run.config)
    kind, *rest = spec.split(":")
    if kind == "dirichlet" and len(rest) == 2:
        return f"Dirichlet α {rest[0]} over {rest[1]}"
    if kind == "column" and len(rest) == 1:
        return f"one per '{rest[0]}'"
    return spec


def replies(run: RunLog) -> str:
    """Return which replies did not count, and why; a sentence when all did."""
    lost = [e for e in run.clients if str(e.get("status", "ok")) != "ok"]
    if not lost:
        return f"<p>All {len(run.clients):,} replies were accepted.</p>" if run.clients else ""
    reasons: dict[tuple[str, str], list[Event]] = {}
    for event in lost:
        why = (str(event.get("status")), str(event.get("reason") or "no reason given"))
        reasons.setdefault(why, []).append(event)
    rows: list[list[str | TableCell]] = [
        [
            status,
            reason,
            TableCell(str(len(events))),
            _some([client_name(run, e.get("client")) for e in events]),
            _some([str(e.get("round")) for e in events]),
        ]
        for (status, reason), events in sorted(reasons.items(), key=lambda item: -len(item[1]))[:100]
    ]
    caption = f"{len(lost)} of {len(run.clients)} replies did not count"
    return page.table(caption, ["reply", "why", "times", "clients", "rounds"], rows)


def _some(names: Sequence[str]) -> str:
    """List distinct names, the first twelve of them."""
    every = sorted(set(names), key=lambda name: (len(name), name) if name.isdecimal() else (99, name))
    return ", ".join(every[:12]) + (f" and {len(every) - 12} more" if len(every) > 12 else "")


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
    for client, values in enumerate(zip(*columns, strict=False)):
        before, after, rows = map(number, values)
        if before is not None and after is not None and rows is not None:
            out.append(ClientLoss(client, float(before), float(after), int(rows)))
    return out


def worst_tenth(values: Sequence[float]) -> float:
    """Return the mean of the highest tenth of the values, of one at least."""
    count = math.ceil(len(values) / 10)
    return statistics.fmean(sorted(values)[-count:])


def client_losses(run: RunLog) -> str:
    """Return the clients as a row each, worst change first, with the words and the numbers; nothing without any."""
    ordered = sorted(measured(run), key=lambda c: (c.before - c.after, c.client))
    if len(ordered) < 2:
        return ""
    kind = text_of("rows", map_of(run.final, "per_client"), map_of(run.done, "per_client")) or "own"
    shown, names = ordered[:MOST], [client_name(run, c.client) for c in ordered]
    tips = [
        f"client {n}: {show('loss', c.before)} before, {show('loss', c.after)} after, {counted(c.rows, f'{kind} row')}"
        for n, c in zip(names, shown, strict=False)
    ]
    title, words = "Loss of each client before and after", _words(ordered, names, kind)
    pairs, changes = [(c.before, c.after) for c in shown], [c.better for c in shown]
    label = f"loss on {kind} rows, {UNIT} (hollow: before)"
    drawing = svg.dumbbells("per-client", title, words, names[:MOST], pairs, tips, changes, label=label)
    return page.figure(drawing, title, words, data=_table(ordered, names))


def _words(ordered: Sequence[ClientLoss], names: Sequence[str], kind: str) -> str:
    worse = [
        f"{n} +{c.after - c.before:.3f}" for n, c in zip(names, ordered, strict=True) if c.better is False
    ]
    better = sum(c.better is True for c in ordered)
    more = f" and {len(worse) - NAMED} more" if len(worse) > NAMED else ""
    who = f"{len(worse)} worse ({', '.join(worse[:NAMED])}{more})" if worse else "none worse"
    sides = [[c.before for c in ordered], [c.after for c in ordered]]
    mean, tenth = ([show("loss", of(values)) for values in sides] for of in (statistics.fmean, worst_tenth))
    rows = [c.rows for c in ordered]
    few = counted(rows[0], f"{kind} row") if len({*rows}) == 1 else f"{span(rows)} {kind} rows"
    trained = ", which were trained on" if kind == "training" else ""
    return (
        f"{better} of {len(ordered)} clients got better, {who}. Mean: {mean[0]} before, {mean[1]} after; of the "
        f"worst tenth: {tenth[0]} before, {tenth[1]} after. Measured on {few} of each{trained}: few rows, so a single "
        "client's change is a hint, no proof."
    )


def _table(ordered: Sequence[ClientLoss], names: Sequence[str]) -> str:
    body: list[list[str | TableCell]] = []
    for name, c in zip(names, ordered[:LISTED], strict=False):
        kind, _ = page.verdict(c.better)
        moved = true_minus(change("loss", c.before, c.after))
        cells = [TableCell(show("loss", v)) for v in (c.before, c.after)]
        body.append([name, *cells, TableCell(moved, kind), TableCell(str(c.rows))])
    return page.table("Loss of each client", ["client", "before", "after", "change", "rows"], body)
