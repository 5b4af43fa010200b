# SPDX-License-Identifier: Apache-2.0
"""`fleetune runs`: list, show, compare, rm."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

from fleetune import report, rundir
from fleetune.errors import UsageError
from fleetune.files import storage_error, write_atomic
from fleetune.text import human_bytes, human_time, show
from fleetune.ui import Ui


def _found(args: argparse.Namespace, least: int) -> list[Path]:
    if len(args.names) < least:
        raise UsageError(
            f"runs {args.action} needs {least} RUN or more", hint="runs there are: fleetune runs"
        )
    return [rundir.find(name, Path(args.out)) for name in args.names]


def _list(args: argparse.Namespace, ui: Ui) -> None:
    rows = report.table(rundir.listing(Path(args.out)))
    for row in rows:
        ui.event({"event": "run", **row})
    for sweep in sorted(p.parent for p in Path(args.out).glob("*/sweep.toml")):
        ui.event({"event": "sweep", "path": str(sweep)})
        ui.note(f"{sweep} is a sweep; its runs: fleetune runs --out {sweep}")
    if ui.json:
        return
    if not rows:
        ui.note(f"no runs in {args.out}")
        ui.paths([("next", "fleetune demo")])
        return
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
    for run in _found(args, 1):
        with rundir.RunDir(run):  # refuses a run that is in use
            try:
                shutil.rmtree(run)
            except OSError as error:
                raise storage_error(error, run) from error
        ui.note(f"removed {run}")
        ui.event({"event": "removed", "run": str(run)})


ACTIONS: dict[str, Callable[[argparse.Namespace, Ui], None]] = {
    "list": _list,
    "show": _show,
    "compare": _compare,
    "rm": _rm,
}
