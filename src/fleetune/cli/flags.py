"""Make the flags that commands share, and what they stand for: a recipe from its fields, and the door of devices."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from fleetune import recipes as named
from fleetune.cli.parser import Add, Parser
from fleetune.common import settings
from fleetune.common.display import quoted
from fleetune.errors import UsageError
from fleetune.fleet import PORT
from fleetune.runs import rundir
from fleetune.tuning.recipe import recipe as recipes

if TYPE_CHECKING:
    from fleetune.fleet.server import Served


PREFIX = "recipe_"


def add(sub: Parser) -> None:
    """Add `--set`, and a flag for every other field of a recipe."""
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="setting of the method; repeatable"
    )
    add_some(sub, [name for name in recipes.fields() if name != "set"])


def add_some(sub: Parser, names: Sequence[str], texts: Mapping[str, str] = MappingProxyType({})) -> None:
    """Add a flag for each of these fields of a recipe; `texts` say what some of them are here, by name."""
    add = sub.group("recipe")
    declared = recipes.fields()
    for name in names:
        kind, default, text = declared[name]
        shown = "" if default in (dataclasses.MISSING, "", False) else f" (default {default})"
        one: dict[str, Any] = {"action": "store_const", "const": "true"} if kind is bool else {}
        add(
            f"--{name.replace('_', '-')}",
            dest=PREFIX + name,
            help=(texts.get(name, text) + shown).replace("%", "%%"),
            **one or {"metavar": kind.__name__.upper(), "choices": recipes.choices(name) or None},
        )
    if "samples" in names:
        add(
            "--no-samples",
            dest=PREFIX + "samples",
            action="store_const",
            const="0",
            help="keep no text of a prompt or an answer in any file of the run (the same as --samples 0)",
        )


def given(args: argparse.Namespace) -> dict[str, str]:
    """The recipe's keys that flags gave."""
    found = {k.removeprefix(PREFIX): v for k, v in vars(args).items() if k.startswith(PREFIX)}
    return {k: v for k, v in found.items() if v is not None}


def keys(args: argparse.Namespace, file: str | None, note: Callable[[str], None]) -> dict[str, Any]:
    """The keys of a recipe (a file or `recipe:NAME`), overridden by the flags; RecipeError for a setting without a value."""
    path = named.find(file) if file else None
    values = recipes.read(path, note) if path else {}
    if path and (path.parent / rundir.ENVIRONMENT).is_file():  # a run's own, of the folder it was started in
        from fleetune.tuning.result import foundations

        values = foundations.found_again(values, path.parent)
    values |= given(args)
    return {**values, "set": {**values.get("set", {}), **settings.pairs(args.set)}}


def options(args: argparse.Namespace, names: str) -> dict[str, Any]:
    """Return the values of these arguments by name, and of those that every command has: `out` and `offline`."""
    return {name: getattr(args, name) for name in (*names.split(), "out", "offline")}


def new_path(text: str | None, command: str) -> Path:
    """Return what `--to` names; UsageError where `command` was given none, or something is there."""
    if not text:
        raise UsageError(f"{command} needs --to PATH, what to write")
    if (path := Path(text)).exists():
        raise UsageError(f"{path} exists already", hint="choose another --to: nothing is overwritten")
    return path


def check_resume(args: argparse.Namespace, path: Path, command: str, allowed: Collection[str] = ()) -> None:
    """UsageError for a part of a recipe, but those `allowed`, that is given beside `--resume`; `command` resumes the run."""
    found = [word for name in ("model", "data", "config") if (word := getattr(args, name, None))]
    if found := [*found, *(name for name in given(args) if name not in allowed), *args.set]:
        raise UsageError(
            f"--resume follows the run's own recipe; it takes no {found[0]}", hint=f"{command} {quoted(path)}"
        )


DOOR: Final = ("host", "port", "keys", "certificate", "wait", "grace", "round_deadline", "page")


def add_door(add: Add, first: str) -> None:
    """Add the flags; `first` is what waits for the devices: "the first round"."""
    add("--host", help="address to listen on (default 127.0.0.1: this machine alone)")
    add("--port", type=int, help=f"port to listen on (default {PORT})")
    add("--keys", metavar="DIR", help="let in the devices whose NAME.pub is in it, in the order of the names")
    add("--certificate", metavar="DIR", help="folder with server.pem and server.key")
    add("--wait", type=int, metavar="N", help=f"devices before {first}")
    add(
        "--grace",
        type=float,
        metavar="SECONDS",
        help="wait this long for a device that has gone (default: twice the median device's time in the last round, 10 to 60 s)",
    )
    add(
        "--round-deadline",
        type=float,
        metavar="SECONDS",
        help="go on without those that have not answered by then (default: 20 times the median device's time, at least 10 min)",
    )
    add(
        "--page",
        nargs="?",
        const="",
        metavar="[HOST:]PORT",
        help="show the running fleet in a browser, and at /metrics to Prometheus; off this machine with TLS and a password: "
        "the environment's FLEETUNE_PASSWORD, or one made here",
    )


def again(args: argparse.Namespace, flags: str, names: Sequence[str] = DOOR[:4]) -> list[str]:
    """Open the same door as a run's server did with these flags, where none says otherwise; return those that were taken."""
    door, taken = Parser(add_help=False), []
    add_door(door.group(""), "")
    before = vars(door.parse_known_args(shlex.split(flags))[0])
    for name in names:
        if getattr(args, name) is None and before[name] is not None:
            setattr(args, name, before[name])
            taken.append(f"--{name.replace('_', '-')} {quoted(before[name])}")
    return taken


def given_door(args: argparse.Namespace) -> list[str]:
    """Return the flags of the door that were given, as they are written."""
    return [f"--{name.replace('_', '-')}" for name in DOOR if getattr(args, name) is not None]


def served(args: argparse.Namespace) -> Served:
    """Return the door; UsageError for a number below 0, and for a place that others reach without TLS and keys."""
    from fleetune.fleet import keys, remote, server

    for name in ("wait", "grace", "round_deadline"):
        if (value := getattr(args, name)) is not None and value < 0:
            raise UsageError(f"--{name.replace('_', '-')} {value} cannot be negative")
    known, certificate = (Path(v) if v else None for v in (args.keys, args.certificate))
    port, usual = PORT if args.port is None else args.port, remote.Pace()
    place = keys.Place(args.host or "127.0.0.1", port, known, certificate)
    pace = remote.Pace(args.grace, usual.deadline if args.round_deadline is None else args.round_deadline)
    return server.Served(place, args.wait or 0, pace, page=args.page)
