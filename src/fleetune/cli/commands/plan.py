# SPDX-License-Identifier: Apache-2.0
"""`fleetune plan`: what every method takes on a device, before any work."""

from __future__ import annotations

import argparse
import dataclasses

from fleetune.cli.console import Ui
from fleetune.common.shell import quoted
from fleetune.runs.events import PlanRow

HELP = "memory, traffic and time of every method for a model, before any work"
ORDER = 20
EXAMPLES = """\
fleetune plan smollm2-135m --ram 4GB --uplink 1Mbps
fleetune plan ./my-model --dtype bf16 --length 512 --batch 4
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument("model", metavar="MODEL", help="hub id, HF directory, GGUF file or built-in name")
    sub.add_argument("--ram", help="memory of a device, e.g. 4GB: says what fits")
    sub.add_argument("--uplink", help="its uplink, e.g. 1Mbps: says how long a round's traffic takes")
    sub.add_argument("--batch", type=int, default=8, help="rows per step (default 8)")
    sub.add_argument(
        "--length", type=int, default=512, help="tokens of a row (default 512, at which tune cuts them)"
    )
    sub.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="type of the weights")
    sub.add_argument("--steps", type=int, default=200, help="local steps of a round (default 200)")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Print the table, and the command to begin with."""
    from fleetune import api
    from fleetune.cli import recipe_flags
    from fleetune.planning import plan as planning

    recipe_flags.check_model(args.model, args.out)
    plan = api.plan(
        args.model, ram=args.ram, uplink=args.uplink, batch=args.batch, length=args.length, steps=args.steps,
        dtype=args.dtype, offline=args.offline,
    )  # fmt: skip
    for row in plan.rows:
        ui.event(PlanRow(model=args.model, **dataclasses.asdict(row), fits=row.fits))
    if not ui.json:
        ui.header("fleetune plan", plan.about)
        ui.table(planning.columns(plan.rows), [planning.cells(row) for row in plan.rows])
    method = plan.best()
    if not ui.json:
        ui.paths([("next", f"fleetune tune {quoted(args.model)} DATA --method {method}")])
