"""`fleetune recipes`: the recipes that come with Fleetune, or one as a file."""

import argparse

from fleetune import recipes
from fleetune.cli.console import Ui
from fleetune.common.events import RecipeListed

HELP = "list the recipes that come with Fleetune, or show one"
ORDER = 125
EXAMPLES = """\
fleetune recipes                      what there is
fleetune recipes fedit                the recipe as a file, to be used: fleetune tune -c recipe:fedit MODEL DATA
"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sub.add_argument(
        "name", metavar="NAME", nargs="?", help="a recipe, to show it; write it into a file to change it"
    )


def run(args: argparse.Namespace, ui: Ui) -> None:
    """List the recipes, or show one."""
    if args.name:
        recipe = recipes.named(args.name)
        ui.event(_event(recipe, text=recipe.text))
        ui.text(recipe.text)
        return
    found = [_event(recipe) for recipe in recipes.every().values()]
    for event in found:
        ui.event(event)
    ui.table(["recipe", "model", "data", "does"], [[e.name, e.model, e.data, e.about] for e in found])
    ui.paths([("next", "fleetune tune -c recipe:NAME MODEL DATA, or fleetune sweep recipe:NAME")])


def _event(recipe: recipes.Named, text: str | None = None) -> RecipeListed:
    values = recipe.values
    return RecipeListed(
        name=recipe.name,
        about=recipe.about,
        method=str(values["method"]),
        model=str(values["model"]),
        data=str(values["data"]),
        sweeps=recipe.sweeps,
        expected=recipe.expected or None,
        text=text,
    )
