"""Measure models side by side, each in a process of its own; and the share of tuning's gain that compression keeps.

Lines are compared with a reference by KL divergence and same top token.  The reference is the model that is named, else the model
from which a compression was made, and then the compressed lines alone are compared.  It is run first.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from transformers import AutoTokenizer

from fleetune import data
from fleetune.common import paired
from fleetune.common.display import (
    COMPARED,
    change,
    counted,
    human_bytes,
    is_noise,
    metric,
    quoted,
    show,
    show_with_error,
)
from fleetune.common.events import Measured, MeasureDone, as_dict
from fleetune.common.files import finite, write_atomic
from fleetune.common.ggml import SCALES
from fleetune.compression.jobs import solve
from fleetune.data import Example, readers
from fleetune.data.encode import encode_all
from fleetune.deploy import export, harness, llamacpp, patch_make
from fleetune.deploy.harness import FILE, KeptGain, MeasureJob, Measurement, Row
from fleetune.errors import FleetuneError, UsageError
from fleetune.evaluation import kl_divergence
from fleetune.report.page import framed_table
from fleetune.runs import compression_folder
from fleetune.runs.listener import Listener
from fleetune.subject import ROW, Compressed, Plain, Run, Subject, check_same_tokens

COMPRESSED_BASE: Final = "compressed base"
SMALL: Final = ("artefact", "gguf")  # kinds of the lines that compression made


@dataclass(frozen=True)
class MeasureOptions:
    """Options of `fleetune measure`: what to measure, and on which text and rows."""

    text: str | None = None  # plain text file, for perplexity
    windows: int = 16  # of the text at most
    length: int = 512  # tokens of a window
    data: str | None = None  # rows for the loss
    limit: int = 200  # rows at most
    threads: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3
    kept_gain: bool = False


@dataclass(frozen=True)
class MeasureResult:
    """All lines of the table, and the kept gain."""

    rows: tuple[Measured, ...]
    kept: KeptGain | None
    folder: Path | None  # of the compression that it is written into

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the headings and the lines of the table, as text."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.values))
        heads = ["", "engine", "size", "bits/weight", "overall", "peak", "read tok/s", "write tok/s"]
        rows = [
            [
                r.name,
                r.engine,
                human_bytes(r.bytes),
                f"{r.bits_linear:.2f}",
                f"{r.bits:.2f}",
                human_bytes(r.peak_rss),
                *(f"{speed:.1f}" if speed else "" for speed in (r.prefill, r.generate)),
                *(_shown(r, name) if name in r.values else "" for name in names),
            ]
            for r in self.rows
        ]
        return [*heads, *(metric(name).label for name in names)], rows

    def _repr_html_(self) -> str:
        return framed_table("Measured", [("kept", self.kept.text if self.kept else "")], *self.table())


def _shown(row: Measured, name: str) -> str:
    value = row.values[name]
    if name in COMPARED:
        return show_with_error(name, value, getattr(row, f"{name}_error"))
    if name != "loss" or row.change is None:
        return show(name, value)
    words = change(name, value - row.change, value, row.change_error)
    noise = is_noise(name, value - row.change, value, row.change_error)
    return f"{show(name, value)} ({words}{', noise' if noise else ''})"


def measure(
    subjects: Sequence[Subject],
    options: MeasureOptions,
    listener: Listener,
    *,
    reference: Subject | None = None,
    offline: bool,
) -> MeasureResult:
    """Measure every line of the subjects, and compare it with the model `reference`.

    UsageError for contradictions, before anything is loaded; `check_kept` comes before where `options` ask for the kept gain.
    """
    check(options)
    measurables = [of(subject, offline=offline) for subject in subjects]
    length, examples = _row_length(options, measurables), _examples(options, measurables, offline=offline)
    if not examples and options.kept_gain:
        raise UsageError("a kept gain needs rows", hint="--data FILE")
    against = reference_of(measurables, reference, offline=offline)
    windows = _windows(options, measurables)
    rows = _compared_rows(options, against, examples, length)
    _header(options, measurables, examples, windows, listener)
    table = chosen(measurables, listener)
    if options.kept_gain and measurables[0].folder:
        path = solve.compressed_base(listener, measurables[0].folder, export.size_beside, offline=offline)
        table.append((measurables[0], line_of(COMPRESSED_BASE, "artefact", path, path)))
    done: list[Measured] = []
    losses: dict[str, list[tuple[float, int]]] = {}
    with logits_of(against, rows, listener, threads=options.threads, offline=offline) as logits:
        for measurable, line in table:
            job = _job(options, measurable, line, (examples, length), windows[measurable.tokenizer], offline)
            if logits and against and against.compares(line):
                job = replace(job, compared=rows, logits=str(logits))
            try:
                result = harness.measured(job)
            except FleetuneError as error:
                if line.kind != "gguf":  # of an engine that is not ours: the other rows stay worth their time
                    raise
                listener.note(f"{line.name} is left out, {line.engine} does not run it: {error.message}")
                continue
            first = next(iter(losses.values()), [])
            losses.setdefault(line.name, result.losses)
            done.append(_report(line, result, first, listener))
    return _finish(options, measurables, done, losses, listener, against)


def check(options: MeasureOptions) -> None:
    """UsageError for contradictions, before anything is loaded."""
    for name in (option.name for option in fields(options) if option.type == "int"):
        value, least = getattr(options, name), 2 if name == "length" else 1
        problem = f"is below {least}" if isinstance(value, int) else "is not an integer"
        if not isinstance(value, int) or value < least:
            raise UsageError(f"{name} = {value!r} {problem}", hint="fleetune measure --help")
    if options.text and not Path(options.text).is_file():
        raise UsageError(f"no text file at {options.text}", hint="check the path")
    if options.text:
        readers.require_text(options.text, hint=f"--data {quoted(options.text)}")


# What it is measured on -------------------------------------------------------------------------------


def _row_length(options: MeasureOptions, measurables: Sequence[Measurable]) -> int:
    """Return the most tokens of a row, the same for all; UsageError when an option exceeds a model's context."""
    most, name = min((harness.longest(one.tokenizer), one.name) for one in measurables)
    asked = max(options.prompt_tokens + options.new_tokens, options.length if options.text else 0)
    if asked > most:
        raise UsageError(
            f"{asked} tokens are more than the {most} that {name} is made for",
            hint="smaller --length, --prompt-tokens or --new-tokens",
        )
    return min(measurables[0].length if len(measurables) == 1 else ROW, most)


