# SPDX-License-Identifier: Apache-2.0
"""Choose the tuning method of a recipe that names none: the one that `plan` recommends for this machine and model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from fleetune.common.display import human_bytes
from fleetune.common.memory import usable_memory
from fleetune.errors import ModelError, RecipeError, suggest
from fleetune.planning import plan
from fleetune.planning.device_cost import Rates
from fleetune.planning.plan import Row
from fleetune.planning.workload import Workload
from fleetune.tuning import methods, prepare
from fleetune.tuning.recipe import AUTO_METHOD, Recipe

NOT_MEASURED: Final = Rates(1e11, 1e10)  # what fits does not depend on the speed


def settled_method(recipe: Recipe, note: Callable[[str], None], *, offline: bool = False) -> Recipe:
    """Return the recipe with a method; where one was chosen, `note` is told which and why.

    FitError when no method fits this machine's memory, RecipeError when none has the recipe's settings.
    """
    if recipe.method != AUTO_METHOD:
        return recipe
    name, why = method_for(recipe, offline=offline)
    note(f"method {name}, since none was given: {why}; choose another with --method (fleetune methods)")
    return dataclasses.replace(recipe, method=name)


def method_for(recipe: Recipe, *, offline: bool = False) -> tuple[str, str]:
    """Return the method to begin with among those that have the recipe's settings, and why, in words."""
    from fleetune import models

    able = methods.having(recipe.set)
    if not able:
        raise RecipeError(
            _unknown(recipe), hint="name the one that is meant: --method NAME (fleetune methods)"
        )
    prepare.check(dataclasses.replace(recipe, method=able[0]))  # all else that is wrong is said first
    try:
        config = models.load_config(recipe.model, offline=offline)
    except ModelError as error:  # loading it says what is wrong, and what to do
        return able[0], f"the model's configuration cannot be read ({error.message})"
    work = Workload(length=recipe.max_length, dtype=recipe.dtype)
    ram = usable_memory() or None
    rows = plan.table(config, work, ram=ram, rates=NOT_MEASURED)
    name = plan.best([row for row in rows if not row.tunes or row.method in able])
    row = next(row for row in rows if row.method == name)
    return name, _why(row, ram)


def _unknown(recipe: Recipe) -> list[str]:
    """Say which settings no method has, with suggestions; or that no method has all of them."""
    if odd := [name for name in recipe.set if not methods.having([name])]:
        every = sorted({s.name for name in methods.entries() for s in methods.settings(name)})
        return [f"no method has a setting '{name}'.{suggest(name, every, cutoff=0.5)}" for name in odd]
    return [f"no method has all of the settings {', '.join(recipe.set)}"]


def _why(row: Row, ram: int | None) -> str:
    learns = "learns most from a step" if methods.entries()[row.method].recommended else "fits"
    if ram is None or row.peak is None:
        return f"it {learns}"
    also = "and " if learns != "fits" else "since it "
    return f"it {learns} {also}takes about {human_bytes(row.peak)} of this machine's {human_bytes(ram)} of memory"
