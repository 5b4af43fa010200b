# SPDX-License-Identifier: Apache-2.0
"""Tune a model over a simulated fleet, or resume a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

from fleetune.api import plain_models
from fleetune.api.arguments import Rows, Setting, words
from fleetune.common.settings import Value
from fleetune.errors import RecipeError, UsageError
from fleetune.runs import rundir, trackers
from fleetune.runs.listener import Listener
from fleetune.runs.progress import Progress, heard_by
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe, RecipeOptions

if TYPE_CHECKING:
    from fleetune.tuning.methods import Method
    from fleetune.tuning.result.result import TuneResult


def tune(
    model: object,
    data: Rows | None = None,
    *,
    method: object = "auto",
    settings: Mapping[str, Setting] | None = None,
    tokenizer: object = None,
    tracker: str | Sequence[str] = (),
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
    **options: Unpack[RecipeOptions],
) -> TuneResult:
    """Tune a model over a simulated fleet in a new folder under `out`, and return the run.

    `model` is a name or path, a `fleetune.Model`, a transformers or PEFT model (with its `tokenizer`), or a whole
    `Recipe`, which then holds all options; with `train="scales"` or `"codes"` also a compressed model, which is tuned in its
    GGUF file: it is written beside the model, unless it is there.  `data` (and the option `eval_data`) is a file, a hub id,
    `"demo"`, or rows: dicts, a `datasets.Dataset`, a DataFrame.  `method` is a name,
    `auto` for the one that `plan` recommends, or a method's own dataclass: `fedkseed.Method(K=1024)`, or one that you wrote,
    which is then known in this process alone.  `settings` are the method's, by name.  `options` are those of
    `fleetune.Recipe`.  A model or rows given as Python objects are saved under `OUT/objects`, so that the run can be
    resumed.  A PEFT model's adapters are merged into the copy that is saved and tuned: they are not trained on.
    `tracker` names trackers that get the figures as well: tensorboard, wandb.
    """
    from fleetune.planning import choose
    from fleetune.tuning.run import run

    watching, named = heard_by(listener, progress), trackers.check(words(tracker))
    recipe = recipe_for(model, data, method, settings or {}, tokenizer, Path(out), options, watching)
    recipe = plain_models.with_file(recipe, Path(out), watching.note)
    recipe = choose.settled_method(recipe, watching.note, offline=offline)
    recipe, check_memory = choose.settled_base(recipe, watching.note, offline=offline)
    with trackers.tracked(watching, named, offline=offline) as heard:
        return run.start(recipe, Path(out), heard, offline=offline, check_memory=check_memory)


def resume_run(
    run: object,
    *,
    rounds: int = 0,
    base: str = "",
    tracker: str | Sequence[str] = (),
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> TuneResult:
    """Resume a stopped run by its own recipe, to the same bits as without the stop; return a finished run as it is.

    With more `rounds` than the run has, finished or not, it goes on until it has as many, to the bits of a run that had them
    from the start, and the same learning rate; its result, answers and report are then those of the longer run.  UsageError
    where it cannot be.
    `run` is a name, number, path or result; `tracker` as in `tune`, which a run does not remember.  `base` is auto, memory or
    mapped: where the base's weights are from now on (the run's own unless given).
    """
    from fleetune.tuning.run import extension
    from fleetune.tuning.run import run as running

    rounds = rounds and extension.number(rounds)
    if base and base not in (places := recipes.choices("base")):
        raise RecipeError(
            [f"base = {base!r} is none of {', '.join(places)}"], hint="leave it out for the run's own"
        )
    folder = getattr(run, "folder", None)
    path = folder if isinstance(folder, Path) else rundir.find(str(run), Path(out))
    hearing = heard_by(listener, progress)
    if isinstance(hearing, Progress):
        hearing.goes_on(path)
    with trackers.tracked(hearing, words(tracker), offline=offline) as heard:
        return running.resume(path, heard, offline=offline, rounds=rounds, base=base)


def recipe_for(
    model: object,
    data: Rows | None,
    method: object,
    settings: Mapping[str, Setting],
    tokenizer: object,
    out: Path,
    options: RecipeOptions,
    listener: Listener,
) -> Recipe:
    """The recipe for what a caller handed over; the options are checked before any object is saved."""
    from fleetune.tuning import methods
    from fleetune.tuning.recipe import objects_to_files

    model = plain_models.path_of(model)
    if isinstance(model, Recipe):
        plain_models.check(model.model, out, recipes.trained(model))
        if data is None and tokenizer is None and not (settings or options) and method == recipes.AUTO_METHOD:
            return model
        raise UsageError(
            "a recipe says everything; nothing is given beside it", hint="dataclasses.replace it"
        )
    if data is None:
        raise RecipeError(["data is missing"], hint='give a file, rows, or "demo"')
    if objects_to_files.is_adapted(model):
        listener.note(
            "the model's adapters are merged into a copy of its base, and that is tuned: rank, alpha and targets are the "
            "method's settings"
        )
    name, chosen = _method_of(method)
    known = set() if name == recipes.AUTO_METHOD else {s.name for s in methods.settings(name)}
    if misplaced := [word for word in options if word in known and word not in recipes.fields()]:
        raise RecipeError(
            [f"'{word}' is a setting of {name}, not an option" for word in misplaced],
            hint=f'give it as settings={{"{misplaced[0]}": ..}}',
        )
    values = chosen | objects_to_files.setting_values(settings)
    held_out = options.get("eval_data", "")
    named_rows, named_held_out = (
        str(rows) if isinstance(rows, str | Path) else "data" for rows in (data, held_out)
    )
    is_named = isinstance(model, str | Path)
    recipe = recipes.make(
        {
            **options,
            "eval_data": named_held_out,
            "model": str(model) if is_named else "model",
            "data": named_rows,
            "method": name,
            "set": values,
        }
    )
    if is_named:
        plain_models.check(recipe.model, out, recipes.trained(recipe))
    return dataclasses.replace(
        recipe,
        model=objects_to_files.model_name(model, tokenizer, out),
        data=objects_to_files.data_name(data, out),
        eval_data=named_held_out
        if isinstance(held_out, str | Path)
        else objects_to_files.data_name(held_out, out),
    )


def _method_of(method: object) -> tuple[str, dict[str, Value]]:
    """Return a method's name and settings, from its name or its own dataclass; a caller's own class gets a name."""
    from fleetune.common.settings import named
    from fleetune.tuning import methods
    from fleetune.tuning.recipe import given_methods

    modules = {n: e.module for n, e in methods.entries().items()}
    if isinstance(method, str | type) or type(method).__module__ in modules.values():
        return named(method, modules)
    return given_methods.registered(method), methods.values_of(cast("Method", method))