def _examples(options: MeasureOptions, measurables: Sequence[Measurable], *, offline: bool) -> list[Example]:
    examples: list[Example] = []
    if options.data:
        examples = data.read(options.data, offline=offline)
    elif len(measurables) == 1 and isinstance(subject := measurables[0].subject, Run | Compressed):
        examples = subject.held_out(offline=offline)
    return examples[: options.limit]


def _windows(options: MeasureOptions, measurables: Sequence[Measurable]) -> dict[Path, list[Row]]:
    """Return tokenizer -> windows of the text; DataError when the text is too short to predict anything."""
    folders = {one.tokenizer for one in measurables}
    if not options.text:
        return {folder: [] for folder in folders}
    return {f: harness.windows_of(options.text, f, options.length, options.windows) for f in folders}


def _compared_rows(
    options: MeasureOptions, reference: ReferenceLine | None, examples: Sequence[Example], length: int
) -> list[Row]:
    """Return what models are compared with the reference on, in its tokens: windows of the text, else the rows' answers.

    UsageError when a reference is named and there is neither.
    """
    if reference is None:
        return []
    if options.text:
        return harness.windows_of(options.text, reference.tokenizer, options.length, options.windows)
    if reference.named and not examples:
        raise UsageError("there is nothing to compare on", hint="--text FILE, or rows with --data FILE")
    return _encoded(examples, reference.tokenizer, length)


def _encoded(examples: Sequence[Example], tokenizer: Path, length: int) -> list[Row]:
    """Return the examples as rows of at most `length` tokens."""
    if not examples:
        return []
    words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    return [(row.ids.tolist(), row.n_prompt) for row in encode_all(examples, words, length)[0]]


