"""`fleetune measure`: what a model costs and how good it is, base, tuned and compressed in one table."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import fleetune
from fleetune.cli import flags
from fleetune.cli.console import Ui, console_listener
from fleetune.common.display import quoted
from fleetune.deploy.harness import FILE

if TYPE_CHECKING:
    from fleetune.deploy.measure import MeasureResult

HELP = "size, speed, memory and quality of base, tuned and compressed in one table"
ORDER = 80
EXAMPLES = """\
fleetune measure latest --kept-gain
fleetune measure smollm2-135m latest --data rows.jsonl
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument("subjects", metavar="FOLDER|RUN|MODEL", nargs="+", help="what to measure, side by side")
    sub.add_argument("--text", help="plain text file for perplexity")
    sub.add_argument("--windows", type=int, default=16, help="most windows of the text (default 16)")
    sub.add_argument("--length", type=int, default=512, help="tokens per window (default 512)")
    sub.add_argument("--data", help="rows for the loss (one run or folder: held-out rows of its own)")
    sub.add_argument("--limit", type=int, default=200, help="most rows (default 200)")
    sub.add_argument("--threads", type=int, default=1, help="processor threads (default 1)")
    sub.add_argument("--prompt-tokens", type=int, default=128, help="tokens of the prefill (default 128)")
    sub.add_argument("--new-tokens", type=int, default=32, help="tokens generated after it (default 32)")
    sub.add_argument("--repeats", type=int, default=3, help="passes, of which the median counts (default 3)")
    sub.add_argument(
        "--kept-gain",
        action="store_true",
        help="compress the base the same way (once), and say what of the tuning's gain is kept",
    )
    sub.add_argument(
        "--reference",
        metavar="MODEL",
        help="compare each with this model: KL divergence and same top token, on the text or the rows (a compressed model: "
        "with what it was made from)",
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Measure, and print the table."""
    with console_listener(ui) as listener:
        result = fleetune.measure(
            *args.subjects,
            listener=listener,
            **flags.options(
                args,
                "text windows length data limit threads prompt_tokens new_tokens repeats kept_gain reference",
            ),
        )
    _show(ui, result)


def _show(ui: Ui, result: MeasureResult) -> None:
    columns, rows = result.table()
    ui.table(columns, rows, align="ll" + "r" * (len(columns) - 2))
    ui.paths([("kept", result.kept.text)] if result.kept else [])
    if (folder := result.folder) is not None:
        ui.paths([("result", str(folder / FILE))])
        if not result.kept and any(r.name == "tuned" for r in result.rows):
            ui.paths([("next", f"fleetune measure {quoted(folder)} --kept-gain")])
