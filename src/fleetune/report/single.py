"""Write the report page of one run into its folder: what it was, what came of it, what it cost, and how to repeat it."""

import math
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from fleetune.common import display
from fleetune.common.display import change, counted, human_bytes, human_time, improved, metric, one_line, show
from fleetune.common.files import PRIVATE, write_atomic
from fleetune.errors import UsageError
from fleetune.report import page, runlog, svg
from fleetune.report.page import TableCell, esc, short_name, span, true_minus
from fleetune.report.runlog import (
    Event,
    Number,
    RunLog,
    Step,
    changed,
    flat,
    kind_of,
    list_of,
    map_of,
    measures,
    num_of,
    number,
    read,
    sum_of,
    text_of,
)
from fleetune.runs import rundir

EQUAL = 0.02  # bytes of rounds that differ by less than this share are told in a sentence
MOST = 64  # clients that are drawn
LISTED = 1000  # clients in a table
UNIT = "nats per token"
NAMED = 3  # clients that the words name


def write(run: Path) -> Path:
    """Write `report.html` into the run folder and return the page's path.

    UsageError when the folder does not exist, StorageError when it cannot be written; an older report is
    then left as it was.
    """
    log, target = read(run), run / "report.html"
    html = page.document(f"{log.name} - fleetune", "\n".join(filter(None, sections(log).values())))
    write_atomic(target, html.encode("utf-8", "replace"), mode=PRIVATE)  # it has held-out prompts
    return target


def drawing(run: Path) -> page.Drawing:
    """Return the validation loss by round, as a drawing that stands by itself; UsageError where there is nothing to draw."""
    measured = [step for step in runlog.steps(read(run)) if "loss" in step.losses]
    if len(measured) < 2:
        raise UsageError(f"{run} has fewer than two evaluated rounds to draw", hint="tune with eval_every=1")
    return page.drawing(losses(measured))


def sections(run: RunLog) -> dict[str, str]:
    """Return the report's sections as HTML, by name and in order; "" for one that has nothing to show."""
    steps, facts = runlog.steps(run), runlog.summarise(run)
    lost = (
        f"<footer>{display.counted(run.skipped, 'damaged line')} of metrics.jsonl left out.</footer>"
        if run.skipped
        else ""
    )
    return {
        "head": header(run, facts),
        "result": page.section("result", "Result", result(run, facts)),
        "course": page.section("course", "Training", training(run, steps, facts) + rates(run)),
        "fleet": page.section("fleet", "Fleet", fleet(run)),
        "samples": page.section("samples", "Samples", samples(run)),
        "configuration": page.section("configuration", "Configuration", configuration(run)),
        "versions": page.section("versions", "Versions", versions(run)),
        "again": page.section("again", "Run it again", _rerun_section(run)),
        "footer": lost,
        "sharing": sharing(run),
    }


def _rerun_section(run: RunLog) -> str:
    where = shlex.quote(run.shown_path)
    lines = [
        (f"fleetune tune -c {shlex.quote(run.shown_path + '/run.toml')}", "the same run, in a new folder")
    ]
    if kind_of(run.status) not in {"done", "running"}:
        lines.insert(0, (run.resume, "go on where it stopped"))
    if (run.path / "ledger.safetensors").is_file():
        ledger = shlex.quote(run.shown_path + "/ledger.safetensors")
        lines.append((f"fleetune verify {ledger}", "rebuild the tuned weights and check their digest"))
    lines.append((f"fleetune eval {where}", "measure the result again"))
    rows = "".join(f"<div><dt><code>{esc(line)}</code></dt><dd>{esc(why)}</dd></div>" for line, why in lines)
    return f'<dl class="commands">{rows}</dl>'


def header(run: RunLog, facts: Mapping[str, object]) -> str:
    """Return title, state, the result in a sentence, and the run's settings."""
    kind = kind_of(run.status)
    mark = {"done": "✓", "running": "●", "failed": "✕", "interrupted": "❙❙"}.get(kind, "?")
    method, model = str(facts["method"] or "tuning"), str(facts["model"] or "an unnamed model")
    alert = ""
    if kind in {"failed", "interrupted"}:
        alert = f'<p class="alert">{esc(run.status)}. To go on: <code>{esc(run.resume)}</code></p>'
    if not run.intact:
        alert += f'<p class="alert">{esc(changed(run.name))}</p>'
    pill = f'<span class="pill {kind}">{mark} {esc(kind)}</span>'
    return (
        f'<header><p class="over">fleetune · {esc(run.name)} {pill}</p>'
        f"<h1>{esc(method)} <small>on</small> {esc(short_name(model))}</h1>"
        f'<p class="lead">{esc(_sentence(facts))}</p>{alert}{page.fact_list(_identity(run, facts))}</header>'
    )


