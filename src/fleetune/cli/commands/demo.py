# SPDX-License-Identifier: Apache-2.0
"""`fleetune demo`: the whole pipeline.  Tune twice, compress the first result, write its GGUF file, ask that file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fleetune.cli.commands import tune
from fleetune.cli.console import Ui
from fleetune.tuning import demo as demos


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Carry out `fleetune demo`."""
    from fleetune import models

    with ui.count(demos.MODEL, 0, size=True) as bar:
        models.pull(
            demos.MODEL, offline=args.offline, progress=lambda what, n, total: bar.update(n, total, what)
        )
    first, _ = [tune.run_recipe(recipe, args, ui) for recipe in demos.recipes(quick=args.quick)]
    _deploy(args, ui, Path(first["run"]))


def _deploy(args: argparse.Namespace, ui: Ui, run: Path) -> None:
    """Compress a run, write it as a GGUF file, and let that file answer the first prompt of its samples."""
    from fleetune.cli.commands import compress, eval, export
    from fleetune.compression.jobs.work import Work
    from fleetune.deploy import export as exports
    from fleetune.evaluation import answers

    work = Work(str(run), True, "optq", length=demos.LENGTH)
    folder = compress.carry_out(work, ui, Path(args.out), offline=args.offline)
    file = folder / f"{folder.name}.gguf"
    export.write(ui, compress.artefact(folder), "gguf", file)
    row = eval.held_out(run, offline=args.offline)[0]
    (answer,) = answers.generate(exports.load(file), [row], max_new_tokens=demos.ANSWER)
    question = row.messages[-1][1]
    ui.event({"event": "answer", "prompt": question, "text": answer})
    ui.paths([
        ("question", question), (f"{file.name} says", answer), ("next", f"fleetune serve {file}"),
    ])  # fmt: skip
