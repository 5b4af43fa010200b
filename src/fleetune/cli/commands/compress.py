# SPDX-License-Identifier: Apache-2.0
"""`fleetune compress`: a model or a finished run to a folder with a smaller one, block by block or by training.

runs/0008-optq-smollm2-135m/
  compress.json   what was asked for, and the result     parts/   what `--resume` goes on with (gone at the end)
  model/          of a solver the master artefact, which `fleetune export` repacks; else a plain model
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune import compression as methods
from fleetune.cli.console import Ui
from fleetune.common import settings
from fleetune.compression.jobs import work as subjects
from fleetune.compression.jobs.work import RECORD, Work
from fleetune.errors import RecipeError, StorageError, UsageError
from fleetune.runs import rundir

if TYPE_CHECKING:
    from fleetune.compression.jobs import distil, prune, solve
    from fleetune.data import Example


def arguments(sub: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    sub.add_argument("model", metavar="RUN|MODEL", nargs="?")
    sub.add_argument("--method", help=f"{', '.join(methods.entries())} (default optq)")
    sub.add_argument("--set", action="append", metavar="NAME=VALUE", help="a setting of the method; repeat")
    sub.add_argument(
        "--list", nargs="?", const="all", metavar="METHOD", help="the methods with their settings"
    )
    sub.add_argument(
        "--data", help="calibrate or train on these rows (a run: every second held-out row of its own)"
    )
    sub.add_argument("--text", help="calibrate on a plain text file (a model without either writes its own)")
    sub.add_argument("--windows", type=int, help="calibration windows at most (default 128)")
    sub.add_argument("--length", type=int, help="tokens a window, or of a row at most (default 512)")
    sub.add_argument(
        "--calibrate", choices=["server", "clients"],
        help="clients: the run's own clients calibrate on their training rows and send sums over them (default server)",
    )  # fmt: skip
    sub.add_argument("--clients", type=int, help="so many of them (default: all)")
    sub.add_argument(
        "--low-memory",
        action="store_true",
        default=None,
        help="leave the model in its files: one block in memory at a time",
    )
    sub.add_argument(
        "--true-sequential",
        action="store_true",
        default=None,
        help="solve a layer on what those before it in its block give once compressed: one pass of all windows together, "
        "which takes a fifth less time, and memory for their activations",
    )
    sub.add_argument("--eval-text", help="plain text file: its perplexity before and after")
    sub.add_argument(
        "--seed",
        type=int,
        help="seed of what a model writes, and of the order of rows (default 42)",
    )
    sub.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], help="type a model is loaded in (default fp32)"
    )
    sub.add_argument(
        "--resume",
        metavar="FOLDER",
        help="go on with a stopped one (a path, a number, or latest), as it was asked for",
    )
    sub.add_argument("--dry-run", action="store_true", help="check settings, model and text, then stop")


def run(args: argparse.Namespace, ui: Ui, of_run: Path | None) -> None:
    """Carry out `fleetune compress`; `of_run` is the folder where the subject is a run."""
    if args.list:
        _list(args, ui)
        return
    out = Path(args.out)
    folder = _stopped(args, out) if args.resume is not None else None
    work = read(folder) if folder else _work(args, of_run, out)
    if args.dry_run:
        job = _prepare(work, ui, out, offline=args.offline)
        ui.event({"event": "fits", "parameters": job.subject.model.n_params, **dict(job.about())})
        for name, text in job.about():
            ui.note(f"{name}: {text}")
        ui.note(f"the settings fit {job.subject.model.n_params:,} parameters; nothing was written")
    elif folder is None:
        carry_out(work, ui, out, offline=args.offline)
    else:
        with rundir.locked(folder):
            if not subjects.finished(ui, folder):
                _do(work, _prepare(work, ui, out, offline=args.offline), ui, folder)


def _stopped(args: argparse.Namespace, out: Path) -> Path:
    """The folder to go on with; UsageError for one that is none, and for whatever else is asked for with it."""
    folder = find(args.resume, out)
    if folder is None:
        raise UsageError(f"no compression '{args.resume}' in {out}", hint="fleetune compress MODEL")
    if given := _given(args):
        flags = ", ".join("RUN|MODEL" if n == "model" else f"--{n.replace('_', '-')}" for n in given)
        raise UsageError(
            f"--resume goes on with what {folder / RECORD} says; {flags} cannot be given with it",
            hint=f"fleetune compress --resume {folder}   or begin anew, without --resume",
        )
    return folder


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of a work's fields, by name."""
    names = [n for n in Work.__dataclass_fields__ if n != "run"]  # that of `args` is the command's function
    return {n: v for n in names if (v := getattr(args, n)) is not None}