def _sentence(facts: Mapping[str, object]) -> str:
    base, tuned = number(facts["base_loss"]), number(facts["tuned_loss"])
    rounds, moved, seconds = facts["rounds"], number(facts["bytes"]), number(facts["seconds"])
    spent = f" {display.human_bytes(moved)} were exchanged" if moved is not None else ""
    spent += f" in {display.human_time(seconds)}" if spent and seconds is not None else ""
    done = display.counted(rounds, "round")
    spent = _unbroken(spent)
    if base is None or tuned is None:
        return f"{done} so far; no loss to compare yet.{spent + '.' if spent else ''}"
    before, after = display.show("loss", base), display.show("loss", tuned)
    error = number(facts["change_error"])
    change = true_minus(display.change("loss", base, tuned, error))
    moves = f"{'fell' if tuned < base else 'rose'} from {before} to {after} ({change})"
    loss = f"stayed at {before}" if display.improved("loss", base, tuned) is None else moves
    if display.is_noise("loss", base, tuned, error):
        loss = f"went from {before} to {after} ({change}), which is within noise,"
    return f"Validation loss {loss} in {done}.{spent + '.' if spent else ''}"


def _unbroken(text: str) -> str:
    """Keep numbers and their units on one line."""
    return re.sub(r"(?<=\d) (?=[a-zA-Z])", "\u00a0", text)


def _identity(run: RunLog, facts: Mapping[str, object]) -> list[tuple[str, str]]:
    digest, params = text_of("digest", run.start, run.env), num_of(run.start, "params")
    trained, dtype = num_of(run.start, "trained"), text_of("dtype", run.config, run.env)
    model = [f"{short_name(str(facts['model'] or ''))}{f' @ {digest[:12]}' if digest else ''}"]
    model += [f"{display.human_count(params)} params"] if params is not None else []
    model += [dtype] if dtype else []
    share = f"trains {display.human_count(trained)}" if trained is not None and trained != params else ""
    method = [str(facts["method"] or ""), _letters(run), share]
    sizes = [n for v in list_of(run.start, "rows_per_client") if (n := number(v)) is not None]
    clients, partition = facts["clients"], partition_words(run)
    data = [
        short_name(text_of("data", run.config)),
        display.counted(clients, "client") if clients is not None else "",
        partition,
    ]
    if sizes:
        middle = f", median {statistics.median(sizes):g}" if min(sizes) != max(sizes) else ""
        data.append(f"{span(sizes)} rows{' each' if len(sizes) > 1 else ''}{middle}")
    asked = [v for e in run.rounds if (v := num_of(e, "clients")) is not None]
    fleet = f" · {span(asked)} client{'' if max(asked) == 1 else 's'} in each" if asked else ""
    began = num_of(run.start, "t") or 0
    when = datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d %H:%M UTC") if 0 < began < 1e11 else ""
    return [
        ("model", " · ".join(model)),
        ("method", " · ".join(part for part in method if part)),
        ("data", " · ".join(part for part in data if part)),
        ("rounds", f"{runlog.rounds_text(facts)}{fleet}"),
        ("seed", text_of("seed", run.config, run.start)),
        ("started", when),
    ]


def _letters(run: RunLog) -> str:
    """Return the method's settings; where the run states which are not defaults, only these and the learning rate."""
    shown = flat(map_of(run.config, "set"))
    if isinstance(run.start.get("changed"), list):
        named = {"lr", *(str(name).removeprefix("set.") for name in list_of(run.start, "changed"))}
        shown = [(k, v) for k, v in shown if k in named]
    return " · ".join(f"{k} {v}" for k, v in shown)


