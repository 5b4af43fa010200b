# SPDX-License-Identifier: Apache-2.0
"""Compare base and tuned model, and list the run's cost and the files in its folder."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from fleetune.common.display import change, human_bytes, human_time, improved, is_noise, metric, show
from fleetune.runs.report import page
from fleetune.runs.report.page import TableCell, esc, true_minus
from fleetune.runs.report.runlog import (
    Number,
    RunLog,
    Step,
    list_of,
    map_of,
    measures,
    num_of,
    number,
    sum_of,
    text_of,
)


def result(run: RunLog, steps: Sequence[Step], facts: Mapping[str, object]) -> str:
    """Return the measures before and after beside the run's cost."""
    base, tuned = measures(run)
    rows: list[list[str | TableCell]] = []
    for name in dict.fromkeys([*base, *tuned]):
        b, t = base.get(name), tuned.get(name)
        error = num_of(map_of(run.done, "change_errors"), name)
        kind, word = page.verdict(improved(name, b, t, error))
        word = "within noise" if is_noise(name, b, t, error) else word
        diff = TableCell(true_minus(change(name, b, t, error)) + (word and f", {word}"), kind)
        rows.append([_label(run, name), TableCell(show(name, b)), TableCell(show(name, t)), diff])
    row_count = num_of(run.final, "rows") or num_of(run.done, "rows")
    caption = f"Measured on {row_count:,} held-out rows" if row_count else "Measured on held-out rows"
    measured = page.table(caption, ["", "base", "tuned", "change"], rows, "result") if rows else ""
    up, down = number(facts["bytes_up"]), number(facts["bytes_down"])
    asked, accepted = sum_of(run.rounds, "clients"), sum_of(run.rounds, "accepted")
    each = [human_bytes(_each(run, *pair)) for pair in (("bytes_up", up), ("bytes_down", down))]
    spent: list[list[str | TableCell]] = [
        ["bytes over the fleet", TableCell(human_bytes(number(facts["bytes"])))],
        ["sent by a client, per round", TableCell(each[0])],
        ["received by a client, per round", TableCell(each[1])],
        *_speed(run),
        ["wall time", TableCell(human_time(number(facts["seconds"])))],
        ["peak memory", TableCell(human_bytes(number(facts["peak_rss"])))],
        [
            "replies accepted",
            TableCell(f"{accepted:,} of {asked:,}" if accepted is not None and asked else "-"),
        ],
    ]
    if not rows and not run.rounds:
        return "<p>Nothing has been measured yet.</p>"
    files = "".join(f"<li><code>{esc(name)}</code> {esc(size)}</li>" for name, size in _artefacts(run))
    digest = text_of("digest", run.done)
    files += f"<li>digest (SHA-256 of the tuned tensors) <code>{esc(digest)}</code></li>" if digest else ""
    told = "".join(f'<p class="alert">{esc(text)}</p>' for text in list_of(run.done, "remarks"))
    left = measured + told + (f'<ul class="files">{files}</ul>' if files else "")
    costs = page.table("Cost", ["", ""], spent, "result plainhead")
    return f'<div class="pair"><div>{left}</div>{costs}</div>'


def _speed(run: RunLog) -> list[list[str | TableCell]]:
    """Return steps and tokens per second of the clients' local work, and the energy, where the run states them."""
    work = [e for e in run.clients if num_of(e, "steps") is not None and (num_of(e, "seconds") or 0) > 0]
    spent = sum(num_of(e, "seconds") or 0 for e in work)
    found: list[list[str | TableCell]] = []
    for key, label in (("steps", "local steps per second"), ("tokens", "tokens trained on per second")):
        if spent and (total := sum_of(work, key)):
            found.append(
                [label, TableCell(f"{total / spent:,.0f}" if total > 20 * spent else f"{total / spent:.2g}")]
            )
    if (energy := num_of(run.done, "energy")) is not None:
        found.append(["energy of the processor", TableCell(f"{energy / 3600:,.3g} Wh")])
    return found


def _label(run: RunLog, name: str) -> str:
    """Return a measure's label; Rouge-L's with the number of its rows, which are fewer than the table's."""
    answered = num_of(run.done, "answered") if name == "rouge_l" else None
    return metric(name).label + (f", {answered:,} rows" if answered else "")


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
            out.append((name, human_bytes(path.stat().st_size)))
    return out
