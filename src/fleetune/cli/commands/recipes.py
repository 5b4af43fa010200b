# SPDX-License-Identifier: Apache-2.0
"""`fleetune recipes`: the recipes that come with Fleetune; list them, show one, copy one to change it."""

from __future__ import annotations

import argparse
from pathlib import Path

from fleetune import recipes
from fleetune.cli.console import Ui
from fleetune.common.events import RecipeListed
from fleetune.common.files import storage_error
from fleetune.errors import UsageError
from fleetune.recipes import Named

HELP = "list, show or copy the recipes that come with Fleetune"
ORDER = 125
EXAMPLES = """\
fleetune recipes                        what there is
fleetune recipes show fedit             the recipe as a file
fleetune recipes copy fedit mine.toml   a copy to change; or use it as it is: fleetune tune -c recipe:fedit MODEL DATA
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument(
        "action",
        metavar="ACTION",
        nargs="?",
        choices=["list", "show", "copy"],
        default="list",
        help="list (default), show NAME, or copy NAME [FILE]",
    )
    sub.add_argument("name", metavar="NAME", nargs="?", help="of a recipe")
    sub.add_argument("file", metavar="FILE", nargs="?", help="new file of the copy (default NAME.toml)")


def run(args: argparse.Namespace, ui: Ui) -> None:
    """List, show or copy."""
    if args.action == "list":
        if args.name:
            raise UsageError(f"list takes no name: {args.name}", hint=f"fleetune recipes show {args.name}")
        _list(ui)
        return
    if not args.name:
        raise UsageError(f"{args.action} needs the name of a recipe", hint="they are: fleetune recipes")
    found = recipes.named(args.name)
    if args.action == "show":
        if args.file:
            raise UsageError(
                "show takes one name and no file", hint=f"fleetune recipes copy {found.name} {args.file}"
            )
        ui.event(_event(found, text=found.text))
        ui.text(found.text)
        return
    _copy(found, Path(args.file or found.path.name), ui)


def _list(ui: Ui) -> None:
    found = recipes.every().values()
    for recipe in found:
        ui.event(_event(recipe))
    ui.table(["recipe", "model", "data", "does"], [[r.name, *_uses(r), r.about] for r in found])
    ui.paths(
        [
            ("next", "fleetune recipes show NAME"),
            ("", "fleetune tune -c recipe:NAME MODEL DATA, or fleetune sweep recipe:NAME for one of a sweep"),
        ]
    )


def _copy(recipe: Named, file: Path, ui: Ui) -> None:
    """Write the recipe to a new file."""
    if file.is_dir():
        file = file / recipe.path.name
    if file.exists():
        raise UsageError(
            f"{file} exists already", hint=f"name a new file: fleetune recipes copy {recipe.name} FILE"
        )
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(recipe.text)
    except OSError as error:
        raise storage_error(error, file) from error
    ui.event(_event(recipe, file=str(file)))
    command = "fleetune sweep" if recipe.sweeps else "fleetune tune -c"
    ui.paths([("recipe", str(file)), ("next", f"{command} {file}")])


def _uses(recipe: Named) -> tuple[str, str]:
    values = recipe.values
    return str(values["model"]), str(values["data"])


def _event(recipe: Named, **more: str) -> RecipeListed:
    model, data = _uses(recipe)
    return RecipeListed(
        name=recipe.name,
        about=recipe.about,
        method=str(recipe.values["method"]),
        model=model,
        data=data,
        sweeps=recipe.sweeps,
        expected=recipe.expected or None,
        **more,
    )