def versions(run: RunLog) -> str:
    """Return what env.json says: versions, the machine, digests."""
    told = page.fact_list(flat({k: v for k, v in run.env.items() if k != rundir.STARTED_IN}), "config")
    return page.folded("versions, machine and digests", told)


def result(run: RunLog, facts: Mapping[str, object]) -> str:
    """Return the measures before and after, then the run's cost."""
    base, tuned = measures(run)
    rows: list[list[str | TableCell]] = []
    for name in dict.fromkeys([*base, *tuned]):
        b, t = base.get(name), tuned.get(name)
        error = num_of(map_of(run.done, "change_errors"), name)
        kind, word = page.verdict(display.improved(name, b, t, error))
        word = "within noise" if display.is_noise(name, b, t, error) else word
        diff = TableCell(true_minus(display.change(name, b, t, error)) + (word and f", {word}"), kind)
        rows.append(
            [_label(run, name), TableCell(display.show(name, b)), TableCell(display.show(name, t)), diff]
        )
    row_count = num_of(run.final, "rows") or num_of(run.done, "rows")
    caption = f"Measured on {row_count:,} held-out rows" if row_count else "Measured on held-out rows"
    caption += f"; loss in {UNIT}" if "loss" in base or "loss" in tuned else ""
    measured = page.table(caption, ["", "base", "tuned", "change"], rows, "result") if rows else ""
    up, down = number(facts["bytes_up"]), number(facts["bytes_down"])
    asked, accepted = sum_of(run.rounds, "clients"), sum_of(run.rounds, "accepted")
    each = [display.human_bytes(_each(run, *pair)) for pair in (("bytes_up", up), ("bytes_down", down))]
    spent = [
        ("bytes over the fleet", display.human_bytes(number(facts["bytes"]))),
        ("sent by a client, per round", each[0]),
        ("received by a client, per round", each[1]),
        *_speed(run),
        ("wall time", display.human_time(number(facts["seconds"]))),
        ("peak memory", display.human_bytes(number(facts["peak_rss"]))),
        ("replies accepted", f"{accepted:,} of {asked:,}" if accepted is not None and asked else "-"),
    ]
    if not rows and not run.rounds:
        return "<p>Nothing has been measured yet.</p>"
    files = "".join(f"<li><code>{esc(name)}</code> {esc(size)}</li>" for name, size in _artefacts(run))
    digest = text_of("digest", run.done)
    files += f"<li>digest (SHA-256 of the tuned tensors) <code>{esc(digest)}</code></li>" if digest else ""
    told = "".join(f'<p class="alert">{esc(text)}</p>' for text in list_of(run.done, "remarks"))
    measured += told + (f'<ul class="files">{files}</ul>' if files else "")
    return f"{measured}<h3>Cost</h3>{page.fact_list(spent, 'config')}"


def _speed(run: RunLog) -> list[tuple[str, str]]:
    """Return steps and tokens per second of the clients' local work, where the run states them."""
    work = [e for e in run.clients if num_of(e, "steps") is not None and (num_of(e, "seconds") or 0) > 0]
    spent = sum(num_of(e, "seconds") or 0 for e in work)
    found = []
    for key, label in (("steps", "local steps per second"), ("tokens", "tokens trained on per second")):
        if spent and (total := sum_of(work, key)):
            found.append((label, f"{total / spent:,.0f}" if total > 20 * spent else f"{total / spent:.2g}"))
    return found


def _label(run: RunLog, name: str) -> str:
    """Return a measure's label; Rouge-L's with the number of its rows, which are fewer than the table's."""
    answered = num_of(run.done, "answered") if name == "rouge_l" else None
    return display.metric(name).label + (f", {answered:,} rows" if answered else "")


def _each(run: RunLog, key: str, total: Number | None) -> float | None:
    """Return a client's bytes in a round: the mean over those that moved any, else the total over those asked."""
    moved = [v for e in run.clients if (v := num_of(e, key))]
    if moved:
        return statistics.fmean(moved)
    asked = sum_of(run.rounds, "clients")
    return total / asked if total is not None and asked else None


def _artefacts(run: RunLog) -> list[tuple[str, str]]:
    """List results in the run folder, with their sizes."""
    out = []
    for name in ("ledger.safetensors", "adapter/adapter_model.safetensors"):
        path = run.path / name
        if path.is_file():
            out.append((name, display.human_bytes(path.stat().st_size)))
    return out


