# SPDX-License-Identifier: Apache-2.0
"""A run folder as one page to read: what was done, what came of it, what it cost, and how to do it again.

The page is one HTML file with its style and its plots (inline SVG) inside: it opens from the disk, asks the
network for nothing (a content policy forbids it), follows the reader's light or dark scheme and prints.
Every plot has a title and a description for those who do not see it and its numbers in a table.

A run may still be going on or may have been killed, so everything is optional: a missing file is an empty
section, a torn line of metrics.jsonl is skipped and counted.  After a resume a round may stand in the file
twice; the later one holds.  All text is escaped, for samples and names come from strangers.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from fleetune import svg, ui
from fleetune.errors import UsageError
from fleetune.files import write_atomic

Event = Mapping[str, object]
Number = int | float

MAX_DOTS = 4000  # above it the spread plot shows ranges in place of single clients
MAX_COLUMNS = 60  # above it, or above `svg.COLOURS` categories, the partition is a heat map
SHOWN_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder says, as far as it could be read."""

    path: Path
    config: Mapping[str, object]
    env: Mapping[str, object]
    start: Event
    evals: Sequence[Event]
    clients: Sequence[Event]
    rounds: Sequence[Event]
    done: Event
    final: Mapping[str, object]
    status: str
    skipped: int

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def shown_path(self) -> str:
        """The folder as a command takes it, without the machine's own folders before it."""
        return f"{self.path.parent.name}/{self.path.name}"


# Reading


