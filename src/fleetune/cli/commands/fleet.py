"""`fleetune fleet`: run a recipe on real devices, be such a device, make keys and certificates."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetune import subject
from fleetune.api import tuning
from fleetune.cli import flags
from fleetune.cli.commands.tune import finish, screen
from fleetune.cli.console import InterruptHandler, Ui, console_listener
from fleetune.cli.parser import Add, Parser
from fleetune.common.display import check_installed, counted, human_bytes, human_time, quoted
from fleetune.common.files import read_text
from fleetune.common.settings import parse_bytes
from fleetune.data import check_columns, sources
from fleetune.data.partition import held_out_problem
from fleetune.data.read_rows import row_of
from fleetune.errors import RecipeError, StorageError, UsageError, suggest
from fleetune.fleet import PORT, flower, keys
from fleetune.fleet import audit as log
from fleetune.fleet import status as standing
from fleetune.fleet.table import LATE, Devices
from fleetune.privacy import secagg
from fleetune.runs import compression_folder, rundir
from fleetune.runs.listener import LOG
from fleetune.tuning import methods
from fleetune.tuning.recipe import recipe as recipes

if TYPE_CHECKING:
    from fleetune.common.events import DeviceEvaluated, FleetEvaluated
    from fleetune.fleet.server import Served


HELP = "fine-tune on real devices"
ORDER = 35
EXAMPLES = """\
fleetune fleet serve -c recipe.toml --wait 4
fleetune fleet join 192.168.1.10:8470 --data rows.jsonl
fleetune fleet status latest
"""
VERBS = """\
serve -c recipe.toml                  run a recipe on the devices that join (--resume RUN: go on after a stop)
join HOST:PORT --data rows.jsonl      be a device: its rows stay on it (or: NAME.invite; -c device.toml)
eval RUN|MODEL                        measure it on the held-out rows of the devices that join
split -c recipe.toml --to DIR         write the rows that each client has in the simulation
keys new NAME                         make a device's key: NAME stays there, NAME.pub goes to the server
invite NAME --keys DIR                make NAME.invite, all that a new device needs: it holds its private key
keys certificate DIR HOST [HOST ..]   make a server's certificate: ca.pem goes to the devices
devices RUN                           which key is which client
status RUN                            how the run stands, and what each device does now
logs RUN                              what happened when
stop RUN                              end the server after this step; it can be resumed
audit RUN                             check the log of all that was taken or refused
app DIR                               write the app for a Flower of your own: flwr run DIR
"""
STATE = "fleetune-device"
OWN = "model device threads held_out eval_data columns train_turns base ram epsilon delta"  # a recipe's options, of a device


def arguments(sub: Parser) -> None:
    """Add the command's arguments."""
    sub.usage = "fleetune fleet ACTION [WORD ...] [options]"
    sub.description = f"{sub.description}\n\n{textwrap.indent(VERBS, '    ')}"
    sub.add_argument("action", metavar="ACTION", choices=list(ACTIONS), help="one of the above")
    sub.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        default=[],
        help="HOST:PORT or NAME.invite (join), NAME (invite), what to make (keys), RUN (others), DIR (app)",
    )
    serve = sub.group("serve (eval takes those of the door, from --host to --round-deadline)")
    of = "a TOML recipe, or a device's settings (join); flags override it"
    serve("-c", "--config", metavar="FILE", help=of)
    serve("--resume", metavar="RUN", help="continue a stopped run (a path, a number, or latest)")
    serve("--dry-run", action="store_true", help="check recipe, rows, model and door, then stop")
    flags.add_door(serve, "the first round (default: the recipe's clients)")
    _join_arguments(
        sub.group(
            "join (with --data, --columns, --train-turns, --held-out or --eval-data, --model, --base, --ram, --device, --threads)"
        )
    )
    sub.add_argument("--to", metavar="DIR", help="for split: folder for the files")
    flags.add(sub)


