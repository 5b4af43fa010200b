# SPDX-License-Identifier: Apache-2.0
"""Every recipe names what exists, and those that state an outcome give it.

A recipe that needs only what comes built in begins with a line such as

    # Expected: validation loss 3.857 -> 3.112.

which `make slow` runs and compares.  Recipes that need other data or models say nothing they would be held to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

import fleetune
from fleetune import recipes as named_recipes
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe

RECIPES = [found.path for found in named_recipes.every().values()]
LINE = re.compile(r"# Expected: validation loss (\d+\.\d{3}) -> (\d+\.\d{3})\.")
NEAR = 0.03  # processors and versions of torch round differently, and thirty steps later that is seen


class Expected(NamedTuple):
    """Validation loss before and after."""

    base: float
    tuned: float


def expected(path: Path) -> Expected | None:
    """What the recipe's first line promises; None when it promises nothing."""
    found = LINE.fullmatch(path.read_text(encoding="utf-8").split("\n", 1)[0])
    return Expected(float(found[1]), float(found[2])) if found else None


PROMISING = [path for path in RECIPES if expected(path)]


def named(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_names_options_settings_and_a_method_that_exist(path: Path) -> None:
    values = recipe.read(path)
    values.pop("sweep", None)  # what `fleetune sweep` varies
    made = recipe.make(values)
    entry, _ = prepare.check(made)
    assert entry.name == made.method


@pytest.mark.slow
@pytest.mark.parametrize("path", PROMISING, ids=named)
def test_a_recipe_gives_what_it_promises(path: Path, tmp_path: Path) -> None:
    promise = expected(path)
    assert promise is not None
    done = fleetune.tune(recipe.make(recipe.read(path)), out=tmp_path).done
    base, tuned = done.base["loss"], done.tuned["loss"]
    assert base == pytest.approx(promise.base, rel=NEAR)
    assert tuned == pytest.approx(promise.tuned, rel=NEAR)
    assert base is not None
    assert tuned is not None
    change = tuned - base
    assert 0.5 < change / (promise.tuned - promise.base) < 2, (
        "small steps change little, but they must change it"
    )