def _job(
    options: MeasureOptions,
    measurable: Measurable,
    line: EngineLine,
    rows: tuple[Sequence[Example], int],
    windows: list[Row],
    offline: bool,
) -> MeasureJob:
    """Return the job of the child process that measures a line; `rows` are the examples and their most tokens."""
    examples, length = rows
    return MeasureJob(
        kind=line.kind,
        path=line.path,
        threads=options.threads,
        dtype=line.dtype,
        offline=offline,
        prompt=options.prompt_tokens,
        generate=options.new_tokens,
        repeats=0 if line.name == COMPRESSED_BASE else options.repeats,  # as fast as the compressed model
        rows=_encoded(examples, measurable.tokenizer, length),
        windows=windows,
    )


# What it is compared with ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceLine:
    """The model that others are compared with."""

    line: EngineLine
    tokenizer: Path  # the folder of its tokenizer
    named: bool  # whether the user named it

    def compares(self, line: EngineLine) -> bool:
        """Return whether a line of the table is compared with it."""
        return self.named or (line.kind in SMALL and line.name != COMPRESSED_BASE)


def reference_of(
    measurables: Sequence[Measurable], named: Subject | None, *, offline: bool
) -> ReferenceLine | None:
    """Return the reference of what is measured; None where there is none.

    UsageError when the named one has other tokens than a model that is measured.
    """
    if named is not None:
        for one in measurables:
            check_same_tokens(one.subject, named, offline=offline)
        own = of(named, offline=offline)
        line = replace(_last_without(own, ("gguf",)), name=own.name)
        return ReferenceLine(line, own.tokenizer, named=True)
    if len(measurables) == 1 and measurables[0].folder is not None:
        return ReferenceLine(_last_without(measurables[0], SMALL), measurables[0].tokenizer, named=False)
    return None


def _last_without(one: Measurable, kinds: Sequence[str]) -> EngineLine:
    """Return the last line of a subject that is of none of these kinds."""
    return [line for line in one.lines if line.kind not in kinds][-1]


@contextmanager
def logits_of(
    reference: ReferenceLine | None, rows: list[Row], listener: Listener, *, threads: int, offline: bool
) -> Iterator[Path | None]:
    """Keep the logits of a reference on rows in a file while the block runs; None without a reference or rows."""
    if reference is None or not kl_divergence.scored(rows):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="fleetune-") as folder:
        line, file = reference.line, Path(folder) / "reference.npy"
        job = MeasureJob(line.kind, line.path, threads, line.dtype, offline, repeats=0, compared=rows)
        harness.measured(replace(job, logits=str(file), reference=True))
        tokens, size = kl_divergence.tokens_in(file), human_bytes(file.stat().st_size)
        listener.note(
            f"{line.name} in {line.engine} is the reference: {counted(tokens, 'token')}, {size} of logits in {folder} "
            "until the end"
        )
        yield file


# What it found ----------------------------------------------------------------------------------------


def _header(
    options: MeasureOptions,
    measurables: Sequence[Measurable],
    examples: Sequence[Example],
    windows: Mapping[Path, list[Row]],
    listener: Listener,
) -> None:
    rows = windows[measurables[0].tokenizer]
    tokens = sum(len(ids) for ids, _ in rows)
    text = f"{options.text} · {counted(len(rows), 'window')}, {counted(tokens, 'token')}"
    speed = f"{options.prompt_tokens} tokens read, {options.new_tokens} written · median of {options.repeats}"
    shown = [
        ("of", ", ".join(one.subject.argument for one in measurables)),
        ("speed", f"{speed} · threads: {options.threads}"),
        ("loss", counted(len(examples), "row") if examples else "no rows (--data)"),
        ("text", text if options.text else "none (--text)"),
    ]
    listener.header("fleetune measure", shown)


