# SPDX-License-Identifier: Apache-2.0
"""Make the flags of `tune` and `sweep` from the recipe's fields, and a recipe's keys from the flags."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fleetune import recipes as named
from fleetune.common import settings
from fleetune.errors import UsageError
from fleetune.tuning import recipe as recipes

PREFIX = "recipe_"


def add_set(sub: argparse.ArgumentParser) -> None:
    """Add `--set NAME=VALUE`."""
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method; repeat"
    )


def add(sub: argparse.ArgumentParser) -> None:
    """Add `--set`, and a flag for every other field of a recipe."""
    add_set(sub)
    group = sub.add_argument_group("recipe")
    for name, (kind, default, text) in recipes.fields().items():
        if name != "set":
            shown = "" if default is dataclasses.MISSING else f" (default {default})"
            group.add_argument(
                f"--{name.replace('_', '-')}",
                dest=PREFIX + name,
                metavar=kind.__name__.upper(),
                help=text + shown,
            )


def given(args: argparse.Namespace) -> dict[str, str]:
    """The recipe's keys that flags gave."""
    found = {k.removeprefix(PREFIX): v for k, v in vars(args).items() if k.startswith(PREFIX)}
    return {k: v for k, v in found.items() if v is not None}


def keys(args: argparse.Namespace, file: str | None) -> dict[str, Any]:
    """The keys of a recipe (a file or `recipe:NAME`), overridden by the flags; RecipeError for a setting without a value."""
    values: dict[str, Any] = recipes.read(named.find(file)) if file else {}
    values |= given(args)
    return {**values, "set": {**values.get("set", {}), **settings.pairs(args.set)}}


def check_resume(args: argparse.Namespace, path: Path, command: str) -> None:
    """UsageError for a part of a recipe that is given beside `--resume`; `command` resumes the run at `path`."""
    found = [word for name in ("model", "data", "config") if (word := getattr(args, name, None))]
    if found := [*found, *given(args), *args.set]:
        raise UsageError(
            f"--resume follows the run's own recipe; it takes no {found[0]}", hint=f"{command} {path}"
        )
