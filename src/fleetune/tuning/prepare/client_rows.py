# SPDX-License-Identifier: Apache-2.0
"""Count the rows of each client whose loss is measured before and after a run (`per_client.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from fleetune.tuning.recipe.recipe import Recipe
from fleetune.tuning.rounds import rounds

USUAL: Final = 4  # rows of a client, unless the recipe says otherwise
LEAST: Final = 2  # and that few in a short run
MOST_CLIENTS: Final = 64  # more are not measured, unless the recipe asks for more rows than usual
SHARE: Final = 0.05  # of the forward passes of a run, which its usual measures may take
PASSES: Final = 3  # forward passes that a training row costs at least, its backward pass counted as two


def of_each(recipe: Recipe, sizes: Sequence[int]) -> int:
    """Return how many rows of a client are measured at most, for clients with so many rows.

    0 where the recipe wants none, or there are no simulated clients, or too many.
    """
    usual = recipe.client_rows <= USUAL
    if not recipe.client_rows or len(sizes) < 2 or (usual and len(sizes) > MOST_CLIENTS):
        return 0
    return most_rows(recipe, sizes) if usual else recipe.client_rows


def in_all(recipe: Recipe, sizes: Sequence[int]) -> int:
    """Return how many rows of all clients are measured, before and again after the run."""
    most = of_each(recipe, sizes)
    return sum(min(most, size) for size in sizes)


def most_rows(recipe: Recipe, sizes: Sequence[int]) -> int:
    """Return how many rows of a client are measured at most, so that all take no more than `SHARE` of a run's passes.

    Both measures together are two passes of a row.  At least `LEAST`, since one row says nothing.
    """
    asked = len(rounds.sample(range(len(sizes)), recipe.participation, recipe.seed, 1))
    trained = recipe.rounds * asked * float(np.mean(sizes)) * PASSES
    return min(recipe.client_rows, max(LEAST, int(SHARE * trained / (2 * len(sizes)))))
