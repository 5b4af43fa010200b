# SPDX-License-Identifier: Apache-2.0
"""Make the flags that commands share, and what they stand for: a recipe from its fields, and the door of devices."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from fleetune import recipes as named
from fleetune.common import settings
from fleetune.common.shell import quoted
from fleetune.errors import RecipeError, UsageError
from fleetune.fleet import PORT
from fleetune.runs import rundir
from fleetune.tuning.recipe import recipe as recipes

if TYPE_CHECKING:
    from fleetune.fleet.server import Served


PREFIX = "recipe_"


def add_set(sub: argparse.ArgumentParser) -> None:
    """Add `--set NAME=VALUE`."""
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method; repeat"
    )


def add(sub: argparse.ArgumentParser) -> None:
    """Add `--set`, and a flag for every other field of a recipe."""
    add_set(sub)
    add_some(sub, [name for name in recipes.fields() if name != "set"])


def add_some(
    sub: argparse.ArgumentParser, names: Sequence[str], texts: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Add a flag for each of these fields of a recipe; `texts` say what some of them are here, by name."""
    group = sub.add_argument_group("recipe")
    declared = recipes.fields()
    for name in names:
        kind, default, text = declared[name]
        shown = "" if default in (dataclasses.MISSING, "") else f" (default {default})"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=PREFIX + name,
            metavar=kind.__name__.upper(),
            choices=recipes.choices(name) or None,
            help=(texts.get(name, text) + shown).replace("%", "%%"),
        )
    if "samples" in names:
        group.add_argument(
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


def keys(args: argparse.Namespace, file: str | None) -> dict[str, Any]:
    """The keys of a recipe (a file or `recipe:NAME`), overridden by the flags; RecipeError for a setting without a value."""
    values = _read(named.find(file)) if file else {}
    values |= given(args)
    return {**values, "set": {**values.get("set", {}), **settings.pairs(args.set)}}


def _read(file: Path) -> dict[str, Any]:
    """Read a recipe; the files that a run's own recipe names are looked for in the folder that the run was started in."""
    values = recipes.read(file)
    if not (file.parent / rundir.ENVIRONMENT).is_file():
        return values
    from fleetune.tuning.result import foundations

    return foundations.found_again(values, file.parent)


def check(recipe: recipes.Recipe, out: str) -> None:
    """UsageError for what can be seen to be wrong before torch is loaded, which takes seconds: names, files, rules."""
    from fleetune.data.partition import check_partition_spec
    from fleetune.tuning.exchange import aggregation

    recipes.check_order(recipe.model, recipe.data)
    check_model(recipe.model, out, recipes.trained(recipe))
    for rows in filter(None, (recipe.data, recipe.eval_data)):
        check_data(rows)
    problems: list[str] = []
    hint = ""
    try:
        check_partition_spec(recipe.partition)
    except RecipeError as error:
        problems, hint = list(error.problems), error.hint or ""
    try:
        aggregation.parse(recipe.aggregation)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise RecipeError(problems, hint=hint or "all options: fleetune tune --help")


def check_model(model: str, out: str, train: str = "weights") -> None:
    """UsageError for what is no plain model, before torch is loaded: a run, an adapter, a path to nothing or to a part.

    A compressed model passes where `train` is scales.
    """
    from fleetune.api import tuning
    from fleetune.models.cache import cache, names
    from fleetune.models.gguf import header

    tuning.check_plain(model, Path(out), train)
    if tuning.compressed_of(model, train, Path(out)) is None:
        names.check(model)
        if model not in cache.ORIGINS and (file := Path(model).expanduser()).is_file():
            header.check_whole(file)


def check_data(data: str) -> None:
    """DataError for a file that is not there, before torch is loaded; names of the hub and folders are looked at later."""
    from fleetune.data import readers

    path = Path(data).expanduser()
    if path.suffix.lower() in readers.READERS and ":" not in data and not path.exists():
        raise readers.no_file(data)


def check_resume(args: argparse.Namespace, path: Path, command: str, allowed: Collection[str] = ()) -> None:
    """UsageError for a part of a recipe, but those `allowed`, that is given beside `--resume`; `command` resumes the run."""
    found = [word for name in ("model", "data", "config") if (word := getattr(args, name, None))]
    if found := [*found, *(name for name in given(args) if name not in allowed), *args.set]:
        raise UsageError(
            f"--resume follows the run's own recipe; it takes no {found[0]}", hint=f"{command} {quoted(path)}"
        )


DOOR: Final = ("host", "port", "keys", "certificate", "wait", "grace", "round_deadline", "page")


def add_door(group: argparse._ArgumentGroup, first: str) -> None:
    """Add the flags to a group; `first` is what waits for the devices: "the first round"."""
    group.add_argument("--host", help="address to listen on (default 127.0.0.1: this machine alone)")
    group.add_argument("--port", type=int, help=f"port to listen on (default {PORT})")
    group.add_argument(
        "--keys",
        metavar="DIR",
        help="let in the devices whose NAME.pub is in this folder, in the order of the names",
    )
    group.add_argument("--certificate", metavar="DIR", help="folder with server.pem and server.key")
    group.add_argument("--wait", type=int, metavar="N", help=f"devices before {first}")
    group.add_argument(
        "--grace", type=float, metavar="SECONDS", help="wait so long for a device that has gone (default 60)"
    )
    group.add_argument(
        "--round-deadline",
        type=float,
        metavar="SECONDS",
        help="go on without those that have not answered by then (default: wait)",
    )
    group.add_argument(
        "--page",
        nargs="?",
        const="",
        metavar="[HOST:]PORT",
        help="show the running fleet in a browser, and at /metrics to Prometheus; off this machine with TLS and a password: "
        "the environment's FLEETUNE_PASSWORD, or one made here",
    )


def given_door(args: argparse.Namespace) -> list[str]:
    """Return the flags of the door that were given, as they are written."""
    return [f"--{name.replace('_', '-')}" for name in DOOR if getattr(args, name) is not None]


def served(args: argparse.Namespace) -> Served:
    """Return the door; UsageError for a number below 0, and for a place that others reach without TLS and keys."""
    from fleetune.fleet.remote import Pace
    from fleetune.fleet.server import Place, Served

    for name in ("wait", "grace", "round_deadline"):
        if (value := getattr(args, name)) is not None and value < 0:
            raise UsageError(f"--{name.replace('_', '-')} {value} cannot be negative")
    keys, certificate = (Path(v) if v else None for v in (args.keys, args.certificate))
    place = Place(args.host or "127.0.0.1", PORT if args.port is None else args.port, keys, certificate)
    usual = Pace()
    pace = Pace(
        usual.grace if args.grace is None else args.grace,
        usual.deadline if args.round_deadline is None else args.round_deadline,
    )
    return Served(place, args.wait or 0, pace, page=args.page)
