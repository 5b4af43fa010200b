"""`fleetune runs`: list, show, compare and remove tuned runs and compressions."""

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fleetune import subject
from fleetune.cli.commands.tune import say_what_is_shared
from fleetune.cli.console import Ui
from fleetune.common.display import command, counted, human_bytes, human_time, quoted, show
from fleetune.common.events import CompressionListed, RunListed, RunRemoved, SweepListed
from fleetune.common.files import storage_error
from fleetune.errors import FleetuneError, StorageError, UsageError
from fleetune.report import runlog, single
from fleetune.runs import compression_folder, rundir
from fleetune.runs.compression_folder import RECORD
from fleetune.tuning.recipe import recipe as recipes

HELP = "list, show, compare or remove runs"
ORDER = 120
NEEDING = (f"*/{RECORD}", "*/run.toml", "*/*/run.toml")  # compressions, runs, and runs of a sweep
VERBS = """\
list (default)       runs, sweeps and compressions under --out
show RUN ..          status and why, settings, results, cost; the report is written anew
compare RUN RUN ..   results and settings that differ
rm RUN ..            remove
"""
EXAMPLES = """\
fleetune runs                 what there is
fleetune runs show latest     settings, results, and the path of the report
fleetune runs compare 1 2     what differs, in the settings and in the results
fleetune runs rm 3
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.description = f"{sub.description}\n\n{textwrap.indent(VERBS, '    ')}"
    sub.add_argument(
        "action", metavar="ACTION", nargs="?", default="list", choices=list(ACTIONS), help="one of the above"
    )
    sub.add_argument("names", metavar="RUN", nargs="*", help="a path, a name, a number, or latest")
    sub.add_argument(
        "--force",
        action="store_true",
        help="rm: also what another run or compression was made from, which stays",
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Carry out an action."""
    if args.force and args.action != "rm":
        raise UsageError("--force is of runs rm alone", hint="leave it out")
    if len(args.names) < (least := {"show": 1, "compare": 2, "rm": 1}.get(args.action, 0)):
        raise UsageError(
            f"runs {args.action} needs {least} RUN or more", hint="runs there are: fleetune runs"
        )
    ACTIONS[args.action](args, ui)


def _folder(name: str, out: Path) -> tuple[Path, bool]:
    """Return the folder that a name means, and whether it is a compression's; `latest` is the newest of either kind."""
    found = subject.open(name, out)
    if isinstance(found, subject.Compressed) and found.folder is not None:
        return found.folder, True
    return (found.folder if isinstance(found, subject.Run) else rundir.find(name, out)), False


def _list(args: argparse.Namespace, ui: Ui) -> None:
    out = Path(args.out)
    rows = runlog.table(rundir.listing(out))
    for row in rows:
        ui.event(RunListed(**row))
    for sweep in sorted(p.parent for p in out.glob("*/sweep.toml")):
        ui.event(SweepListed(path=str(sweep)))
        ui.note(f"{sweep} is a sweep; its runs: fleetune runs --out {quoted(sweep)}")
    _note_changed(rows, ui)
    smaller = [_row(folder) for folder in compression_folder.listing(out)]
    for listed in smaller:
        ui.event(listed)
    if rows:
        cells = [
            [
                r["name"],
                runlog.kind_of(str(r["status"])),  # a word; the reason is in `runs show`
                r["rounds"],
                *(show("loss", _number(r[name])) for name in ("base_loss", "tuned_loss")),
                human_bytes(_number(r["bytes"])),
                human_time(_number(r["seconds"])),
            ]
            for r in rows
        ]
        ui.table(["run", "status", "rounds", "base", "tuned", "bytes", "time"], cells, align="llrrrrr")
    if smaller:
        cells = [[r.name, r.of, r.status, human_bytes(r.bytes)] for r in smaller]
        ui.table(["compressed", "of", "status", "size"], cells, align="lllr")
    if not rows and not smaller:
        ui.note(f"no runs in {out}")
        ui.paths([("next", "fleetune demo")])
    failed = [str(r["name"]) for r in rows if runlog.kind_of(str(r["status"])) == "failed"]
    if failed:
        ui.paths([("reason", f"of {failed[-1]}: {command('runs', 'show', out / failed[-1])}")])
    if rows and (page := out / str(rows[-1]["name"]) / "report.html").is_file():  # the newest has one
        ui.paths([("report", str(page))])


def _note_changed(rows: Sequence[Mapping[str, object]], ui: Ui) -> None:
    for row in rows:
        if not row["intact"]:
            ui.note(runlog.changed(row["name"]))


