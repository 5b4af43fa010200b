# SPDX-License-Identifier: Apache-2.0
"""Watch and stop the run of a real fleet: the actions devices, status, stop and audit of `fleetune fleet`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fleetune.cli.console import Ui
from fleetune.common.display import human_bytes, human_time
from fleetune.errors import StorageError, UsageError
from fleetune.runs import compression_folder, rundir
from fleetune.tuning.recipe import recipe as recipes


def devices(args: argparse.Namespace, ui: Ui) -> None:
    """Show which key is which client, and what each device has and does."""
    from fleetune.fleet.table import Devices
    from fleetune.tuning import methods

    run = _run_of(args)
    found, names = Devices(run), [""]
    if not compression_folder.is_one(run):
        recipe = recipes.make(recipes.read(run / "run.toml"))
        names = list(methods.make(recipe.method, recipe.set).kind_names)
    rows = [
        [
            str(c),
            m.name,
            m.key[:16],
            str(m.rows or "has not joined"),
            human_bytes(m.memory) if m.memory else "",
            str(m.threads or ""),
            f"{m.speed:,.0f}" if m.speed else "",
            names[m.kind] if 0 <= m.kind < len(names) else "",
            m.version,
            m.torch,
            m.processor,
        ]
        for c, m in enumerate(found.members)
    ]
    head = [
        "client",
        "device",
        "key",
        "rows",
        "memory",
        "threads",
        "tokens/s",
        "does",
        "fleetune",
        "torch",
        "processor",
    ]
    ui.table(head, rows)
    if len(names) > 1 and all(m.kind >= 0 for m in found.members):
        given = ",".join(str(m.kind) for m in found.members)
        ui.note(f"the same in the simulation: --kinds {given}")


def status(args: argparse.Namespace, ui: Ui) -> None:
    """Show how the run stands, and what each device does now."""
    from fleetune.fleet import status as standing

    now = standing.look(_run_of(args))
    ui.event(now)
    if ui.json:
        return
    ago = human_time(now.heard)
    if now.served:
        ui.paths([("run", f"{now.run} · {now.status} · heard {ago} ago"), *standing.facts(now)])
    else:
        ui.note(f"no server has {now.run} now: last heard {ago} ago")
        ui.paths([("run", f"{now.run} · {now.status}"), *standing.facts(now)])
    ui.table(standing.HEAD, [standing.cells(device) for device in now.devices])
    if not now.served and now.status != "done":
        ui.paths([("next", standing.resume(Path(now.run)))])


def stop(args: argparse.Namespace, ui: Ui) -> None:
    """Ask the run's server to end after this step."""
    from fleetune.fleet import status as standing

    standing.ask_to_stop(run := _run_of(args))
    ui.note(f"asked: it stops after this step; go on with: {standing.resume(run)}")


def audit(args: argparse.Namespace, ui: Ui) -> None:
    """Check the log of all that was taken or refused; StorageError where it was changed."""
    from fleetune.fleet import audit as log

    file = _run_of(args) / log.FILE
    found = log.verify(file)
    if found.bad:
        raise StorageError(
            f"{file}: line {found.bad} does not follow from the one before: it, or one before it, was changed",
            hint=f"the first {found.entries} entries are as they were written",
        )
    ui.paths([("entries", f"{found.entries}, each follows from the one before"), ("chain", found.chain)])


def _run_of(args: argparse.Namespace) -> Path:
    """The folder of the run that the words name, or of a compression that devices have calibrated."""
    if len(args.words) != 1:
        raise UsageError(f"{args.action} takes one RUN", hint=f"fleetune fleet {args.action} latest")
    name, out = args.words[0], Path(args.out)
    smaller = compression_folder.find(name, out) if name != "latest" else None
    return smaller or rundir.find(name, out)
