# SPDX-License-Identifier: Apache-2.0
"""`fleetune compress`: a model or a finished run to a folder with the master artefact, block by block.

runs/0008-optq-smollm2-135m/
  compress.json   what was asked for, and the result     parts/   finished blocks (gone at the end)
  model/          the master artefact: what `fleetune export` repacks
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune import compress as solvers
from fleetune import rundir, settings
from fleetune.commands.brake import Brake
from fleetune.deploy.master import is_master
from fleetune.errors import Interrupted, RecipeError, UsageError
from fleetune.text import human_bytes, human_time
from fleetune.ui import Ui

if TYPE_CHECKING:
    from torch import Tensor

    from fleetune.compress.calibrate import Block, Parts
    from fleetune.data import Encoded, Example
    from fleetune.models import Model

RECORD = "compress.json"


@dataclass(frozen=True)
class Work:
    """What is asked for; as it is written to `compress.json`."""

    model: str  # a model's name, or a run's folder
    run: bool
    method: str
    set: dict[str, str]
    data: str
    text: str
    windows: int
    length: int
    eval_text: str
    seed: int
    dtype: str


@dataclass(frozen=True)
class Subject:
    """The model to compress, what to calibrate it on, and what to measure it on."""

    model: Model
    calibration: Sequence[Encoded]  # rows of the data, or of the run's held-out half
    held: Sequence[Encoded]
    texts: Sequence[str]
    source: str


def run(args: argparse.Namespace, ui: Ui, of_run: Path | None) -> None:
    """Carry out `fleetune compress`; `of_run` is the folder where the subject is a run."""
    if args.list:
        _list(args, ui)
        return
    if args.resume:
        folder = find(args.resume, Path(args.out))
        if folder is None:
            raise UsageError(f"no compression '{args.resume}' in {args.out}", hint="fleetune compress MODEL")
        work = _read(folder)
    else:
        folder = None
        work = _work(args, of_run)
    solver = solvers.make(work.method, work.set)
    _check(work)
    subject = _subject(work, offline=args.offline)
    from fleetune.compress import calibrate

    calibrate.check(subject.model, solver)
    calibration = _windows(work, subject, ui) if solver.data else None
    if args.dry_run:
        ui.note(f"the settings fit {subject.model.n_params:,} parameters; nothing was written")
        return
    folder = folder or _new(work, Path(args.out))
    _header(ui, work, subject, folder, calibration)
    _compress(ui, work, solver, subject, calibration, folder)


# Before the work -------------------------------------------------------------------------------------


def _work(args: argparse.Namespace, of_run: Path | None) -> Work:
    if not args.model:
        raise UsageError("compress needs a model or a run", hint="fleetune compress latest --method optq")
    chosen = {}
    for pair in args.set:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise RecipeError([f"--set {pair!r} is not NAME=VALUE"], hint="for example --set bits=4")
        chosen[name.strip()] = value.strip()
    return Work(
        str(of_run or args.model), of_run is not None, args.method, chosen, args.data or "", args.text or "",
        args.windows, args.length, args.eval_text or "", args.seed, args.dtype,
    )  # fmt: skip


def _check(work: Work) -> None:
    problems = [
        f"{n} = {v} is below 1" for n, v in (("windows", work.windows), ("length", work.length)) if v < 1
    ]
    problems += ["data and text are both given"] if work.data and work.text else []
    if problems:
        raise RecipeError(problems, hint="fleetune compress --help")
    for name in (work.text, work.eval_text):
        if name and not Path(name).is_file():
            raise UsageError(f"no text file at {name}", hint="check the path")


def _new(work: Work, out: Path) -> Path:
    from fleetune.files import write_atomic

    rundir.check_writable(out)
    folder = rundir.numbered(out, f"{work.method}-{rundir.slug(Path(work.model).name) or 'model'}")
    write_atomic(folder / RECORD, json.dumps({"v": 1, **asdict(work)}, indent=1) + "\n")
    return folder


def _read(folder: Path) -> Work:
    raw = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return Work(**{name: raw[name] for name in Work.__dataclass_fields__})


def find(name: str, out: Path) -> Path | None:
    """The folder of a compression: a path, a name or number under `out`, or `latest`; None if there is none."""
    if name == "latest":
        return newest(out)
    numbered = out.glob(f"{name.zfill(4)}-*") if name.isdigit() else ()
    for path in (Path(name), out / name, *numbered):
        if (path / RECORD).is_file():
            return path
    return None


def newest(out: Path) -> Path | None:
    """The folder with the highest number, None for none."""
    return max((p.parent for p in out.glob(f"*/{RECORD}")), key=rundir.number, default=None)


def artefact(folder: Path) -> Path:
    """The master artefact in a folder; UsageError when it is not finished."""
    if not is_master(folder / "model"):
        raise UsageError(f"{folder} is not finished", hint=f"fleetune compress --resume {folder}")
    return folder / "model"


def _subject(work: Work, *, offline: bool) -> Subject:
    from fleetune import data, models, tuned
    from fleetune.commands import evaluate
    from fleetune.data.encode import encode_all

    texts = data.read_text(work.eval_text) if work.eval_text else []
    if not work.run:
        model = models.load(work.model, dtype=work.dtype, device="cpu", offline=offline)
        _causal(model)
        rows = (
            encode_all(data.read(work.data, offline=offline), model.tokenizer, work.length)[0]
            if work.data
            else []
        )
        return Subject(model, rows, [], texts, work.data or work.text or "text of its own")
    recipe = tuned.recipe_of(Path(work.model))
    held = evaluate.held_out(Path(work.model), offline=offline)
    model = tuned.load(work.model, offline=offline, device="cpu")
    _causal(model)
    tuned.settle(model)

    def encoded(rows: Sequence[Example]) -> list[Encoded]:
        return encode_all(rows, model.tokenizer, recipe.max_length)[0]

    if work.data:
        rows = encode_all(data.read(work.data, offline=offline), model.tokenizer, work.length)[0]
        return Subject(model, rows, encoded(held), texts, work.data)
    if work.text:
        return Subject(model, [], encoded(held), texts, work.text)
    source = "every second held-out row of the run"
    return Subject(model, encoded(held[::2]), encoded(held[1::2]), texts, source)


def held_out(folder: Path, *, offline: bool) -> list[Example]:
    """The held-out rows of the run in a folder that it was not calibrated on; [] for a model that is no run."""
    from fleetune.commands import evaluate

    work = _read(folder)
    if not work.run:
        return []
    held = evaluate.held_out(Path(work.model), offline=offline)
    return held if work.data or work.text else held[1::2]


def _causal(model: Model) -> None:
    if model.labels:
        raise UsageError("an encoder cannot be compressed", hint="decoders can, such as: fleetune models")


def _windows(work: Work, subject: Subject, ui: Ui) -> Tensor:
    import numpy as np

    from fleetune import data
    from fleetune.compress import calibrate
    from fleetune.losses import context

    model = subject.model
    if work.length > (longest := context(model)):
        raise UsageError(
            f"windows of {work.length} tokens are longer than the model's {longest}",
            hint=f"--length {min(longest, 512)}",
        )
    if subject.calibration:
        ids = [np.asarray(row.ids) for row in subject.calibration]
    elif work.text:
        encode = model.tokenizer
        ids = [np.asarray(encode(text, verbose=False)["input_ids"]) for text in data.read_text(work.text)]
    else:
        ui.note(f"no calibration text is given: the model writes {work.windows} windows itself")
        return calibrate.written(model, work.length, work.windows, work.seed)
    return calibrate.windows(ids, work.length, work.windows)


def _header(ui: Ui, work: Work, subject: Subject, folder: Path, calibration: Tensor | None) -> None:
    fields = {s.name: s.default for s in settings.of(solvers.solver_class(work.method))} | work.set
    rows = [
        (
            "model",
            f"{work.model} @ {subject.model.digest[:8]} · {subject.model.n_params / 1e6:.1f} M parameters",
        ),
        ("method", f"{work.method} · " + " · ".join(f"{k} {v}" for k, v in fields.items())),
    ]
    if calibration is not None:
        count, length = calibration.shape
        rows.append(("text", f"{subject.source} · {count} windows of {length} tokens"))
    ui.header("fleetune compress", [*rows, ("folder", str(folder))])


# The work --------------------------------------------------------------------------------------------


def _compress(
    ui: Ui, work: Work, solver: solvers.Solver, subject: Subject, calibration: Tensor | None, folder: Path
) -> None:
    from fleetune import models, rounds
    from fleetune.compress import calibrate
    from fleetune.deploy import master
    from fleetune.files import write_atomic

    began, model = time.monotonic(), subject.model
    before = _measure(subject)
    ui.event({"event": "start", **asdict(work), "folder": str(folder), "before": before})
    with ui.count("blocks", 0) as bar, Brake(ui) as brake:

        def on_matrix(block: int, blocks: int, name: str) -> None:
            bar.update(block, blocks, name.rsplit(".", 1)[-1])
            if brake.pulled:
                raise Interrupted(
                    f"stopped in block {block}; finished blocks are kept",
                    hint=f"fleetune compress --resume {folder}",
                )

        parts = calibrate.run(
            model, solver, calibration, folder / "parts", on_matrix, lambda b, n: _told(ui, b, n)
        )
    head = master.Head(
        work.method, {**asdict(solver)}, models.digest(models.named_tensors(model.net)), model.tokenizer_digest,  # type: ignore[call-overload]
        _calibration(subject, calibration),
    )  # fmt: skip
    master.write(folder / "model", model, parts, head)
    after = _after(subject, parts)
    shutil.rmtree(folder / "parts")
    size = sum(p.stat().st_size for p in (folder / "model").rglob("*") if p.is_file())
    done = {
        "before": before, "after": after, "bytes": size, "seconds": round(time.monotonic() - began, 3),
        "peak_rss": rounds.peak_rss(), "digest": master.Master(folder / "model").digest(),
        "error": _mean_error(parts.blocks), "notes": _notes(parts.blocks),
    }  # fmt: skip
    write_atomic(folder / RECORD, json.dumps({"v": 1, **asdict(work), "result": done}, indent=1) + "\n")
    ui.event({"event": "done", "folder": str(folder), **done})
    _finish(ui, model, folder, done)


def _told(ui: Ui, block: Block, blocks: int) -> None:
    errors = [m.error for m in block.matrices]
    ui.event({
        "event": "block", "block": block.number, "blocks": blocks, "seconds": block.seconds,
        "matrices": [{"name": m.name, "error": m.error, "notes": list(m.notes)} for m in block.matrices],
    })  # fmt: skip
    told = (
        "" if math.isnan(errors[0]) else f"  error {statistics.fmean(errors):.4f}, at most {max(errors):.4f}"
    )
    ui.note(f"block {block.number + 1}/{blocks}{told}  {human_time(block.seconds)}")
    for matrix in block.matrices:
        for note in matrix.notes:
            ui.note(f"  {matrix.name}: {note}")


def _mean_error(blocks: Sequence[Block]) -> float | None:
    errors = [m.error for b in blocks for m in b.matrices]
    return None if math.isnan(errors[0]) else statistics.fmean(errors)


def _notes(blocks: Sequence[Block]) -> dict[str, list[str]]:
    return {m.name: list(m.notes) for b in blocks for m in b.matrices if m.notes}


def _calibration(subject: Subject, calibration: Tensor | None) -> dict[str, Any]:
    if calibration is None:
        return {}
    tokens = calibration.numpy().astype("<i8").tobytes()
    count, length = calibration.shape
    return {"windows": count, "length": length, "sha256": hashlib.sha256(tokens).hexdigest()}


def _measure(subject: Subject) -> dict[str, float]:
    from fleetune.losses import perplexity, response_loss

    found = {"loss": response_loss(subject.model, subject.held)} if subject.held else {}
    return found | ({"perplexity": perplexity(subject.model, subject.texts)} if subject.texts else {})


def _after(subject: Subject, parts: Parts) -> dict[str, float]:
    with _compressed(subject.model, parts):
        return _measure(subject)


@contextmanager
def _compressed(model: Model, parts: Parts) -> Iterator[None]:
    from fleetune.compress import calibrate

    linears = {name: m for _, found in calibrate.linears_of(model) for name, m in found.items()}
    with calibrate.placed(linears, parts):
        yield


def _finish(ui: Ui, model: Model, folder: Path, done: Mapping[str, Any]) -> None:
    whole = sum(p.numel() * p.element_size() for p in model.net.parameters())
    rows: list[list[object]] = [["size", human_bytes(whole), human_bytes(done["bytes"])]]
    rows += [[name, f"{done['before'][name]:.3f}", f"{done['after'][name]:.3f}"] for name in done["before"]]
    if not ui.json:
        ui.table(["", "before", "after"], rows, align="lrr")
    ui.paths([
        ("result", f"{folder / 'model'} ({human_bytes(done['bytes'])})"),
        ("time · peak memory", f"{human_time(done['seconds'])} · {human_bytes(done['peak_rss'])}"),
        ("digest", str(done["digest"])), ("next", f"fleetune export {folder} --to gguf"),
    ])  # fmt: skip


def _list(args: argparse.Namespace, ui: Ui) -> None:
    for name, entry in solvers.entries().items():
        if args.list not in ("all", name):
            continue
        found = settings.of(solvers.solver_class(name))
        ui.event(
            {
                "event": "method",
                **entry._asdict(),
                "settings": [asdict(s) | {"type": s.type.__name__} for s in found],
            }
        )
        if not ui.json:
            ui.paths([(name, entry.summary), ("paper", entry.paper)])
            ui.table(
                ["setting", "symbol", "default", ""],
                [[s.name, s.symbol, s.default, s.help] for s in found],
                align="llll",
            )
    if args.list != "all":
        solvers.solver_class(args.list)
