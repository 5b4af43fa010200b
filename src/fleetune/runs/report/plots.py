# SPDX-License-Identifier: Apache-2.0
"""Give a report's plots as files of their own: SVG for papers, CSV with the numbers, and links to both in the page.

The links hold their files, so that a page that is sent to somebody still has them.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from fleetune.common.files import PRIVATE, storage_error, write_atomic
from fleetune.runs.report.runlog import RunLog, steps
from fleetune.runs.report.sections import per_client
from fleetune.runs.report.sections.fleet import client_name
from fleetune.runs.report.svg import standalone

FOLDER: Final = "plots"
LARGEST: Final = 64_000  # characters of a drawing that the page holds a second time
DRAWING: Final = re.compile(r'<svg viewBox=.*?aria-labelledby="(\S+)-t .*?</svg>', re.DOTALL)
# of each drawing the file with its numbers
NUMBERS: Final = {
    "loss-round": "rounds", "loss-bytes": "rounds", "memory": "rounds", "bytes-up": "rounds", "bytes-down": "rounds",
    "spread": "client-losses", "partition": "client-rows", "per-client": "clients", "replies": "client-losses",
}  # fmt: skip


def drawings(html: str) -> dict[str, str]:
    """Return the drawings of a page as files: name -> SVG."""
    return {found[1]: standalone(found[0]) for found in DRAWING.finditer(html)}


def numbers(run: RunLog) -> dict[str, str]:
    """Return the numbers behind the drawings: name -> CSV, of those that have rows."""
    tables = {
        "rounds": _rounds(run), "client-losses": _client_losses(run), "client-rows": _client_rows(run),
        "clients": _clients(run),
    }  # fmt: skip
    return {name: text for name, rows in tables.items() if (text := csv_text(rows))}


def write(folder: Path, html: str, tables: Mapping[str, str]) -> None:
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
            "round": s.round, **s.losses, "clients_asked": s.asked, "replies_accepted": s.accepted, "bytes_up": s.up,
            "bytes_down": s.down, "bytes_total": s.total, "seconds": s.seconds, "rss": s.rss, **s.own,
        }  # fmt: skip


def _client_losses(run: RunLog) -> Rows:
    for e in run.clients:
        yield {
            "round": e.get("round"), "client": client_name(run, e.get("client")), "training_loss": e.get("loss"),
            "rows": e.get("n"), "status": e.get("status"), "seconds": e.get("seconds"),
        }  # fmt: skip


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
    for c in per_client.measured(run):
        yield {
            "client": client_name(run, c.client), "loss_before": c.before, "loss_after": c.after, "rows": c.rows,
        }  # fmt: skip
