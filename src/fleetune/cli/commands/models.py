# SPDX-License-Identifier: Apache-2.0
"""`fleetune models`: the built-in models; `fleetune models pull NAME` fetches one."""

from __future__ import annotations

import argparse
import dataclasses

from fleetune.cli.console import Ui
from fleetune.common.display import human_count
from fleetune.errors import UsageError
from fleetune.runs.events import ModelListed, ModelPulled

HELP = "list the built-in models, or fetch one"
ORDER = 140


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument("action", nargs="?", default="list", choices=["list", "pull"])
    sub.add_argument("name", metavar="NAME", nargs="?")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """List the built-in models, or fetch one into the cache."""
    from fleetune import models

    if args.action == "pull":
        _pull(args, ui)
        return
    found = models.builtin()
    for m in found:
        ui.event(ModelListed(**{**dataclasses.asdict(m), "cached": str(m.cached) if m.cached else None}))
    if not ui.json:
        ui.table(
            ["model", "parameters", "licence", "here", "source"],
            [
                [m.name, human_count(m.params), m.licence, "yes" if m.cached else "no", m.source]
                for m in found
            ],
        )


def _pull(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune import models

    if not args.name:
        raise UsageError("pull needs the name of a model", hint="fleetune models pull smollm2-135m")
    with ui.count(args.name, 0, size=True) as bar:
        path = models.pull(
            args.name, offline=args.offline, progress=lambda what, n, total: bar.update(n, total, what)
        )
    ui.event(ModelPulled(name=args.name, path=str(path)))
    ui.paths([("result", str(path))])