def _report(
    line: EngineLine, result: Measurement, first: Sequence[tuple[float, int]], listener: Listener
) -> Measured:
    """Report a line; `first` are the losses of the rows under the first line's model."""
    linear, whole = harness.bits(line.weights)
    own, before = _row_losses(result.losses), _row_losses(first)
    change = paired.difference(before, own) if first else None
    values: dict[str, Any] = dict(result.values)
    event = Measured(
        name=line.name,
        engine=line.engine,
        path=line.path,
        bytes=line.bytes,
        bits_linear=linear,
        bits=whole,
        peak_rss=result.peak_rss,
        prefill=result.prefill,
        generate=result.generate,
        loss_error=paired.ratio(own.sums, own.counts)[1] if result.losses else None,
        change=change and change.value,
        change_error=change and change.error,
        **values,
    )
    listener.event(event)
    told = " · ".join(f"{metric(name).label} {_shown(event, name)}" for name in event.values)
    listener.note(f"{line.name} in {line.engine}: {told}")
    return event


def _row_losses(losses: Sequence[tuple[float, int]]) -> paired.RowLosses:
    return paired.RowLosses([loss for loss, _ in losses], [count for _, count in losses])


def _finish(
    options: MeasureOptions,
    measurables: Sequence[Measurable],
    rows: Sequence[Measured],
    losses: Mapping[str, list[tuple[float, int]]],
    listener: Listener,
    reference: ReferenceLine | None,
) -> MeasureResult:
    kept = _kept(rows, losses) if options.kept_gain else None
    shown = [{name: value for name, value in as_dict(row).items() if name != "event"} for row in rows]
    gains = {"loss": asdict(kept)} if kept else {}
    folder = measurables[0].folder if len(measurables) == 1 else None
    if folder is not None:
        asked = asdict(options) | {"reference": reference and reference.line.path}
        content = {"v": 1, **asked, "rows": shown, "kept": gains}
        write_atomic(folder / FILE, json.dumps(finite(content), indent=1) + "\n")
    listener.event(MeasureDone(folder=str(folder) if folder else None, rows=shown, kept=gains))
    return MeasureResult(tuple(rows), kept, folder)


# Kept gain --------------------------------------------------------------------------------------------


def check_kept(subjects: Sequence[Subject]) -> None:
    """Raise UsageError when these are no compression of a tuned run, or one whose base cannot be compressed the same way."""
    if len(subjects) > 1:
        raise UsageError("--kept-gain is of one compressed run", hint="name its folder alone")
    (compressed,) = subjects
    if not isinstance(compressed, Compressed) or compressed.folder is None:
        hint = "compress the run first, and measure that: fleetune compress RUN"
        raise UsageError("--kept-gain is of a compressed run's folder", hint=hint)
    request = compression_folder.request_of(compressed.folder)
    if not request.run:
        raise UsageError(
            f"{compressed.folder} was made from a model, not from a run: no tuning, no gain to keep",
            hint="fleetune compress RUN",
        )
    if request.calibrate == compression_folder.FLEET:
        raise UsageError(
            f"{compressed.folder} was calibrated by devices, so the base would have to be calibrated by them as well",
            hint="leave out --kept-gain; or compress with --calibrate clients, which simulates the devices",
        )
    compression_folder.model_in(compressed.folder)
    solve.solver_of(request)


def _kept(rows: Sequence[Measured], losses: Mapping[str, list[tuple[float, int]]]) -> KeptGain:
    names = ("base", "tuned", COMPRESSED_BASE, "compressed")
    values = {row.name: row.values["loss"] for row in reversed(rows)}
    b, t, cb, ct = (values[name] for name in names)
    return harness.kept_gain(b, t, cb, ct, [losses[name] for name in names])


# The lines of the table -----------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineLine:
    """A line of the table: a model in an engine."""

    name: str
    kind: str  # of a `MeasureJob`
    path: str
    weights: Path  # whose bits are counted
    bytes: int  # on the disk
    dtype: str = "fp32"

    @property
    def engine(self) -> str:
        """The engine that runs it: torch or llama.cpp."""
        return "llama.cpp" if self.kind == "gguf" else "torch"


