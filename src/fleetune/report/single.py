# SPDX-License-Identifier: Apache-2.0
"""Write the report page of one run into its folder, with its plots as files: SVG for papers, CSV with the numbers."""

from __future__ import annotations

import base64
import csv
import io
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from fleetune.common.display import counted
from fleetune.common.files import PRIVATE, storage_error, write_atomic
from fleetune.report import clients, page, result, runlog, training
from fleetune.report.clients import client_name, measured
from fleetune.report.page import esc
from fleetune.report.runlog import RunLog, kind_of, read, steps
from fleetune.report.svg import standalone


def write(run: Path) -> Path:
    """Write `report.html`, and its plots as files, into the run folder and return the page's path.

    UsageError when the folder does not exist, StorageError when it cannot be written; an older report is
    then left as it was.
    """
    seen = read(run)
    target = run / "report.html"
    html, tables = _report(seen), _tables(seen)
    text = linked(html, tables)
    write_atomic(target, text.encode("utf-8", "replace"), mode=PRIVATE)  # it has held-out prompts
    _write_plots(run, html, tables)
    return target


def sections(run: RunLog) -> dict[str, str]:
    """Return the report's sections as HTML, by name and in order; "" for one that has nothing to show."""
    steps, facts = runlog.steps(run), runlog.summarise(run)
    lost = (
        f"<footer>{counted(run.skipped, 'damaged line')} of metrics.jsonl left out.</footer>"
        if run.skipped
        else ""
    )
    return {
        "head": result.header(run, facts),
        "result": page.section("result", "Result", result.result(run, steps, facts)),
        "course": page.section(
            "course", "Training", training.course(run, steps, facts) + training.rates(run)
        ),
        "fleet": page.section("fleet", "Fleet", clients.fleet(run)),
        "samples": page.section("samples", "Samples", result.samples(run)),
        "configuration": page.section("configuration", "Configuration", result.configuration(run)),
        "versions": page.section("versions", "Versions", result.versions(run)),
        "again": page.section("again", "Run it again", _rerun_section(run)),
        "footer": lost,
        "sharing": result.sharing(run),
    }


def _report(run: RunLog) -> str:
    return page.document(f"{run.name} - fleetune", "\n".join(filter(None, sections(run).values())))


def _rerun_section(run: RunLog) -> str:
    where = shlex.quote(run.shown_path)
    lines = [
        (f"fleetune tune -c {shlex.quote(run.shown_path + '/run.toml')}", "the same run, in a new folder")
    ]
    if kind_of(run.status) != "done":
        lines.insert(0, (run.resume, "go on where it stopped"))
    if (run.path / "ledger.safetensors").is_file():
        ledger = shlex.quote(run.shown_path + "/ledger.safetensors")
        lines.append((f"fleetune ledger verify {ledger}", "rebuild the tuned weights and check their digest"))
    lines.append((f"fleetune eval {where}", "measure the result again"))
    rows = "".join(f"<div><dt><code>{esc(line)}</code></dt><dd>{esc(why)}</dd></div>" for line, why in lines)
    return f'<dl class="commands">{rows}</dl>'


FOLDER: Final = "plots"
LARGEST: Final = 64_000  # characters of a drawing that the page holds a second time
DRAWING: Final = re.compile(r'<svg viewBox=.*?aria-labelledby="(\S+)-t .*?</svg>', re.DOTALL)
# of each drawing the file with its numbers
NUMBERS: Final = {
    "loss-round": "rounds",
    "loss-bytes": "rounds",
    "memory": "rounds",
    "bytes-up": "rounds",
    "bytes-down": "rounds",
    "spread": "client-losses",
    "partition": "client-rows",
    "per-client": "clients",
    "replies": "client-losses",
}


def drawings(html: str) -> dict[str, str]:
    """Return the drawings of a page as files: name -> SVG."""
    return {found[1]: standalone(found[0]) for found in DRAWING.finditer(html)}


def _tables(run: RunLog) -> dict[str, str]:
    """Return the numbers behind the drawings: name -> CSV, of those that have rows."""
    tables = {
        "rounds": _rounds(run),
        "client-losses": _client_losses(run),
        "client-rows": _client_rows(run),
        "clients": _clients(run),
    }
    return {name: text for name, rows in tables.items() if (text := csv_text(rows))}


def _write_plots(folder: Path, html: str, tables: Mapping[str, str]) -> None:
    """Write the drawings of a page, and the tables, into `plots/` of a run folder; StorageError when that is impossible."""
    place = folder / FOLDER
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise storage_error(error, place) from error
    for name, drawing in drawings(html).items():
        write_atomic(place / f"{name}.svg", drawing.encode("utf-8", "replace"), mode=PRIVATE)
    for name, text in tables.items():
        write_atomic(place / f"{name}.csv", text.encode("utf-8", "replace"), mode=PRIVATE)


def linked(html: str, tables: Mapping[str, str]) -> str:
    """Return a page with links below every drawing: to its numbers, where there is a table of them, and to the drawing itself.

    A very large drawing is a file beside the page alone.
    """

    def links(found: re.Match[str]) -> str:
        ident = found[1]
        drawing = standalone(found[0])
        out = _link(f"{ident}.svg", "image/svg+xml", drawing, "SVG") if len(drawing) <= LARGEST else ""
        if text := tables.get(NUMBERS.get(ident, "")):
            out += _link(f"{NUMBERS[ident]}.csv", "text/csv", text, "CSV")
        return f'{found[0]}<p class="files">{out}</p>' if out else found[0]

    return DRAWING.sub(links, html)


def _link(name: str, kind: str, text: str, label: str) -> str:
    data = base64.b64encode(text.encode("utf-8", "replace")).decode()
    return f'<a download="{name}" href="data:{kind};base64,{data}">{label}</a>'


# Tables ---------------------------------------------------------------------------------------------

Rows = Iterator[Mapping[str, object]]


def csv_text(rows: Iterable[Mapping[str, object]]) -> str:
    """Write rows as CSV, with the columns of all of them; "" for none."""
    listed = list(rows)
    names = list(dict.fromkeys(name for row in listed for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _safe(v) for k, v in row.items()} for row in listed)
    return out.getvalue() if listed else ""


def _safe(value: object) -> object:
    """Keep a text from being read as a formula by a spreadsheet."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _rounds(run: RunLog) -> Rows:
    for s in steps(run):
        yield {
            "round": s.round,
            **s.losses,
            "clients_asked": s.asked,
            "replies_accepted": s.accepted,
            "bytes_up": s.up,
            "bytes_down": s.down,
            "bytes_total": s.total,
            "seconds": s.seconds,
            "rss": s.rss,
            **s.own,
        }


def _client_losses(run: RunLog) -> Rows:
    for e in run.clients:
        yield {
            "round": e.get("round"),
            "client": client_name(run, e.get("client")),
            "training_loss": e.get("loss"),
            "rows": e.get("n"),
            "status": e.get("status"),
            "seconds": e.get("seconds"),
        }


def _client_rows(run: RunLog) -> Rows:
    counts = run.start.get("counts")
    own = run.start.get("rows_per_client")
    for i, rows in enumerate(own if isinstance(own, list) else ()):
        values = counts.items() if isinstance(counts, dict) else ()
        by = {
            f"rows: {name}": column[i]
            for name, column in values
            if isinstance(column, list) and i < len(column)
        }
        yield {"client": client_name(run, i), "rows": rows, **by}


def _clients(run: RunLog) -> Rows:
    for c in measured(run):
        yield {
            "client": client_name(run, c.client),
            "loss_before": c.before,
            "loss_after": c.after,
            "rows": c.rows,
        }
