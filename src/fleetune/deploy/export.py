"""Export a run, a compressed model or a plain model, and check the file in the runtime that it is for.

The whole file or folder appears, or nothing does.  A format may hold where the model comes from (docs/export.md), without time
and path: the same work gives the same bytes.  `tunable_file` is the GGUF file of a compressed model, to tune its scales in.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from fleetune import models
from fleetune import subject as subjects
from fleetune.common import sums
from fleetune.common.display import command, human_bytes, quoted
from fleetune.common.events import ExportChecked, ExportDone
from fleetune.common.files import appeared, default_mode, locked, scratch, staged, storage_error
from fleetune.common.ggml import HALVES, SCALES
from fleetune.data.columns import sentence
from fleetune.deploy import harness, patch_make, targets
from fleetune.deploy.again import Again, DiffersError
from fleetune.deploy.checkpoint import Checkpoint, InMemory, Tuned, open_checkpoint
from fleetune.deploy.formats import Misfit, Report, _gguf_vocabulary, gguf, hf, ollama
from fleetune.deploy.targets import Target, check_place, find
from fleetune.errors import StorageError, UsageError, called
from fleetune.models.artefact import ArtefactHead, Master
from fleetune.models.cache import names
from fleetune.models.families import table
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.families.widths import has_block_widths, mark_config
from fleetune.models.gguf.convert import ARCHITECTURES
from fleetune.models.net.model import Model, stored_tensors
from fleetune.models.net.saving import disk_errors, head_in_turn
from fleetune.report.page import framed_table
from fleetune.runs import compression_folder, rundir
from fleetune.runs.listener import Listener
from fleetune.subject import Compressed, Plain, Run, Subject
from fleetune.tuning.recipe import objects
from fleetune.tuning.result import finished
from fleetune.tuning.run import model_card

NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
DEFAULT_TARGET: Final = "gguf"
DEFAULT_TARGET_OF_A_RUN: Final = "hf"
FILES: Final = ("gguf", "ollama")  # targets that hold the GGUF file itself
RUNTIMES: Final = {"llama.cpp": "gguf", "transformers": "transformers"}  # -> the kind of a `MeasureJob`
WINDOWS: Final = 8  # of the text that an export is checked on
LENGTH: Final = 512  # tokens of one
GGUF: Final = ".gguf"


@dataclass(frozen=True)
class ExportResult:
    """A written file or folder, and what checking it found."""

    path: Path
    done: ExportDone
    check: ExportChecked | None = None  # where a text was given

    def _repr_html_(self) -> str:
        done, exact = self.done, f"{self.done.exact} of {self.done.tensors} tensors hold the source's values"
        facts = [("written", str(self.path)), ("target", done.to), ("size", human_bytes(done.bytes))]
        facts += [("read back", exact if done.tensors else ""), ("notes", "; ".join(done.notes or ()))]
        return framed_table("Export", facts, [], [])


def export(
    subject: Subject,
    to: str | None,
    path: Path | None,
    text: str | None,
    listener: Listener,
    *,
    offline: bool,
) -> ExportResult:
    """Write `subject` as target `to` (default: gguf; of a run of weights hf, unless `path` ends in .gguf) and read it back.

    Without `path` it is beside the subject.  With a `text` file its perplexity is measured by the source and by what was written,
    in its runtime.  `targets.check` comes before; errors as of `write`.
    """
    if isinstance(subject, Run):
        is_gguf = subject.recipe.train == SCALES or (path and path.suffix.lower() == GGUF)
        own = DEFAULT_TARGET if is_gguf else DEFAULT_TARGET_OF_A_RUN
        return _of_run(subject, find(to or own), path, text, listener, offline=offline)
    target = find(to or DEFAULT_TARGET)
    if isinstance(subject, Compressed):
        return _checked(subject.model, target, path or target.place(subject.home), NOTHING, text, listener)
    _require_codes(target, subject.name)
    if subject.name.endswith(GGUF) and target.name in FILES:
        listener.note(
            f"note: {subject.name} is a GGUF file already: its blocks are read as plain numbers, and these are written "
            "in 16 bits a weight, which may be larger"
        )
    source = subject.directory(offline=offline)
    out = path or target.place(Path("."), rundir.of_model(subject.name))
    with called(source, subject.name):
        return _checked(source, target, out, facts_of_base(subject.name), text, listener)


def _of_run(
    run: Run, target: Target, path: Path | None, text: str | None, listener: Listener, *, offline: bool
) -> ExportResult:
    signed = (run.folder / sums.SIGNATURE).is_file()  # a release, to which nothing is added
    usual = target.place(Path("."), run.folder.name) if signed else target.place(run.folder)
    recipe, out = run.recipe, path or usual
    check_place(target, out)
    _require_codes(target, str(run.folder))
    base = Plain(recipe.model)
    if target.takes == "adapter":
        target.load().check(run.folder / finished.RESULT["adapter"], target.kind)
        source = base.directory(offline=offline)
        report = write_adapter(run.result, source, target.name, out, made=_facts_of_run(run))
        if sentence(recipe.columns) is not None:
            listener.note("note: the system sentence is not in this file: the runtime has to be given it")
        return ExportResult(out, _done(report, listener))
    rows = _rows(base.directory(offline=offline), text) if text else []
    if recipe.train == SCALES and target.name in FILES:
        done = _done(_with_other_scales(run, target, out, listener, offline=offline), listener)
        return _finish(run.folder, target, done, rows, listener, offline=offline)
    if target.name == DEFAULT_TARGET_OF_A_RUN:
        digest = _write_tuned(run, out, listener, offline=offline)
        done = ExportDone(to=target.name, path=str(out), digest=digest, bytes=compression_folder.size(out))
        listener.event(done)
        return _finish(run.folder, target, done, rows, listener, offline=offline)
    with opened(run, offline=offline) as (model, made):
        report = write(model, target.name, out, made=made)
    return _finish(run.folder, target, _done(report, listener), rows, listener, offline=offline)


@contextmanager
def opened(
    subject: Subject, tuned: Tuned | None = None, *, offline: bool
) -> Iterator[tuple[Checkpoint, Mapping[str, str]]]:
    """Open what a subject is exported from, a run's as it was tuned, and what is told of it.

    LedgerError where a ledger does not rebuild the weights that it states.
    """
    if isinstance(subject, Compressed):
        yield open_checkpoint(subject.model), NOTHING
    elif isinstance(subject, Plain):
        source = subject.directory(offline=offline)
        with called(source, subject.name):
            yield open_checkpoint(source), facts_of_base(subject.name)
    else:
        tuned = tuned or _tuned(subject, offline=offline)
        with tempfile.TemporaryDirectory() as place, called(folder := Path(place), subject.folder):
            yield Checkpoint(InMemory(tuned, folder / "model")), _facts_of_run(subject)


def _tuned(run: Run, *, offline: bool) -> Tuned:
    """Load a run's model; LedgerError where a ledger does not rebuild the weights that it states."""
    stated = None if run.result.is_dir() else run.ledger().final_check()
    tuned = Tuned(run.load(offline=offline))
    if stated is not None:
        finished.require_digest(models.digest(tuned.tensors()), stated, "the ledger")
    return tuned