def carry_out(work: Work, ui: Ui, out: Path, *, offline: bool = False) -> Path:
    """Check it, then do it, into a new folder under `out`; the folder."""
    rundir.check_folder(out)
    job = _prepare(work, ui, out, offline=offline)
    folder = _new(work, out)
    with rundir.locked(folder):
        _do(work, job, ui, folder)
    return folder


def _do(work: Work, job: solve.Job | distil.Job | prune.Job, ui: Ui, folder: Path) -> None:
    """Do what is checked, into a folder that nobody else has."""
    fields = {s.name: s.default for s in settings.of(methods.method_class(work.method))} | work.set
    ui.header("fleetune compress", [
        ("model", subjects.name_of(work, job.subject.model)),
        ("method", f"{work.method} · " + " · ".join(f"{k} {v}" for k, v in fields.items())),
        *job.about(), ("folder", str(folder)),
    ])  # fmt: skip
    job.run(ui, folder)


def _prepare(work: Work, ui: Ui, out: Path, *, offline: bool) -> solve.Job | distil.Job | prune.Job:
    """The work, checked and ready to be done."""
    from fleetune.compression.jobs import distil, prune, solve

    method = methods.make(work.method, work.set)
    _check(work)
    if not work.run:
        check_plain(work.model, out)
    if isinstance(method, methods.Trainer | methods.Pruner):
        _whole(work)
    if isinstance(method, methods.Trainer):
        return distil.prepare(work, method, out, offline=offline)
    if isinstance(method, methods.Pruner):
        return prune.prepare(work, method, offline=offline, ui=ui)
    return solve.prepare(work, method, subjects.load(work, offline=offline), ui)


def _work(args: argparse.Namespace, of_run: Path | None, out: Path) -> Work:
    if not args.model:
        raise UsageError("compress needs a model or a run", hint="fleetune compress latest --method optq")
    plain = _plain(args.model, out, of_run)
    run = None if plain or not of_run else _lasting(of_run)
    given = _given(args) | {
        "model": str(plain or run or args.model), "run": run is not None, "set": settings.pairs(args.set or []),
        "method": (args.method or "optq").replace("_", "-"),
    }  # fmt: skip
    return Work(**given)


def _lasting(run: Path) -> Path:
    """A run's folder by a name that stays its own: `latest` may be a link, and `.` is another folder elsewhere."""
    if run.is_symlink():
        return run.parent / run.readlink()
    return run.resolve() if run.name in ("", "..") else run


def _plain(name: str, out: Path, of_run: Path | None) -> Path | None:
    """The plain model in the compression's folder that is meant; None for none, which `latest` passes over."""
    from fleetune.models.artefact import is_master

    if name != "latest":
        folder = find(name, out)
        return artefact(folder) if folder and not is_master(folder / "model") else None
    newest = max(
        (p.parent for p in out.glob(f"*/{RECORD}") if subjects.made(p.parent) and not is_master(p.parent / "model")),
        key=rundir.number, default=None,
    )  # fmt: skip
    older = newest and of_run and rundir.number(newest) < rundir.number(of_run.resolve())
    return newest / "model" if newest and not older else None


def _check(work: Work) -> None:
    if work.run and not (Path(work.model) / "run.toml").is_file():
        raise UsageError(f"the run {work.model} is gone", hint="fleetune runs   lists what there is")
    clients, given = work.calibrate == subjects.CLIENTS, work.data or work.text
    problems = [
        f"{n} = {v} is below 1" for n, v in (("windows", work.windows), ("length", work.length)) if v < 1
    ]
    problems += ["data and text are both given"] if work.data and work.text else []
    problems += ["only a run has clients to calibrate on"] if clients and not work.run else []
    problems += ["the clients calibrate on rows of their own: no data, no text"] if clients and given else []
    problems += (
        [f"clients = {work.clients} needs --calibrate clients"] if work.clients and not clients else []
    )
    problems += [f"clients = {work.clients} is below 0"] if work.clients < 0 else []
    problems += (
        ["clients solve a block at a time: no true_sequential"] if clients and work.true_sequential else []
    )
    problems += ["a run has a dtype of its own"] if work.run and work.dtype != "fp32" else []
    problems += (
        [
            f"a run's weights are made in memory, not in its files: fleetune export {work.model} --to hf, then that"
        ]
        if work.low_memory and work.run
        else []
    )
    if problems:
        raise RecipeError(problems, hint="fleetune compress --help")
    for name in (work.text, work.eval_text):
        if name and not Path(name).is_file():
            raise UsageError(f"no text file at {name}", hint="check the path")


