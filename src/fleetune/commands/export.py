# SPDX-License-Identifier: Apache-2.0
"""`fleetune export`: a finished run, a compressed model or any model to a file or folder that a runtime reads."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fleetune import rundir
from fleetune.commands import compress
from fleetune.deploy import exports, gguf_lora, measure, provenance
from fleetune.deploy.master import Master, is_master
from fleetune.deploy.source import Report
from fleetune.errors import UsageError
from fleetune.text import human_bytes
from fleetune.ui import Ui


def run(args: argparse.Namespace, ui: Ui, of_run: Path | None) -> None:
    """Carry out `fleetune export`; `of_run` is the folder where the subject is a tuned run."""
    _check_text(args)
    master = _master(args, of_run)
    if master is not None:
        folder, kind = (master.parent if master.name == "model" else master), args.to or "gguf"
        write(ui, master, kind, _place(args, folder, kind), text=args.text)
    elif of_run is not None:
        _of_run(args, ui, of_run)
    else:
        from fleetune import models

        rundir.check_name(args.subject, Path(args.out))
        source, kind = models.resolve(args.subject, offline=args.offline), args.to or "gguf"
        place = _place(args, Path("."), kind, rundir.slug(Path(args.subject).name))
        write(ui, source, kind, place, provenance.of_base(args.subject), args.text)


def _check_text(args: argparse.Namespace) -> None:
    if args.text and not Path(args.text).is_file():
        raise UsageError(f"no text file at {args.text}", hint="check the path")
    if args.text and args.to in ("peft", gguf_lora.TARGET):
        raise UsageError("an adapter alone has no perplexity", hint="leave out --text, or --to hf")


def _master(args: argparse.Namespace, of_run: Path | None) -> Path | None:
    """The artefact that is meant, None for none."""
    if is_master(Path(args.subject)):
        return Path(args.subject)
    found = compress.named(args.subject, Path(args.out), of_run)
    return compress.artefact(found) if found else None


def _place(args: argparse.Namespace, folder: Path, kind: str, name: str = "") -> Path:
    if args.path:
        return Path(args.path)
    if kind.startswith("gguf"):
        return folder / f"{name or folder.name}{kind[4:].replace(':', '-')}.gguf"
    return folder / (f"{name}-{kind}" if name else kind).replace(":", "-")


def _of_run(args: argparse.Namespace, ui: Ui, run: Path) -> None:
    from fleetune import models, tuned

    recipe, kind = tuned.recipe_of(run), args.to or "hf"
    out = _place(args, run, kind)
    if kind == "peft":
        tuned.export_peft(run, out)
        ui.event({"event": "export", "to": kind, "path": str(out)})
        ui.paths([("result", str(out))])
        return
    card = (
        f"# {run.name}\n\n{recipe.model} tuned by Fleetune ({recipe.method}) on {Path(recipe.data).name}.\n"
    )
    if kind == "hf":
        digest = tuned.export_hf(tuned.load(run, offline=args.offline, device="cpu"), out, card=card)
        ui.event({"event": "export", "to": kind, "path": str(out), "digest": digest})
        ui.paths([("result", str(out)), ("digest", digest)])
        if args.text:
            _compare(ui, run, kind, out, args.text, offline=args.offline)
        return
    made = provenance.of_run(run, recipe)
    if kind == gguf_lora.TARGET:
        adapter = run / tuned.RESULT["adapter"]
        gguf_lora.check_kind(adapter)
        base = models.resolve(recipe.model, offline=args.offline)
        _show(ui, exports.export_adapter(adapter, base, out, made=made))
        return
    exports.check_target(kind, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        plain = Path(folder) / run.name
        tuned.export_hf(tuned.load(run, offline=args.offline, device="cpu"), plain, card=card)
        write(ui, plain, kind, out, made, args.text)


def write(
    ui: Ui,
    source: Path,
    kind: str,
    out: Path,
    made: Mapping[str, str] = exports.NOTHING,
    text: str | None = None,
) -> None:
    if kind == "peft":
        raise UsageError("only a run has an adapter", hint="fleetune export RUN --to peft")
    report = exports.export(source, kind, out, made=made)
    if is_master(source) and (warning := measure.warning(Master(source))):
        report = dataclasses.replace(report, notes=(*report.notes, warning))
    _show(ui, report)
    if text:
        _compare(ui, source, kind, out, text)


def _compare(ui: Ui, source: Path, kind: str, out: Path, text: str, *, offline: bool = False) -> None:
    """Run what was written in the runtime that it is for, and its source in torch, on the same text."""
    from fleetune.deploy import runtimes

    if why := runtimes.obstacle(kind, out):
        ui.event({"event": "check", "path": str(out), "runtime": None})
        ui.note(f"not run: {why}")
        return
    runtime = runtimes.RUNTIMES[kind.partition(":")[0]]
    found = runtimes.compare(source, out, runtime, text, offline=offline)
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