def _join_arguments(add: Add) -> None:
    add("--state", metavar="DIR", help=f"folder of the device: its key, log and memory (default ./{STATE})")
    add("--key", metavar="FILE", help="the device's key (default: one made in the state folder)")
    add("--ca", metavar="FILE", help="ca.pem of the server; needed unless the server is this machine")
    add(
        "--calibrate",
        action="store_true",
        help="let sums over its rows go to a compression (compress --calibrate fleet); words can be learned from them",
    )
    add(
        "--smallest-sum",
        type=int,
        default=0,
        metavar="DEVICES",
        help="take part only where the server sees sums of at least this many devices (serve --privacy sealed)",
    )
    add(
        "--peers",
        metavar="DIR",
        help="public keys (NAME.pub) of the devices that it adds up with; else a server can invent some",
    )
    add("--only-on-power", action="store_true", help="decline rounds while this device runs on its battery")
    add(
        "--max-load",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="decline rounds while other programs keep more than this share of the processors busy, e.g. 0.5",
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """Carry out an action."""
    if args.dry_run and (args.action != "serve" or args.resume):
        raise UsageError("--dry-run is for a new run", hint="fleetune fleet serve -c recipe.toml --dry-run")
    ACTIONS[args.action](args, ui)


# The server -------------------------------------------------------------------------------------------


def _serve(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.planning import choose

    _no_words(args)
    path = rundir.find(args.resume, Path(args.out)) if args.resume else None
    if path is not None:
        flags.check_resume(args, path, "fleetune fleet serve --resume")
    values = {} if path else _values(args, ui.note)
    recipe = recipes.make(values) if values else None
    if path is not None:
        _as_before(args, path, ui, flags.DOOR[:7])
    fleets = flags.served(args)
    if path is not None:
        fleets.check(path)
    if recipe:
        tuning.check_plain(recipe.model, Path(args.out), recipes.trained(recipe))
        recipe = tuning.with_file(recipe, Path(args.out), ui.note)
        recipe = choose.settled_method(recipe, ui.note, offline=args.offline)
        recipe = fleets.settled(recipe, values)
    if args.dry_run and recipe is not None:
        return _check_only(recipe, fleets, args, ui)
    from fleetune.tuning.run import resume
    from fleetune.tuning.run import run as running

    ui.log(results=True)
    with fleets:
        with screen(ui, path) as shown:
            if recipe is None:
                assert path is not None
                result = resume.resume(path, shown, offline=args.offline, fleets=fleets)
            else:
                result = running.start(recipe, Path(args.out), shown, offline=args.offline, fleets=fleets)
        finish(ui, result, then=standing.resume(Path(result.done.run)))
        with suppress(KeyboardInterrupt), InterruptHandler(ui) as interrupt:
            interrupt.at_once = True
            fleets.linger(ui.note)


def _as_before(args: argparse.Namespace, run: Path, ui: Ui, names: Sequence[str] = flags.DOOR[:4]) -> None:
    """Take the flags with which a run was served before, where none says otherwise: its devices look for it there."""
    word = standing.word_of(run) if (run / standing.FILE).is_file() else {}
    if taken := flags.again(args, str(word.get("flags", "")), names):
        ui.note(f"taken from the run: {' '.join(taken)}")


def _check_only(recipe: recipes.Recipe, fleets: Served, args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.fleet.orders import is_path
    from fleetune.tuning.prepare import prepare

    rundir.check_writable(Path(args.out), make=False)
    with fleets:
        pass  # it can listen there
    with sources.borrowed(recipe.data) as rows:
        stated, offline = dataclasses.replace(recipe, data=rows), args.offline
        job = prepare.prepare(stated, offline=offline, simulated=False, find=False, note=ui.note)
    count = fleets.count(job)
    prepare.check_aggregation(job.recipe, job.method, count)
    ui.note(f"the recipe is good, and so is the door: {fleets.where(count)}")
    told = dataclasses.replace(prepare.checked(job, []), clients=count)
    here = f"{counted(told.held_out, 'row')} of {recipe.eval_data or recipe.data}"
    whole = "" if recipe.eval_data else f"; --eval-data {quoted(recipe.data)}: on all, if no device has them"
    ui.note(f"the server measures on {here} and uses no other{whole}")
    ui.note(f"on each device: {fleets.line(is_path(recipe.model))}")
    ui.event(told)


def _values(args: argparse.Namespace, note: Callable[[str], None]) -> Mapping[str, Any]:
    values = flags.keys(args, args.config, note)
    if not args.config and "model" not in values:
        raise UsageError(
            f"which recipe is `fleetune fleet {args.action}` to take?",
            hint=f"fleetune fleet {args.action} -c recipe.toml, or the flags of fleetune tune (fleetune tune --help)",
        )
    if "sweep" in values:
        raise RecipeError([f"{args.config} is the recipe of a sweep, which runs in the simulator alone"])
    return values


def _eval(args: argparse.Namespace, ui: Ui) -> None:
    name = _word(args, "latest")
    if other := [*flags.given(args), *args.set, *filter(None, (args.config, args.resume))]:
        raise UsageError(
            f"eval takes no {other[0]}", hint="devices hold rows out: fleetune fleet join .. --held-out 0.1"
        )
    found = subject.open(name, args.out)
    ui.log()
    if isinstance(found, subject.Run):
        _as_before(args, found.folder, ui)
    with console_listener(ui) as listener, flags.served(args) as served:
        from fleetune.fleet import eval_server

        done, each = eval_server.evaluate(found, served, listener, offline=args.offline)
    _show(ui, each, done)


def _show(ui: Ui, found: Sequence[DeviceEvaluated], done: FleetEvaluated) -> None:

    def cells(base: float | None, tuned: float | None) -> list[str]:
        if base is None or tuned is None:
            return ["", "", ""]
        return [f"{base:.4f}", f"{tuned:.4f}", f"{tuned - base:+.4f}"]

    def error(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    rows: list[list[object]] = [
        [one.client, one.name, one.rows or "", one.tokens or "", *cells(one.base, one.tuned), one.reason]
        for one in sorted(found, key=lambda one: one.client)
    ]
    share = f"{done.largest_share:.0%} of one device"
    errors = map(error, (done.base_error, done.tuned_error, done.change_error))
    rows += [
        ["", "mean by tokens", done.rows, done.tokens, *cells(done.base, done.tuned), share],
        ["", "standard error", "", "", *errors, ""],
        ["", "plain mean", "", "", *cells(done.base_plain, done.tuned_plain), ""],
        ["", "median", "", "", *cells(done.base_median, done.median)[:2], f"{done.change_median:+.4f}", ""],
        ["", "perplexity", "", "", f"{done.base_perplexity:.3f}", f"{done.tuned_perplexity:.3f}", "", ""],
    ]
    ui.table(["client", "device", "rows", "tokens", "base", "tuned", "change", ""], rows, align="llrrrrrl")
    if done.path:
        ui.paths([("measures", done.path)])


# A device ---------------------------------------------------------------------------------------------


def _join(args: argparse.Namespace, ui: Ui) -> None:
    if args.config:
        _take_settings(args, Path(args.config))
    server = _word(args, f"192.168.1.10:{PORT} --data rows.jsonl")
    given = flags.given(args)
    if not (rows := given.pop("data", "")):
        raise UsageError("which rows does this device have?", hint="--data rows.jsonl")
    own = {name: given.pop(name, "") for name in OWN.split()}
    if other := [*given, *args.set]:
        raise UsageError(
            f"{other[0]} is the server's to say",
            hint="a device gives --data, --columns, --train-turns, --held-out or --eval-data, --model, --base, --ram, --device, "
            "--threads, --epsilon",
        )
    if not own["threads"].isdigit() and own["threads"]:
        raise UsageError(f"--threads {own['threads']} is no number")
    if own["train_turns"] not in ("", "last", "all"):
        raise UsageError(f"--train-turns {own['train_turns']} is not one of last, all")
    check_columns(own["columns"])
    memory, held_out = parse_bytes(own["ram"] or None) or 0, _held_out(own)
    state = Path(args.state or STATE)
    key, ca = args.key and Path(args.key), args.ca and Path(args.ca)
    if server.endswith(keys.INVITE):
        if key or ca:
            raise UsageError("an invite has a key and a ca.pem of its own", hint="leave out --key and --ca")
        keys.check_installed()
        file = Path(server)
        server, ca = keys.accept_invite(file, state)
        if os.name == "posix" and file.stat().st_mode & 0o077:
            ui.note(f"others on this machine can read the private key in {file}: chmod 600 {quoted(file)}")
    ui.log()
    from fleetune.fleet.brings import Brings
    from fleetune.fleet.device import Conditions, Home, join

    rows = str(sources.store_stdin(state)) if rows == sources.STDIN else rows
    brings = Brings(
        rows,
        own["model"],
        own["device"] or "auto",
        int(own["threads"] or 0),
        memory,
        args.offline,
        held_out,
        own["eval_data"],
        own["columns"],
        own["base"] or "auto",
        args.calibrate,
        args.smallest_sum or (secagg.FEWEST if args.peers else 0),
        _number(own["epsilon"] or "0"),
        _number(own["delta"] or "1e-5"),
        own["train_turns"] == "all",
    )
    home = Home(state, key, ca, peers=args.peers and Path(args.peers))
    with InterruptHandler(ui) as interrupt:
        why = join(
            server,
            brings,
            home,
            stop=lambda: interrupt.requested,
            note=ui.note,
            conditions=Conditions(args.only_on_power, args.max_load),
        )
    ui.note(why)


def _take_settings(args: argparse.Namespace, file: Path) -> None:
    """Give the device's settings in a TOML file to the arguments that no flag gave; RecipeError for any that is none."""
    found = recipes.read(file)
    known: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("server", "data", "state", "key", "ca", "peers", *OWN.split()), str),
        **dict.fromkeys(("ram", "held_out", "threads", "epsilon", "delta"), (str, int, float)),
        **dict.fromkeys(("smallest_sum", "max_load"), (int, float)),
        **dict.fromkeys(("calibrate", "only_on_power", "offline"), bool),
    }
    wrong = [f"{file}: no setting '{n}' of a device.{suggest(n, known)}" for n in found if n not in known]
    for name, kind in known.items():
        value = found.get(name)
        if name in found and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            wrong.append(f"{file}: {name} = {value!r} is of another kind")
    if wrong:
        raise RecipeError(wrong, hint=f"settings are {', '.join(known)}")
    args.words = args.words or [found[name] for name in ("server",) if name in found]
    for name, value in found.items():
        recipe = flags.PREFIX + name if hasattr(args, flags.PREFIX + name) else name
        if name != "server" and not getattr(args, recipe):
            setattr(args, recipe, value if recipe == name else str(value))


def _number(text: str) -> float:
    """Return a number; -1 for what is none."""
    try:
        return float(text)
    except ValueError:
        return -1.0


def _held_out(own: Mapping[str, str]) -> float:
    """The share or number of rows that a device holds out; UsageError for what is none."""
    if own["held_out"] and own["eval_data"]:
        why = "rows to measure on come from --data, or from a file of their own"
        raise UsageError("--held-out and --eval-data are both given", hint=why)
    number = _number(own["held_out"] or "0")
    if why := held_out_problem(number):
        raise UsageError(f"--held-out {own['held_out']}: {why}")
    return number


# What fleets need -------------------------------------------------------------------------------------


def _split(args: argparse.Namespace, ui: Ui) -> None:
    from fleetune.tuning.prepare import prepare

    _no_words(args)
    if not args.to:
        raise UsageError("where to?", hint="--to DIR")
    from fleetune.planning import choose

    recipe = choose.settled_method(recipes.make(_values(args, ui.note)), ui.note, offline=args.offline)
    parts = prepare.split(recipe, methods.entry(recipe.method), offline=args.offline)
    folder = Path(args.to)
    folder.mkdir(parents=True, exist_ok=True)
    for client, rows in enumerate(parts.clients):
        lines = [json.dumps(row_of(parts.examples[i]), ensure_ascii=False) for i in rows.tolist()]
        (folder / f"client-{client:03d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ui.paths([("rows", f"{folder}/client-000.jsonl to client-{len(parts.clients) - 1:03d}.jsonl")])


def _keys(args: argparse.Namespace, ui: Ui) -> None:
    keys.check_installed()
    match args.words:
        case ["new", name]:
            made = keys.make(Path(name))
            ui.paths(
                [
                    ("key", f"{name}   (stays on the device)"),
                    ("public key", f"{name}.pub   (for the server's --keys folder)"),
                    ("fingerprint", made.public.fingerprint),
                ]
            )
        case ["certificate", folder, *hosts] if hosts:
            ca = keys.make_certificate(Path(folder), hosts)
            ui.paths([("for devices", str(ca)), ("for the server", f"--certificate {quoted(folder)}")])
        case _:
            raise UsageError("keys takes: new NAME, or certificate DIR HOST [HOST ..]")


def _invite(args: argparse.Namespace, ui: Ui) -> None:
    keys.check_installed()
    name, certificate = _word(args, "press-3"), args.certificate and Path(args.certificate)
    if not args.keys:
        raise UsageError("where do the devices' public keys go?", hint="--keys DIR, as in fleet serve")
    host = args.host or ("0.0.0.0" if certificate else "127.0.0.1")
    place = keys.Place(host, args.port or PORT, Path(args.keys), certificate)
    names = keys.hosts_of(certificate / "server.pem") if certificate else []
    if certificate is None and not keys.is_loopback(host):
        raise UsageError(f"a device on another machine than {host} needs TLS", hint="--certificate DIR")
    if certificate and host not in (*keys.EVERY, *names) and not any("*" in name for name in names):
        raise UsageError(f"the certificate in {certificate} is not for {host}", hint=f"--host {names[0]}")
    file = Path(name).with_name(Path(name).name.removesuffix(keys.INVITE) + keys.INVITE)
    text = keys.make_invite(file, Path(args.keys), place.address(), certificate and certificate / "ca.pem")
    ui.code(keys.qr_code(text))
    ui.paths(
        [("invite", f"{file}   (holds the device's private key: bring it there safely, then delete it here)")]
    )
    ui.paths([("next", f"fleetune fleet join {quoted(file.name)} --data rows.jsonl   (on the device)")])


def _no_words(args: argparse.Namespace) -> None:
    if args.words:
        raise UsageError(f"{args.action} takes no '{args.words[0]}'", hint="fleetune fleet --help")


def _word(args: argparse.Namespace, such: str) -> str:
    """Return the one word that an action takes, such as `such`."""
    if len(args.words) != 1:
        raise UsageError(f"{args.action} takes one word", hint=f"fleetune fleet {args.action} {such}")
    return str(args.words[0])


def _app(args: argparse.Namespace, ui: Ui) -> None:
    check_installed("Flower", "flower", "flwr")
    folder = Path(_word(args, "fleetune-app"))
    flower.write_app(folder)
    given = "--run-config \"recipe='/path/on/the/server/recipe.toml'\""
    ui.paths([("app", str(folder)), ("next", f"flwr run {quoted(folder)} CONNECTION {given}")])


def _devices(args: argparse.Namespace, ui: Ui) -> None:
    run = _run_of(args)
    found, names = Devices(run), [""]
    if not compression_folder.is_one(run):
        recipe = recipes.make(recipes.read(run / "run.toml"))
        names = list(methods.make(recipe.method, recipe.set).kind_names)
    rows = [
        [
            str(c),
            m.name,
            m.key[:16],
            str(m.rows or (LATE if m.late else "has not joined")),
            human_bytes(m.memory) if m.memory else "",
            str(m.threads or ""),
            f"{m.speed:,.0f}" if m.speed else "",
            names[m.kind] if 0 <= m.kind < len(names) else "",
            m.version,
            m.torch,
            m.processor,
        ]
        for c, m in enumerate(found.members)
    ]
    head = "client device key rows memory threads tokens/s does fleetune torch processor"
    ui.table(head.split(), rows)
    if len(names) > 1 and all(m.kind >= 0 for m in found.members):
        given = ",".join(str(m.kind) for m in found.members)
        ui.note(f"the same in the simulation: --kinds {given}")


def _status(args: argparse.Namespace, ui: Ui) -> None:
    now = standing.look(_run_of(args))
    ui.event(now)
    ago = human_time(now.heard)
    if now.served:
        ui.paths([("run", f"{now.run} · {now.status} · heard {ago} ago"), *standing.facts(now)])
    else:
        page = "its page is still shown" if standing.lingers(Path(now.run)) else "no server runs it"
        ui.note(f"{page}; last heard {ago} ago")
        ui.paths([("run", f"{now.run} · {now.status}"), *standing.facts(now)])
    ui.table(standing.HEAD, [standing.cells(device) for device in now.devices])
    if not now.served and now.status != "done":
        ui.paths([("next", standing.resume(Path(now.run)))])


def _logs(args: argparse.Namespace, ui: Ui) -> None:
    file = _run_of(args) / LOG
    if not file.is_file():
        raise UsageError(f"there is no {file}: the run is of an earlier version, or has told nothing yet")
    ui.text(read_text(file, errors="replace"))


def _stop(args: argparse.Namespace, ui: Ui) -> None:
    standing.ask_to_stop(run := _run_of(args))
    after = "it stops after this step; go on with: "
    ui.note(f"asked: {'its page ends' if standing.standing(run) == 'done' else after + standing.resume(run)}")


def _audit(args: argparse.Namespace, ui: Ui) -> None:
    file = _run_of(args) / log.FILE
    found = log.verify(file)
    if found.bad:
        raise StorageError(
            f"{file}: line {found.bad} does not follow from the one before: it, or one before it, was changed",
            hint=f"the first {found.entries} entries are as they were written",
        )
    ui.paths([("entries", f"{found.entries}, each follows from the one before"), ("chain", found.chain)])


def _run_of(args: argparse.Namespace) -> Path:
    """The folder of the run that the words name, or of a compression that devices have calibrated."""
    name, out = _word(args, "latest"), Path(args.out)
    smaller = compression_folder.find(name, out) if name != "latest" else None
    return smaller or rundir.find(name, out)


ACTIONS: Final[Mapping[str, Callable[[argparse.Namespace, Ui], None]]] = {
    "serve": _serve,
    "join": _join,
    "eval": _eval,
    "split": _split,
    "keys": _keys,
    "invite": _invite,
    "devices": _devices,
    "status": _status,
    "logs": _logs,
    "stop": _stop,
    "audit": _audit,
    "app": _app,
}
