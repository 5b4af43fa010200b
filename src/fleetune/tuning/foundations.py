# SPDX-License-Identifier: Apache-2.0
"""Find out whether a stopped run still stands on what it was begun with: its recipe, base model and rows.

Every checkpoint states them (`checkpoint.StandsOn`).  A run whose run.toml lost a line, or whose data or model changed, is
refused before any round, since it would end otherwise than it was begun.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetune.data.encode import digest
from fleetune.errors import RecipeError, UsageError
from fleetune.runs import rundir
from fleetune.tuning import checkpoint
from fleetune.tuning import recipe as recipes
from fleetune.tuning.checkpoint import StandsOn
from fleetune.tuning.recipe import Recipe

if TYPE_CHECKING:
    from fleetune.tuning.prepare import TuneJob

PATHS: Final = ("model", "data", "eval_data")  # may be moved: what they hold is compared, not their names
SHOWN: Final = 8  # differences at once


def of_job(job: TuneJob) -> StandsOn:
    """What the checkpoints of a job state beside the state."""
    return StandsOn(
        options_of(job.recipe), job.model.digest, digest(job.rows), digest([job.held]),
    )  # fmt: skip


def options_of(recipe: Recipe) -> dict[str, Any]:
    """The options that decide the outcome, by name; those of the method as `set.NAME`."""
    plain = dataclasses.asdict(recipe)
    chosen: Mapping[str, Any] = plain.pop("set")
    return {n: v for n, v in plain.items() if n not in PATHS} | {f"set.{n}": v for n, v in chosen.items()}


def stated_by(run: Path) -> StandsOn | None:
    """What the newest readable checkpoint of a run states; None for a run of an earlier version."""
    found = (checkpoint.stated_in(file) for _, file in reversed(rundir.checkpoints(run)))
    return next((stands_on for stands_on in found if stands_on is not None), None)


def recipe_of(run: Path) -> Recipe:
    """The recipe in a run's run.toml; RecipeError, with every option that differs, when it is not the run's own any more."""
    file = run / "run.toml"
    values = recipes.read(file)
    try:
        recipe = recipes.make(values)
    except RecipeError as error:
        problems = [f"{file} is not the recipe of a run", *error.problems]
        raise RecipeError(problems, hint=f"put {file} back as it was") from error
    stated = stated_by(run)
    if stated is None:
        return recipe
    if differences := stated.differences(dataclasses.replace(stated, recipe=options_of(recipe))):
        raise RecipeError(
            [f"{file} is not the recipe that the run was begun with", *_first(differences)],
            hint=f"write these options into {file} as they were; a run with other options is a new one: "
            f"fleetune tune -c {file}",
        )
    return recipe


def check(job: TuneJob, run: Path) -> StandsOn:
    """What a job stands on; UsageError when its run was begun on another recipe, model or rows."""
    now, stated = of_job(job), stated_by(run)
    differences = stated.differences(now) if stated is not None else []
    if differences:
        recipe = job.recipe
        raise UsageError(
            "\n  ".join([f"{run} was begun with something else than there is now:", *_first(differences)]),
            hint=f"bring back the recipe, the model ({recipe.model}) and the data ({recipe.data}) of that run; "
            f"or begin a new one: fleetune tune -c {run / 'run.toml'}",
        )
    return now


def _first(differences: list[str]) -> list[str]:
    more = len(differences) - SHOWN
    return differences[:SHOWN] + ([f"and {more} more"] if more > 0 else [])
