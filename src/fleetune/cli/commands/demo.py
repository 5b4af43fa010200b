"""`fleetune demo`: the whole pipeline.  Tune twice, compress the first result, write its GGUF file, ask that file.

FedIT shows a gain after minutes of back-propagation.  In FedKSeed's mixed fleet every second site back-propagates: in so few
steps forward passes alone would move the loss by hundredths.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fleetune
from fleetune import models
from fleetune.cli.commands import compress, export, tune
from fleetune.cli.console import Ui, console_listener
from fleetune.common.display import human_bytes, quoted
from fleetune.common.events import Answered
from fleetune.subject import Run
from fleetune.tuning.recipe.recipe import make

if TYPE_CHECKING:
    from fleetune.tuning.recipe.recipe import Recipe

HELP = "tune smollm2-135m over the built-in demo fleet and make the result fit a device"
ORDER = 10
EXAMPLES = """\
fleetune demo
fleetune demo --quick
"""
MODEL = "smollm2-135m"
LENGTH = 256  # tokens of a row at most
ANSWER = 72  # tokens of an answer at most


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument("--quick", action="store_true", help="the same path in a minute, with fewer steps")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Run the pipeline, each stage shown as its own command shows it."""
    with ui.bar(f"fetching {MODEL}", human_bytes) as bar:
        models.pull(MODEL, offline=args.offline, progress=lambda what, n, total: bar.update(n, total, what))
    run, _ = [tune.run_recipe(recipe, args, ui) for recipe in recipes(quick=args.quick)]
    with console_listener(ui) as listener:
        small = fleetune.compress(
            run.done.run, length=LENGTH, out=args.out, offline=args.offline, listener=listener
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
    from fleetune.evaluation import answers

    row = run.held_out(offline=offline)[0]
    model = models.load(str(file), device="cpu")
    (answer,) = answers.generate(model, [row], max_new_tokens=ANSWER)
    return row.messages[-1][1], answer


def recipes(*, quick: bool = False) -> list[Recipe]:
    """Return the demo's recipes, in order; `quick` takes a few steps of each, to see the path."""
    shared: dict[str, Any] = {
        "model": MODEL,
        "data": "demo",
        "partition": "column:client",
        "held_out": 32,
        "max_length": LENGTH,
        "samples": 2,
        "answer_tokens": ANSWER,
        "client_rows": 0,  # two rows of each site tell little
    }
    fedit = shared | {  # many small steps of few sites: four of them a round
        "method": "fedit",
        "rounds": 1 if quick else 3,
        "participation": 0.125 if quick else 0.167,
        "set": {"r": 8, "alpha": 16, "dropout": 0.0, "lr": 2e-3, "batch_size": 2, "epochs": 1},
    }
    fedkseed = shared | {
        "method": "fedkseed",
        "rounds": 1 if quick else 2,
        "participation": 0.167,
        "samples": 0,
        "eval_every": 2,
        "set": {
            "K": 1024,
            "tau": 1 if quick else 4,
            "lr": 1e-4,
            "eps": 1e-3,
            "batch_size": 4,
            "backprop": 0.5,
            "backprop_steps": 1 if quick else 3,
        },
    }
    return [make(fedit), make(fedkseed)]
