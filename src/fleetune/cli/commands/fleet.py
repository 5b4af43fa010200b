# SPDX-License-Identifier: Apache-2.0
"""`fleetune fleet`: run a recipe on real devices, be such a device, make keys and certificates."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetune.cli import recipe_flags
from fleetune.cli.commands.tune import finish, screen
from fleetune.cli.console import Ui
from fleetune.cli.interrupt import InterruptHandler
from fleetune.errors import RecipeError, StorageError, UsageError
from fleetune.runs import rundir, sealed
from fleetune.tuning import recipe as recipes
from fleetune.tuning.recipe import Recipe

if TYPE_CHECKING:
    from fleetune.fleet.server import Served

HELP = "fine-tune on real devices"
ORDER = 35
EXAMPLES = """\
serve -c recipe.toml                  run a recipe on the devices that join (--resume RUN: go on after a stop)
join HOST:PORT --data rows.jsonl      be a device: its rows stay on it
split -c recipe.toml --to DIR         write the rows that each client has in the simulation
keys new NAME                         make a device's key: NAME stays there, NAME.pub goes to the server
keys certificate DIR HOST [HOST ..]   make a server's certificate: ca.pem goes to the devices
devices RUN                           which key is which client
status RUN                            what each device does now
stop RUN                              end the server after this step; it can be resumed
audit RUN                             check the log of all that was taken or refused
app DIR                               write the app for a Flower of your own: flwr run DIR
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.epilog = EXAMPLES
    sub.add_argument("action", choices=list(ACTIONS))
    sub.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        help="HOST:PORT (join), what to make (keys), RUN (devices, status, stop, audit), DIR (app)",
    )
    _serve_arguments(sub.add_argument_group("serve"))
    _join_arguments(
        sub.add_argument_group("join (with --data, --model, --device and --threads of this device)")
    )
    sub.add_argument("--to", metavar="DIR", help="for split: folder for the files")
    recipe_flags.add(sub)


def _serve_arguments(serve: argparse._ArgumentGroup) -> None:
    serve.add_argument("-c", "--config", metavar="FILE", help="a TOML recipe; flags override it")
    serve.add_argument("--resume", metavar="RUN", help="continue a stopped run (a path, a number, or latest)")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    serve.add_argument("--port", type=int, default=8470, help="port to listen on (default 8470)")
    serve.add_argument(
        "--keys",
        metavar="DIR",
        help="let in the devices whose NAME.pub is in this folder, in the order of the names",
    )
    serve.add_argument("--certificate", metavar="DIR", help="folder with server.pem and server.key")
    serve.add_argument(
        "--wait",
        type=int,
        default=0,
        metavar="N",
        help="devices before the first round (default: the recipe's clients)",
    )
    serve.add_argument(
        "--grace",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="wait so long for a device that has gone (default 60)",
    )
    serve.add_argument(
        "--round-deadline",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="go on without those that have not answered by then (default: wait)",
    )


