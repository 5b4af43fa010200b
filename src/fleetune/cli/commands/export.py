# SPDX-License-Identifier: Apache-2.0
"""`fleetune export`: a finished run, a compressed model or any model to a file or folder that a runtime reads."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.cli.commands import compress
from fleetune.cli.console import Ui
from fleetune.common.display import human_bytes
from fleetune.deploy.targets import check_place, find
from fleetune.errors import UsageError

if TYPE_CHECKING:
    from fleetune.deploy.formats import Report
    from fleetune.deploy.measure.harness import Row


def run(args: argparse.Namespace, ui: Ui, of_run: Path | None) -> None:
    """Carry out `fleetune export`; `of_run` is the folder where the subject is a tuned run."""
    _check(args)
    master = _master(args, of_run)
    if master is not None:
        folder, kind = (master.parent if master.name == "model" else master), args.to or "gguf"
        write(ui, master, kind, _place(args, folder, kind), rows=_rows(master, args.text))
    elif of_run is not None:
        _of_run(args, ui, of_run)
    else:
        from fleetune import models
        from fleetune.deploy import provenance
        from fleetune.runs import rundir

        rundir.check_name(args.subject, Path(args.out))
        source, kind = models.resolve(args.subject, offline=args.offline), args.to or "gguf"
        place = _place(args, Path("."), kind, rundir.slug(Path(args.subject).name))
        write(ui, source, kind, place, provenance.of_base(args.subject), _rows(source, args.text))


def _check(args: argparse.Namespace) -> None:
    """UsageError for a target, a place or a text that cannot be, before anything heavy is imported."""
    target = find(args.to) if args.to else None
    if args.to and args.path:
        check_place(args.to, Path(args.path))
    if args.text and not Path(args.text).is_file():
        raise UsageError(f"no text file at {args.text}", hint="check the path")
    if args.text and target is not None and target.takes == "adapter":
        raise UsageError("an adapter alone has no perplexity", hint="leave out --text, or --to hf")


def _master(args: argparse.Namespace, of_run: Path | None) -> Path | None:
    """The artefact that is meant, None for none."""
    from fleetune.models.artefact import is_master

    if is_master(Path(args.subject)):
        return Path(args.subject)
    found = compress.named(args.subject, Path(args.out), of_run)
    return compress.artefact(found) if found else None


def _place(args: argparse.Namespace, folder: Path, kind: str, name: str = "") -> Path:
    return Path(args.path) if args.path else find(kind).place(folder, name)


def _of_run(args: argparse.Namespace, ui: Ui, run: Path) -> None:
    from fleetune import models
    from fleetune.deploy import export, provenance
    from fleetune.deploy.formats import gguf_vocabulary
    from fleetune.tuning import finished

    recipe, kind = finished.recipe_of(run), args.to or "hf"
    out = _place(args, run, kind)
    check_place(kind, out)
    made, target = provenance.of_run(run, recipe), find(kind)
    if target.takes == "adapter":
        adapter = run / finished.RESULT["adapter"]
        export.check_adapter(adapter, kind)
        base = models.resolve(recipe.model, offline=args.offline) if target.states("BASE") else None
        _show(ui, export.export_adapter(adapter, base, kind, out, made=made))
        return
    rows = _rows(models.resolve(recipe.model, offline=args.offline), args.text)
    card = (
        f"# {run.name}\n\n{recipe.model} tuned by Fleetune ({recipe.method}) on {Path(recipe.data).name}.\n"
    )
    model = finished.load(run, offline=args.offline, device="cpu")
    if kind == "hf":
        for note in gguf_vocabulary.give_template(model.tokenizer):
            ui.note(f"note: {note}")
        digest = finished.export_hf(model, out, card=card)
        del model
        ui.event({"event": "export", "to": kind, "path": str(out), "digest": digest})
        ui.paths([("result", str(out)), ("digest", digest)])
        _compare(ui, run, kind, out, rows, offline=args.offline)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        plain = Path(folder) / run.name
        finished.export_hf(model, plain, card=card)
        del model
        write(ui, plain, kind, out, made, rows)


def write(
    ui: Ui,
    source: Path,
    kind: str,
    out: Path,
    made: Mapping[str, str] | None = None,
    rows: list[Row] | None = None,
) -> None:
    """Export `source`, and run what was written and `source` on the same windows of a text, where there are any."""
    from fleetune.deploy import export
    from fleetune.deploy.measure import harness
    from fleetune.models.artefact import Master, is_master

    report = export.export(source, kind, out, made=made or {})
    if is_master(source) and (warning := harness.warning(Master(source))):
        report = dataclasses.replace(report, notes=(*report.notes, warning))
    _show(ui, report)
    _compare(ui, source, kind, out, rows or [])


def _rows(source: Path, text: str | None) -> list[Row]:
    """The windows of the text in the tokens of the model in `source`; none without a text."""
    from fleetune.deploy.measure import check

    return check.windows_of(text, source) if text else []


def _compare(ui: Ui, source: Path, kind: str, out: Path, rows: list[Row], *, offline: bool = False) -> None:
    """Run what was written in the runtime that it is for, and its source in torch, on the same windows of a text."""
    from fleetune.deploy.measure import check

    if not rows:
        return
    if why := check.obstacle(kind, out):
        ui.event({"event": "check", "path": str(out), "runtime": None})
        ui.note(f"not run: {why}")
        return
    runtime = check.runtime_of(kind)
    assert runtime is not None  # or there would be an obstacle
    found = check.compare(source, out, runtime, rows, offline=offline)
    ui.event({"event": "check", "path": str(out), **dataclasses.asdict(found), "ratio": found.ratio})
    ui.paths([(
        "perplexity", f"{found.source:.3f} in torch, {found.file:.3f} in {found.runtime} (x {found.ratio:.4f}), "
        f"{found.tokens:,} tokens",
    )])  # fmt: skip


def _show(ui: Ui, report: Report) -> None:
    ui.event({"event": "export", **dataclasses.asdict(report), "path": str(report.path)})
    for note in report.notes:
        ui.note(f"note: {note}")
    types = ", ".join(f"{count} {name}" for name, count in sorted(report.types.items()))
    ui.paths([
        ("result", f"{report.path} ({human_bytes(report.bytes)})"), ("tensors", types),
        ("read back", f"{report.exact} of {report.tensors} tensors hold the source's values bit for bit"),
    ])  # fmt: skip
