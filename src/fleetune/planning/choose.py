"""Choose the tuning method of a recipe that names none: the one that `plan` recommends for this machine and model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleetune import models
from fleetune.common.display import human_bytes, quoted
from fleetune.common.ggml import SCALES, scales_in
from fleetune.common.settings import parse_bytes
from fleetune.errors import FitError, ModelError, RecipeError
from fleetune.models import loading
from fleetune.models.cache import cache, names
from fleetune.models.families.foreign import foreign_file
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.shapes import Shape, shape_of
from fleetune.models.stored import check_scales
from fleetune.planning import device_cost, plan
from fleetune.planning.device_cost import Rates, Workload
from fleetune.planning.plan import TIGHT, PlanSearch
from fleetune.tuning import methods
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import AUTO_METHOD, Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NOT_MEASURED: Final = Rates(1e11, 1e10)  # what fits does not depend on the speed


def settled_method(recipe: Recipe, note: Callable[[str], None], *, offline: bool = False) -> Recipe:
    """Return the recipe with a method; where one was chosen, `note` is told which and why.

    FitError when no method fits this machine's memory, RecipeError when none has the recipe's settings.
    """
    if recipe.method != AUTO_METHOD:
        return recipe
    name, base, why = method_for(recipe, offline=offline)
    note(f"method {name}, since none was given: {why}; choose another with --method (fleetune methods)")
    return recipes.resolved(dataclasses.replace(recipe, method=name, base=base))


def settled_sweep(
    values: Mapping[str, Any], varied: Collection[str], note: Callable[[str], None], *, offline: bool = False
) -> dict[str, Any]:
    """Return the keys of a sweep's recipe with a method; where the method itself varies, any will do.

    `varied` are the names that vary beside those of the table `sweep`.
    """
    if "method" in varied or "method" in values.get("sweep", {}):
        return {"method": "fedit", **values}
    recipe = recipes.make({k: v for k, v in values.items() if k != "sweep"})
    return {**values, "method": settled_method(recipe, note, offline=offline).method}


def method_for(recipe: Recipe, *, offline: bool = False) -> tuple[str, str, str]:
    """Return the method to begin with among those that have the recipe's settings, where its base is, and why, in words."""
    able, part = able_methods(recipe), recipes.trained(recipe)
    try:
        config = models.load_config(recipe.model, offline=offline)
    except ModelError as error:  # loading it says what is wrong, and what to do
        return able[0], recipe.base, f"the model's configuration cannot be read ({error.message})"
    asked, _, ram = _asked(recipe)
    rows = plan.table(config, Workload(**asked), ram=ram, rates=NOT_MEASURED)
    shape = _shape(recipe, config, offline=offline)
    search = PlanSearch(shape, ram, asked, recipe.set, shrinks=False, train=part)
    settings = search.best([name for name in plan.order(rows) if name in able])
    mapped = settings.work.base == "mapped"
    base = "mapped" if mapped and part != SCALES else recipe.base
    why = "it learns most from a step" if methods.entries()[settings.method].recommended else "it fits"
    if settings.ram is not None:
        why += f" and takes about {human_bytes(settings.peak)}"
        why += f" of this machine's {human_bytes(settings.ram)} of memory"
    return settings.method, base, why + ", base mapped" * mapped


def settled_base(
    recipe: Recipe, note: Callable[[str], None], *, offline: bool = False
) -> tuple[Recipe, prepare.CheckMemory]:
    """Return the recipe, its base mapped where it fits only so, which `note` is told, and the check of its memory by its rows.

    FitError, here already, where a step of one token does not fit.  Only what is certain is refused: pages of files do not
    count, nor does a method without a footprint, nor a GPU, which says itself what does not fit.
    """
    prepare.check(recipe)
    asked, device, ram = _asked(recipe)
    if ram is None or device != "cpu":
        return recipe, lambda rows, tokens: None
    try:
        config = models.load_config(recipe.model, offline=offline)
        with foreign_file(Path(recipe.model)):
            shape = _shape(recipe, config, offline=offline)
    except ModelError:  # loading it says what is wrong, and what to do
        return recipe, lambda rows, tokens: None
    there = human_bytes(ram)
    tried = [
        *PlanSearch(shape, ram, asked, recipe.set, shrinks=False, train=recipe.train).tried(recipe.method)
    ]
    if len(tried) > 1 and tried[0].peak > TIGHT * ram:
        recipe = dataclasses.replace(recipe, base="mapped")
        note(
            f"base mapped: in memory the run takes about {human_bytes(tried[0].peak)}, and there are {there}"
        )
    stored = str(config.dtype).removeprefix("torch.")  # the type of the weights in their file; None: not said
    check = functools.partial(_check_memory, recipe, shape, stored, ram)
    check(1, 1)
    if tried and tried[-1].peak > ram:
        note(
            f"{tried[-1]} takes about {human_bytes(tried[-1].peak)}, and there are {there}: slow, or ended by the system"
        )
    return recipe, check


