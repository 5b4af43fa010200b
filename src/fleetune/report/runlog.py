"""Read a run folder for the report, as far as it can be read, and summarise the run in a few numbers.

After a resume a round may be in the file twice; the later one counts.
"""

import json
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fleetune.common import sums
from fleetune.common.display import change, clean, human_bytes, human_time, is_noise, show
from fleetune.common.files import read_text
from fleetune.errors import UsageError
from fleetune.report.svg import usable
from fleetune.runs import rundir

Event = Mapping[str, object]
Number = int | float
# Numbers in the event of an evaluation that are no measures
NO_MEASURES = frozenset({"v", "t", "event", "round", "seconds", "rows", "rss", "change_error"})


@dataclass(frozen=True, slots=True)
class RunLog:
    """The content of a run folder, as far as it could be read."""

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
    rates: Sequence[Event] = ()  # learning rates that were found
    intact: bool = True  # false: metrics.jsonl was changed since the run ended

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def shown_path(self) -> str:
        """Return the folder as a command takes it, without the machine's own folders before it."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def resume(self) -> str:
        """Return the command that goes on with the run."""
        command = "fleet serve" if (self.path / rundir.FLEET).is_file() else "tune"
        return f"fleetune {command} --resume {shlex.quote(self.shown_path)}"


def read(path: Path) -> RunLog:
    """Read a run folder; missing or damaged files give empty parts.  UsageError when there is no folder."""
    if not path.is_dir():
        raise UsageError(f"no run folder at {path}", hint="fleetune runs   lists them")
    events, skipped = _events(path / rundir.METRICS)
    rounds = _latest(events, "round", ("round",))
    done = next((e for e in reversed(events) if e["event"] == "done"), {})
    if done and any(e["event"] == "round" for e in events[events.index(done) :]):
        done = {}  # the run was taken up again after it had ended
    status = clean(rundir.status_of(path)) or ("done" if done else "unknown")
    return RunLog(
        path=path.absolute(),
        config=_toml(path / "run.toml"),
        env=_json(path / "env.json"),
        start=next((e for e in reversed(events) if e["event"] == "start"), {}),
        evals=_latest(events, "eval", ("round",)),
        clients=_latest(events, "client", ("round", "client")),
        rates=list({text_of("setting", e): e for e in events if e["event"] == "rate"}.values()),
        rounds=rounds,
        done=done,
        final=_json(path / "eval.json"),
        status=status,
        skipped=skipped,
        intact=status != "done" or not any(sums.faults(path, [rundir.METRICS])),
    )


def changed(folder: object) -> str:
    """Say that the record of a finished run (its folder, or its name) is not as it was written."""
    return f"{folder}: {rundir.METRICS} was changed since the run ended: what is shown may not be what was measured"


def _read(path: Path) -> str:
    try:
        return read_text(path, errors="replace")
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
    """Return events of one kind in order of their round, the last one of each key."""
    latest: dict[tuple[str, ...], Event] = {}
    for event in events:
        if event["event"] == kind and usable(event.get("round")):
            latest[tuple(str(event.get(key)) for key in keys)] = event
    return sorted(latest.values(), key=lambda event: num_of(event, "round") or 0.0)


def number(value: object) -> Number | None:
    """Return a finite number as it is; None for any other value."""
    return value if isinstance(value, int | float) and usable(value) else None


def num_of(source: Mapping[str, object], key: str) -> Number | None:
    """Return a number of a record; None when it is missing, null, not finite or no number."""
    return number(source.get(key))


def map_of(source: Mapping[str, object], key: str) -> Mapping[str, object]:
    """Return a table of a record; empty when it is missing or no table."""
    value = source.get(key)
    return value if isinstance(value, dict) else {}


def list_of(source: Mapping[str, object], key: str) -> list[object]:
    """Return a list of a record; empty when it is missing or no list."""
    value = source.get(key)
    return value if isinstance(value, list) else []


def text_of(key: str, *sources: Mapping[str, object]) -> str:
    """Return the first scalar called `key`, as text; a table of that name gives its own `name`."""
    for source in sources:
        value = source.get(key)
        if isinstance(value, dict):
            value = value.get("name")
        if isinstance(value, str | int | float) and value != "":
            return clean(str(value))
    return ""


def sum_of(events: Iterable[Event], key: str) -> Number | None:
    """Return the sum of a number over those records that have it; None when none has."""
    values = [v for e in events if (v := num_of(e, key)) is not None]
    return sum(values) if values else None


def kind_of(status: str) -> str:
    """Return the first word of a status: done, running, failed, interrupted, else unknown."""
    word = status.split(":")[0].split()[0] if status else "unknown"
    return word if word in {"done", "running", "failed", "interrupted"} else "unknown"


def measures(run: RunLog) -> tuple[dict[str, Number], dict[str, Number]]:
    """Return base and tuned measures: of the end when there is one, else of round 0 and the latest evaluation."""
    early = run.evals[0] if run.evals and num_of(run.evals[0], "round") == 0 else {}
    late = run.evals[-1] if len(run.evals) > 1 else {}
    sides: list[dict[str, Number]] = []
    for key, event in (("base", early), ("tuned", late)):
        source = map_of(run.done, key) or map_of(run.final, key) or event
        names = [n for n in source if n not in NO_MEASURES]
        sides.append({n: v for n in names if (v := num_of(source, n)) is not None})
    return sides[0], sides[1]


def samples(run: Path) -> list[object]:
    """Return the prompts with their answers that a run folder keeps the text of; [] for none."""
    return list_of(_json(run / "eval.json"), "samples")


def summary(run: Path) -> dict[str, Any]:
    """Summarise the run in a few numbers, for the console and for `fleetune runs --json`.

    Keys: name, path, method, model, status, rounds (done), rounds_planned, clients, base_loss, tuned_loss,
    bytes_up, bytes_down, bytes (their sum), seconds (wall time; before the end, time in rounds), peak_rss (bytes),
    intact (metrics.jsonl is as it was written),
    change_error (standard error of the loss's change, taken row by row); None where the folder does not say.
    """
    return summarise(read(run))


def table(runs: Iterable[Path]) -> list[dict[str, Any]]:
    """Return `summary` of several run folders, in their order."""
    return [summary(run) for run in runs]


def summarise(run: RunLog) -> dict[str, Any]:
    """Return the keys of `summary`, of a run that has been read."""
    base, tuned = measures(run)
    both = [
        run.done,
        {"bytes_up": sum_of(run.rounds, "bytes_up"), "bytes_down": sum_of(run.rounds, "bytes_down")},
    ]
    up, down = (
        next((v for s in both if (v := num_of(s, k)) is not None), None) for k in ("bytes_up", "bytes_down")
    )
    seen = [v for e in (*run.rounds, *run.clients) if (v := num_of(e, "rss")) is not None]
    peak = num_of(run.done, "peak_rss")
    return {
        "name": run.name,
        "path": str(run.path),
        "method": text_of("method", run.start, run.config) or None,
        "model": text_of("model", run.start, run.config) or None,
        "status": run.status,
        "rounds": len(run.rounds),
        # run.toml first: a run that is given more rounds has the new number there alone
        "rounds_planned": num_of(run.config, "rounds") or num_of(run.start, "rounds"),
        "clients": num_of(run.start, "clients") or num_of(run.config, "clients"),
        "base_loss": base.get("loss"),
        "tuned_loss": tuned.get("loss"),
        "bytes_up": up,
        "bytes_down": down,
        "bytes": None if up is None and down is None else (up or 0) + (down or 0),
        "seconds": num_of(run.done, "wall") or sum_of(run.rounds, "seconds"),
        "peak_rss": peak if peak is not None else max(seen, default=None),
        "intact": run.intact,
        "change_error": num_of(map_of(run.done, "change_errors"), "loss"),
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
    own: Mapping[str, Number]  # the method's own figures


def steps(run: RunLog) -> list[Step]:
    """Return the rounds that were run or measured, in order."""
    evals = {num_of(e, "round"): e for e in run.evals}
    rounds = {num_of(e, "round"): e for e in run.rounds}
    steps: list[Step] = []
    total: Number = 0
    for number in sorted(key for key in evals.keys() | rounds.keys() if key is not None):
        event, measured = rounds.get(number, {}), evals.get(number, {})
        up, down = num_of(event, "bytes_up"), num_of(event, "bytes_down")
        stated = num_of(event, "bytes_total")
        total = stated if stated is not None else total + (up or 0) + (down or 0)
        names = [n for n in measured if n not in NO_MEASURES]
        losses = {n: v for n in names if (v := num_of(measured, n)) is not None}
        asked, accepted = num_of(event, "clients"), num_of(event, "accepted")
        seconds, rss = num_of(event, "seconds"), num_of(event, "rss")
        figures = map_of(event, "report")
        own = {n: v for n in figures if (v := num_of(figures, n)) is not None}
        steps.append(Step(int(number), losses, asked, accepted, up, down, total, seconds, rss, own))
    return steps


# ---------------------------------------------------------------- told in a terminal


def flat(source: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested tables to (dotted key, value) with values as text."""
    out: list[tuple[str, str]] = []
    for key, value in source.items():
        if isinstance(value, dict):
            out += flat(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}", value_text(value)))
    return out


def value_text(value: object) -> str:
    """Format a value of an option."""
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(value_text, value)) or "(empty)"
    return str(value) or '""'


