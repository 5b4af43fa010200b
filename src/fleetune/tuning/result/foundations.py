"""Find out whether a stopped run still stands on what it was begun with: its recipe, base model and rows.

Every checkpoint states them (`checkpoint.StandsOn`); a run that would end otherwise is refused before any round.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetune.common import sums
from fleetune.common.display import quoted
from fleetune.common.files import read_json
from fleetune.data import Example
from fleetune.data.encode import digest
from fleetune.data.readers import READERS
from fleetune.errors import DataError, FleetuneError, RecipeError, StorageError, UsageError
from fleetune.models.cache.cache import ORIGINS
from fleetune.runs import rundir
from fleetune.tuning.recipe import defaults
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.rounds import checkpoint

if TYPE_CHECKING:
    from fleetune.data.partition import Split
    from fleetune.tuning.prepare.prepare import TuneJob

PATHS: Final = ("model", "data", "eval_data")  # may be moved: what they hold is compared, not their names
SHOWN: Final = 8  # differences at once


def of_job(job: TuneJob) -> checkpoint.StandsOn:
    """What the checkpoints of a job state beside the state."""
    return checkpoint.StandsOn(
        options_of(job.recipe), job.model.digest, digest(job.rows), digest([job.held]), *texts_of(job.split)
    )


def options_of(recipe: recipes.Recipe) -> dict[str, Any]:
    """The options that decide the outcome, by name, with the method's defaults; its settings as `set.NAME`."""
    return _deciding(defaults.options_of(recipe))


