# SPDX-License-Identifier: Apache-2.0
"""Name the model, data and code files of a run as they are found from the present folder, wherever the run was started."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fleetune.common.files import read_json
from fleetune.common.shell import quoted
from fleetune.data.readers import READERS
from fleetune.errors import DataError, FleetuneError, RecipeError, StorageError
from fleetune.models.cache.cache import ORIGINS
from fleetune.runs import env_file, start_folder
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe
from fleetune.tuning.result import foundations

NOT_PATHS: Final = {"", "demo", *ORIGINS}
CODE: Final = re.compile(r"(.+\.py):\w+")  # file.py:function


def found_again(values: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return the keys of a run's recipe with the names of its files as they are found from here."""
    start = start_folder.of(run, record(run))
    names = {n: v for n in foundations.PATHS if isinstance(v := values.get(n), str) and v not in NOT_PATHS}
    return {**values, **{n: start_folder.find(v, start) for n, v in names.items()}}


def recipe_of(run: Path, *, longer: bool = False) -> Recipe:
    """Return the recipe of a run, its files named as they are found from here; RecipeError as `foundations.recipe_of`."""
    recipe = foundations.recipe_of(run, longer=longer)
    found = found_again({n: getattr(recipe, n) for n in foundations.PATHS}, run)
    return dataclasses.replace(recipe, **found)


def as_stated(recipe: Recipe, run: Path) -> Recipe:
    """Return a recipe with the names of its files as the run's run.toml has them; as it is where there is none yet."""
    try:
        values = recipes.read(run / "run.toml")
    except FleetuneError:
        return recipe
    return dataclasses.replace(recipe, **{n: values[n] for n in foundations.PATHS if n in values})


def note(run: Path) -> dict[str, str]:
    """Return what env.json says of the folder that a run is started in."""
    return start_folder.note(run, record(run))


def check_rows(recipe: Recipe, run: Path) -> None:
    """DataError for a file of rows that is neither here nor in the folder that the run was started in."""
    start = start_folder.of(run, record(run))
    for name in filter(None, (recipe.data, recipe.eval_data)):
        path = Path(name).expanduser()
        if path.suffix.lower() in READERS and ":" not in name and not path.exists():
            where = f", nor in {start_folder.shown(start)}, where the run was started" if start else ""
            raise DataError(
                f"{run} was made on {name}, which is not here{where}",
                hint=f"bring it back, or write its new path into {run / 'run.toml'}: its rows are compared",
            )


def check_code(recipe: Recipe, run: Path) -> None:
    """RecipeError for a setting file.py:function whose file is only in the folder that the run was started in."""
    start = start_folder.of(run, record(run))
    for name, value in recipe.set.items():
        code = CODE.fullmatch(value) if isinstance(value, str) else None
        if start and code and not Path(code[1]).exists() and (start / code[1]).is_file():
            folder = start_folder.shown(start)
            raise RecipeError(
                [f"{name} = {value}: the run was started in {folder}, and {code[1]} is there, not here"],
                hint=f"go there first: cd {quoted(folder)}",
            )


def record(run: Path) -> Mapping[str, Any]:
    """Return what env.json holds; {} where it is damaged or gone."""
    try:
        return read_json(run / env_file.ENVIRONMENT, "")
    except StorageError:
        return {}