def _check_memory(recipe: Recipe, shape: Shape, stored: str, ram: int, rows: int, tokens: int) -> None:
    method = methods.make(recipe.method, recipe.set)
    base = "memory" if recipe.base == "memory" else "mapped"
    work = Workload(min(rows, prepare.batch_size_of(method)), tokens, dtype=recipe.dtype, base=base)
    in_file = stored in ("None", WEIGHTS[recipe.dtype].full)
    counted = filter(None, method.footprints(shape))
    least = min((device_cost.least(shape, work, f, in_file=in_file) for f in counted), default=0)
    if least <= ram:
        return
    less = "--base mapped needs less; " * (base == "memory")
    size = human_bytes(ram).replace(" ", "")
    raise FitError(
        f"{recipe.method} with {work.batch:,} x {tokens:,} tokens a step in {recipe.dtype}, base {base}, takes at least "
        f"{human_bytes(least)} beside pages of files, and there are {human_bytes(ram)}",
        hint=f"{less}what fits: fleetune plan {quoted(recipe.model)} --ram {size}; "
        "where there is more memory: --ram SIZE",
    )


def _asked(recipe: Recipe) -> tuple[dict[str, Any], str, int | None]:
    """Return the fields of `Workload` that a recipe states, its device, and the memory of its work there (None: not known)."""
    base = "mapped" if recipes.trained(recipe) == SCALES else recipe.base
    device = models.check_device(recipe.device, recipe.dtype, base)
    base = base if device == "cpu" else "memory"
    asked = {"length": recipe.max_length, "dtype": recipe.dtype} | ({} if base == "auto" else {"base": base})
    return asked, device, parse_bytes(recipe.ram or None) or models.device_memory(device) or None


def _shape(recipe: Recipe, config: PretrainedConfig, *, offline: bool) -> Shape:
    if recipes.trained(recipe) != SCALES:
        return shape_of(config)
    return shape_of(config)._replace(scales=scales_of(recipe.model, offline=offline))


def able_methods(recipe: Recipe) -> list[str]:
    """Return the methods that can do what a recipe says: the one that it names, else all that have its settings.

    RecipeError for anything wrong that needs neither the clients' data nor the model.
    """
    found = [recipe.method] if recipe.method != AUTO_METHOD else methods.having(recipe.set)
    if recipe.method == AUTO_METHOD and recipes.trained(recipe) == SCALES:
        wanted = (recipes.SCALES_MODULE,) if "module" in recipe.set else recipes.SCALE_METHODS
        found = [name for name in found if name in wanted]
    if not found:
        raise RecipeError(
            recipes.no_method_problems(list(recipe.set)),
            hint="name the one that is meant: --method NAME (fleetune methods)",
        )
    prepare.check(recipes.resolved(dataclasses.replace(recipe, method=found[0])))
    return found


def scales_of(name: str, *, offline: bool = False) -> dict[str, int]:
    """Return how many scales a block of a model's file has, by linear layer (`Shape.scales`); {} where none can be read."""
    try:
        return scales_in(_kinds_in(name, offline=offline))
    except ModelError:  # loading it says what is wrong, and what to do
        return {}


def checked_kinds(name: str) -> dict[str, str]:
    """Return the types of the matrices in the file of a model whose scales are to be tuned, by layer.

    Nothing is fetched, {} for a built-in name.
    ModelError where no layer has scales, as loading it to tune would raise: of a directory or hub id, whose weights are
    plain, and of a GGUF file of other types.
    """
    if name in cache.ORIGINS and cache.ORIGINS[name].member.endswith(".gguf"):
        return {}
    in_file = name not in cache.ORIGINS and (path := names.local(name)) is not None and path.is_file()
    found = _kinds_in(name, offline=True) if in_file else {}
    check_scales(found)
    return found


def _kinds_in(name: str, *, offline: bool) -> dict[str, str]:
    _, tensors = loading.tensors_of(name, offline=offline, blocks=True)
    return {name.removesuffix(".weight"): t.kind for name, t in tensors.items() if len(t.shape) == 2}