def _row(folder: Path) -> CompressionListed:
    try:
        record = compression_folder.record(folder)
    except StorageError:
        return CompressionListed(name=folder.name, of="", method="", status="damaged", bytes=None)
    done = record.get("result", {})
    status = "done" if done else "running" if rundir.held(folder) else "stopped"
    return CompressionListed(
        name=folder.name,
        of=compression_folder.name_of(record["model"]),
        method=record.get("method"),
        status=status,
        bytes=done.get("bytes"),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _show(args: argparse.Namespace, ui: Ui) -> None:
    for folder, smaller in [_folder(name, Path(args.out)) for name in args.names]:
        if smaller:
            _show_compressed(folder, ui)
            continue
        facts = runlog.summary(folder)
        ui.event(RunListed(**facts))
        _note_changed([facts], ui)
        known = {name: default for name, (_, default, _) in recipes.fields().items()}
        ui.table(["", folder.name], runlog.facts(folder, known), align="ll")
        try:
            ui.paths([("report", str(single.write(folder)))])
            say_what_is_shared(ui, folder)
        except StorageError as error:  # the one that is there stays
            ui.note(f"the report is not written anew: {error.message}")


def _show_compressed(folder: Path, ui: Ui) -> None:
    work = asdict(compression_folder.request_of(folder))
    done = compression_folder.record(folder).get("result")
    row = replace(_row(folder), folder=str(folder), asked=work, result=done)
    ui.event(row)
    given = {k: v for k, v in work.items() if k != "run" and v not in ("", {}, False)}
    if chosen := given.get("set"):
        given["set"] = " · ".join(f"{name} {value}" for name, value in chosen.items())
    asked = [[k, v] for k, v in given.items()]
    ui.table(["", folder.name], [*asked, ["status", row.status], *_outcome(done or {})], align="ll")
    next_ = f"fleetune measure {quoted(folder)}" if done else f"fleetune compress --resume {quoted(folder)}"
    ui.paths([("folder", str(folder)), ("next", next_)])


def _outcome(done: Mapping[str, Any]) -> list[list[object]]:
    if not done:
        return []
    after = done["after"]
    return [
        *(
            [k, f"{show(k, before)} before, {show(k, after.get(k))} after"]
            for k, before in done["before"].items()
        ),
        ["size", human_bytes(_number(done["bytes"]))],
        ["time", human_time(_number(done["seconds"]))],
        ["digest", done["digest"]],
    ]


def _compare(args: argparse.Namespace, ui: Ui) -> None:
    found = [_folder(name, Path(args.out)) for name in args.names]
    if smaller := [name for name, (_, is_smaller) in zip(args.names, found, strict=True) if is_smaller]:
        raise UsageError(
            f"runs compare is of tuned runs; {smaller[0]} was compressed",
            hint=f"{command('measure', *args.names)} --data FILE",
        )
    runs = [folder for folder, _ in found]
    for row in (rows := runlog.table(runs)):
        ui.event(RunListed(**row))
    head = ["run", "status", "rounds", "validation loss", "traffic", "time", "peak memory"]
    ui.table(head, runlog.results(runs), align="llrlrrr")
    unlike, same = runlog.differing(runs)
    if unlike:
        ui.table(
            ["option", *runlog.labels(runs)],
            [[k, *values] for k, values in unlike],
            align="l" * (len(runs) + 1),
        )
    ui.note(f"{counted(same, 'option')} equal" if unlike else "all options are equal")
    _note_changed(rows, ui)
    for caveat in runlog.caveats([runlog.read(folder) for folder in runs]):
        ui.note(f"these runs {caveat}: {runlog.APART}")


def _rm(args: argparse.Namespace, ui: Ui) -> None:
    found = list(dict.fromkeys(_folder(name, Path(args.out))[0] for name in args.names))
    if "latest" in args.names:
        latest, _ = _folder("latest", Path(args.out))
        raise UsageError(
            f"what is removed must be named; latest is {latest} now",
            hint=f"fleetune runs rm {quoted(latest)}",
        )
    links = [folder for folder in found if rundir.is_foreign_link(folder)]
    if not args.force:
        _check_needed([folder for folder in found if folder not in links], Path(args.out))
    for folder in found:
        leads = f", a link; {folder.resolve()}, to which it led, stays" if folder in links else ""
        try:
            if leads:
                folder.unlink()
            else:
                rundir.RunDir(folder).remove()  # refuses one that is in use
        except OSError as error:
            raise storage_error(error, folder) from error
        ui.note(f"removed {folder}{leads}")
        ui.event(RunRemoved(run=str(folder)))


def _check_needed(found: Sequence[Path], out: Path) -> None:
    """UsageError when something that stays needs one of these folders."""
    gone = {folder.resolve() for folder in found}
    for folder in found:
        files = [p for at in (folder.resolve().parent, out) for kind in NEEDING for p in at.glob(kind)]
        staying = {p.parent.resolve(): p.parent for p in files if p.parent.resolve() not in gone}
        needing = sorted(str(p) for p in staying.values() if folder.resolve() in _needs(p))
        if needing:
            raise UsageError(
                f"{folder} is needed by {', '.join(needing)}: made from it, and measured against it",
                hint=f"remove all: {command('runs', 'rm', folder, *needing)}   or it alone, with --force",
            )


def _needs(folder: Path) -> set[Path]:
    """Return the folders that a compression or a run was made from; of a stopped compression also its teacher's."""
    if not (folder / RECORD).is_file():
        return _holding(_base_of(folder))
    try:
        record = compression_folder.record(folder)
    except StorageError:  # a damaged record needs nothing
        return set()
    teacher = "" if record.get("result") else record.get("set", {}).get("teacher", "")
    names = [record["model"], teacher] if teacher else [record["model"]]
    numbered = folder.parent.glob(f"{teacher.zfill(4)}-*") if teacher.isdigit() else []
    return _holding([*numbered, *(p for name in names for p in (Path(name), folder.parent / name))])


def _base_of(run: Path) -> list[Path]:
    from fleetune.tuning.result import foundations

    try:
        model = foundations.found_again(recipes.read(run / "run.toml"), run).get("model")
    except FleetuneError:  # a damaged recipe needs nothing
        return []
    path = Path(model).expanduser() if isinstance(model, str) else None
    return [path] if path is not None and path.exists() else []


def _holding(paths: Sequence[Path]) -> set[Path]:
    return {inside for p in paths for inside in (p.resolve(), *p.resolve().parents)}


ACTIONS: dict[str, Callable[[argparse.Namespace, Ui], None]] = {
    "list": _list,
    "show": _show,
    "compare": _compare,
    "rm": _rm,
}
