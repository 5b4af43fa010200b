# SPDX-License-Identifier: Apache-2.0
"""Collect the settings of a run for others: every value resolved, no path of the machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune.common import __version__
from fleetune.common.settings import Value
from fleetune.tuning.recipe import given_methods

if TYPE_CHECKING:
    from fleetune.tuning.prepare.prepare import TuneJob
    from fleetune.tuning.recipe.recipe import Recipe

NAMED: tuple[str, ...] = ("model", "data", "eval_data")  # may be paths: their last part is told


def of_job(job: TuneJob) -> dict[str, Value]:
    """Return option -> value: those of the recipe, the method's as `set.NAME`, and what they were resolved to."""
    return of_recipe(job.recipe) | {
        "base_digest": job.model.digest,
        "parameters": job.model.n_params,
        "held_out_rows": len(job.held),
        "training_rows": sum(len(rows) for rows in job.rows),
        "fleetune": __version__,
    }


def of_recipe(recipe: Recipe) -> dict[str, Value]:
    """Return the options of a recipe, those of its method with their defaults."""
    plain = dataclasses.asdict(recipe)
    plain.pop("set")
    found: dict[str, Value] = {n: public(str(v)) if n in NAMED else v for n, v in plain.items()}
    return found | {f"set.{name}": value for name, value in settings_of(recipe).items()}


def settings_of(recipe: Recipe) -> dict[str, Value]:
    """Return the settings of a recipe's method, each with the value that it has in the run; files by their last part."""
    values = given_methods.settings_of(recipe)
    return {name: public(v) if isinstance(v, str) and "/" in v else v for name, v in values.items()}


def public(name: str) -> str:
    """Return a model's or a file's name without the folders of this machine; a hub id, OWNER/NAME, stays whole."""
    path = Path(name).expanduser()
    local = path.is_absolute() or path.exists() or name.count("/") != 1
    return path.name if local else name