def _join_arguments(join: argparse._ArgumentGroup) -> None:
    join.add_argument(
        "--state",
        metavar="DIR",
        default="fleetune-device",
        help="folder of the device: its key, what it remembers (default ./fleetune-device)",
    )
    join.add_argument(
        "--key", metavar="FILE", help="the device's key (default: one made in the state folder)"
    )
    join.add_argument(
        "--ca", metavar="FILE", help="ca.pem of the server; needed unless the server is this machine"
    )
    join.add_argument("--ram", metavar="SIZE", help="memory that the work may take, e.g. 2GB (default: all)")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Carry out an action."""
    ACTIONS[args.action](args, ui)


# The server -------------------------------------------------------------------------------------------


def _serve(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.tuning import run as running

    _no_words(args)
    with screen(ui) as shown, _served(args) as fleets:
        if args.resume:
            path = rundir.find(args.resume, Path(args.out))
            if given := [*recipe_flags.given(args), *args.set, *([args.config] if args.config else [])]:
                raise UsageError(
                    f"--resume follows the run's own recipe; it takes no {given[0]}",
                    hint=f"fleetune fleet serve --resume {path}",
                )
            result = running.resume(path, shown, offline=args.offline, fleets=fleets)
        else:
            result = running.start(_recipe(args), Path(args.out), shown, offline=args.offline, fleets=fleets)
    finish(ui, result)


def _served(args: argparse.Namespace) -> Served:
    from fleetune.fleet.remote import Pace
    from fleetune.fleet.server import Place, Served

    for name in ("wait", "grace", "round_deadline"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)} cannot be negative")
    place = Place(args.host, args.port, _path(args.keys), _path(args.certificate))
    return Served(place, args.wait, Pace(args.grace, args.round_deadline))


def _recipe(args: argparse.Namespace) -> Recipe:
    values = recipe_flags.keys(args, args.config)
    if "sweep" in values:
        raise RecipeError([f"{args.config} is the recipe of a sweep, which runs in the simulator alone"])
    return recipes.make(values)


# A device ---------------------------------------------------------------------------------------------


def _join(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.fleet.device import Home, join
    from fleetune.fleet.worker import Brings
    from fleetune.planning.plan import parse_bytes

    if len(args.words) != 1:
        raise UsageError(
            "join takes the server's HOST:PORT",
            hint="fleetune fleet join 192.168.1.10:8470 --data rows.jsonl",
        )
    given = recipe_flags.given(args)
    if not (rows := given.pop("data", "")):
        raise UsageError("which rows does this device have?", hint="--data rows.jsonl")
    own = {name: given.pop(name, "") for name in ("model", "device", "threads")}
    if other := [*given, *args.set]:
        raise UsageError(
            f"{other[0]} is the server's to say", hint="a device gives --data, --model, --device, --threads"
        )
    if not own["threads"].isdigit() and own["threads"]:
        raise UsageError(f"--threads {own['threads']} is no number")
    memory = parse_bytes(args.ram) or 0
    brings = Brings(
        rows, own["model"], own["device"] or "auto", int(own["threads"] or 0), memory, args.offline
    )
    home = Home(Path(args.state), _path(args.key), _path(args.ca))
    with InterruptHandler(ui) as interrupt:
        why = join(args.words[0], brings, home, stop=lambda: interrupt.requested, note=ui.note)
    ui.note(why)


# What fleets need -------------------------------------------------------------------------------------


def _split(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.data.examples import row_of
    from fleetune.tuning import methods, prepare

    _no_words(args)
    if not args.to:
        raise UsageError("where to?", hint="--to DIR")
    recipe = _recipe(args)
    parts = prepare.split(recipe, methods.entry(recipe.method), offline=args.offline)
    folder = Path(args.to)
    folder.mkdir(parents=True, exist_ok=True)
    for client, rows in enumerate(parts.clients):
        lines = [json.dumps(row_of(parts.examples[i]), ensure_ascii=False) for i in rows.tolist()]
        (folder / f"client-{client:03d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ui.paths([("rows", f"{folder}/client-000.jsonl to client-{len(parts.clients) - 1:03d}.jsonl")])


def _keys(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.fleet import keys

    keys.check_installed()
    match args.words:
        case ["new", name]:
            made = keys.make(Path(name))
            ui.paths([
                ("key", f"{name}   (stays on the device)"),
                ("public key", f"{name}.pub   (for the server's --keys folder)"),
                ("fingerprint", made.public.fingerprint),
            ])  # fmt: skip
        case ["certificate", folder, *hosts] if hosts:
            ca = keys.make_certificate(Path(folder), hosts)
            ui.paths([("for devices", str(ca)), ("for the server", f"--certificate {folder}")])
        case _:
            raise UsageError("keys takes: new NAME, or certificate DIR HOST [HOST ..]")


def _no_words(args: argparse.Namespace) -> None:
    if args.words:
        raise UsageError(f"{args.action} takes no '{args.words[0]}'", hint="fleetune fleet --help")


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _devices(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.fleet.table import Devices

    found = Devices(_run_of(args))
    rows = [
        [str(c), m.name, m.key[:16], str(m.rows or "has not joined")] for c, m in enumerate(found.members)
    ]
    ui.table(["client", "device", "key", "rows"], rows)


def _status(args: argparse.Namespace, ui: Ui) -> None:
    run = _run_of(args)
    found = _published(run)
    rows = [(str(d["client"]), str(d["name"]), str(d["does"])) for d in found["devices"]]
    if not rundir.held(run):
        ui.note(f"no server has {run} now ({rundir.status_of(run) or 'status unknown'}); as it last was:")
    ago = max(0.0, time.time() - float(found["t"]))
    ui.note(f"{found['address']} · round {found['round']} · {ago:.0f} s ago")
    ui.table(["client", "device", "does"], rows)


def _stop(args: argparse.Namespace, ui: Ui) -> None:
    run = _run_of(args)
    if not rundir.held(run):
        raise UsageError(f"no server has {run} now", hint=f"its status: {rundir.status_of(run) or 'unknown'}")
    found = _published(run)
    if found["machine"] != platform.node():
        raise UsageError(f"the server of {run} is on {found['machine']}", hint="stop it there")
    os.kill(int(found["pid"]), signal.SIGTERM)
    ui.note(f"told: it stops after this step; go on with: fleetune fleet serve --resume {run}")


def _published(run: Path) -> Mapping[str, Any]:
    """What the server of a run said last; StorageError where it is damaged, UsageError where it is no fleet's run."""
    from fleetune.fleet.server import STATUS

    if not (run / STATUS).is_file():
        raise UsageError(f"{run} is not the run of a real fleet, or its server has not begun")
    found = sealed.read(run / STATUS, "the server writes it again every second")
    if missing := {"t", "pid", "machine", "address", "round", "devices"} - found.keys():
        raise StorageError(f"{run / STATUS} lacks {', '.join(sorted(missing))}")
    return found


def _audit(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.fleet import audit

    file = _run_of(args) / audit.FILE
    found = audit.verify(file)
    if found.bad:
        raise StorageError(
            f"{file}: line {found.bad} does not follow from the one before: it, or one before it, was changed",
            hint=f"the first {found.entries} entries are as they were written",
        )
    ui.paths([("entries", f"{found.entries}, each follows from the one before"), ("chain", found.chain)])


def _app(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.fleet.flower import shim

    if len(args.words) != 1:
        raise UsageError("app takes one DIR", hint="fleetune fleet app fleetune-app")
    folder = Path(args.words[0])
    shim.write(folder)
    ui.paths([
        ("app", str(folder)),
        ("next", f"flwr run {folder} CONNECTION --run-config \"recipe='/path/on/the/server/recipe.toml'\""),
    ])  # fmt: skip


def _run_of(args: argparse.Namespace) -> Path:
    """The folder of the run that the words name."""
    if len(args.words) != 1:
        raise UsageError(f"{args.action} takes one RUN", hint=f"fleetune fleet {args.action} latest")
    return rundir.find(args.words[0], Path(args.out))


ACTIONS: Final[Mapping[str, Callable[[argparse.Namespace, Ui], None]]] = {
    "serve": _serve, "join": _join, "split": _split, "keys": _keys, "devices": _devices, "status": _status,
    "stop": _stop, "audit": _audit, "app": _app,
}  # fmt: skip