def _deciding(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what may differ: the names of what is compared itself, and where the base's weights are (`base`)."""
    return {n: v for n, v in defaults.settled_options(options).items() if n not in (*PATHS, "base")}


def same(one: recipes.Recipe, other: recipes.Recipe) -> bool:
    """Whether two recipes are one, however much of it they leave to the defaults."""
    places = [[getattr(recipe, name) for name in PATHS] for recipe in (one, other)]
    return places[0] == places[1] and options_of(one) == options_of(other)


def texts_of(parts: Split) -> tuple[str, str]:
    """Digests of the clients' rows and of the held-out rows as the data has them: no model is needed to compare them.

    That of the clients is "" where their rows are not in the data: on the devices of a real fleet.
    """
    own, held = (
        [[parts.examples[i] for i in p.tolist()] for p in some] for some in (parts.clients, [parts.held])
    )
    return _text_digest(own) if own else "", _text_digest(held)


def _text_digest(parts: Iterable[Iterable[Example]]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(b"part")
        for row in part:
            sha.update(repr(row.content).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


def check_rows(run: Path, recipe: recipes.Recipe, parts: Split) -> None:
    """UsageError when the rows that the data gives now are not those that a run was made on."""
    stated, (clients, held_out) = stated_by(run), texts_of(parts)
    if stated is None:
        return
    pairs = {"clients'": (stated.rows_text, clients), "held-out": (stated.held_out_text, held_out)}
    if changed := [what for what, (old, new) in pairs.items() if old not in ("", new)]:
        data = " or ".join(filter(None, (recipe.data, recipe.eval_data)))
        raise UsageError(
            f"{data} was changed since {run} was made on it: other {' and '.join(changed)} rows",
            hint=f"bring it back as it was: rows held out now may have been trained on; or name the rows to measure on: "
            f"fleetune eval {quoted(run)} FILE, or fleetune measure {quoted(run)} --data FILE",
        )


def stated_by(run: Path) -> checkpoint.StandsOn | None:
    """What the newest readable checkpoint of a run states, with the method's defaults; None where none states it."""
    found = (checkpoint.stated_in(file) for _, file in reversed(rundir.checkpoints(run)))
    stated = next((stands_on for stands_on in found if stands_on is not None), None)
    return stated and dataclasses.replace(stated, recipe=_deciding(stated.recipe))


def stated_recipe(run: Path, *, longer: bool = False) -> recipes.Recipe:
    """The recipe in a run's run.toml; RecipeError, with every option that differs, when it is not the run's own any more.

    With `longer` the number of rounds may differ.
    """
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
    now = options_of(recipe)
    if longer:
        now["rounds"] = stated.recipe.get("rounds")
    if differences := stated.differences(dataclasses.replace(stated, recipe=now)):
        raise RecipeError(
            [f"{file} is not the recipe that the run was begun with", *_first(differences)],
            hint=f"write these options into {file} as they were; a run with other options is a new one: "
            f"fleetune tune -c {quoted(file)}",
        )
    return recipe


def check(job: TuneJob, run: Path, *, longer: bool = False) -> checkpoint.StandsOn:
    """Return what a job stands on; UsageError if its run was begun with another recipe, model or rows.

    With `longer` the number of rounds may differ.
    """
    now, stated = of_job(job), stated_by(run)
    if longer and stated is not None:
        now = dataclasses.replace(now, recipe={**now.recipe, "rounds": stated.recipe.get("rounds")})
    differences = stated.differences(now) if stated is not None else []
    if differences:
        recipe = job.recipe
        raise UsageError(
            "\n  ".join([f"what {run} was begun with has changed:", *_first(differences)]),
            hint=f"bring back the recipe, the model ({recipe.model}) and the data ({recipe.data}) of that run; "
            f"or begin a new one: fleetune tune -c {quoted(run / 'run.toml')}",
        )
    return now


def _first(differences: list[str]) -> list[str]:
    more = len(differences) - SHOWN
    return differences[:SHOWN] + ([f"and {more} more"] if more > 0 else [])


NOT_PATHS: Final = {"", "demo", *ORIGINS}


def found_again(values: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return the keys of a run's recipe with the names of its files as they are found from here."""
    start = rundir.start_of(run, environment_of(run))
    names = {n: v for n in PATHS if isinstance(v := values.get(n), str) and v not in NOT_PATHS}
    return {**values, **{n: rundir.find_from(v, start) for n, v in names.items()}}


def recipe_of(run: Path, *, longer: bool = False) -> recipes.Recipe:
    """Return the recipe of a run, its files named as they are found from here; RecipeError as `stated_recipe`."""
    recipe = stated_recipe(run, longer=longer)
    found = found_again({n: getattr(recipe, n) for n in PATHS}, run)
    return dataclasses.replace(recipe, **found)


def as_stated(recipe: recipes.Recipe, run: Path) -> recipes.Recipe:
    """Return a recipe with the names of its files as the run's run.toml has them; as it is where there is none yet."""
    try:
        values = recipes.read(run / "run.toml")
    except FleetuneError:
        return recipe
    return dataclasses.replace(recipe, **{n: values[n] for n in PATHS if n in values})


def note_start(run: Path) -> dict[str, str]:
    """Return what env.json says of the folder that a run is started in."""
    return rundir.note_start(run, environment_of(run))


def check_files(recipe: recipes.Recipe, run: Path) -> None:
    """DataError for a file of rows that is neither here nor in the folder that the run was started in."""
    start = rundir.start_of(run, environment_of(run))
    for name in filter(None, (recipe.data, recipe.eval_data)):
        path = Path(name).expanduser()
        if path.suffix.lower() in READERS and ":" not in name and not path.exists():
            where = f", nor in {rundir.shown_path(start)}, where the run was started" if start else ""
            hint = f"bring it back, or write its new path into {run / 'run.toml'}: its rows are compared"
            if (run / sums.SIGNATURE).is_file():  # a release, whose run.toml is signed
                hint = f"measure it on rows of yours: fleetune eval {quoted(run)} rows.jsonl"
            raise DataError(f"{run} was made on {name}, which is not here{where}", hint=hint)


def environment_of(run: Path) -> Mapping[str, Any]:
    """Return what env.json holds; {} where it is damaged or gone."""
    try:
        return read_json(run / rundir.ENVIRONMENT, "")
    except StorageError:
        return {}