APART = "their losses do not compare directly"
ROWS = ("data", "eval_data", "limit", "held_out", "partition", "seed", "eval_rows", "max_length")
NO_MATTER = ("data", "limit", "held_out", "partition", "seed")  # where rows are given to validate on

SHOWN_ELSEWHERE = ("model", "data", "method", "rounds", "clients")  # options with a line of their own


def facts(run: Path, defaults: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return a run as (label, text): status and why, what ran, result, cost, settings that are not `defaults`."""
    log = read(run)
    figures = summarise(log)
    reason = log.status.partition(":")[2].strip()
    lines = [
        ("status", kind_of(log.status)),
        ("reason", reason),
        ("method", str(figures["method"] or "")),
        ("model", str(figures["model"] or "")),
        ("data", text_of("data", log.config)),
        ("rounds", rounds_text(figures)),
        ("clients", str(figures["clients"] or "")),
        ("loss", loss_text(figures)),
        ("traffic", _traffic(figures)),
        ("time", _time(figures["seconds"])),
        ("peak memory", _bytes(figures["peak_rss"])),
        ("settings", settings_text(log, defaults)),
        ("digest", text_of("digest", log.done)),
        ("folder", str(run)),
    ]
    return [(label, text) for label, text in lines if text]


def rounds_text(figures: Mapping[str, object]) -> str:
    """Return how many rounds were run, and of how many where that is another number: "4", "4 of 10"."""
    done, planned = figures["rounds"], figures["rounds_planned"]
    return str(done) if planned in (None, done) else f"{done} of {planned}"


def loss_text(figures: Mapping[str, object]) -> str:
    """Return the validation loss before and after: "4.438 -> 4.351 (-2.0 %)"; "" without one."""
    base, tuned = number(figures["base_loss"]), number(figures["tuned_loss"])
    if base is None or tuned is None:
        return "" if base is None else f"{show('loss', base)} before"
    error = number(figures["change_error"])
    noise = ", within noise" if is_noise("loss", base, tuned, error) else ""
    return f"{show('loss', base)} -> {show('loss', tuned)} ({change('loss', base, tuned, error)}{noise})"


def settings_text(log: RunLog, defaults: Mapping[str, object]) -> str:
    """Return the options that are not `defaults`, and the method's settings that are not its defaults, in one line."""
    chosen = {
        k: v
        for k, v in log.config.items()
        if k not in (*SHOWN_ELSEWHERE, "set") and (k not in defaults or v != defaults[k])
    }
    own = map_of(log.config, "set")
    if isinstance(log.start.get("changed"), list):
        named = {"lr", *(str(name).removeprefix("set.") for name in list_of(log.start, "changed"))}
        own = {k: v for k, v in own.items() if k in named}
    return " · ".join(f"{k} {v}" for k, v in flat({**chosen, **own}))


def labels(runs: Sequence[Path]) -> list[str]:
    """Return the runs' names, with the folder where two are called the same, as runs of sweeps are."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{run.parent.name}/{name}"
        for name, run in zip(names, runs, strict=True)
    ]


def results(runs: Sequence[Path]) -> list[list[str]]:
    """Return a row for each run: name, status, rounds, loss, traffic, time, peak memory."""
    rows = []
    for label, run in zip(labels(runs), runs, strict=True):
        log = read(run)
        f = summarise(log)
        rows.append(
            [
                label,
                kind_of(log.status),
                str(f["rounds"]),
                loss_text(f),
                _bytes(f["bytes"]),
                _time(f["seconds"]),
                _bytes(f["peak_rss"]),
            ]
        )
    return rows


def differing(runs: Sequence[Path]) -> tuple[list[tuple[str, list[str]]], int]:
    """Return the options that are not equal, each with its value of every run ("-" for none), and how many are equal."""
    flats = [dict(flat(read(run).config)) for run in runs]
    every = {key: [config.get(key, "-") for config in flats] for config in flats for key in config}
    unlike = [(key, values) for key, values in every.items() if len(set(values)) > 1]
    return unlike, len(every) - len(unlike)


def _traffic(figures: Mapping[str, object]) -> str:
    if figures["bytes"] is None:
        return ""
    up, down = (_bytes(figures[key]) for key in ("bytes_up", "bytes_down"))
    return f"{_bytes(figures['bytes'])}: {up} up, {down} down"


def _bytes(value: object) -> str:
    return "" if (size := number(value)) is None else human_bytes(size)


def _time(value: object) -> str:
    return "" if (seconds := number(value)) is None else human_time(seconds)


def caveats(runs: Sequence[RunLog]) -> list[str]:
    """Say why the losses of these runs do not compare, in the words after "These runs"; [] where they do."""
    bases = [text_of("digest", run.start, run.config) or None for run in runs]
    told = ["have different base models"] if _differ(bases) else []
    names = _options(runs)
    stated = [text_of("held_out_digest", run.start) for run in runs]
    if _differ(stated) if all(stated) else bool(names):
        why = ", ".join(names) or "the data changed between them"
        told.append("have different data" if "data" in names else f"are measured on different rows ({why})")
    return told


def _options(runs: Sequence[RunLog]) -> list[str]:
    """List those options that decide the validation rows and are not the same in all runs."""
    given = all(text_of("eval_data", run.config) for run in runs)
    return [
        name for name in ROWS if not (given and name in NO_MATTER) and _differ(_value(r, name) for r in runs)
    ]


def _value(run: RunLog, name: str) -> str | None:
    """Return an option as text; None where the run does not state it."""
    if name not in run.config:
        return None
    value = str(run.config[name])
    if name == "partition":  # of it only the column decides, whose values all give their share
        return value.split(":")[-1] if ":" in value else ""
    return value


def _differ(values: Iterable[str | None]) -> bool:
    return len({*values} - {None}) > 1