@dataclass(frozen=True)
class Measurable:
    """A subject with its lines."""

    name: str
    lines: tuple[EngineLine, ...]
    tokenizer: Path  # the folder of its tokenizer
    subject: Subject
    length: int = ROW  # tokens of a row at most, as in its run

    @property
    def folder(self) -> Path | None:
        """The compression's folder, where it is one."""
        return self.subject.folder if isinstance(self.subject, Compressed) else None


def of(subject: Subject, *, offline: bool) -> Measurable:
    """Return a subject with all its lines."""
    if isinstance(subject, Run):
        lines, tokenizer = _of_run(subject, offline=offline)
        return Measurable(subject.name, lines, tokenizer, subject, subject.max_length)
    if isinstance(subject, Compressed):
        return _of_compressed(subject, offline=offline)
    weights, path = subject.directory(offline=offline), Path(subject.name)
    if path.is_file():
        line = EngineLine(path.name, "model", subject.name, path, path.stat().st_size)
        return Measurable(path.name, (line, replace(line, kind="gguf")), weights, subject)
    return Measurable(path.name, (line_of(path.name, "model", subject.name, weights),), weights, subject)


def line_of(name: str, kind: str, path: Path | str, weights: Path, dtype: str = "fp32") -> EngineLine:
    """Return a line for weights in a folder."""
    return EngineLine(name, kind, str(path), weights, compression_folder.size(weights), dtype)


def chosen(measured: Sequence[Measurable], listener: Listener) -> list[tuple[Measurable, EngineLine]]:
    """Return the lines to measure: all of a single subject; of several, the last in torch of each, and its .gguf files."""
    lines: list[tuple[Measurable, EngineLine]] = []
    for one in measured:
        own = [line for line in one.lines if line.kind != "gguf"]
        if len(measured) > 1:
            own = [replace(own[-1], name=one.name)]
        # a file may be named, and lie in a folder that is
        there = {Path(line.path).resolve() for _, line in lines if line.kind == "gguf"}
        files = [line for line in one.lines if line.kind == "gguf" and Path(line.path).resolve() not in there]
        if files and not llamacpp.available():
            listener.note(
                f"{files[0].name} is not run in llama.cpp, which is not installed: {llamacpp.INSTALL}"
            )
            files = []
        lines += [(one, line) for line in (*own, *files)]
    return lines


def _of_run(run: Run, *, offline: bool) -> tuple[tuple[EngineLine, EngineLine], Path]:
    """Return the lines of base and tuned model, and the folder of the tokenizer."""
    recipe, weights = run.recipe, Plain(run.recipe.model).directory(offline=offline)
    base, result = line_of("base", "model", recipe.model, weights, recipe.dtype), run.result
    if recipe.train == SCALES:  # the file itself was tuned
        file = patch_make.file_of(recipe.model, offline=offline)
        base = replace(base, weights=file, bytes=file.stat().st_size)
    more = compression_folder.size(result) if result.is_dir() else result.stat().st_size
    tuned = replace(base, name="tuned", kind="run", path=str(run.folder), bytes=base.bytes + more)
    return (base, tuned), weights


def _of_compressed(subject: Compressed, *, offline: bool) -> Measurable:
    artefact, request = subject.model, subject.request
    if request is None or subject.folder is None:
        line = line_of(artefact.name, "artefact", artefact, artefact)
        return Measurable(artefact.name, (line,), artefact, subject)
    small = line_of("compressed", "artefact", artefact, artefact)
    found = sorted(subject.folder.glob("*.gguf"))
    files = tuple(EngineLine(f.name, "gguf", str(f), f, f.stat().st_size) for f in found)
    if request.run:
        run = Run(Path(request.model))
        lines, tokenizer = _of_run(run, offline=offline)
        return Measurable(
            subject.folder.name, (*lines, small, *files), tokenizer, subject, subject.max_length
        )
    weights = Plain(request.model).directory(offline=offline)
    base = line_of("base", "model", request.model, weights, request.dtype)
    return Measurable(subject.folder.name, (base, small, *files), artefact, subject)
