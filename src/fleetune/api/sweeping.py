# SPDX-License-Identifier: Apache-2.0
"""Tune over a grid of values and seeds, or resume a sweep."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from fleetune.api import plain_models
from fleetune.api.arguments import Rows, Setting
from fleetune.api.tuning import recipe_for
from fleetune.common.settings import Value
from fleetune.runs import rundir
from fleetune.runs.listener import Listener
from fleetune.runs.progress import heard_by
from fleetune.tuning.recipe.recipe import Recipe, RecipeOptions

if TYPE_CHECKING:
    from fleetune.tuning.sweep.sweep import SweepResult
    from fleetune.tuning.sweep.sweep_grid import SweepGrid


def sweep(
    model: object,
    data: Rows | None = None,
    *,
    vary: Mapping[str, Sequence[Value]] | None = None,
    seeds: int = 1,
    method: object = "auto",
    settings: Mapping[str, Setting] | None = None,
    tokenizer: object = None,
    name: str = "grid",
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
    **options: Unpack[RecipeOptions],
) -> SweepResult:
    """Tune over all combinations of the values in `vary`, each for `seeds` seeds, in a new folder under `out`.

    `vary` maps a name to its values: an option (`rounds`), a setting of the method (`K`), `method`, or `alpha` of the
    Dirichlet partition.  `name` becomes a part of the folder's name; all else is as in `tune`.  RecipeError, before any
    run, for a name that cannot vary or a combination that cannot be; FleetuneError, after all runs, when some failed:
    `resume_sweep` does these again.
    """
    from fleetune.tuning.sweep import sweep as sweeps
    from fleetune.tuning.sweep import sweep_grid

    heard, varied = heard_by(listener, progress), dict(vary or {})
    recipe = recipe_for(model, data, method, settings or {}, tokenizer, Path(out), options, heard)
    table = {n: [*values] if isinstance(values, list | tuple) else values for n, values in varied.items()}
    values = dataclasses.asdict(recipe) | {"sweep": {**table, "seeds": seeds}}
    grid = sweep_grid.make(with_method(values, (), Path(out), heard.note, offline=offline))
    sweeps.check(grid, offline=offline)
    return start(grid, Path(out), heard, name=name, offline=offline)


def resume_sweep(
    sweep: object,
    *,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> SweepResult:
    """Resume a stopped sweep by its own recipe: finished runs stay, the others are done or resumed.

    `sweep` is a path, the name or number of a sweep under `out`, `latest`, or a result of `sweep`.  UsageError when there
    is none.
    """
    from fleetune.tuning.sweep import sweep as sweeps

    heard = heard_by(listener, progress)
    path = sweeps.find(str(getattr(sweep, "folder", sweep)), Path(out))
    grid = sweeps.read(path)
    sweeps.check(grid, offline=offline)
    return start(grid, Path(out), heard, resumed=path, offline=offline)


def start(
    grid: SweepGrid,
    out: Path,
    listener: Listener,
    *,
    name: str = "",
    resumed: Path | None = None,
    offline: bool,
) -> SweepResult:
    """Do the runs of a checked grid: in a new folder under `out` with `name` in its own, or in that of a `resumed` sweep."""
    from fleetune.tuning.sweep import sweep as sweeps

    rundir.check_writable(resumed or out)
    grid = _with_files(grid, out, listener.note)
    with rundir.RunDir(resumed) if resumed else sweeps.create(out, name, grid) as folder:
        return sweeps.run(folder, grid, listener, offline=offline)


def with_method(
    values: dict[str, Any], varied: Collection[str], out: Path, note: Callable[[str], None], *, offline: bool
) -> dict[str, Any]:
    """Return the keys of a sweep's recipe with a method, unless the method is what varies: here, or by name in `varied`."""
    from fleetune.planning import choose

    configured = functools.partial(plain_models.with_artefact, out=out)
    return choose.settled_sweep(values, varied, note, configured=configured, offline=offline)


def _with_files(grid: SweepGrid, out: Path, note: Callable[[str], None]) -> SweepGrid:
    """Return a checked grid whose compressed models are their GGUF files, as in `plain_models.with_file`."""
    files: dict[str, str] = {}
    for recipe in {(p.recipe.model, p.recipe.train): p.recipe for p in grid.points}.values():
        plain_models.check(recipe.model, out, recipe.train)
        files[recipe.model] = plain_models.with_file(recipe, out, note).model

    def tuned(recipe: Recipe) -> Recipe:
        return dataclasses.replace(recipe, model=files.get(recipe.model, recipe.model))

    points = tuple(dataclasses.replace(point, recipe=tuned(point.recipe)) for point in grid.points)
    return dataclasses.replace(grid, base=tuned(grid.base), points=points)
