# SPDX-License-Identifier: Apache-2.0
"""`fleetune demo`: the whole pipeline.  Tune twice, compress the first result, write its GGUF file, ask that file."""

from __future__ import annotations

import argparse
from pathlib import Path

import fleetune
from fleetune.cli.console import Ui
from fleetune.cli.listener import console_listener
from fleetune.common.display import human_bytes
from fleetune.common.events import Answered
from fleetune.common.shell import quoted
from fleetune.subject import Run

HELP = "tune smollm2-135m over the built-in demo fleet and make the result fit a device"
ORDER = 10
EXAMPLES = """\
fleetune demo
fleetune demo --quick
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument("--quick", action="store_true", help="the same path in a minute, with fewer steps")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Run the pipeline, each stage shown as its own command shows it."""
    from fleetune import models
    from fleetune.cli.commands import compress, export, tune
    from fleetune.tuning.run import demo

    with ui.bar(demo.MODEL, human_bytes) as bar:
        models.pull(
            demo.MODEL, offline=args.offline, progress=lambda what, n, total: bar.update(n, total, what)
        )
    run, _ = [tune.run_recipe(recipe, args, ui) for recipe in demo.recipes(quick=args.quick)]
    with console_listener(ui) as listener:
        small = fleetune.compress(
            run.done.run, length=demo.LENGTH, out=args.out, offline=args.offline, listener=listener
        )
        compress.show(ui, small)
        file = small.folder / f"{small.folder.name}.gguf"
        export.show(ui, fleetune.export(small, to="gguf", path=file, listener=listener))
    question, answer = _ask(Run(run.folder), file, offline=args.offline)
    ui.event(Answered(prompt=question, text=answer))
    ui.paths(
        [
            ("question", question),
            (f"{file.name} says", indented(answer)),
            ("next", f"fleetune serve {quoted(file)}"),
        ]
    )


def indented(text: str) -> str:
    """Return a text whose lines stay lines where results are shown: a line break alone is shown as an escape."""
    return text.replace("\n", "\n  ")


def _ask(run: Run, file: Path, *, offline: bool) -> tuple[str, str]:
    from fleetune.deploy import export
    from fleetune.evaluation import answers
    from fleetune.tuning.run import demo

    row = run.held_out(offline=offline)[0]
    (answer,) = answers.generate(export.load(file), [row], max_new_tokens=demo.ANSWER)
    return row.messages[-1][1], answer