NOTE = (
    "This page shows the text of {} of the clients, with the model's answers. Share it only with those who may read them; "
    "a run with --no-samples has none."
)


def samples(run: RunLog) -> str:
    """Return the prompts with their answers."""
    listed = [s for s in list_of(run.final, "samples") if isinstance(s, dict)]
    return "".join(_sample(sample, i) for i, sample in enumerate(listed, 1))


def sharing(run: RunLog) -> str:
    """Return the note in the foot for who shares the page: how many held-out rows are on it; nothing for none."""
    count = len([s for s in list_of(run.final, "samples") if isinstance(s, dict)])
    return f"<footer>{esc(NOTE.format(display.counted(count, 'held-out row')))}</footer>" if count else ""


def _sample(sample: Mapping[str, object], number: int) -> str:
    owner = sample.get("client")
    title = f"Prompt {number}" + (f" · client {owner}" if owner not in (None, "") else "")
    parts = [
        f"<div><h4>{esc(label)}</h4><p>{_marked(sample.get(key) or '(nothing)')}</p></div>"
        for key, label in (("base", "before"), ("tuned", "after"), ("reference", "reference"))
        if sample.get(key) is not None
    ]
    prompt = _marked(sample.get("prompt") or "")
    return (
        f'<article class="sample"><h3>{esc(title)}</h3><p class="prompt">{prompt}</p>'
        f'<div class="answers">{"".join(parts)}</div></article>'
    )


def _marked(text: object) -> str:
    """Return a text with the bold, code and headings of its Markdown; lists read well as they are."""
    text = re.sub(r"(?m)^#{1,6} (.+)$", r"<strong>\1</strong>", esc(text))
    return re.sub(
        r"`([^`\n]+)`|\*\*(?=\S)(.+?)(?<=\S)\*\*",
        lambda m: f"<code>{m[1]}</code>" if m[1] else f"<strong>{m[2]}</strong>",
        text,
    )


PATHS = ("model", "data", "eval_data")  # options that may be paths: their last part is shown


def options(run: RunLog) -> list[tuple[str, str]]:
    """Return the options as text, without this machine's folders."""
    return [(k, short_name(v) if k in PATHS else v) for k, v in flat(run.config)]


def configuration(run: RunLog) -> str:
    """Return the options, those that differ from their defaults first where the run states which these are."""
    found = options(run)
    changed = {str(name) for name in list_of(run.start, "changed")}
    first = [(k, v) for k, v in found if k in changed]
    if not first:
        return page.fact_list(found, "config")
    rest = [(k, v) for k, v in found if k not in changed]
    return (
        f"<h3>Chosen for this run</h3>{page.fact_list(first, 'config chosen')}"
        f"{page.folded(f'{len(rest)} left at the default', page.fact_list(rest, 'config'))}"
    )


def training(run: RunLog, steps: Sequence[Step], facts: Mapping[str, object]) -> str:
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
    title = "Validation loss by round"
    x, y = svg.integers(rounds, "round"), svg.numbers(losses, f"validation loss, {UNIT}")
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
    title, words = "Loss of each client before and after", _client_words(ordered, names, kind)
    pairs, changes = [(c.before, c.after) for c in shown], [c.better for c in shown]
    label = f"loss on {kind} rows, {UNIT} (hollow: before)"
    drawing = svg.dumbbells("per-client", title, words, names[:MOST], pairs, tips, changes, label=label)
    return page.figure(drawing, title, words, data=_client_table(ordered, names))


def _client_words(ordered: Sequence[ClientLoss], names: Sequence[str], kind: str) -> str:
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


def _client_table(ordered: Sequence[ClientLoss], names: Sequence[str]) -> str:
    body: list[list[str | TableCell]] = []
    for name, c in zip(names, ordered[:LISTED], strict=False):
        kind, _ = page.verdict(c.better)
        moved = true_minus(change("loss", c.before, c.after))
        cells = [TableCell(show("loss", v)) for v in (c.before, c.after)]
        body.append([name, *cells, TableCell(moved, kind), TableCell(str(c.rows))])
    return page.table("Loss of each client", ["client", "before", "after", "change", "rows"], body)
