# SPDX-License-Identifier: Apache-2.0
"""Tell a run in a few lines for a terminal, and how runs differ, with the rounding of the report page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fleetune.common.display import change, human_bytes, human_time, is_noise, show
from fleetune.report.page import flat
from fleetune.report.runlog import RunLog, kind_of, list_of, map_of, number, read, summarise, text_of

APART = "their losses do not compare directly"
ROWS = ("data", "eval_data", "limit", "held_out", "partition", "seed", "eval_rows", "max_length")
NO_MATTER = ("data", "limit", "held_out", "partition", "seed")  # where rows are given to validate on

SHOWN_ELSEWHERE = ("model", "data", "method", "rounds", "clients")  # options with a line of their own


def facts(run: Path, defaults: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return a run as (label, text): status and why, what ran, result, cost, settings that are not `defaults`."""
    log = read(run)
    found = summarise(log)
    reason = log.status.partition(":")[2].strip()
    lines = [
        ("status", kind_of(log.status)),
        ("reason", reason),
        ("method", str(found["method"] or "")),
        ("model", str(found["model"] or "")),
        ("data", text_of("data", log.config)),
        ("rounds", rounds(found)),
        ("clients", str(found["clients"] or "")),
        ("loss", loss(found)),
        ("traffic", _traffic(found)),
        ("time", _time(found["seconds"])),
        ("peak memory", _bytes(found["peak_rss"])),
        ("settings", settings(log, defaults)),
        ("digest", text_of("digest", log.done)),
        ("folder", str(run)),
    ]
    return [(label, text) for label, text in lines if text]


def rounds(found: Mapping[str, object]) -> str:
    """Return how many rounds were run, and of how many where that is another number: "4", "4 of 10"."""
    done, planned = found["rounds"], found["rounds_planned"]
    return str(done) if planned in (None, done) else f"{done} of {planned}"


def loss(found: Mapping[str, object]) -> str:
    """Return the validation loss before and after: "4.438 -> 4.351 (-2.0 %)"; "" without one."""
    base, tuned = number(found["base_loss"]), number(found["tuned_loss"])
    if base is None or tuned is None:
        return "" if base is None else f"{show('loss', base)} before"
    error = number(found["change_error"])
    noise = ", within noise" if is_noise("loss", base, tuned, error) else ""
    return f"{show('loss', base)} -> {show('loss', tuned)} ({change('loss', base, tuned, error)}{noise})"


def settings(log: RunLog, defaults: Mapping[str, object]) -> str:
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


def results(runs: Sequence[Path]) -> list[list[str]]:
    """Return a row for each run: name, status, rounds, loss, traffic, time, peak memory."""
    rows = []
    for run in runs:
        log = read(run)
        f = summarise(log)
        rows.append(
            [
                log.name,
                kind_of(log.status),
                str(f["rounds"]),
                loss(f),
                _bytes(f["bytes"]),
                _time(f["seconds"]),
                _bytes(f["peak_rss"]),
            ]
        )
    return rows


def differences(configs: Sequence[Mapping[str, object]]) -> tuple[list[tuple[str, list[str]]], int]:
    """Return the options that are not equal, each with its value of every run ("-" for none), and how many are equal."""
    flats = [dict(flat(config)) for config in configs]
    keys = dict.fromkeys(key for config in flats for key in config)
    every = [(key, [config.get(key, "-") for config in flats]) for key in keys]
    unlike = [(key, values) for key, values in every if len(set(values)) > 1]
    return unlike, len(every) - len(unlike)


def differing(runs: Sequence[Path]) -> tuple[list[tuple[str, list[str]]], int]:
    """Return `differences` of run folders."""
    return differences([read(run).config for run in runs])


def _traffic(found: Mapping[str, object]) -> str:
    if found["bytes"] is None:
        return ""
    up, down = (_bytes(found[key]) for key in ("bytes_up", "bytes_down"))
    return f"{_bytes(found['bytes'])}: {up} up, {down} down"


def _bytes(value: object) -> str:
    return "" if (found := number(value)) is None else human_bytes(found)


def _time(value: object) -> str:
    return "" if (found := number(value)) is None else human_time(found)


def caveats(runs: Sequence[RunLog]) -> list[str]:
    """Say why the losses of these runs do not compare, in the words after "These runs"; [] where they do."""
    bases = [text_of("digest", run.start, run.config) or None for run in runs]
    found = ["have different base models"] if _differ(bases) else []
    names = _options(runs)
    stated = [text_of("held_out_digest", run.start) for run in runs]
    if _differ(stated) if all(stated) else bool(names):
        why = ", ".join(names) or "the data changed between them"
        found.append("have different data" if "data" in names else f"are measured on different rows ({why})")
    return found


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
