# SPDX-License-Identifier: Apache-2.0
"""Export a run, a compressed model or a plain model, and check the file in the runtime that it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.common.events import ExportChecked, ExportDone, ExportPushed
from fleetune.common.files import storage_error
from fleetune.common.folders import scratch
from fleetune.common.ggml import SCALES
from fleetune.common.shell import command, quoted
from fleetune.deploy import targets
from fleetune.deploy.targets import check_place
from fleetune.errors import ModelError, UsageError, called
from fleetune.models.cache import names
from fleetune.runs import compression_folder, rundir
from fleetune.runs.listener import Listener
from fleetune.subject import Compressed, Plain, Run, Subject

if TYPE_CHECKING:
    from fleetune.deploy.formats import Report
    from fleetune.deploy.measure.harness import Row

DEFAULT_TARGET = "gguf"
DEFAULT_TARGET_OF_A_RUN = "hf"
FILES = ("gguf", "ollama")  # targets that hold the GGUF file itself
RUNTIMES = {
    "llama.cpp": "gguf",
    "mlx-lm": "mlx",
    "transformers": "transformers",
}  # -> the kind of a `MeasureJob`
WINDOWS, LENGTH = 8, 512  # of the text that an export is checked on, and tokens of one
GGUF = ".gguf"


@dataclass(frozen=True)
class ExportResult:
    """A written file or folder, and what checking it found."""

    path: Path
    done: ExportDone
    check: ExportChecked | None = None  # where a text was given
    pushed: ExportPushed | None = None  # where a repository was given


def export(
    subject: Subject,
    to: str | None,
    path: Path | None,
    text: str | None,
    listener: Listener,
    *,
    offline: bool,
) -> ExportResult:
    """Write `subject` as target `to` (default: gguf; of a run of weights hf) to `path` (default: beside it), and read it back.

    With a `text` file its perplexity is measured by the source and by what was written, in its runtime.  UsageError for
    a target, a place or a text that cannot be, before anything heavy is imported; the rest as in `export.export`.
    """
    check(to, path, text)
    if isinstance(subject, Run):
        own = DEFAULT_TARGET if subject.recipe.train == SCALES else DEFAULT_TARGET_OF_A_RUN
        return _of_run(subject, to or own, path, text, listener, offline=offline)
    kind = to or DEFAULT_TARGET
    if isinstance(subject, Compressed):
        source = subject.model
        out = path or targets.find(kind).place(subject.home)
        return write(source, kind, out, listener, rows=_rows(source, text), keeps=path is None)
    from fleetune.deploy import provenance

    _require_codes(targets.find(kind), subject.name, _of_gguf(subject.name))
    if subject.name.endswith(GGUF) and kind in FILES:
        listener.note(
            f"note: {subject.name} is a GGUF file already: its blocks are read as plain numbers, and these are written "
            "in 16 bits a weight, which may be larger"
        )
    source = subject.directory(offline=offline)
    out = path or targets.find(kind).place(Path("."), rundir.of_model(subject.name))
    with called(source, subject.name):
        return write(source, kind, out, listener, provenance.of_base(subject.name), _rows(source, text))


def _require_codes(target: targets.Target, name: str, holds: str = "plain weights") -> None:
    """UsageError when a target is for the codes of a compressed model alone, and the subject `holds` something else."""
    if target.takes == "codes":
        raise UsageError(
            f"{name} holds {holds}, and {target.name} is for compressed ones",
            hint=f"compress it first: fleetune compress {quoted(name)}; or use --to hf",
        )


def _check_of_blocks(target: targets.Target, run: Run) -> None:
    """UsageError for a target that has no place for a GGUF file whose scales a run has tuned."""
    what = f"{run.folder} has tuned the {run.recipe.train} of a GGUF file"
    if target.takes == "codes":
        raise UsageError(
            f"{what}, and {target.name} is for codes that fleetune compress has written",
            hint=f"--to gguf writes the file; or compress the run first: fleetune compress {quoted(run.folder)}",
        )
    if target.name == "gguf:lora":
        make = command("patch", "make", run.recipe.model, run.folder, "--to", "tuned.patch")
        raise UsageError(
            f"{what}: there is no LoRA",
            hint=f"--to gguf writes the whole file; what has changed alone: {make}",
        )


def _of_gguf(name: str) -> str:
    """Return what a plain model holds, in words."""
    return (
        "the blocks of a GGUF file, which are read as plain weights"
        if name.endswith(GGUF)
        else "plain weights"
    )


def check(to: str | None, path: Path | None, text: str | None) -> None:
    """UsageError for a target, a place or a text that cannot be, before anything heavy is imported."""
    target = targets.find(to) if to else None
    if to and path:
        check_place(to, path)
    if text and not Path(text).is_file():
        raise UsageError(f"no text file at {text}", hint="check the path")
    if text and target is not None and target.takes == "adapter":
        raise UsageError("an adapter alone has no perplexity", hint="leave out --text, or --to hf")


def write(
    source: Path,
    kind: str,
    out: Path,
    listener: Listener,
    made: Mapping[str, str] | None = None,
    rows: Sequence[Row] = (),
    *,
    keeps: bool = False,
) -> ExportResult:
    """Export the folder `source`, and run what was written and `source` on the same windows of a text, if there are any.

    With `keeps` a GGUF file that is at `out` already is taken where it is, byte for byte, what would be written.
    """
    from fleetune.deploy import export as exporting
    from fleetune.deploy.measure import harness
    from fleetune.models.artefact import Master
    from fleetune.models.cache.names import is_master

    report = exporting.written(source, kind, out) if keeps else None
    if report is None:
        report = exporting.export(source, kind, out, made=made or {})
    else:
        listener.note(f"{out} is there already: it is, byte for byte, what would be written")
    if is_master(source) and (warning := harness.warning(Master(source))):
        report = dataclasses.replace(report, notes=(*report.notes, warning))
    return _finish(source, kind, _done(report, listener), rows, listener)


def _of_run(
    run: Run, kind: str, path: Path | None, text: str | None, listener: Listener, *, offline: bool
) -> ExportResult:
    from fleetune.deploy import export as exporting
    from fleetune.deploy import provenance

    recipe, target = run.recipe, targets.find(kind)
    out = path or target.place(run.folder)
    check_place(kind, out)
    if recipe.train == SCALES:
        _check_of_blocks(target, run)
    _require_codes(target, str(run.folder))
    base, made = Plain(recipe.model), provenance.of_run(run.folder, recipe)
    if target.takes == "adapter":
        from fleetune.tuning.result import finished

        exporting.check_adapter(run.folder / finished.RESULT["adapter"], kind)
        adapter = run.result
        source = base.directory(offline=offline) if target.states("BASE") else None
        report = exporting.export_adapter(adapter, source, kind, out, made=made)
        return ExportResult(out, _done(report, listener))
    if recipe.train == SCALES and kind in FILES:
        report = _with_other_blocks(run, kind, out, listener, offline=offline)
        rows = _rows(base.directory(offline=offline), text) if text else []
        return _finish(run.folder, kind, _done(report, listener), rows, listener, offline=offline)
    rows = _rows(base.directory(offline=offline), text)
    if kind == DEFAULT_TARGET_OF_A_RUN:
        done = _plain_directory(run, out, listener, offline=offline)
        return _finish(run.folder, kind, done, rows, listener, offline=offline)
    with _scratch(out) as folder:
        plain = folder / run.folder.name
        _write_tuned(run, plain, offline=offline)
        with called(plain, run.folder):
            return write(plain, kind, out, listener, made, rows)


def of_adapter(
    adapter: Path, to: str | None, path: Path | None, listener: Listener, *, offline: bool
) -> ExportResult:
    """Write the adapter in a folder of PEFT, of the base that it names, as target `to` to `path` (default: here).

    ModelError for a target that takes whole models, with how to merge it, and where its base is not found; the rest as in
    `export.export_adapter`.
    """
    target = targets.find(to or DEFAULT_TARGET)
    if target.takes != "adapter":
        taken = " or ".join(name for name, other in targets.every().items() if other.takes == "adapter")
        refused = names.adapter_refused(adapter, adapter)
        refused.hint = f"--to {taken} takes it as it is; {refused.hint}"
        raise refused
    if not (adapter / names.ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{adapter} has no {names.ADAPTER_WEIGHTS}, which is all that is read of an adapter's weights",
            hint="save it again with PEFT, which writes it so",
        )
    out = path or target.place(Path("."), adapter.resolve().name)
    check_place(target.name, out)
    from fleetune.deploy import export as exporting
    from fleetune.deploy import provenance

    exporting.check_adapter(adapter, target.name)
    base = names.adapter_base(adapter)
    source = _base_of_adapter(adapter, base, offline=offline) if target.states("BASE") else None
    made = provenance.of_base(base)
    return ExportResult(
        out, _done(exporting.export_adapter(adapter, source, target.name, out, made=made), listener)
    )


def _base_of_adapter(adapter: Path, base: str, *, offline: bool) -> Path:
    """Return the directory of the base that an adapter names; ModelError, with what to change, where it is not found."""
    try:
        return Plain(base).directory(offline=offline)
    except ModelError as error:
        raise ModelError(
            f"{adapter} says that it is of the base '{base}': {error.message}",
            hint=f"write the base's path or hub id as {names.BASE} into {adapter / names.ADAPTER_CONFIG}",
        ) from error


def _with_other_blocks(run: Run, kind: str, out: Path, listener: Listener, *, offline: bool) -> Report:
    """Write the GGUF file that a run was tuned on with the scales that it has found; all else stays as it is."""
    from fleetune import models
    from fleetune.common.folders import staged
    from fleetune.deploy import patch, patch_make
    from fleetune.deploy.formats import ollama

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, out) from error
    source = patch_make.file_of(run.recipe.model, offline=offline)
    with called(source, run.recipe.model):
        made = patch_make.of_run(
            source, run.folder, name=run.recipe.model, offline=offline, listener=listener
        )
        if kind == DEFAULT_TARGET:
            patch.apply(source, made, out, listener)
            return patch_make.report(out)
    with staged(out) as folder:
        file = folder / ollama.FILE
        patch.write(source, made, file, listener)
        report = patch_make.report(file)
        notes = ollama.add_modelfile(models.load_tokenizer(run.recipe.model, offline=offline), folder)
    size = compression_folder.size(out)
    return dataclasses.replace(report, path=out, to=kind, bytes=size, notes=(*report.notes, *notes))


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Give a hidden folder beside `out`, for what is written on the way there; StorageError when it cannot be made."""
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(scratch(out.parent, "export"))
        except OSError as error:
            raise storage_error(error, out) from error
        yield folder


