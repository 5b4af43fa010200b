# SPDX-License-Identifier: Apache-2.0
"""`fleetune runs`: list, show, compare, rm."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fleetune import report, rundir
from fleetune.commands.subject import RECORD
from fleetune.errors import UsageError
from fleetune.files import storage_error, write_atomic
from fleetune.text import human_bytes, human_time, show
from fleetune.ui import Ui


def _at_least(args: argparse.Namespace, least: int) -> None:
    if len(args.names) < least:
        raise UsageError(
            f"runs {args.action} needs {least} RUN or more", hint="runs there are: fleetune runs"
        )


def _found(args: argparse.Namespace, least: int) -> list[Path]:
    _at_least(args, least)
    return [rundir.find(name, Path(args.out)) for name in args.names]


def _list(args: argparse.Namespace, ui: Ui) -> None:
    rows = report.table(rundir.listing(Path(args.out)))
    for row in rows:
        ui.event({"event": "run", **row})
    for sweep in sorted(p.parent for p in Path(args.out).glob("*/sweep.toml")):
        ui.event({"event": "sweep", "path": str(sweep)})
        ui.note(f"{sweep} is a sweep; its runs: fleetune runs --out {sweep}")
    smaller = _compressed(Path(args.out))
    for row in smaller:
        ui.event({"event": "compressed", **row})
    if ui.json:
        return
    if not rows and not smaller:
        ui.note(f"no runs in {args.out}")
        ui.paths([("next", "fleetune demo")])
        return
    if rows:
        _runs_table(rows, ui)
    if smaller:
        cells = [[r["name"], r["of"], r["status"], human_bytes(_number(r["bytes"]))] for r in smaller]
        ui.table(["compressed", "of", "status", "size"], cells, align="lllr")


def _runs_table(rows: Sequence[Mapping[str, object]], ui: Ui) -> None:
    ui.table(
        ["run", "status", "rounds", "base", "tuned", "bytes", "time"],
        [
            [
                r["name"], r["status"], r["rounds"], show("loss", _number(r["base_loss"])),
                show("loss", _number(r["tuned_loss"])), human_bytes(_number(r["bytes"])), human_time(_number(r["seconds"])),
            ]
            for r in rows
        ],
    )  # fmt: skip


def _compressed(out: Path) -> list[dict[str, object]]:
    """What `fleetune compress` left under `out`, by number."""
    found = []
    for file in sorted(out.glob(f"*/{RECORD}"), key=lambda p: rundir.number(p.parent)):
        record = json.loads(file.read_text(encoding="utf-8"))
        done = record.get("result", {})
        status = "done" if done else "stopped"
        found.append({"name": file.parent.name, "of": Path(record["model"]).name, "method": record["method"],
                      "status": status, "bytes": done.get("bytes")})  # fmt: skip
    return found


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _show(args: argparse.Namespace, ui: Ui) -> None:
    for run in _found(args, 1):
        facts = report.summary(run)
        ui.event({"event": "run", **facts})
        if not ui.json:
            ui.table(["", run.name], [[k, v] for k, v in facts.items()], align="ll")
            ui.paths([("report", str(report.write(run)))])


def _compare(args: argparse.Namespace, ui: Ui) -> None:
    runs = _found(args, 2)
    page = Path(args.out) / "compare.html"
    write_atomic(page, report.compare(runs))
    for row in (rows := report.table(runs)):
        ui.event({"event": "run", **row})
    if not ui.json:
        keys = [k for k in rows[0] if any(row.get(k) != rows[0].get(k) for row in rows)]
        ui.table(
            ["", *(r.name for r in runs)],
            [[k, *(row.get(k) for row in rows)] for k in keys],
            align="l" + "r" * len(runs),
        )
    ui.paths([("report", str(page))])


def _rm(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.commands import compress

    _at_least(args, 1)
    smaller = {n: p for n in args.names if n != "latest" and (p := compress.find(n, Path(args.out)))}
    found = [smaller.get(name) or rundir.find(name, Path(args.out)) for name in args.names]
    for folder in found:
        try:
            if folder in smaller.values():
                shutil.rmtree(folder)
            else:
                rundir.RunDir(folder).remove()  # refuses a run that is in use
        except OSError as error:
            raise storage_error(error, folder) from error
        ui.note(f"removed {folder}")
        ui.event({"event": "removed", "run": str(folder)})


ACTIONS: dict[str, Callable[[argparse.Namespace, Ui], None]] = {
    "list": _list,
    "show": _show,
    "compare": _compare,
    "rm": _rm,
}
