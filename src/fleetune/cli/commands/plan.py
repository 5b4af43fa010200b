"""`fleetune plan`: what every method takes on a device, before any work."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import fleetune
from fleetune.cli import flags
from fleetune.cli.console import Ui
from fleetune.common.display import human_bytes, quoted
from fleetune.common.events import PlanSettings

if TYPE_CHECKING:
    from fleetune.planning.plan import Settings

HELP = "memory, traffic and time of every method for a model, before any work"
ORDER = 20
EXAMPLES = """\
fleetune plan smollm2-135m --ram 4GB --uplink 1Mbps
fleetune plan smollm2-135m --ram 1.5GB                     the settings that fit, as a command
fleetune plan ./my-model --dtype bf16 --length 512 --batch 4
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument(
        "model",
        metavar="MODEL",
        help="hub id, HF directory, GGUF file or built-in name; with --train scales also a compressed model",
    )
    sub.add_argument(
        "--ram",
        help="memory of a device, e.g. 4GB: shows what fits, and finds settings that make a method fit",
    )
    sub.add_argument("--uplink", help="its uplink, e.g. 1Mbps: shows how long a round's traffic takes")
    sub.add_argument("--batch", type=int, help="rows per step (default 8; what fits may have fewer)")
    sub.add_argument(
        "--length",
        type=int,
        help="tokens per row (default 512, at which tune cuts them; what fits may have fewer)",
    )
    sub.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="type of the weights (default fp32; what fits may be in bf16)",
    )
    sub.add_argument(
        "--base",
        choices=["memory", "mapped"],
        help="where the base's weights are: memory, or mapped, in their file (default memory; what fits may be mapped)",
    )
    sub.add_argument(
        "--train",
        choices=["weights", "scales"],
        default="weights",
        help="scales: the methods that tune the scales of a GGUF file, or in that of a compressed model (default weights)",
    )
    sub.add_argument("--steps", type=int, default=200, help="local steps of a round (default 200)")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Print the table, and the command to begin with."""
    from fleetune.planning import plan as planning

    plan = fleetune.plan(args.model, **flags.options(args, "ram uplink batch length steps dtype base train"))
    for row in plan.rows:
        ui.event(row)
    ui.header("fleetune plan", plan.about)
    ui.table(planning.columns(plan.rows), [planning.cells(row) for row in plan.rows])
    found = plan.settings()
    ui.event(
        PlanSettings(
            model=args.model,
            method=found.method,
            batch_size=found.work.batch,
            max_length=found.work.length,
            dtype=found.work.dtype,
            base=found.work.base,
            peak=found.peak,
            ram=found.ram,
            command=_command(args.model, found),
        )
    )
    told = f"{found}: about {human_bytes(found.peak)}" + (
        f" of {human_bytes(found.ram)}" if found.ram else ""
    )
    counted = "the table: a device's round · best: one process that trains, measures, answers and averages"
    ui.paths([("best", told), ("counted", counted), ("next", _command(args.model, found))])


def _command(model: str, found: Settings) -> str:
    options = found.options()
    words = ["--method", options.pop("method")]
    for name, value in options.pop("settings", {}).items():
        words += ["--set", f"{name}={value}"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return " ".join(["fleetune tune", quoted(model), "DATA", *words])
