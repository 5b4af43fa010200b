# SPDX-License-Identifier: Apache-2.0
"""`fleetune methods` and `fleetune models`: what there is to tune with, and to tune."""

from __future__ import annotations

import argparse
import dataclasses

from fleetune import models
from fleetune.cli.console import Ui
from fleetune.common.display import human_count
from fleetune.errors import UsageError
from fleetune.tuning import methods


def list_methods(args: argparse.Namespace, ui: Ui) -> None:
    if args.name:
        entry = methods.entry(args.name)
        settings = methods.settings(args.name)
        for s in settings:
            ui.event(
                {"event": "setting", "method": entry.name, **dataclasses.asdict(s), "type": s.type.__name__}
            )
        if not ui.json:
            ui.paths(
                [
                    ("method", entry.summary),
                    ("paper", entry.paper),
                    ("sends", entry.sends),
                    ("leaves", entry.kind),
                ]
            )
            rows = [[s.name, s.symbol, s.type.__name__, s.default, s.help] for s in settings]
            ui.table(["--set", "symbol", "type", "default", "meaning"], rows, align="lllll")
        return
    found = methods.entries().values()
    for e in found:
        ui.event({"event": "method", "name": e.name, "kind": e.kind, "paper": e.paper, "sends": e.sends})
    if not ui.json:
        ui.table(["method", "leaves", "sends", "paper"], [[e.name, e.kind, e.sends, e.paper] for e in found])
        ui.paths([("next", "fleetune methods NAME")])


def list_models(args: argparse.Namespace, ui: Ui) -> None:
    if args.action == "pull":
        if not args.name:
            raise UsageError("pull needs the name of a model", hint="fleetune models pull smollm2-135m")
        with ui.count(args.name, 0, size=True) as bar:
            path = models.pull(
                args.name, offline=args.offline, progress=lambda what, n, total: bar.update(n, total, what)
            )
        ui.event({"event": "pulled", "name": args.name, "path": str(path)})
        ui.paths([("result", str(path))])
        return
    found = models.builtin()
    for m in found:
        ui.event({"event": "model", **dataclasses.asdict(m)})
    if not ui.json:
        ui.table(
            ["model", "parameters", "licence", "here", "source"],
            [
                [m.name, human_count(m.params), m.licence, "yes" if m.cached else "no", m.source]
                for m in found
            ],
        )
