# SPDX-License-Identifier: Apache-2.0
"""`fleetune demo`: the whole pipeline, tune twice, compress the first result, write its GGUF file, ask that file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fleetune import demo as demos
from fleetune.commands import tune
from fleetune.ui import Ui


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
    """Compress a run, write it as GGUF, and let that file answer a held-out row."""
    from fleetune import answers
    from fleetune.commands import compress, export
    from fleetune.commands.subject import Work
    from fleetune.deploy import exports

    out = Path(args.out)
    folder = compress.carry_out(Work(str(run), True, "optq"), ui, out, offline=args.offline)
    file = folder / f"{folder.name}.gguf"
    export.write(ui, compress.artefact(folder), "gguf", file)
    row = compress.held_out(folder, offline=args.offline)[0]
    (answer,) = answers.generate(exports.load(file), [row], max_new_tokens=72)
    question = row.messages[-1][1]
    ui.event({"event": "answer", "prompt": question, "text": answer})
    ui.paths([
        ("question", question), ("answer", answer),
        ("next", f"fleetune serve {file}"),
    ])  # fmt: skip