def _require_codes(target: Target, name: str) -> None:
    """UsageError when a target is for the codes of a compressed model alone, which the subject has not."""
    if target.takes == "codes":
        raise UsageError(
            f"{name} holds no codes of a compression, and {target.name} is for compressed ones",
            hint=f"compress it first: fleetune compress {quoted(name)}; or use --to hf",
        )


def _checked(
    source: Path, target: Target, out: Path, made: Mapping[str, str], text: str | None, listener: Listener
) -> ExportResult:
    """Export the folder `source`, and run what was written and `source` on the same windows of a text, if there is one."""
    rows = _rows(source, text) if text else []
    report = write(source, target.name, out, made=made)
    return _finish(source, target, _done(report, listener), rows, listener)


def _rows(source: Path, text: str) -> list[harness.Row]:
    return harness.windows_of(text, source, LENGTH, WINDOWS)


def _with_other_scales(run: Run, target: Target, out: Path, listener: Listener, *, offline: bool) -> Report:
    """Write the GGUF file that a run was tuned on with the scales that it has found; all else stays as it is."""
    name, notes = run.recipe.model, list[str]()
    source = patch_make.file_of(name, offline=offline)
    with called(source, name), _staged(target, out) as place:
        file = place if target.suffix else place / ollama.FILE
        patch_make.write_run(source, run.folder, file, name=name, offline=offline, listener=listener)
        report = patch_make.report(file)
        if not target.suffix:
            notes = ollama.add_modelfile(models.load_tokenizer(name, offline=offline), place)
    size = compression_folder.size(out)
    return dataclasses.replace(report, path=out, to=target.name, bytes=size, notes=(*report.notes, *notes))


