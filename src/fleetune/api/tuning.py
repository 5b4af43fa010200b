"""Tune a model over a simulated fleet, or resume a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from fleetune import models
from fleetune import subject as subjects
from fleetune.api.names import Base, Device, Dtype, MethodName, Rows, Setting, Trains, words
from fleetune.common.display import quoted
from fleetune.common.settings import Value, parse_bytes, parse_rate
from fleetune.deploy import targets
from fleetune.errors import RecipeError, UsageError
from fleetune.models.cache import cache
from fleetune.models.cache.names import is_master
from fleetune.runs import rundir, trackers
from fleetune.runs.listener import Listener, heard_by
from fleetune.tuning import methods
from fleetune.tuning.recipe import objects
from fleetune.tuning.recipe import recipe as recipes

if TYPE_CHECKING:
    from fleetune.planning.plan import Plan
    from fleetune.tuning.methods import Method
    from fleetune.tuning.result.finished import TuneResult
    from fleetune.tuning.sweep import SweepResult

RESULTS: Final = ("adapter", "ledger.safetensors")  # of a run


def path_of(result: object) -> object:
    """Return the path of what `tune`, `compress` or `export` returned, or the argument of a subject; anything else as it is."""
    found = getattr(result, "folder", None) or getattr(result, "path", None)
    if isinstance(result, subjects.Run | subjects.Compressed | subjects.Plain):
        return result.argument
    model_in_memory = hasattr(result, "named_parameters") or hasattr(result, "net")
    return str(found) if isinstance(found, Path) and not model_in_memory else result


def check_plain(name: str, out: Path, train: str = "weights") -> None:
    """Raise UsageError for a name that means a run, an adapter or a compressed model; `out` is the folder of the runs.

    A compressed model passes where `train` is scales: `with_file` is for it.
    """
    path = Path(name).expanduser()
    of_run = path.name in RESULTS and (path.parent / "run.toml").is_file()
    if not of_run and compressed_of(name, train, out) is not None:
        return
    found = subjects.Run(path.parent) if of_run else subjects.open(name, out)
    if name in cache.ORIGINS or ((path / "config.json").is_file() and not is_master(path)):
        return
    if isinstance(found, subjects.Run):
        raise _written_out(f"{name} is a run: a change of its base, not a plain model", found, found.folder)
    if isinstance(found, subjects.Compressed):
        model = found.artefact or Path(found.argument) / "model"
        if is_master(model):
            what = f"{name} is a compressed model: codes, not plain weights"
            refused = _written_out(what, found, found.home)
            refused.hint = f"{refused.hint}; or tune its scales as they are: --train scales"
            raise refused
        raise UsageError(f"{name} is the folder of a compression", hint=f"its model is {quoted(model)}")


def compressed_of(name: str, train: str, out: Path) -> subjects.Compressed | None:
    """Return the compressed model of this name whose scales can be trained (`train` = scales); None for anything else."""
    if train != "scales":
        return None
    found = subjects.open(name, out)
    if isinstance(found, subjects.Compressed) and is_master(found.artefact or Path(found.argument) / "model"):
        return found
    return None


def with_file(recipe: recipes.Recipe, out: Path, note: Callable[[str], None]) -> recipes.Recipe:
    """Return a recipe that trains scales of a compressed model with its GGUF file as the model; others as they are.

    The file is written unless it is there, and `note` is told.  First, RecipeError for mistakes that show without model and
    data; UsageError as in `tunable_file.of`.
    """
    if (found := compressed_of(recipe.model, recipes.trained(recipe), out)) is None:
        return recipe
    from fleetune.deploy import export
    from fleetune.planning import choose

    choose.able_methods(recipe)
    return dataclasses.replace(recipe, model=str(export.tunable_file(found, note)))


def _written_out(what: str, found: subjects.Run | subjects.Compressed, home: Path) -> UsageError:
    """Return the error with the command that writes the model out: as a GGUF file where a run has tuned scales."""
    to = "gguf" if isinstance(found, subjects.Run) and found.recipe.train == "scales" else "hf"
    place = targets.find(to).place(home)
    hint = f"fleetune export {quoted(found.argument)} --to {to}   and then give {quoted(place)} as the model"
    if place.exists():
        hint = f"it is written out already: give {quoted(place)} as the model (if it is newer than the run)"
    return UsageError(what, hint=hint)


def plan(
    model: str | Path,
    *,
    ram: str | int | None = None,
    uplink: str | float | None = None,
    batch: int | None = None,
    length: int | None = None,
    steps: int = 200,
    dtype: Dtype | None = None,
    base: Base | None = None,
    train: Trains = "weights",
    out: str | Path = "runs",
    offline: bool = False,
) -> Plan:
    """Return memory, traffic and time of every method for one device and one round, before any work.

    `ram` is the device's memory (4GB, or bytes), `uplink` its upload speed (1Mbps, or bytes a second); without them, the plan
    states neither what fits nor how long sending takes.  A round is `steps` local steps of `batch` rows (None: 8) of `length`
    tokens (None: 512), with weights in `dtype` (None: fp32), in memory or mapped (`base`, None: memory).  With `train` scales
    the methods are those that tune the scales of a GGUF file (the base is mapped), and the model may be a compressed one, of
    which no file is written; ModelError for a model that has none.

    `Plan.settings` finds the method to begin with and what makes it fit `ram`: a `batch`, `length` or `dtype` that is None
    may become smaller and a `base` mapped, one that is given stays.  `Settings.options` are the arguments for `tune`:

        fleetune.tune(model, data, **fleetune.plan(model, ram="2GB").settings().options())
    """
    from fleetune.planning import device_cost
    from fleetune.planning import plan as planning

    name = str(model) if isinstance(model, str | Path) else subjects.open(model).argument
    if train not in (known := recipes.choices("train")):
        raise UsageError(f"train = {train!r} is not one of {', '.join(known)}")
    if train == "scales":
        if base == "memory":
            raise UsageError(f"train = {train} reads the base from its GGUF file", hint="--base mapped")
        base = "mapped"
    given = {"batch": batch, "length": length, "dtype": dtype, "base": base}
    asked: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    device_cost.Workload(steps=steps, **asked)  # bad numbers are refused before transformers is imported
    memory = parse_bytes(f"{ram} B" if isinstance(ram, int) else ram)
    speed = parse_rate(f"{uplink} B/s" if isinstance(uplink, int | float) else uplink)
    check_plain(name, Path(out), train)
    if (found := compressed_of(name, train, Path(out))) is not None:
        from fleetune.deploy import export

        kinds = export.kinds_of(found)
        config = models.load_config(str(found.model), offline=offline)
    else:
        from fleetune.planning import choose

        config = models.load_config(name, offline=offline)
        kinds = choose.checked_kinds(name) if train == "scales" else {}
    return planning.make(config, name, asked, steps=steps, ram=memory, uplink=speed, train=train, kinds=kinds)


def tune(
    model: object,
    data: Rows | None = None,
    *,
    method: MethodName | Method = "auto",
    settings: Mapping[str, Setting] | None = None,
    tokenizer: object = None,
    tracker: str | Sequence[str] = (),
    dtype: Dtype | None = None,
    device: Device | None = None,
    base: Base | None = None,
    train: Trains | None = None,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
    **options: Any,
) -> TuneResult:
    """Tune a model over a simulated fleet in a new folder under `out`, and return the run.

    `model` is a name or path, a `fleetune.Model`, a transformers or PEFT model (with its `tokenizer`), or a whole
    `Recipe`, which then holds all options; with `train="scales"` also a compressed model, which is tuned in its GGUF file:
    it is written beside the model, unless it is there.  `data` (and the option `eval_data`) is a file, a hub id, `"demo"`, or
    rows: dicts, a `datasets.Dataset`, a DataFrame.  `method` is a name, `auto` for the one that `plan` recommends, or a
    method's own dataclass: `fedkseed.Method(K=1024)`, or one that you wrote, which is then known in this process alone.
    `settings` are the method's, by name.  `dtype` to `train`, and the `options`, are those of `fleetune.Recipe`.  A model or
    rows given as Python objects are saved under `OUT/objects`, so that the run can be resumed.  A PEFT model's adapters are
    merged into the copy that is saved and tuned: they are not trained on.
    `tracker` names trackers that get the figures as well: tensorboard, wandb.
    """
    few = {"dtype": dtype, "device": device, "base": base, "train": train}
    options |= {name: value for name, value in few.items() if value is not None}
    watching, named = heard_by(listener, progress), trackers.check(words(tracker))
    recipe = recipe_for(model, data, method, settings or {}, tokenizer, Path(out), options, watching)
    recipe = recipes.with_columns(recipe, watching.note, offline=offline)
    from fleetune.planning import choose  # torch: after all that can be wrong with the rows' columns
    from fleetune.tuning.run import run

    recipe = with_file(recipe, Path(out), watching.note)
    recipe = choose.settled_method(recipe, watching.note, offline=offline)
    recipe, check_memory = choose.settled_base(recipe, watching.note, offline=offline)
    with trackers.tracked(watching, named, offline=offline) as heard:
        return run.start(recipe, Path(out), heard, offline=offline, check_memory=check_memory)


def resume_run(
    run: object,
    *,
    rounds: int = 0,
    base: Base | None = None,
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
    from fleetune.tuning.run import resume

    rounds = rounds and resume.rounds_number(rounds)
    if base and base not in (places := recipes.choices("base")):
        raise RecipeError(
            [f"base = {base!r} is not one of {', '.join(places)}"], hint="leave it out for the run's own"
        )
    folder = getattr(run, "folder", None)
    path = folder if isinstance(folder, Path) else rundir.find(str(run), Path(out))
    with trackers.tracked(heard_by(listener, progress), words(tracker), offline=offline) as heard:
        return resume.resume(path, heard, offline=offline, rounds=rounds, base=base or "")


def recipe_for(
    model: object,
    data: Rows | None,
    method: object,
    settings: Mapping[str, Setting],
    tokenizer: object,
    out: Path,
    options: Mapping[str, Any],
    listener: Listener,
) -> recipes.Recipe:
    """The recipe for what a caller handed over; the options are checked before any object is saved."""
    model = path_of(model)
    if isinstance(model, recipes.Recipe):
        check_plain(model.model, out, recipes.trained(model))
        if data is None and tokenizer is None and not (settings or options) and method == recipes.AUTO_METHOD:
            return model
        raise UsageError(
            "a recipe says everything; nothing is given beside it", hint="dataclasses.replace it"
        )
    if data is None:
        raise RecipeError(["data is missing"], hint='give a file, rows, or "demo"')
    if objects.is_adapted(model):
        listener.note(
            "the model's adapters are merged into a copy of its base, and that is tuned: rank, alpha and targets are the "
            "method's settings"
        )
    name, chosen = _method_of(method)
    given = {"model": model, "data": data, "eval_data": options.get("eval_data", "")}
    named = {n: str(v) if isinstance(v, str | Path) else n for n, v in given.items()}
    both = objects.setting_values(options.get("set", {})) | objects.setting_values(settings)
    recipe = recipes.make({**options, **named, "method": name, "set": chosen | both})
    if isinstance(model, str | Path):
        check_plain(recipe.model, out, recipes.trained(recipe))
    return dataclasses.replace(
        recipe,
        model=objects.model_name(model, tokenizer, out),
        data=objects.data_name(data, out),
        eval_data=objects.data_name(given["eval_data"], out),
    )


def _method_of(method: object) -> tuple[str, dict[str, Value]]:
    from fleetune.common.settings import named

    modules = {n: e.module for n, e in methods.entries().items()}
    if isinstance(method, str | type) or type(method).__module__ in modules.values():
        return named(method, modules)
    return objects.registered(method), methods.values_of(cast("Method", method))


def sweep(
    model: object,
    data: Rows | None = None,
    *,
    vary: Mapping[str, Sequence[Value]] | None = None,
    seeds: int = 1,
    method: MethodName | Method = "auto",
    settings: Mapping[str, Setting] | None = None,
    tokenizer: object = None,
    name: str = "grid",
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
    **options: Any,
) -> SweepResult:
    """Tune over all combinations of the values in `vary`, each for `seeds` seeds, in a new folder under `out`.

    `vary` maps a name to its values: an option (`rounds`), a setting of the method (`K`), `method`, or `alpha` of the
    Dirichlet partition.  `name` becomes a part of the folder's name; all else is as in `tune`.  RecipeError, before any
    run, for a name that cannot vary or a combination that cannot be; FleetuneError, after all runs, when some failed:
    `resume_sweep` does these again.
    """
    from fleetune.planning import choose
    from fleetune.tuning import sweep as sweeps

    heard, varied = heard_by(listener, progress), dict(vary or {})
    recipe = recipe_for(model, data, method, settings or {}, tokenizer, Path(out), options, heard)
    table = {n: [*values] if isinstance(values, list | tuple) else values for n, values in varied.items()}
    values = dataclasses.asdict(recipe) | {"sweep": {**table, "seeds": seeds}}
    grid = sweeps.make_grid(choose.settled_sweep(values, (), heard.note, offline=offline))
    for tuned in {point.recipe.model for point in grid.points}:
        check_plain(tuned, Path(out))
    sweeps.check(grid, offline=offline)
    return sweeps.start(grid, Path(out), heard, name=name, offline=offline)


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
    from fleetune.tuning import sweep as sweeps

    heard = heard_by(listener, progress)
    path = sweeps.find(str(getattr(sweep, "folder", sweep)), Path(out))
    grid = sweeps.read(path)
    sweeps.check(grid, offline=offline)
    return sweeps.start(grid, Path(out), heard, resumed=path, offline=offline)