def read(path: Path) -> Run:
    """Read a run folder; missing or damaged files give empty parts.  UsageError when there is no folder."""
    if not path.is_dir():
        raise UsageError(f"no run folder at {path}", hint="fleetune runs   lists them")
    events, skipped = _events(path / "metrics.jsonl")
    rounds = _latest(events, "round", ("round",))
    done = next((e for e in reversed(events) if e["event"] == "done"), {})
    if done and any(e["event"] == "round" for e in events[events.index(done) :]):
        done = {}  # the run was taken up again after it had ended
    return Run(
        path=path.absolute(),
        config=_toml(path / "run.toml"),
        env=_json(path / "env.json"),
        start=next((e for e in reversed(events) if e["event"] == "start"), {}),
        evals=_latest(events, "eval", ("round",)),
        clients=_latest(events, "client", ("round", "client")),
        rounds=rounds,
        done=done,
        final=_json(path / "eval.json"),
        status=ui.clean(_read(path / "status")).strip() or ("done" if done else "unknown"),
        skipped=skipped,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(path: Path) -> Mapping[str, object]:
    try:
        value = json.loads(_read(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _toml(path: Path) -> Mapping[str, object]:
    try:
        return tomllib.loads(_read(path))
    except (ValueError, RecursionError):
        return {}


def _events(path: Path) -> tuple[list[dict[str, object]], int]:
    good: list[dict[str, object]] = []
    bad = 0
    for line in _read(path).splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            bad += bool(line.strip())
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            good.append(event)
        else:
            bad += 1
    return good, bad


def _latest(events: Iterable[Event], kind: str, keys: tuple[str, ...]) -> list[Event]:
    """Events of one kind in order of their round, the last one of each key."""
    kept: dict[tuple[str, ...], Event] = {}
    for event in events:
        if event["event"] == kind and svg.usable(event.get("round")):
            kept[tuple(str(event.get(key)) for key in keys)] = event
    return sorted(kept.values(), key=lambda event: _num(event, "round") or 0.0)


def _num(source: Mapping[str, object], key: str) -> Number | None:
    """A number of a record; None when it is missing, null, not finite or no number."""
    value = source.get(key)
    return value if isinstance(value, int | float) and svg.usable(value) else None


def _map(source: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = source.get(key)
    return value if isinstance(value, dict) else {}


def _list(source: Mapping[str, object], key: str) -> list[object]:
    value = source.get(key)
    return value if isinstance(value, list) else []


def _first(key: str, *sources: Mapping[str, object]) -> str:
    """The first scalar called `key`, as text; a table of that name gives its own `name`."""
    for source in sources:
        value = source.get(key)
        if isinstance(value, dict):
            value = value.get("name")
        if isinstance(value, str | int | float) and value != "":
            return ui.clean(str(value))
    return ""


def _sum(events: Iterable[Event], key: str) -> Number | None:
    values = [v for e in events if (v := _num(e, key)) is not None]
    return sum(values) if values else None


def _measures(run: Run) -> tuple[dict[str, Number], dict[str, Number]]:
    """Base and tuned measures: of the end when there is one, else of round 0 and of the latest evaluation."""
    early = run.evals[0] if run.evals and _num(run.evals[0], "round") == 0 else {}
    late = run.evals[-1] if len(run.evals) > 1 else {}
    found: list[dict[str, Number]] = []
    for key, event in (("base", early), ("tuned", late)):
        source = _map(run.done, key) or _map(run.final, key) or event
        names = [n for n in source if n not in {"v", "t", "event", "round", "seconds", "rows", "rss"}]
        found.append({n: v for n in names if (v := _num(source, n)) is not None})
    return found[0], found[1]


def summary(run: Path) -> dict[str, object]:
    """The run in a few numbers, for the console and for `fleetune runs --json`.

    Keys: name, path, method, model, status, rounds (done), rounds_planned, clients, base_loss, tuned_loss,
    bytes_up, bytes_down, bytes (their sum), seconds (wall time), peak_rss (bytes); None where the folder
    does not say.
    """
    return _summary(read(run))


def table(runs: Iterable[Path]) -> list[dict[str, object]]:
    """`summary` of several run folders, in their order."""
    return [summary(run) for run in runs]


def _summary(run: Run) -> dict[str, object]:
    base, tuned = _measures(run)
    both = [
        run.done,
        {"bytes_up": _sum(run.rounds, "bytes_up"), "bytes_down": _sum(run.rounds, "bytes_down")},
    ]
    up, down = (
        next((v for s in both if (v := _num(s, k)) is not None), None) for k in ("bytes_up", "bytes_down")
    )
    seen = [v for e in (*run.rounds, *run.clients) if (v := _num(e, "rss")) is not None]
    peak = _num(run.done, "peak_rss")
    # `seconds` are the rounds of all sittings, `wall` the last sitting with its evaluations: a resumed run
    # may have more of the former.
    clocks = [v for key in ("seconds", "wall") if (v := _num(run.done, key)) is not None]
    return {
        "name": run.name,
        "path": str(run.path),
        "method": _first("method", run.start, run.config) or None,
        "model": _first("model", run.start, run.config) or None,
        "status": run.status,
        "rounds": len(run.rounds),
        "rounds_planned": _num(run.start, "rounds") or _num(run.config, "rounds"),
        "clients": _num(run.start, "clients") or _num(run.config, "clients"),
        "base_loss": base.get("loss"),
        "tuned_loss": tuned.get("loss"),
        "bytes_up": up,
        "bytes_down": down,
        "bytes": None if up is None and down is None else (up or 0) + (down or 0),
        "seconds": max(clocks, default=None) or _sum(run.rounds, "seconds"),
        "peak_rss": peak if peak is not None else max(seen, default=None),
    }


class Step(NamedTuple):
    """One round joined from its events; `total` is the bytes both ways up to and with this round."""

    round: int
    losses: Mapping[str, Number]
    asked: Number | None
    accepted: Number | None
    up: Number | None
    down: Number | None
    total: Number | None
    seconds: Number | None
    rss: Number | None


def _steps(run: Run) -> list[Step]:
    evals = {_num(e, "round"): e for e in run.evals}
    rounds = {_num(e, "round"): e for e in run.rounds}
    steps: list[Step] = []
    total: Number = 0
    for number in sorted(key for key in evals.keys() | rounds.keys() if key is not None):
        event, measured = rounds.get(number, {}), evals.get(number, {})
        up, down = _num(event, "bytes_up"), _num(event, "bytes_down")
        said = _num(event, "bytes_total")
        total = said if said is not None else total + (up or 0) + (down or 0)
        names = [n for n in measured if n not in {"v", "t", "event", "round", "seconds", "rows", "rss"}]
        losses = {n: v for n in names if (v := _num(measured, n)) is not None}
        asked, accepted = _num(event, "clients"), _num(event, "accepted")
        seconds, rss = _num(event, "seconds"), _num(event, "rss")
        steps.append(Step(int(number), losses, asked, accepted, up, down, total, seconds, rss))
    return steps


# HTML


def _e(value: object) -> str:
    return svg.escape(str(value))


class Cell(NamedTuple):
    """A table cell with its class: "r" stands right (numbers), "r good" and "r bad" colour it as well."""

    text: str
    kind: str = "r"


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str | Cell]], kind: str = "") -> str:
    """A table whose first column names the rows; the head of a column goes right when a cell of it does."""
    right = [any(isinstance(row[i], Cell) for row in rows) for i in range(len(head))]
    top = "".join(f'<th scope="col"{_css(r)}>{_e(h)}</th>' for h, r in zip(head, right, strict=True))
    body = "".join(f"<tr>{''.join(_cell(c, i == 0) for i, c in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{_e(caption)}"><table class="{kind}">'
        f"<caption>{_e(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _css(right: bool) -> str:
    return ' class="r"' if right else ""


def _cell(cell: str | Cell, first: bool) -> str:
    text, css = (cell.text, f' class="{cell.kind}"') if isinstance(cell, Cell) else (cell, "")
    return f'<th scope="row"{css}>{_e(text)}</th>' if first else f"<td{css}>{_e(text)}</td>"


def _facts(rows: Iterable[tuple[str, str]], kind: str = "facts") -> str:
    pairs = "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in rows if v)
    return f'<dl class="{kind}">{pairs}</dl>' if pairs else ""


def _figure(drawing: str, title: str, words: str, wide: bool = False, data: str = "") -> str:
    kind = ' class="wide"' if wide else ""
    more = f"<details><summary>the numbers</summary>{data}</details>" if data else ""
    caption = f"<figcaption><strong>{_e(title)}</strong> <span>{_e(words)}</span></figcaption>"
    return f"<figure{kind}>{caption}{drawing}{more}</figure>"


def _section(ident: str, title: str, body: str) -> str:
    return f'<section id="{ident}"><h2>{_e(title)}</h2>{body}</section>' if body else ""


def _page(title: str, body: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_e(title)}</title>\n<style>{svg.STYLE}{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


# One run


def write(run: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    UsageError when the folder does not exist, StorageError when it cannot be written; an older report is
    then left as it was.
    """
    seen = read(run)
    target = run / "report.html"
    write_atomic(target, _report(seen).encode("utf-8", "replace"))
    return target


def _report(run: Run) -> str:
    steps, facts = _steps(run), _summary(run)
    parts = [
        _header(run, facts),
        _section("result", "Result", _result(run, steps, facts)),
        _section("course", "Course", _course(run, steps, facts)),
        _section("fleet", "Fleet", _partition(run) + _replies(run)),
        _section("samples", "Samples", _samples(run)),
        _section("configuration", "Configuration", _facts(flat(run.config), "config")),
        _section("versions", "Versions", _facts(flat(run.env), "config")),
        _section("again", "Run it again", _again(run)),
    ]
    if run.skipped:
        parts.append(f"<footer>{run.skipped} damaged line(s) of metrics.jsonl left out.</footer>")
    return _page(f"{run.name} - fleetune", "\n".join(parts))


def flat(source: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested tables as (dotted key, value) with values as text."""
    out: list[tuple[str, str]] = []
    for key, value in source.items():
        if isinstance(value, dict):
            out += flat(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}", _value(value)))
    return out


def _value(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "(empty)"
    return str(value) or '""'


def _number(value: object) -> Number | None:
    return value if isinstance(value, int | float) and svg.usable(value) else None


def _kind_of(status: str) -> str:
    word = status.split(":")[0].split()[0] if status else "unknown"
    return word if word in {"done", "running", "failed", "interrupted"} else "unknown"


def _header(run: Run, facts: Mapping[str, object]) -> str:
    kind = _kind_of(run.status)
    mark = {"done": "✓", "running": "●", "failed": "✕", "interrupted": "❙❙"}.get(kind, "?")
    method, model = str(facts["method"] or "tuning"), str(facts["model"] or "an unnamed model")
    alert = ""
    if kind in {"failed", "interrupted"}:
        resume = f"fleetune tune --resume {shlex.quote(run.shown_path)}"
        alert = f'<p class="alert">{_e(run.status)}. To go on: <code>{_e(resume)}</code></p>'
    pill = f'<span class="pill {kind}">{mark} {_e(kind)}</span>'
    return (
        f'<header><p class="over">fleetune · {_e(run.name)} {pill}</p>'
        f"<h1>{_e(method)} <small>on</small> {_e(_base_name(model))}</h1>"
        f'<p class="lead">{_e(_sentence(facts))}</p>{alert}{_facts(_identity(run, facts))}</header>'
    )


def _base_name(model: str) -> str:
    """A hub id as it is; of a path only the last part."""
    return Path(model).name or model if model.startswith(("/", ".", "~")) else model


def _sentence(facts: Mapping[str, object]) -> str:
    base, tuned = _number(facts["base_loss"]), _number(facts["tuned_loss"])
    rounds, moved, seconds = facts["rounds"], _number(facts["bytes"]), _number(facts["seconds"])
    spent = f" {ui.human_bytes(moved)} were exchanged" if moved is not None else ""
    spent += f" in {ui.human_time(seconds)}" if spent and seconds is not None else ""
    done = _many(rounds, "round")
    if base is None or tuned is None:
        return f"{done} so far; no loss to compare yet.{spent + '.' if spent else ''}"
    before, after = ui.show("loss", base), ui.show("loss", tuned)
    moves = f"{'fell' if tuned < base else 'rose'} from {before} to {after}"
    loss = f"{moves} ({_minus(ui.change('loss', base, tuned))})" if tuned != base else f"stayed at {before}"
    return f"Validation loss {loss} in {done}.{spent + '.' if spent else ''}"


def _minus(text: str) -> str:
    return "\u2212" + text[1:] if text.startswith("-") and len(text) > 1 else text


def _identity(run: Run, facts: Mapping[str, object]) -> list[tuple[str, str]]:
    digest, params = _first("digest", run.start, run.env), _num(run.start, "params")
    trained, dtype = _num(run.start, "trained"), _first("dtype", run.config, run.env)
    model = [f"{facts['model'] or ''}{f' @ {digest[:12]}' if digest else ''}"]
    model += [f"{ui.human_count(params)} params"] if params is not None else []
    model += [dtype] if dtype else []
    share = f"trains {ui.human_count(trained)}" if trained is not None and trained != params else ""
    method = [str(facts["method"] or ""), _letters(run.config, str(facts["method"])), share]
    sizes = [n for v in _list(run.start, "rows_per_client") if (n := _number(v)) is not None]
    clients, partition = facts["clients"], _partition_words(run)
    data = [_first("data", run.config), _many(clients, "client") if clients is not None else "", partition]
    if sizes:
        middle = f", median {statistics.median(sizes):g}" if min(sizes) != max(sizes) else ""
        data.append(f"{_span(sizes)} rows{' each' if len(sizes) > 1 else ''}{middle}")
    asked = [v for e in run.rounds if (v := _num(e, "clients")) is not None]
    fleet = f" · {_span(asked)} client{'' if max(asked) == 1 else 's'} in each" if asked else ""
    began = _num(run.start, "t") or 0
    when = datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d %H:%M UTC") if 0 < began < 1e11 else ""
    planned = facts["rounds_planned"]
    rounds = f"{facts['rounds']}{f' of {planned}' if planned is not None else ''}"
    return [
        ("model", " · ".join(model)),
        ("method", " · ".join(part for part in method if part)),
        ("data", " · ".join(part for part in data if part)),
        ("rounds", f"{rounds}{fleet}"),
        ("seed", _first("seed", run.config, run.start)),
        ("started", when),
    ]


def _many(count: object, word: str) -> str:
    shown = f"{count:,}" if isinstance(count, int) else str(count)
    return f"{shown} {word}{'' if count == 1 else 's'}"


def _span(values: Sequence[Number]) -> str:
    low, high = min(values), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _partition_words(run: Run) -> str:
    """The partition in words: "dirichlet:0.5:category" is "Dirichlet α 0.5 over category"."""
    spec = _first("partition", run.start, run.config)
    kind, *rest = spec.split(":")
    if kind == "dirichlet" and len(rest) == 2:
        return f"Dirichlet α {rest[0]} over {rest[1]}"
    if kind == "column" and len(rest) == 1:
        return f"one client for each {rest[0]}"
    if kind == "shards" and rest:
        return f"shards of {rest[0]}"
    return spec


def _letters(config: Mapping[str, object], method: str) -> str:
    """The method's own options: the table of the recipe that is called after it, or `set`."""
    sources = [v for key in (method, "set", "method", "fields") if isinstance(v := config.get(key), dict)]
    return " · ".join(f"{k} {v}" for k, v in (flat(sources[0]) if sources else []) if k != "name")


def _result(run: Run, steps: Sequence[Step], facts: Mapping[str, object]) -> str:
    base, tuned = _measures(run)
    rows: list[list[str | Cell]] = []
    for name in dict.fromkeys([*base, *tuned]):
        b, t = base.get(name), tuned.get(name)
        better = ui.improved(name, b, t)
        word = "" if better is None else ", better" if better else ", worse"
        kind = "r" if better is None else "r good" if better else "r bad"
        diff = Cell(_minus(ui.change(name, b, t)) + word, kind)
        rows.append([ui.metric(name).label, Cell(ui.show(name, b)), Cell(ui.show(name, t)), diff])
    held = _num(run.final, "rows") or _num(run.done, "rows")
    caption = f"Measured on {held:,} held-out rows" if held else "Measured on held-out rows"
    measured = _table(caption, ["", "base", "tuned", "change"], rows, "result") if rows else ""
    up, down = _number(facts["bytes_up"]), _number(facts["bytes_down"])
    asked, taken = _sum(run.rounds, "clients"), _sum(run.rounds, "accepted")
    each = [ui.human_bytes(_each(run, *pair)) for pair in (("bytes_up", up), ("bytes_down", down))]
    spent: list[list[str | Cell]] = [
        ["bytes over the fleet", Cell(ui.human_bytes(_number(facts["bytes"])))],
        ["sent by a client, per round", Cell(each[0])],
        ["received by a client, per round", Cell(each[1])],
        ["wall time", Cell(ui.human_time(_number(facts["seconds"])))],
        ["peak memory", Cell(ui.human_bytes(_number(facts["peak_rss"])))],
        ["replies accepted", Cell(f"{taken:,} of {asked:,}" if taken is not None and asked else "-")],
    ]
    if not rows and not run.rounds:
        return "<p>Nothing has been measured yet.</p>"
    files = "".join(f"<li><code>{_e(name)}</code> {_e(size)}</li>" for name, size in _artefacts(run))
    digest = _first("digest", run.done)
    files += f"<li>SHA-256 <code>{_e(digest)}</code></li>" if digest else ""
    left = measured + (f'<ul class="files">{files}</ul>' if files else "")
    costs = _table("What it took", ["", ""], spent, "result plainhead")
    return f'<div class="pair"><div>{left}</div>{costs}</div>'


def _each(run: Run, key: str, total: Number | None) -> float | None:
    """Bytes of a client in a round: the mean over those that moved any, else the total over those asked."""
    moved = [v for e in run.clients if (v := _num(e, key))]
    if moved:
        return statistics.fmean(moved)
    asked = _sum(run.rounds, "clients")
    return total / asked if total is not None and asked else None


def _artefacts(run: Run) -> list[tuple[str, str]]:
    """Results in the run folder, with their sizes."""
    out = []
    for name in ("ledger.safetensors", "adapter/adapter_model.safetensors"):
        path = run.path / name
        if path.is_file():
            out.append((name, ui.human_bytes(path.stat().st_size)))
    return out


def _course(run: Run, steps: Sequence[Step], facts: Mapping[str, object]) -> str:
    measured = [s for s in steps if "loss" in s.losses]
    figures = ""
    if len(measured) > 1:
        points = [(float(s.round), s.losses["loss"]) for s in measured]
        tips = [
            f"round {s.round}: {ui.show('loss', s.losses['loss'])}, {ui.human_bytes(s.total)}"
            for s in measured
        ]
        first, last = measured[0].round, measured[-1].round
        desc = f"From {points[0][1]:.3f} in round {first} to {points[-1][1]:.3f} in round {last}."
        y = svg.numbers([p[1] for p in points], "validation loss")
        plot = svg.Plot(
            "loss-round", "Validation loss against round", desc, svg.whole([p[0] for p in points], "round"), y
        )
        moved = [float(s.total or 0) for s in measured]
        x, at = _bytes_axis([moved])
        by = svg.Plot("loss-bytes", "Validation loss against bytes", desc, x, y)
        for drawing, xs in ((plot, [p[0] for p in points]), (by, [at(v) for v in moved])):
            drawing.right = 50.0
            drawing.end((xs[-1], points[-1][1]), f"{points[-1][1]:.3f}", 0)
            if first == 0:
                drawing.reference(points[0][1], f"base {points[0][1]:.3f}")
            drawing.line(list(zip(xs, [p[1] for p in points], strict=True)), 0, tips)
        figures = _figure(plot.svg(), "Validation loss by round", "Round 0 is the model before tuning.")
        words = "Cumulative, both ways, all clients."
        figures += _figure(by.svg(), "Validation loss by bytes exchanged", words)
    figures += _spread(run) + _costs(run, steps, facts)
    body = f'<div class="figures">{figures}</div>' if figures else ""
    return body + (_every_round(steps) if run.rounds else "")


def _bytes_axis(series: Sequence[Sequence[float]]) -> tuple[svg.Axis, Callable[[float], float]]:
    """An axis for cumulative bytes; a logarithmic one has no place for zero: there it is NaN (not drawn)."""
    label = "bytes sent and received so far"
    every = [v for values in series for v in values]
    if not svg.sparse(every):
        return svg.sizes(every, label, count=8, snap=False), lambda value: value
    axis = svg.log_sizes(every, label + " (log)")
    return axis, lambda value: value if value > 0 else math.nan


def _spread(run: Run) -> str:
    rounds: dict[int, list[Event]] = {}
    for event in run.clients:
        if _num(event, "loss") is not None:
            rounds.setdefault(int(_num(event, "round") or 0), []).append(event)
    if not rounds:
        return ""
    losses = {r: sorted(_num(e, "loss") or 0.0 for e in events) for r, events in rounds.items()}
    every = [v for values in losses.values() for v in values]
    desc = f"{len(every)} losses of clients in {len(rounds)} rounds, {min(every):.3f} to {max(every):.3f}."
    x = svg.whole(list(map(float, rounds)), "round", pad=0.6)
    plot = svg.Plot(
        "spread", "Training loss of each client by round", desc, x, svg.numbers(every, "client loss")
    )
    slot = (plot.width - plot.left - plot.right) / (x.hi - x.lo)
    alone = len(every) == len(rounds)
    if alone:
        tips = [f"round {r}: {v[0]:.3f}" for r, v in losses.items()]
        plot.line([(float(r), v[0]) for r, v in losses.items()], 0, tips)
    elif len(every) > MAX_DOTS:
        plot.band([(float(r), v[0], v[-1]) for r, v in losses.items()])
        plot.band([(float(r), *_quartiles(v)[::2]) for r, v in losses.items()])
    else:
        for r, events in rounds.items():
            for i, event in enumerate(events):
                loss = _num(event, "loss") or 0.0
                aside = ((i * 0.618034 + 0.5) % 1 - 0.5) * min(0.6 * slot, 70.0)
                plot.dot(r, loss, 0, f"round {r}, client {event.get('client')}: {loss:.3f}", aside)
    medians = [(float(r), statistics.median(v)) for r, v in losses.items() if not alone]
    if slot > 8:
        for at, median in medians:
            plot.dash(at, median, min(0.36 * slot, 40.0), -1, f"round {at:.0f}: median {median:.3f}")
    else:
        plot.line(medians, -1, markers=False)
    rows: list[list[str | Cell]] = [
        [str(r), *_cells(len(v), v[0], *_quartiles(v), v[-1])] for r, v in losses.items()
    ]
    head = ["round", "clients", "lowest", "quarter", "median", "three quarters", "highest"]
    words = "One dot a client. Bar: median."
    if len(every) > MAX_DOTS:
        words = "Bands: all clients and their middle half. Line: median."
    words = "One client in each round." if alone else words
    data = _table("Training loss over the clients of a round", head, rows)
    title = "Training loss of the client" if alone else "Spread over the clients"
    return _figure(plot.svg(), title, words, data=data)


def _quartiles(ordered: Sequence[Number]) -> tuple[float, float, float]:
    if len(ordered) < 2:
        return (float(ordered[0]),) * 3
    low, mid, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return low, mid, high


def _cells(count: int, *values: float) -> list[Cell]:
    return [Cell(str(count)), *(Cell(f"{v:.3f}") for v in values)]


def _every_round(steps: Sequence[Step]) -> str:
    names = list(dict.fromkeys(name for s in steps for name in s.losses))
    head = [
        "round",
        *(ui.metric(n).label for n in names),
        "replies",
        "sent",
        "received",
        "so far",
        "time",
        "memory",
    ]
    rows: list[list[str | Cell]] = []
    for s in steps:
        row: list[str | Cell] = [str(s.round)]
        row += [Cell(ui.show(n, s.losses.get(n))) for n in names]
        used = "-" if s.accepted is None else f"{s.accepted}{f' of {s.asked}' if s.asked is not None else ''}"
        row += [Cell(used), *(Cell(ui.human_bytes(v)) for v in (s.up, s.down, s.total))]
        rows.append([*row, Cell(ui.human_time(s.seconds)), Cell(ui.human_bytes(s.rss))])
    table = _table("Every round: bytes are sums over its clients", head, rows)
    shut = len(rows) > 31
    return f"<details{'' if shut else ' open'}><summary>Every round in numbers</summary>{table}</details>"


class Split(NamedTuple):
    """Rows of each client by category: `names` of clients, then (category, rows of each client)."""

    names: list[str]
    rows: list[tuple[str, list[float]]]

    def sizes(self) -> list[float]:
        return [sum(values[i] for _, values in self.rows) for i in range(len(self.names))]

    def tip(self, i: int) -> str:
        parts = [f"{name} {values[i]:g}" for name, values in self.rows if values[i] and len(self.rows) > 1]
        return f"client {self.names[i]}: {self.sizes()[i]:g} rows{': ' if parts else ''}{', '.join(parts)}"

    def take(self, order: Sequence[int]) -> Split:
        return Split([self.names[i] for i in order], [(n, [v[i] for i in order]) for n, v in self.rows])


def _split(run: Run, most: int) -> Split:
    """The data partition of the start event, its `most` largest categories and the others as one."""
    counts: dict[str, list[float]] = {}
    for name, values in _map(run.start, "counts").items():
        if isinstance(values, list):
            counts[str(name)] = [_number(v) or 0 for v in values]
    if not counts:
        counts = {"rows": [_number(v) or 0 for v in _list(run.start, "rows_per_client")]}
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
    return Split([str(i) for i in range(clients)], rows)


def _partition(run: Run) -> str:
    split = _split(run, 24)
    clients = len(split.names)
    if not clients:
        return ""
    column = _first("column", run.start) or "category"
    title = f"Data of the clients: {_partition_words(run) or 'rows'}"
    sizes = split.sizes()
    each = f", {_span(sizes)} each" if clients > 1 else ""
    desc = f"{_many(clients, 'client')}, {sum(sizes):,.0f} rows{each}."
    words = f"{desc} Coloured by {column}." if len(split.rows) > 1 else desc
    if len(split.rows) <= svg.COLOURS and (clients <= MAX_COLUMNS or len(split.rows) == 1):
        tips = [split.tip(i) for i in range(clients)]
        axes = ("client", "rows")
        drawing = svg.stacked_bars("partition", title, desc, split.names, split.rows, tips, labels=axes)
    else:
        drawing, words = _heat(split, title, desc), f"{desc} A stronger shade is a larger share."
    head = ["client", *(name for name, _ in split.rows), "all"]
    body: list[list[str | Cell]] = [
        [split.names[i], *(Cell(f"{v[i]:g}") for _, v in split.rows), Cell(f"{sizes[i]:g}")]
        for i in range(min(clients, 1000))
    ]
    return _figure(drawing, title, words, True, _table(f"Rows of each client by {column}", head, body))


def _heat(split: Split, title: str, desc: str) -> str:
    """Clients side by side, sorted by their main category so that equal ones stand together."""
    sizes = split.sizes()

    def place(i: int) -> tuple[float, float]:
        values = [v[i] for _, v in split.rows]
        main = max(range(len(values)), key=values.__getitem__)
        return main, -values[main] / (sizes[i] or 1)

    order = sorted(range(len(split.names)), key=place)
    held = split.take(order)
    chunk = math.ceil(len(order) / 500)
    label = f"{len(order)} clients, sorted by their main category"
    if chunk > 1:
        label += f", {chunk} to a column"
        groups = [range(i, min(i + chunk, len(order))) for i in range(0, len(order), chunk)]
        names = [f"{held.names[g[0]]}+" for g in groups]
        held = Split(names, [(n, [sum(v[i] for i in g) for g in groups]) for n, v in held.rows])
    tips = [held.tip(i) for i in range(len(held.names))]
    return svg.heat_map("partition", title, desc, held.names, held.rows, tips, label=label)


def _replies(run: Run) -> str:
    """What became of the clients' replies: a sentence when all counted, else bars and reasons."""
    if not run.clients:
        return ""
    lost = [e for e in run.clients if str(e.get("status", "ok")) != "ok"]
    if not lost:
        return f"<p>All {len(run.clients)} replies were accepted.</p>"
    kinds = {"ok": 0, "late": 4, "dropped": 7, "failed": 3, "refused": 1}
    rounds = sorted({int(_num(e, "round") or 0) for e in run.clients})
    tally = {kind: [0.0] * len(rounds) for kind in kinds}
    reasons: dict[tuple[str, str], list[Event]] = {}
    for event in run.clients:
        status = str(event.get("status", "ok"))
        status = status if status in kinds else "refused"
        tally[status][rounds.index(int(_num(event, "round") or 0))] += 1
        if status != "ok":
            reasons.setdefault((status, str(event.get("reason") or "no reason given")), []).append(event)
    series = [(("accepted" if k == "ok" else k), v) for k, v in tally.items() if any(v)]
    shades = [colour for kind, colour in kinds.items() if any(tally[kind])]
    tips = [f"round {r}: " + ", ".join(f"{v[i]:g} {n}" for n, v in series) for i, r in enumerate(rounds)]
    desc = f"{len(lost)} of {len(run.clients)} replies did not count."
    drawing = svg.stacked_bars(
        "replies", "Replies by round", desc, [str(r) for r in rounds], series, tips,
        labels=("round", "clients"), height=220, colours=shades,
    )  # fmt: skip
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    rows: list[list[str | Cell]] = [
        [status, reason, Cell(str(len(events))), _some(events, "client"), _some(events, "round")]
        for (status, reason), events in ordered[:100]
    ]
    table = _table("Replies that did not count", ["what", "why", "times", "clients", "rounds"], rows)
    return _figure(drawing, "Replies by round", desc, True) + table


def _some(events: Sequence[Event], key: str) -> str:
    """Distinct values of a key, the first twelve of them."""
    names = {str(event.get(key)) for event in events}
    found = sorted(names, key=lambda name: (len(name), name) if name.isdecimal() else (99, name))
    return ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")


def _costs(run: Run, steps: Sequence[Step], facts: Mapping[str, object]) -> str:
    figures = _memory(run, steps, facts)
    asked = {s.round: s.asked for s in steps}
    for ident, word, pick in (("up", "sent", 3), ("down", "received", 4)):
        values = [(s.round, v) for s in steps if (v := (s.up if pick == 3 else s.down)) is not None]
        if not values:
            continue
        rounds = [float(r) for r, _ in values]
        most = max(v for _, v in values)
        desc = (
            f"At most {ui.human_bytes(most)} in a round, {ui.human_bytes(sum(v for _, v in values))} in all."
        )
        title = f"Bytes {word} by the clients"
        y = svg.sizes([v for _, v in values], f"{word} in a round")
        plot = svg.Plot(f"bytes-{ident}", title, desc, svg.whole(rounds, "round", pad=0.6), y)
        for r, v in values:
            n = asked[r]
            tip = f"round {r}: {ui.human_bytes(v)}" + (f", {ui.human_bytes(v / n)} a client" if n else "")
            plot.bar(r, v, 0 if pick == 3 else 2, tip)
        figures += _figure(plot.svg(), title, desc)
    return figures


def _memory(run: Run, steps: Sequence[Step], facts: Mapping[str, object]) -> str:
    values = [(float(s.round), float(s.rss)) for s in steps if s.rss is not None]
    peak = _number(facts["peak_rss"])
    if not values or peak is None:
        return ""
    params = _num(run.start, "params")
    width = {"fp32": 4, "bf16": 2, "fp16": 2}.get(_first("dtype", run.config, run.env))
    bare = params * width if params is not None and width else None
    desc = f"Peak {ui.human_bytes(peak)}" + (
        f"; the weights alone are {ui.human_bytes(bare)}." if bare else "."
    )
    y = svg.sizes([peak, bare or 0, *(v for _, v in values)], "resident memory")
    plot = svg.Plot("memory", "Memory by round", desc, svg.whole([r for r, _ in values], "round", pad=0.4), y)
    if bare and bare > 0.15 * peak:  # lower down its text would stand on the axis
        plot.reference(bare, f"weights alone {ui.human_bytes(bare)}", below=True)
    plot.reference(peak, f"peak {ui.human_bytes(peak)}")
    plot.line(values, 3, [f"round {r:.0f}: {ui.human_bytes(v)}" for r, v in values])
    return _figure(plot.svg(), "Memory of the process", desc)


def _samples(run: Run) -> str:
    samples = [s for s in _list(run.final, "samples") if isinstance(s, dict)]
    drawn = [_sample(s, i + 1) for i, s in enumerate(samples)]
    shown, more = "".join(drawn[:SHOWN_SAMPLES]), "".join(drawn[SHOWN_SAMPLES:])
    rest = f"<details><summary>{len(drawn) - SHOWN_SAMPLES} more</summary>{more}</details>" if more else ""
    return shown + rest


def _sample(sample: Mapping[str, object], number: int) -> str:
    owner = sample.get("client")
    title = f"Prompt {number}" + (f" · client {owner}" if owner not in (None, "") else "")
    parts = [
        f"<div><h4>{_e(label)}</h4><p>{_e(sample.get(key) or '(nothing)')}</p></div>"
        for key, label in (("base", "before"), ("tuned", "after"), ("reference", "reference"))
        if sample.get(key) is not None
    ]
    prompt = _e(sample.get("prompt") or "")
    return (
        f'<article class="sample"><h3>{_e(title)}</h3><p class="prompt">{prompt}</p>'
        f'<div class="answers">{"".join(parts)}</div></article>'
    )


def _again(run: Run) -> str:
    where = shlex.quote(run.shown_path)
    lines = [
        (f"fleetune tune -c {shlex.quote(run.shown_path + '/run.toml')}", "the same run, in a new folder")
    ]
    if _kind_of(run.status) != "done":
        lines.insert(0, (f"fleetune tune --resume {where}", "go on where it stopped"))
    if (run.path / "ledger.safetensors").is_file():
        ledger = shlex.quote(run.shown_path + "/ledger.safetensors")
        lines.append((f"fleetune ledger verify {ledger}", "rebuild the tuned weights and check their digest"))
    lines.append((f"fleetune eval {where}", "measure the result again"))
    rows = "".join(f"<div><dt><code>{_e(line)}</code></dt><dd>{_e(why)}</dd></div>" for line, why in lines)
    return f'<dl class="commands">{rows}</dl>'


# Several runs


def compare(runs: Sequence[Path]) -> str:
    """One page with several runs over each other: loss by rounds, by bytes and by time, results, differences.

    UsageError when one of the folders does not exist.
    """
    seen = [read(path) for path in runs]
    names = _short([run.name for run in seen])
    facts = [_summary(run) for run in seen]
    body = [
        f'<header><p class="over">fleetune · comparison</p><h1>{len(seen)} runs side by side</h1>'
        f'<p class="lead">{_e(_closest(names, facts))}</p>{_warnings(seen)}</header>',
        _section("result", "Results", _results(seen, names, facts)),
        _section("course", "Course", _overlaid(seen, names)),
        _section("differences", "What differs in their configuration", _differences(seen, names)),
    ]
    return _page("fleetune: comparison of " + ", ".join(names), "\n".join(body))


def _short(names: Sequence[str]) -> list[str]:
    """Run names as far as they fit beside a line: number and method, if that tells them apart."""
    short = ["-".join(name.split("-")[:2])[:22] for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _closest(names: Sequence[str], facts: Sequence[Mapping[str, object]]) -> str:
    known = [(v, n) for n, f in zip(names, facts, strict=True) if (v := _number(f["tuned_loss"])) is not None]
    sizes = [(v, n) for n, f in zip(names, facts, strict=True) if (v := _number(f["bytes"])) is not None]
    best = f"Lowest validation loss: {min(known)[1]} ({min(known)[0]:.3f}). " if known else ""
    return best + (f"Fewest bytes: {min(sizes)[1]} ({ui.human_bytes(min(sizes)[0])})." if sizes else "")


def _warnings(runs: Sequence[Run]) -> str:
    out = ""
    for key, what in (("digest", "base models"), ("data", "data")):
        values = {_first(key, run.start, run.config) for run in runs} - {""}
        if len(values) > 1:
            text = f"These runs have different {what}: their losses do not compare directly."
            out += f'<p class="alert">{text}</p>'
    return out


def _results(runs: Sequence[Run], names: Sequence[str], facts: Sequence[Mapping[str, object]]) -> str:
    head = ["run", "method", "model", "status", "rounds", "base", "tuned", "change"]
    head += ["sent", "received", "time", "peak memory"]
    rows: list[list[str | Cell]] = []
    for name, f in zip(names, facts, strict=True):
        base, tuned = _number(f["base_loss"]), _number(f["tuned_loss"])
        better = ui.improved("loss", base, tuned)
        kind = "r" if better is None else "r good" if better else "r bad"
        row: list[str | Cell] = [
            name,
            str(f["method"] or "-"),
            str(f["model"] or "-"),
            _kind_of(str(f["status"])),
        ]
        row += [Cell(str(f["rounds"])), Cell(ui.show("loss", base)), Cell(ui.show("loss", tuned))]
        row.append(Cell(_minus(ui.change("loss", base, tuned)) or "-", kind))
        row += [Cell(ui.human_bytes(_number(f[key]))) for key in ("bytes_up", "bytes_down")]
        row += [Cell(ui.human_time(_number(f["seconds"]))), Cell(ui.human_bytes(_number(f["peak_rss"])))]
        rows.append(row)
    keys = "".join(
        f'<li class="c{i % svg.COLOURS}"><span></span>{_e(run.name)}</li>' for i, run in enumerate(runs)
    )
    return _table("Validation loss and costs", head, rows, "names") + f'<ul class="key">{keys}</ul>'


def _overlaid(runs: Sequence[Run], names: Sequence[str]) -> str:
    every = [[s for s in _steps(run) if "loss" in s.losses] for run in runs]
    losses = [s.losses["loss"] for steps in every for s in steps]
    if not losses:
        return "<p>No run has been measured yet.</p>"
    y = svg.numbers(losses, "validation loss")
    moved = [[float(s.total or 0) for s in steps] for steps in every]
    spent = [_elapsed(_steps(run)) for run in runs]
    clocks = [[clock[s.round] for s in steps] for clock, steps in zip(spent, every, strict=True)]
    bytes_axis, at = _bytes_axis(moved)
    views = [
        (
            "round",
            svg.whole([s.round for t in every for s in t], "round"),
            [[float(s.round) for s in t] for t in every],
        ),
        ("bytes exchanged", bytes_axis, [[at(v) for v in values] for values in moved]),
        ("time", svg.durations([v for c in clocks for v in c], "time in rounds"), clocks),
    ]
    said = ["Round 0 is the model before tuning.", "Cumulative, both ways, all clients."]
    said.append("The rounds alone, without the evaluations between them.")
    right = 20 + svg.CHAR * max(map(len, names))
    figures = ""
    for i, (what, x, xs) in enumerate(views):
        title = f"Validation loss by {what}"
        plot = svg.Plot(f"overlay-{i}", title, f"{len(runs)} runs.", x, y, right=right, height=300)
        for k, (name, steps) in enumerate(zip(names, every, strict=True)):
            points = [(at_x, s.losses["loss"]) for at_x, s in zip(xs[k], steps, strict=True)]
            tips = [
                f"{name}, round {s.round}: {s.losses['loss']:.3f}, {ui.human_bytes(s.total)}" for s in steps
            ]
            plot.line(points, k, tips, dash=k >= svg.COLOURS)
            if points:
                plot.end(points[-1], name, k)
        figures += _figure(plot.svg(), title, said[i])
    figures += _peaks(names, [_number(_summary(run)["peak_rss"]) for run in runs])
    rounds = sorted({s.round for steps in every for s in steps})
    by = [{s.round: s.losses["loss"] for s in steps} for steps in every]
    rows: list[list[str | Cell]] = [[str(r), *(Cell(ui.show("loss", b.get(r))) for b in by)] for r in rounds]
    data = _table("Validation loss by round", ["round", *names], rows)
    return f'<div class="figures">{figures}</div><details><summary>the numbers</summary>{data}</details>'


def _peaks(names: Sequence[str], peaks: Sequence[Number | None]) -> str:
    known = [(name, v, i) for i, (name, v) in enumerate(zip(names, peaks, strict=True)) if v is not None]
    if not known:
        return ""
    ticks = tuple((float(k), name) for k, (name, _, _) in enumerate(known))
    x = svg.Axis(-0.6, len(known) - 0.4, ticks, "run")
    y = svg.sizes([v for _, v, _ in known], "peak memory")
    plot = svg.Plot("peaks", "Peak memory of each run", f"{len(known)} runs.", x, y, height=300)
    for k, (name, value, colour) in enumerate(known):
        plot.bar(k, value, colour, f"{name}: {ui.human_bytes(value)}")
    return _figure(plot.svg(), "Peak memory", "Resident memory of the process that ran the fleet.")


def _elapsed(steps: Sequence[Step]) -> dict[int, float]:
    """Seconds from the start to the end of each round."""
    total, out = 0.0, {}
    for step in steps:
        total += step.seconds or 0.0
        out[step.round] = total
    return out


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    configs = [dict(flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows: list[list[str | Cell]] = []
    for key in keys:
        values = [config.get(key, "-") for config in configs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    same = len(keys) - len(rows)
    if not rows:
        return f"<p>Nothing: all {same} options are equal.</p>"
    return (
        _table("Options that are not equal", ["option", *names], rows)
        + f"<p>{same} other options are equal.</p>"
    )


_FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif'
_STYLE = (
    f":root{{--font:{_FONT}}}"
    + """
:root{color-scheme:light dark;--page:#f6f7f8;--card:#fff;--ink:#1c2329;--muted:#5a6570;--rule:#e2e6e9;
--good:#00724f;--bad:#b84a00}
@media screen and (prefers-color-scheme:dark){:root{--page:#121518;--card:#1a1e22;--ink:#e7eaed;
--muted:#9ea9b3;--rule:#30373d;--good:#41cfa2;--bad:#f5995f}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 var(--font)}
svg text{font-family:var(--font)}
main{max-width:1160px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;margin:6px 0 10px;letter-spacing:-.01em;overflow-wrap:anywhere}
h1 small{font-size:.62em;font-weight:400;color:var(--muted)}
h2{font-size:19px;margin:44px 0 14px;padding-top:14px;border-top:1px solid var(--rule)}
.over{margin:0;color:var(--muted);font-size:13px}
.lead{font-size:18px;margin:0 0 18px;max-width:46em}
.pill{margin-left:8px;padding:1px 9px;border-radius:99px;border:1px solid currentColor;font-weight:600}
.done,.good{color:var(--good)}
.failed,.bad,.interrupted{color:var(--bad)}
.alert{border-left:4px solid var(--bad);background:var(--card);padding:10px 14px;overflow-wrap:anywhere}
code{font:13px/1.5 ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
dl{margin:0}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
.facts div{display:grid;grid-template-columns:84px 1fr;gap:12px;padding:2px 0}
.config{columns:2;column-gap:40px;font-size:13px}
.config div{display:grid;grid-template-columns:minmax(150px,2fr) 3fr;gap:12px;padding:3px 0;
break-inside:avoid;border-bottom:1px solid var(--rule)}
.config dd{font-variant-numeric:tabular-nums}
.commands div{padding:4px 0}
.commands dt{color:var(--ink)}
.commands dd{color:var(--muted);font-size:13px}
.pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:24px;align-items:start}
.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:24px}
figure{margin:0 0 4px;padding:16px 18px;background:var(--card);border:1px solid var(--rule);
border-radius:8px;overflow-x:auto;break-inside:avoid}
figure.wide{margin-bottom:20px}
figcaption{margin:0 0 12px;font-size:13px;color:var(--muted)}
figcaption strong{display:block;font-size:15px;color:var(--ink)}
.scroll{overflow:auto;max-height:560px;background:var(--card);border:1px solid var(--rule);border-radius:8px}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
figure .scroll{border:0;max-height:320px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:10px 14px 6px;color:var(--muted)}
th,td{padding:5px 14px;text-align:left;border-top:1px solid var(--rule);vertical-align:top}
thead th{border-top:0;color:var(--muted);font-weight:600;position:sticky;top:0;background:var(--card)}
tbody th{font-weight:400}
tbody th,.names td,.r{white-space:nowrap}
.r{text-align:right}
.files{list-style:none;margin:14px 0 0;padding:0;font-size:13px;color:var(--muted)}
.files code{color:var(--ink);margin-right:8px}
.result{font-size:15px}
.result tbody th{font-weight:600}
.plainhead thead{display:none}
.plainhead tbody th{font-weight:400}
details{margin-top:14px}
summary{cursor:pointer;color:var(--muted);font-size:13px;margin-bottom:8px}
.sample{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:14px 18px;
margin-bottom:16px;break-inside:avoid}
.sample h3,.sample h4{margin:0 0 4px;font-size:12px;font-weight:600;color:var(--muted)}
.sample p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.sample .prompt{padding-bottom:12px;font-weight:600}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:24px;font-size:14px;
border-top:1px solid var(--rule);padding-top:12px}
.key{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:6px 24px;font-size:13px}
.key span{display:inline-block;width:11px;height:11px;margin-right:7px;background:var(--k);
print-color-adjust:exact}
footer{margin-top:32px;color:var(--muted);font-size:13px}
@media screen and (max-width:820px){.figures,.pair{grid-template-columns:minmax(0,1fr)}.config{columns:1}
svg{min-width:460px}.wide svg{min-width:860px}main{padding:24px 14px}}
@media print{body{background:#fff;font-size:11pt}main{max-width:none;padding:0}h2{break-after:avoid}
.scroll{max-height:none;overflow:visible}.figures,.pair{gap:10px}thead th{position:static}
svg{font-size:12.5px}
th,td{padding:3px 7px}table,.config,.result{font-size:9pt}figure{padding:8px 10px}.lead{font-size:12pt}
details:not([open]){display:none}}
"""
)