def _write_tuned(run: Run, out: Path, listener: Listener | None = None, *, offline: bool) -> str:
    """Write the run's tuned weights as a plain directory; return their digest.

    LedgerError where a ledger does not rebuild the weights that it states.
    """
    stated = None if run.result.is_dir() else run.ledger().final_check()
    model = run.load(offline=offline)
    card = model_card.of_run(run.folder, encoder=bool(model.labels))
    if listener is not None:
        for note in _gguf_vocabulary.give_template(model.tokenizer):
            listener.note(f"note: {note}")
    return finished.export_hf(model, out, card=card, stated=stated)


def _done(report: Report, listener: Listener) -> ExportDone:
    done = ExportDone(**{**dataclasses.asdict(report), "path": str(report.path)})
    listener.event(done)
    for note in report.notes:
        listener.note(f"note: {note}")
    return done


def _finish(
    source: Path,
    target: Target,
    done: ExportDone,
    rows: Sequence[harness.Row],
    listener: Listener,
    *,
    offline: bool = False,
) -> ExportResult:
    """Compare the perplexity of a text by the source in torch with that by what was written, in its runtime."""
    out = Path(done.path)
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


def _obstacle(target: Target, out: Path) -> str:
    """Return why what was written cannot be run here; "" when it can."""
    runtime = target.states("RUNTIME")
    if runtime not in RUNTIMES:
        return f"nothing here runs {target.name}"
    if target.missing:
        return f"{runtime} for {target.name}: {target.install}"
    if runtime == "transformers" and has_block_widths(models.load_config(str(out))):
        return f"{runtime} does not load blocks of different widths; llama.cpp does, a llama's: --to gguf"
    return ""


# ---------------------------------------------------------------- one source to one file or folder


def write(source: Path | Checkpoint, to: str, out: Path, *, made: Mapping[str, str] = NOTHING) -> Report:
    """Write the model in the folder `source` as target `to` to the new file or folder `out`.

    `source` is a master artefact or a plain Hugging Face directory, perhaps opened; `made`, where it comes from, goes into the
    file where the format has a place for it.  Everything written is read back and compared.  UsageError for an unknown target, an
    `out` that exists, or a model that the target cannot hold; ModelError for a source that is none; StorageError when the
    disk is full.  `out` appears when it is complete.
    """
    target = find(to)
    check_place(target, out)
    if target.takes == "adapter":
        raise UsageError("only a run has an adapter", hint=f"fleetune export RUN --to {to}")
    model = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    _check_widths(model, target)
    with _staged(target, out) as place, _hinted(model):
        report: Report = target.load().write(model, place, target.kind, _told(model, target, made))
    return dataclasses.replace(report, path=out)


def compare(
    model: Checkpoint, target: Target, again: Again, place: Path, made: Mapping[str, str] = NOTHING
) -> None:
    """Compare a file or folder with what `write` writes; what is not compared meanwhile is written to the new `place`.

    DiffersError for the first difference; UsageError as of `write`.
    """
    model.again = again
    _check_widths(model, target)
    if not target.suffix:
        place.mkdir()
    target.load().write(model, place, target.kind, _told(model, target, made))


def is_written(path: Path, model: Checkpoint, target: Target) -> bool:
    """Return whether a file is, byte for byte, what `write` makes there."""
    try:
        with tempfile.TemporaryDirectory() as place:
            compare(model, target, Again(path), Path(place) / path.name)
    except DiffersError:
        return False
    return True


def compare_tuned(tuned: Tuned, again: Again, place: Path) -> None:
    """Compare a folder with what `export` writes of a run as `hf`, as `compare` does."""
    _gguf_vocabulary.give_template(tuned.model.tokenizer)
    source = InMemory(tuned, place)
    tensors = ((name, source.weight(name)) for name in source.names)
    again.compare_tensors(hf.FILE, tensors, partial(head_in_turn, metadata=hf.METADATA))


def _check_widths(model: Checkpoint, target: Target) -> None:
    if has_block_widths(model.config) and not target.states("BLOCK_WIDTHS"):
        raise UsageError(
            f"{model.folder} has blocks of different widths, which {target.name} has no place for",
            hint=_others(model, "prune it again with --set first=0 --set last=0"),
        )


