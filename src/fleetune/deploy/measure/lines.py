# SPDX-License-Identifier: Apache-2.0
"""List the lines of the table of `fleetune measure`: which models are run, and in which engine.

A run has two lines, the base and the tuned model; a compression also the compressed model and its exported .gguf files
(a note names other files in its folder); a plain model has one (a .gguf file one in torch and one in llama.cpp).  With
several models, only the last stage of each is measured, in torch and as its exported files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fleetune.common.ggml import SCALES
from fleetune.common.shell import command
from fleetune.errors import FleetuneError
from fleetune.runs import compression_folder
from fleetune.runs.listener import Listener
from fleetune.subject import ROW, Compressed, Plain, Run, Subject

COMPRESSED_BASE: Final = "compressed base"


@dataclass(frozen=True)
class Line:
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
    lines: tuple[Line, ...]
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
        line = Line(path.name, "model", subject.name, path, path.stat().st_size)
        return Measurable(path.name, (line, replace(line, kind="gguf")), weights, subject)
    return Measurable(path.name, (line_of(path.name, "model", subject.name, weights),), weights, subject)


def compressed_before(subject: Subject) -> Path | None:
    """Return the compression that the base of a subject's run comes from; None where there is no run, or its base is plain.

    The base is its model, or an export in its folder.
    """
    request = subject.request if isinstance(subject, Compressed) else None
    if isinstance(subject, Run):
        run = subject
    elif request is not None and request.run:
        run = Run(Path(request.model))
    else:
        return None
    base = Path(run.recipe.model)
    folders = (base, base.parent, base.parent.parent) if base.exists() else ()
    return next((folder for folder in folders if (folder / compression_folder.RECORD).is_file()), None)


def line_of(name: str, kind: str, path: Path | str, weights: Path, dtype: str = "fp32") -> Line:
    """Return a line for weights in a folder."""
    return Line(name, kind, str(path), weights, compression_folder.size(weights), dtype)


def chosen(found: Sequence[Measurable], listener: Listener) -> list[tuple[Measurable, Line]]:
    """Return the lines to measure: all of a single subject; of several, the last in torch of each, and its .gguf files."""
    from fleetune.deploy.measure import llamacpp

    lines: list[tuple[Measurable, Line]] = []
    for measurable in found:
        own = [line for line in measurable.lines if line.kind != "gguf"]
        files = [line for line in measurable.lines if line.kind == "gguf"]
        if len(found) > 1:
            own = [replace(own[-1], name=measurable.name)]
        there = {Path(line.path).resolve() for _, line in lines if line.kind == "gguf"}
        files = [
            line for line in files if Path(line.path).resolve() not in there
        ]  # named, and in a folder that is
        if llamacpp.available():
            files = _own(measurable, files, listener)
        lines += [(measurable, line) for line in own + (files if llamacpp.available() else [])]
        if files and not llamacpp.available():
            listener.note(
                f"{files[0].name} is not run in llama.cpp, which is not installed: {llamacpp.INSTALL}"
            )
    return lines


def _own(measurable: Measurable, files: Sequence[Line], listener: Listener) -> list[Line]:
    """Leave out the files in a compression's folder that do not hold its model, as one does that was patched; each is noted."""
    from fleetune.deploy.checkpoint import open_checkpoint
    from fleetune.deploy.formats import gguf

    subject = measurable.subject
    if not isinstance(subject, Compressed) or not files:
        return list(files)
    model, own = open_checkpoint(subject.model), list[Line]()
    for line in files:
        try:
            holds = gguf.holds(Path(line.path), model)
        except FleetuneError:  # not readable as a GGUF file
            holds = False
        if holds:
            own.append(line)
            continue
        hint = f"measure it as a model of its own: {command('measure', line.path)}"
        listener.note(
            f"{line.name} is left out: it does not hold what fleetune export writes of {subject.argument} ({hint})"
        )
    return own


def _of_run(run: Run, *, offline: bool) -> tuple[tuple[Line, Line], Path]:
    """Return the lines of base and tuned model, and the folder of the tokenizer."""
    recipe, weights = run.recipe, Plain(run.recipe.model).directory(offline=offline)
    base, result = line_of("base", "model", recipe.model, weights, recipe.dtype), run.result
    if recipe.train == SCALES:  # the file itself was tuned
        from fleetune.deploy import patch_make  # imports torch

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
    files = tuple(Line(f.name, "gguf", str(f), f, f.stat().st_size) for f in found)
    if request.run:
        run = Run(Path(request.model))
        lines, tokenizer = _of_run(run, offline=offline)
        return Measurable(
            subject.folder.name, (*lines, small, *files), tokenizer, subject, subject.max_length
        )
    weights = Plain(request.model).directory(offline=offline)
    base = line_of("base", "model", request.model, weights, request.dtype)
    return Measurable(subject.folder.name, (base, small, *files), artefact, subject)