def _write_tuned(run: Run, out: Path, listener: Listener | None = None, *, offline: bool) -> str:
    """The run's tuned weights as a plain directory; the digest of its weights."""
    from fleetune.deploy.formats import _gguf_vocabulary
    from fleetune.tuning.result import finished
    from fleetune.tuning.run import model_card

    model = run.load(offline=offline)
    card = model_card.of_run(run.folder, encoder=bool(model.labels))
    if listener is not None:
        for note in _gguf_vocabulary.give_template(model.tokenizer):
            listener.note(f"note: {note}")
    return finished.export_hf(model, out, card=card)


def _plain_directory(run: Run, out: Path, listener: Listener, *, offline: bool) -> ExportDone:
    digest = _write_tuned(run, out, listener, offline=offline)
    done = ExportDone(
        to=DEFAULT_TARGET_OF_A_RUN, path=str(out), digest=digest, bytes=compression_folder.size(out)
    )
    listener.event(done)
    return done


def _done(report: Report, listener: Listener) -> ExportDone:
    done = ExportDone(**{**dataclasses.asdict(report), "path": str(report.path)})
    listener.event(done)
    for note in report.notes:
        listener.note(f"note: {note}")
    return done


def _rows(source: Path, text: str | None) -> list[Row]:
    """The windows of the text in the tokens of the model in `source`; none without a text."""
    from fleetune.deploy.measure import harness

    return harness.windows_of(text, source, LENGTH, WINDOWS) if text else []