def _told(model: Checkpoint, target: Target, made: Mapping[str, str]) -> Mapping[str, str]:
    if not target.states("PROVENANCE"):
        return made
    held = model.source
    return {**made, **facts_of_head(held.head, held.digest())} if isinstance(held, Master) else made


def write_adapter(
    adapter: Path, base: Path, to: str, out: Path, *, made: Mapping[str, str] = NOTHING
) -> Report:
    """Write the adapter in the PEFT directory `adapter`, of the model in the folder `base`, to the new `out`.

    UsageError for an `out` that exists or an adapter that the target has no place for; ModelError for one of another base.
    """
    target = find(to)
    check_place(target, out)
    target.load().check(adapter, target.kind)
    model = open_checkpoint(base)
    with _staged(target, out) as place, _hinted(model):
        report: Report = target.load().write(adapter, model, place, target.kind, made)
    return dataclasses.replace(report, path=out)


def _others(model: Checkpoint, remedy: str = "") -> str:
    """Return a hint for a model that a target refused: the targets that hold it exactly, then the `remedy`."""
    able = []
    for name in targets.FORMATS.members():
        exact = getattr(targets.FORMATS.load(name), "exact_target", None)
        if exact is not None and (target := exact(model)) is not None:
            able.append(f"--to {target}")
    exactly = " or ".join(filter(None, [", ".join(able[:-1]), *able[-1:]]))
    return f"use {exactly}" + (f", or {remedy}" if remedy else "")


@contextmanager
def _hinted(model: Checkpoint) -> Iterator[None]:
    """Name the targets that can hold the model where the format says that it cannot."""
    try:
        yield
    except Misfit as misfit:
        raise UsageError(misfit.message, hint=_others(model, misfit.remedy)) from misfit


@contextmanager
def _staged(target: Target, out: Path) -> Iterator[Path]:
    """The place to write to: it becomes `out` when the block ends without an error."""
    if target.suffix:
        with _staged_file(out) as file:
            yield file
    else:
        with staged(out) as folder, disk_errors(out):
            yield folder


@contextmanager
def _staged_file(out: Path) -> Iterator[Path]:
    """The path of a file in a hidden folder beside `out`, moved to `out` when the block ends without an error."""
    try:
        with _scratch(out) as folder:
            file = folder / out.name
            yield file
            with file.open("rb+") as written:
                os.fsync(written.fileno())
            file.chmod(default_mode())
            try:
                os.link(file, out)  # which fails where a rename would replace what has appeared there
            except FileExistsError:
                raise appeared(out) from None
            except OSError:  # a file system without hard links
                # not `out` itself, whose lock sweeps its hidden folders
                with locked(out.with_name(f"{out.name}.new")):
                    if out.exists():
                        raise appeared(out) from None
                    file.rename(out)
    except OSError as error:
        raise storage_error(error, out) from error


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Give a hidden folder beside `out`, for what is written on the way there; StorageError when it cannot be made."""
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(scratch(out.parent, out.name))
        except OSError as error:
            raise storage_error(error, out) from error
        yield folder


# ---------------------------------------------------------------- where a model comes from


def facts_of_head(head: ArtefactHead, digest: str) -> dict[str, str]:
    """Return where an artefact with this head, and the digest of its file, comes from."""
    return _facts(head.method, head.settings, head.base) | {"fleetune.artefact_digest": digest}


def _facts_of_run(run: Run) -> dict[str, str]:
    recipe, base = run.recipe, rundir.made_on(run.folder)["base"]
    return _facts(recipe.method, objects.method_settings(recipe), base) | facts_of_base(recipe.model)


def facts_of_base(name: str) -> dict[str, str]:
    """Return the licence of a built-in model or a short name; {} for others."""
    licence = names.licence_of(name)
    return {} if licence is None else {"general.license": licence}


def _facts(method: str, settings: Mapping[str, Any], base: str) -> dict[str, str]:
    text = json.dumps(dict(settings), sort_keys=True, separators=(",", ":"))
    every = {"fleetune.method": method, "fleetune.settings": text, "fleetune.base_digest": base}
    return {key: value for key, value in every.items() if value}


# ---------------------------------------------------------------- the size of a file to come


class _Names:
    """The names of a model's tensors, as a source that is asked for no values."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.folder = folder
        self.names = [name for name, _ in stored_tensors(model.net)]

    def quantised(self, name: str) -> None:
        """Return None: nothing is compressed yet."""

    def weight(self, name: str) -> Tensor:
        """Raise KeyError: there are no values."""
        raise KeyError(name)


