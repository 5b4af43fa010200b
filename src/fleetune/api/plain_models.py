# SPDX-License-Identifier: Apache-2.0
"""Refuse what is no plain model where one is needed, before anything is loaded: runs, adapters, compressed models.

Tuning begins at weights that a runtime can load.  The result of a run is a change of such weights, and codes stand for
weights; each error has the command that writes the model out.  Where the scales of a compressed model are to be
tuned, its GGUF file is written and takes its place in the recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fleetune import subject as subjects
from fleetune.common.shell import quoted
from fleetune.deploy import targets
from fleetune.errors import UsageError
from fleetune.models.cache import cache
from fleetune.models.cache.names import is_master
from fleetune.subject import Compressed, Run
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe

RESULTS: Final = ("adapter", "ledger.safetensors")  # of a run
HF: Final = "hf"  # target of an export, and its folder
GGUF: Final = "gguf"


def path_of(result: object) -> object:
    """Return the path of what `tune`, `compress` or `export` returned, or the argument of a subject; anything else as it is."""
    found = getattr(result, "folder", None) or getattr(result, "path", None)
    if isinstance(result, Run | Compressed | subjects.Plain):
        return result.argument
    model_in_memory = hasattr(result, "named_parameters") or hasattr(result, "net")
    return str(found) if isinstance(found, Path) and not model_in_memory else result


def check(name: str, out: Path, train: str = "weights") -> None:
    """Raise UsageError for a name that means a run, an adapter or a compressed model; `out` is the folder of the runs.

    A compressed model passes where `train` is scales: `with_file` is for it.
    """
    path = Path(name).expanduser()
    of_run = path.name in RESULTS and (path.parent / "run.toml").is_file()
    if not of_run and compressed_of(name, train, out) is not None:
        return
    found = Run(path.parent) if of_run else subjects.open(name, out)
    if name in cache.ORIGINS or ((path / "config.json").is_file() and not is_master(path)):
        return
    if isinstance(found, Run):
        raise _written_out(f"{name} is a run: a change of its base, not a plain model", found, found.folder)
    if isinstance(found, Compressed):
        model = found.artefact or Path(found.argument) / "model"
        if is_master(model):
            what = f"{name} is a compressed model: codes, not plain weights"
            refused = _written_out(what, found, found.home)
            refused.hint = f"{refused.hint}; or tune its scales as they are: --train scales"
            raise refused
        raise UsageError(f"{name} is the folder of a compression", hint=f"its model is {quoted(model)}")


def compressed_of(name: str, train: str, out: Path) -> Compressed | None:
    """Return the compressed model that a name means where `train` is scales, which it has; None for any other."""
    if train != "scales":
        return None
    found = subjects.open(name, out)
    if isinstance(found, Compressed) and is_master(found.artefact or Path(found.argument) / "model"):
        return found
    return None


def with_file(recipe: Recipe, out: Path, note: Callable[[str], None]) -> Recipe:
    """Return a recipe that trains scales of a compressed model with its GGUF file as the model; others as they are.

    The file is written unless it is there, and `note` is told.  RecipeError, before that, for what needs neither model nor
    data to be seen to be wrong; UsageError as in `tunable_file.of`.
    """
    if (found := compressed_of(recipe.model, recipes.trained(recipe), out)) is None:
        return recipe
    from fleetune.deploy import tunable_file
    from fleetune.planning import choose

    choose.able_methods(recipe)
    return dataclasses.replace(recipe, model=str(tunable_file.of(found, note)))


def with_artefact(recipe: Recipe, out: Path) -> Recipe:
    """Return a recipe that trains scales of a compressed model with its artefact as the model; others as they are.

    The artefact has the model's configuration, so a method can be chosen before the GGUF file is written.
    """
    found = compressed_of(recipe.model, recipes.trained(recipe), out)
    return recipe if found is None else dataclasses.replace(recipe, model=str(found.model))


def _written_out(what: str, found: Run | Compressed, home: Path) -> UsageError:
    """Return the error with the command that writes the model out: as a GGUF file where a run has tuned scales."""
    to = GGUF if isinstance(found, Run) and found.recipe.train == "scales" else HF
    first = targets.find(to).place(home)
    place, number = first, 1
    while place.exists():
        if _is_new(place if to == GGUF else place / "config.json", home / "status"):
            return UsageError(what, hint=f"it is written out already: give {quoted(place)} as the model")
        number += 1
        place = first.with_name(f"{first.stem}-{number}{first.suffix}")  # export overwrites nothing
    where = f" --path {quoted(place)}" if number > 1 else ""
    return UsageError(
        what,
        hint=f"fleetune export {quoted(found.argument)} --to {to}{where}   and then give {quoted(place)} as the model",
    )


def _is_new(written: Path, status: Path) -> bool:
    """Whether a model was written out, and not before the run ended: it may have been given more rounds since."""
    if not written.is_file():
        return False
    return not status.is_file() or written.stat().st_mtime >= status.stat().st_mtime