def _finish(
    source: Path,
    kind: str,
    done: ExportDone,
    rows: Sequence[Row],
    listener: Listener,
    *,
    offline: bool = False,
) -> ExportResult:
    """Compare the perplexity of a text by the source in torch with that by what was written, in its runtime."""
    from fleetune.deploy.measure import harness

    out, target = Path(done.path), targets.find(kind)
    if not rows:
        return ExportResult(out, done)

    def perplexity(engine: str, path: Path) -> float:
        job = harness.MeasureJob(engine, str(path), 1, offline=offline, repeats=0, windows=list(rows))
        return harness.measured(job).values["perplexity"]

    if why := _obstacle(target, out):
        checked = ExportChecked(path=str(out), runtime=None)
        listener.event(checked)
        listener.note(f"not run: {why}")
        return ExportResult(out, done, checked)
    runtime, tokens = target.states("RUNTIME"), sum(len(row) - 1 for row, _ in rows)
    own = perplexity("run" if (source / "run.toml").is_file() else "artefact", source)
    theirs = perplexity(RUNTIMES[runtime], out)
    checked = ExportChecked(
        path=str(out), runtime=runtime, source=own, file=theirs, tokens=tokens, ratio=theirs / own
    )
    listener.event(checked)
    return ExportResult(out, done, checked)


def _obstacle(target: targets.Target, out: Path) -> str:
    """Return why what was written cannot be run here; "" when it can."""
    runtime = target.states("RUNTIME")
    if runtime not in RUNTIMES:
        return f"nothing here runs {target.name}"
    if target.missing:
        return f"{runtime} for {target.name}: {target.install}"
    from fleetune import models
    from fleetune.models.families import widths

    if runtime == "transformers" and widths.has_block_widths(models.load_config(str(out))):
        return f"{runtime} does not load blocks of different widths; llama.cpp does, a llama's: --to gguf"
    return ""