def _whole(work: Work) -> None:
    """RecipeError for what only the layer-by-layer methods can do."""
    problems = [f"{work.method} trains the whole model, which must be in memory"] if work.low_memory else []
    problems += [f"{work.method} is not calibrated by clients"] if work.calibrate == subjects.CLIENTS else []
    problems += [f"{work.method} solves no layers: no true_sequential"] if work.true_sequential else []
    if problems:
        raise RecipeError(problems, hint="--method optq, sparsegpt or rtn")


def _new(work: Work, out: Path) -> Path:
    from fleetune.common.files import write_atomic

    rundir.check_writable(out)
    name = called(work.model)
    name = name.removeprefix(f"{rundir.number(Path(name)):04d}-")  # of a run: without its number
    folder = rundir.numbered(out, f"{work.method}-{rundir.slug(name) or 'model'}")
    write_atomic(folder / RECORD, json.dumps({"v": 1, **asdict(work)}, indent=1) + "\n")
    return folder


def called(model: str) -> str:
    """What a model or a run is called; of a compression's plain model that is its folder's name."""
    path = Path(model)
    return (path.parent if path.name == "model" and rundir.number(path.parent) else path).name


def read(folder: Path) -> Work:
    """What a folder was asked to hold; StorageError for a record that does not say it."""
    raw = subjects.recorded(folder)
    try:
        return Work(**{name: raw[name] for name in Work.__dataclass_fields__ if name in raw})
    except TypeError as error:
        raise StorageError(
            f"{folder / RECORD} is damaged ({error})", hint="compress again: fleetune compress MODEL"
        ) from error


def find(name: str, out: Path) -> Path | None:
    """The folder of a compression: a path, a name or number under `out`, or `latest`; None if there is none."""
    if name == "latest":
        return max((p.parent for p in out.glob(f"*/{RECORD}")), key=rundir.number, default=None)
    numbered = list(out.glob(f"{name.zfill(4)}-*")) if name.isdigit() else []
    for path in [Path(name), out / name, *numbered]:
        if (path / RECORD).is_file():
            return path
    return None


def named(name: str, out: Path, of_run: Path | None) -> Path | None:
    """As `find`, but None where `latest` means the run `of_run`, which is newer."""
    found = find(name, out)
    older = found and of_run and rundir.number(found) < rundir.number(of_run.resolve())
    return None if name == "latest" and older else found


def check_plain(name: str, out: Path) -> None:
    """UsageError where `name` is a compressed model that must be exported first, a folder around one, or nothing."""
    from fleetune.models.artefact import Master, is_master

    folder = None if name == "latest" and rundir.listing(out) else find(name, out)
    model = folder / "model" if folder else Path(name)
    if is_master(model):
        head = Master(model).head
        raise UsageError(
            f"{name} was compressed with {head.method}: it holds {'codes' if head.grids else 'zeros among weights'} "
            "in a file of Fleetune's own, not a plain model",
            hint=f"fleetune export {name} --to hf   and give the folder that it writes",
        )
    if folder:
        raise UsageError(f"{name} is a compression's folder, not a model's", hint=f"give {artefact(folder)}")
    rundir.check_name(name, out)


def artefact(folder: Path) -> Path:
    """The master artefact or plain model in a folder; UsageError when it is not finished."""
    if not subjects.made(folder):
        raise UsageError(f"{folder} is not finished", hint=f"fleetune compress --resume {folder}")
    return folder / "model"


def held_out(folder: Path, *, offline: bool) -> list[Example]:
    """The held-out rows of the run in a folder that it was not made with; [] for a model that is no run."""
    from fleetune.cli.commands import eval

    work = read(folder)
    if not work.run:
        return []
    if not (Path(work.model) / "run.toml").is_file():
        raise UsageError(
            f"{folder} was made from the run {work.model}, which is gone with its held-out rows",
            hint=f"give rows: fleetune eval {folder} rows.jsonl",
        )
    held = eval.held_out(Path(work.model), offline=offline)
    return held if work.data or work.text or work.calibrate == subjects.CLIENTS else held[1::2]


def _list(args: argparse.Namespace, ui: Ui) -> None:
    for name, entry in methods.entries().items():
        if args.list.replace("_", "-") not in ("all", name):
            continue
        found = settings.of(methods.method_class(name))
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
        methods.method_class(args.list)
