# SPDX-License-Identifier: Apache-2.0
"""`fleetune measure`: what a model costs and how good it is, base, tuned and compressed in one table.

Of a compression's folder also what of the tuning's gain is kept; that needs the base compressed the same way, which is
made once:

runs/0008-optq-smollm2-135m/
  measure.json    what came out; `fleetune export` warns by it        base/model/   the base, compressed the same way
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleetune.cli.console import Ui
from fleetune.deploy.measure.record import Done, Line, facts, tell, write
from fleetune.errors import FleetuneError, UsageError

if TYPE_CHECKING:
    from fleetune.data import Example
    from fleetune.deploy.measure.harness import KeptGain, Measurement, Row

SMALL_BASE: Final = "compressed base"
ROW: Final = 512
NUMBERS: Final = {
    "windows": 1, "length": 2, "limit": 1, "answer_tokens": 1, "threads": 1, "prompt_tokens": 1, "new_tokens": 1,
    "repeats": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What was named: the lines it has by itself, and the rows that are its own."""

    name: str
    lines: tuple[Line, ...]
    words: Path  # the folder of its tokenizer
    folder: Path | None = None  # of a compression
    run: Path | None = None
    length: int = ROW  # tokens of a row at most: as the run had them


def arguments(sub: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    sub.add_argument("subjects", metavar="FOLDER|RUN|MODEL", nargs="+")
    sub.add_argument("--text", help="plain text file for perplexity")
    sub.add_argument("--windows", type=int, default=16, help="windows of the text at most (default 16)")
    sub.add_argument("--length", type=int, default=512, help="tokens a window (default 512)")
    sub.add_argument("--data", help="rows for the loss (one run or folder: held-out rows of its own)")
    sub.add_argument("--limit", type=int, default=200, help="rows at most (default 200)")
    sub.add_argument("--tasks", default="", help="also of these rows: rouge, f1, em, accuracy")
    sub.add_argument("--answer-tokens", type=int, default=96, help="tokens of a generated answer at most")
    sub.add_argument("--labels", default="", help="label words for accuracy, comma-separated")
    sub.add_argument("--threads", type=int, default=1, help="processor threads (default 1)")
    sub.add_argument("--prompt-tokens", type=int, default=128, help="tokens of the prefill (default 128)")
    sub.add_argument("--new-tokens", type=int, default=32, help="tokens generated after it (default 32)")
    sub.add_argument("--repeats", type=int, default=3, help="passes, of which the median counts (default 3)")
    sub.add_argument(
        "--kept-gain", action="store_true",
        help="compress the base the same way (once), and say what of the tuning's gain is kept",
    )  # fmt: skip


def run(args: argparse.Namespace, ui: Ui, of_run: Sequence[Path | None]) -> None:
    """Carry out `fleetune measure`; `of_run` has the folder of each subject that is a run."""
    tasks = _check(args)
    found = [_subject(args, name, run) for name, run in zip(args.subjects, of_run, strict=True)]
    if args.kept_gain:
        _check_kept(found[0])
    length = _row_length(args, found)
    examples = _examples(args, found)
    if not examples and (tasks or args.kept_gain):
        raise UsageError("tasks and kept gain need rows", hint="--data FILE")
    windows = _windows(args, found)
    ui.header("fleetune measure", [
        ("of", ", ".join(args.subjects)),
        ("speed", f"{args.prompt_tokens} tokens read, {args.new_tokens} written · median of {args.repeats} · "
         f"threads: {args.threads}"),
        ("loss", f"{len(examples)} rows" if examples else "no rows (--data)"),
        ("text", f"{args.text} · {_size(windows[found[0].words])}" if args.text else "none (--text)"),
    ])  # fmt: skip
    lines = _lines(found, ui)
    if args.kept_gain:
        lines.append((found[0], _small_base(args, ui, found[0])))
    done = []
    for subject, line in lines:
        try:
            result = _one(args, subject, line, (examples, length), windows[subject.words], tasks)
        except FleetuneError as error:  # of an engine that is not ours; the other rows stay worth their time
            if line.kind != "gguf":
                raise
            ui.note(f"{line.name} is left out, {line.engine} does not run it: {error.message}")
            continue
        done.append(_told(ui, line, result))
    kept = _kept(done) if args.kept_gain else {}
    folder = found[0].folder if len(found) == 1 else None
    if folder is not None:
        write(args, folder, done, kept)
    tell(ui, done, kept, folder)


def _told(ui: Ui, line: Line, result: Measurement) -> Done:
    done = Done(line, result.values, facts(line, result))
    ui.event({"event": "measured", **done.facts})
    ui.note(f"{line.name} in {line.engine}: " + ", ".join(f"{k} {v:.4f}" for k, v in result.values.items()))
    return done


def _check(args: argparse.Namespace) -> list[str]:
    """The tasks; UsageError for what does not fit together, before anything is loaded."""
    from fleetune.evaluation import measures

    for name, least in NUMBERS.items():
        if (value := getattr(args, name)) < least:
            raise UsageError(f"{name} = {value} is below {least}", hint="fleetune measure --help")
    if args.text and not Path(args.text).is_file():
        raise UsageError(f"no text file at {args.text}", hint="check the path")
    if args.kept_gain and len(args.subjects) > 1:
        raise UsageError("--kept-gain is of one compressed run", hint="name its folder alone")
    tasks = measures.check_tasks([t.strip() for t in args.tasks.split(",") if t.strip()])
    if "perplexity" in tasks and not args.text:
        raise UsageError("perplexity is measured on a text", hint="--text FILE")
    if args.labels and "accuracy" not in tasks:
        raise UsageError("--labels is of the task accuracy alone", hint="--tasks accuracy")
    return [task for task in tasks if task not in ("loss", "perplexity")]  # these are measured anyway


def _row_length(args: argparse.Namespace, found: Sequence[Subject]) -> int:
    """Tokens of a row at most, the same for all; UsageError when more is asked of a model than it is made for."""
    from fleetune.deploy.measure.check import longest

    most, name = min((longest(subject.words), subject.name) for subject in found)
    asked = max(args.prompt_tokens + args.new_tokens, args.length if args.text else 0)
    if asked > most:
        raise UsageError(
            f"{asked} tokens are more than the {most} that {name} is made for",
            hint="smaller --length, --prompt-tokens or --new-tokens",
        )
    return min(found[0].length if len(found) == 1 else ROW, most)


# ---------------------------------------------------------------- what was named


def _subject(args: argparse.Namespace, name: str, of_run: Path | None) -> Subject:
    """What a name means: a compression's folder, its artefact, a run, a file or a model."""
    from fleetune import models
    from fleetune.cli.commands import compress
    from fleetune.models.artefact import is_master
    from fleetune.runs import rundir

    out, path = Path(args.out), Path(name)
    folder = compress.named(name, out, of_run)
    if folder is not None:
        return _of_folder(folder, args.offline)
    if of_run is not None:
        lines, words = _of_run(of_run, args.offline)
        return Subject(of_run.resolve().name, lines, words, run=of_run, length=_length(of_run))
    if is_master(path):
        return Subject(path.name, (_line(path.name, "artefact", path, path),), path)
    rundir.check_name(name, out)
    weights = models.resolve(name, offline=args.offline)
    if path.is_file():
        line = Line(path.name, "model", name, path, path.stat().st_size)
        return Subject(path.name, (line, replace(line, kind="gguf")), weights)
    return Subject(path.name, (_line(path.name, "model", name, weights),), weights)


def _line(name: str, kind: str, path: Path | str, weights: Path, dtype: str = "fp32") -> Line:
    from fleetune.compression.jobs.work import folder_bytes

    return Line(name, kind, str(path), weights, folder_bytes(weights), dtype)


def _of_run(run: Path, offline: bool) -> tuple[tuple[Line, Line], Path]:
    """Base and tuned, and where the tokenizer is."""
    from fleetune import models
    from fleetune.compression.jobs.work import folder_bytes
    from fleetune.tuning import finished
    from fleetune.tuning.methods import entry

    recipe = finished.recipe_of(run)
    weights = models.resolve(recipe.model, offline=offline)
    base = _line("base", "model", recipe.model, weights, recipe.dtype)
    result = run / finished.RESULT[entry(recipe.method).kind]
    if not result.exists():
        raise UsageError(f"{run} has no result yet", hint=f"finish it: fleetune tune --resume {run}")
    more = folder_bytes(result) if result.is_dir() else result.stat().st_size
    return (base, replace(base, name="tuned", kind="run", path=str(run), bytes=base.bytes + more)), weights


def _of_folder(folder: Path, offline: bool) -> Subject:
    from fleetune import models
    from fleetune.cli.commands import compress

    artefact, work = compress.artefact(folder), compress.read(folder)
    small = _line("compressed", "artefact", artefact, artefact)
    files = tuple(Line(f.name, "gguf", str(f), f, f.stat().st_size) for f in sorted(folder.glob("*.gguf")))
    if work.run:
        run = Path(work.model)
        lines, words = _of_run(run, offline)
        return Subject(folder.name, (*lines, small, *files), words, folder, run, _length(run))
    base = _line("base", "model", work.model, models.resolve(work.model, offline=offline), work.dtype)
    return Subject(folder.name, (base, small, *files), artefact, folder)


def _length(run: Path) -> int:
    from fleetune.tuning import finished

    return finished.recipe_of(run).max_length


def _lines(found: Sequence[Subject], ui: Ui) -> list[tuple[Subject, Line]]:
    """What is measured: every line of one subject; of several the last in torch of each, and its files."""
    from fleetune.deploy.measure import llamacpp

    lines: list[tuple[Subject, Line]] = []
    for subject in found:
        own = [line for line in subject.lines if line.kind != "gguf"]
        files = [line for line in subject.lines if line.kind == "gguf"]
        if len(found) > 1:
            own = [replace(own[-1], name=subject.name)]
        lines += [(subject, line) for line in own + (files if llamacpp.available() else [])]
        if files and not llamacpp.available():
            ui.note(f"{files[0].name} is not run in llama.cpp, which is not installed: {llamacpp.INSTALL}")
    return lines


# ---------------------------------------------------------------- what it is measured on


def _examples(args: argparse.Namespace, found: Sequence[Subject]) -> list[Example]:
    from fleetune import data
    from fleetune.cli.commands import compress, eval

    subject = found[0]
    examples: list[Example] = []
    if args.data:
        examples = data.read(args.data, offline=args.offline)
    elif len(found) == 1 and subject.folder is not None:
        examples = compress.held_out(subject.folder, offline=args.offline)
    elif len(found) == 1 and subject.run is not None:
        examples = eval.held_out(subject.run, offline=args.offline)
    return examples[: args.limit]


def _windows(args: argparse.Namespace, found: Sequence[Subject]) -> dict[Path, list[Row]]:
    """The windows of the text in each subject's tokens; DataError where there is nothing to predict."""
    from fleetune.deploy.measure import check

    folders = {subject.words for subject in found}
    if not args.text:
        return {folder: [] for folder in folders}
    return {f: check.windows_of(args.text, f, args.length, args.windows) for f in folders}


def _size(windows: Sequence[Row]) -> str:
    tokens = sum(len(ids) for ids, _ in windows)
    return f"{len(windows)} window{'s' if len(windows) > 1 else ''}, {tokens:,} tokens"


def _one(
    args: argparse.Namespace,
    subject: Subject,
    line: Line,
    rows: tuple[Sequence[Example], int],
    windows: list[Row],
    tasks: list[str],
) -> Measurement:
    """A line, measured in a process of its own; rows of so many tokens at most."""
    from transformers import AutoTokenizer

    from fleetune.data.encode import encode_all
    from fleetune.deploy.measure import harness

    words = AutoTokenizer.from_pretrained(subject.words, local_files_only=True)
    examples, length = rows
    encoded = encode_all(examples, words, length)[0] if examples else []
    asked = tasks if line.kind != "gguf" else []  # llama.cpp is given tokens and asked for losses alone
    return harness.measured(
        harness.MeasureJob(
            kind=line.kind,
            path=line.path,
            threads=args.threads,
            dtype=line.dtype,
            offline=args.offline,
            prompt=args.prompt_tokens,
            generate=args.new_tokens,
            repeats=0 if line.name == SMALL_BASE else args.repeats,  # as fast as the compressed model
            rows=[(row.ids.tolist(), row.n_prompt) for row in encoded],
            windows=windows,
            examples=[([*e.messages], e.response) for e in examples] if asked else [],
            tasks=asked,
            answer_tokens=args.answer_tokens,
            labels=args.labels.split(",") if args.labels else [],
        )
    )


# ---------------------------------------------------------------- kept gain


def _check_kept(subject: Subject) -> None:
    from fleetune.compression.jobs import compressed_base as kept

    if subject.folder is None:
        raise UsageError("--kept-gain is of a compressed run's folder", hint="fleetune compress RUN")
    kept.check(subject.folder)


def _small_base(args: argparse.Namespace, ui: Ui, subject: Subject) -> Line:
    from fleetune.compression.jobs import compressed_base as kept

    assert subject.folder is not None
    path = kept.base_of(ui, subject.folder, offline=args.offline)
    return _line(SMALL_BASE, "artefact", path, path)


def _kept(done: Sequence[Done]) -> dict[str, KeptGain]:
    """By measure; not of the text's perplexity, since that is no task that was tuned for."""
    from fleetune.deploy.measure.harness import kept_gain

    values = {d.line.name: d.values for d in done}
    four = [values[name] for name in ("base", "tuned", SMALL_BASE, "compressed")]
    return {name: kept_gain(name, *(v[name] for v in four)) for name in four[0] if name != "perplexity"}