def size_beside(model: Model, quantised: Collection[str], head: ArtefactHead, name: str) -> int:
    """Return the bytes of a model's GGUF file beside the matrices `quantised`: the header and all other tensors.

    `head` is that of the artefact to come, `name` the file's, without its ending: the header holds it.  UsageError when the
    model has no place in GGUF.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.net.config.save_pretrained(folder)
        mark_config(folder)
        model.tokenizer.save_pretrained(folder)
        try:
            checkpoint = Checkpoint(_Names(model, folder))
            checkpoint.compressed = True
            checkpoint.dtype = getattr(torch, WEIGHTS[model.dtype].full)
            without = {name for name in checkpoint.names if checkpoint.stored[name] in quantised}
            made = facts_of_head(head, "0" * 64)
            return gguf.size_beside(checkpoint, without, folder / f"{name}.gguf", made)
        except UsageError as error:
            told = error.message.replace(place, model.name)
            raise UsageError(
                f"grids are chosen among those of GGUF files, and none can be made of this model: {told}",
                hint="choose one grid for all: --set grid=.. --set bits=..",
            ) from error


def model_to_tune(name: str, runs: str | Path, note: Callable[[str], None]) -> str:
    """Return the model that BASE of `fleetune patch make` means: of a compression its `tunable_file`; others as they are.

    UsageError for a run.
    """
    if Path(name).is_file():
        return name
    base = subjects.open(name, runs)
    if isinstance(base, Run):
        hint = command("patch", "make", base.recipe.model, name, "--to", "FILE")
        raise UsageError(f"{name} is a run: the model comes first, then the run", hint=hint)
    return str(tunable_file(base, note)) if isinstance(base, Compressed) else name


def tunable_file(model: Compressed, note: Callable[[str], None]) -> Path:
    """Return the GGUF file of a compressed model; it is written unless it is there, and `note` is told so in a line.

    UsageError, before anything is written, for codes that no blocks with scales hold, and where something else is in the
    file's place.
    """
    kinds_of(model)
    place, source = find(DEFAULT_TARGET).place(model.home), model.model
    try:
        report = write(source, DEFAULT_TARGET, place)
    except (StorageError, UsageError):  # it is there from before, or a process was faster
        if not place.exists():
            raise
        opened = open_checkpoint(source)
        if not place.is_file() or not is_written(place, opened, find(DEFAULT_TARGET)):
            raise UsageError(
                f"{place} is not what fleetune export --to {DEFAULT_TARGET} writes of {model.argument}",
                hint=f"move {quoted(place)} away; or, if it is the file to tune, give it as the model",
            ) from None
        note(f"the scales are tuned in a GGUF file, {place}, which is there already")
        return place
    written = f"now written ({human_bytes(report.bytes)})"
    note("; ".join([f"the scales are tuned in a GGUF file, {place}, {written}", *report.notes]))
    return place


def kinds_of(model: Compressed) -> dict[str, str]:
    """Return the types of the layers' matrices in a compressed model's GGUF file, by layer.

    UsageError where the file would have no scales, or would not be read.
    """
    opened, request = open_checkpoint(model.model), model.request
    why, experts = table.misfit(opened.config), any(".experts." in name for name in opened.names)
    if why is None and ((family := table.architecture(opened.config)) not in ARCHITECTURES or experts):
        what = "mixtures of experts" if experts else f"models of architecture {family}"
        why = f"GGUF files of {what} are not read, so no scales of one are tuned"
    if why is not None:
        raise UsageError(
            f"{model.argument}: {why}",
            hint=f"export it and tune all weights: {command('export', model.argument, '--to', 'hf')}",
        )
    again = command("compress", "MODEL" if request is None else request.model, "--set", "grid=ggml")
    able = f"--train scales is for blocks of {', '.join(HALVES)}"
    try:
        kinds = gguf.layer_types(opened)
    except UsageError as error:
        raise UsageError(f"{error.message}; {able}", hint=f"compress again: {again}") from error
    if not set(kinds.values()) & set(HALVES):
        raise UsageError(
            f"the layers of {model.argument} are {', '.join(sorted(set(kinds.values())))} in a GGUF file; {able}",
            hint=f"compress again: {again}",
        )
    return {name.removesuffix(".weight"): kind for name, kind in kinds.items()}
