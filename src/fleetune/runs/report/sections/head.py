# SPDX-License-Identifier: Apache-2.0
"""Write the head of a report: what was run, its state, and the result in one sentence."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from datetime import UTC, datetime

from fleetune.common.display import change, human_bytes, human_count, human_time, improved, is_noise, show
from fleetune.runs import start_folder
from fleetune.runs.report import page, words
from fleetune.runs.report.page import counted, esc, flat, short_name, span, true_minus
from fleetune.runs.report.runlog import RunLog, changed, kind_of, list_of, num_of, number, text_of
from fleetune.runs.report.sections.fleet import partition_words


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
    spent = f" {human_bytes(moved)} were exchanged" if moved is not None else ""
    spent += f" in {human_time(seconds)}" if spent and seconds is not None else ""
    done = counted(rounds, "round")
    spent = _unbroken(spent)
    if base is None or tuned is None:
        return f"{done} so far; no loss to compare yet.{spent + '.' if spent else ''}"
    before, after, error = show("loss", base), show("loss", tuned), number(facts["change_error"])
    moves = f"{'fell' if tuned < base else 'rose'} from {before} to {after} ({true_minus(change('loss', base, tuned, error))})"
    loss = f"stayed at {before}" if improved("loss", base, tuned) is None else moves
    if is_noise("loss", base, tuned, error):
        loss = f"went from {before} to {after} ({true_minus(change('loss', base, tuned, error))}), which is within noise,"
    return f"Validation loss {loss} in {done}.{spent + '.' if spent else ''}"


def _unbroken(text: str) -> str:
    """Keep numbers and their units on one line."""
    return re.sub(r"(?<=\d) (?=[a-zA-Z])", "\u00a0", text)


def _identity(run: RunLog, facts: Mapping[str, object]) -> list[tuple[str, str]]:
    digest, params = text_of("digest", run.start, run.env), num_of(run.start, "params")
    trained, dtype = num_of(run.start, "trained"), text_of("dtype", run.config, run.env)
    model = [f"{short_name(str(facts['model'] or ''))}{f' @ {digest[:12]}' if digest else ''}"]
    model += [f"{human_count(params)} params"] if params is not None else []
    model += [dtype] if dtype else []
    share = f"trains {human_count(trained)}" if trained is not None and trained != params else ""
    method = [str(facts["method"] or ""), _letters(run, str(facts["method"])), share]
    sizes = [n for v in list_of(run.start, "rows_per_client") if (n := number(v)) is not None]
    clients, partition = facts["clients"], partition_words(run)
    data = [
        short_name(text_of("data", run.config)),
        counted(clients, "client") if clients is not None else "",
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
        ("rounds", f"{words.rounds(facts)}{fleet}"),
        ("seed", text_of("seed", run.config, run.start)),
        ("started", when),
    ]


def _letters(run: RunLog, method: str) -> str:
    """Return the method's own options: the table of the recipe that is called after it, or `set`.

    Of a run that says which are not the defaults, these and the learning rate; all are in the configuration.
    """
    sources = [v for key in (method, "set", "method", "fields") if isinstance(v := run.config.get(key), dict)]
    shown = [(k, v) for k, v in (flat(sources[0]) if sources else []) if k != "name"]
    if isinstance(run.env.get("given"), list):
        named = {"lr", *(str(name).removeprefix("set.") for name in list_of(run.env, "given"))}
        shown = [(k, v) for k, v in shown if k in named]
    return " · ".join(f"{k} {v}" for k, v in shown)


def versions(run: RunLog) -> str:
    """Return what env.json says: versions, the machine, digests."""
    return page.fact_list(
        flat({k: v for k, v in run.env.items() if k not in ("given", start_folder.KEY)}), "config"
    )
