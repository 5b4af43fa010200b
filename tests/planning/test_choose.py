"""The method of a recipe that names none."""

import pytest

from fleetune import models
from fleetune.common.display import human_bytes, quoted
from fleetune.errors import FitError, RecipeError
from fleetune.models.shapes import shape_of
from fleetune.planning import choose, device_cost
from fleetune.planning.plan import PlanSearch
from fleetune.tuning import methods
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe


def recipe(model: str, **values: object) -> Recipe:
    return recipes.make({"model": model, "data": "demo", **values})


def test_the_method_is_the_one_that_plan_recommends_and_is_said(tiny):
    told: list[str] = []
    assert choose.settled_method(recipe(tiny), told.append, offline=True).method == "fedit"
    assert told[0].startswith(
        "method fedit, since none was given: it learns most from a step and takes about"
    )


def test_the_method_has_the_settings_that_are_given(tiny):
    chosen, _, _ = choose.method_for(recipe(tiny, set={"tau": 3, "K": 64, "backprop_steps": 3}), offline=True)
    assert chosen == "fedkseed"
    with pytest.raises(RecipeError, match="no method has all of the settings r, K"):
        choose.method_for(recipe(tiny, set={"r": 4, "K": 64}), offline=True)


def test_what_trains_scales_is_chosen_among_the_methods_that_can(tiny):
    settled = choose.settled_method(recipe(tiny, train="scales"), lambda _: None, offline=True)
    assert settled.method in recipes.SCALE_METHODS
    assert settled.base == "auto", "the file is mapped whatever the recipe says"
    assert choose.method_for(recipe(tiny, set={"module": "scales"}), offline=True)[0] == "fedpetuning"


def test_where_back_propagation_does_not_fit_a_method_without_it_is_chosen(tiny, monkeypatch):
    monkeypatch.setenv("FLEETUNE_KERNELS", "torch")  # Numba's take more than this model's back-propagation
    table = choose.plan.table(models.load_config(tiny), choose.Workload(), rates=choose.NOT_MEASURED)
    rows = {row.method: row for row in table}
    most = max(r.peak or 0 for n, r in rows.items() if n in ("mezo", "fedkseed", "onebyte"))
    assert most < (rows["fedit"].peak or 0)
    monkeypatch.setattr(models, "device_memory", lambda device: most + 1)
    name, _, why = choose.method_for(recipe(tiny, base="memory"), offline=True)
    assert name in ("fedkseed", "mezo", "onebyte")
    assert "of this machine's" in why
    monkeypatch.setattr(models, "device_memory", lambda device: 1_000_000)
    with pytest.raises(FitError, match="no method fits"):
        choose.method_for(recipe(tiny), offline=True)


def test_a_method_is_counted_with_the_rows_that_its_steps_will_have(tiny, monkeypatch):
    shape = shape_of(models.load_config(tiny))
    asked = {"length": 512, "dtype": "fp32", "base": "memory"}
    peaks = {s.work.batch: s.peak for s in PlanSearch(shape, None, asked).tried("fedit")}
    assert peaks[1] < peaks[8]
    monkeypatch.setattr(models, "device_memory", lambda device: peaks[1] * 10 // 9 + 1)
    small = recipe(tiny, base="memory", set={"batch_size": 1, "r": 16, "alpha": 16})
    name, _, why = choose.method_for(small, offline=True)
    assert name == "fedit"
    assert f"about {human_bytes(peaks[1])} of this machine's" in why
    monkeypatch.setattr(models, "device_memory", lambda device: peaks[8] - 1)
    with pytest.raises(FitError, match="fedit with 8 x 512 tokens a step in fp32, needs 1 B more"):
        set_ = {"batch_size": 8, "r": 16, "dropout": 0.05}
        choose.method_for(recipe(tiny, base="memory", set=set_), offline=True)


def test_a_base_that_memory_cannot_hold_stays_in_its_file(large, monkeypatch):
    tried = PlanSearch(shape_of(models.load_config(large)), None, {"length": 512, "dtype": "fp32"}).tried(
        "fedit"
    )
    in_memory, mapped = [s.peak for s in tried][:2]
    for ram, base in ((in_memory * 10 // 9 + 1, "auto"), (mapped * 10 // 9 + 1, "mapped")):
        monkeypatch.setattr(models, "device_memory", lambda device, ram=ram: ram)
        _, found, why = choose.method_for(recipe(large, set={"r": 16, "dropout": 0.05}), offline=True)
        assert found == base
        assert why.endswith("base mapped") == (base == "mapped")


def settled_base(recipe: Recipe) -> tuple[Recipe, prepare.CheckMemory, str]:
    told: list[str] = []
    found, check = choose.settled_base(recipe, told.append, offline=True)
    return found, check, " ".join(told)


def test_the_base_of_a_named_method_is_mapped_where_it_fits_only_so_which_is_said(large):
    shape = shape_of(models.load_config(large))
    tried = PlanSearch(shape, None, {"length": 512, "dtype": "fp32"}, shrinks=False).tried("mezo")
    in_memory, mapped = (settings.peak for settings in tried)
    assert mapped < in_memory
    roomy, tight = f"{in_memory * 10 // 9 + 9}", f"{in_memory * 10 // 9 - 9}"
    found, _, told = settled_base(recipe(large, method="mezo", ram=roomy))
    assert (found.base, told) == ("auto", "")
    found, _, told = settled_base(recipe(large, method="mezo", ram=tight))
    assert found.base == "mapped"
    assert f"in memory the run takes about {human_bytes(in_memory)}" in told
    stated, _, told = settled_base(recipe(large, method="mezo", ram=f"{in_memory - 9}", base="memory"))
    assert stated.base == "memory"
    assert "mezo with 16 x 512 tokens a step in fp32 takes about" in told


def test_what_cannot_fit_is_refused_by_what_no_file_backs_with_what_fits(large, monkeypatch):
    shape, work = shape_of(models.load_config(large)), choose.Workload(16, 200)
    footprint = methods.make("mezo", {}).footprint(shape)
    parts = device_cost.memory(shape, work, footprint)
    peak, own = sum(parts.values()), device_cost.least(shape, work, footprint, in_file=True)
    kept = own + device_cost.CODE + device_cost.KERNEL_CODE
    assert kept == int(device_cost.SURE * (peak - parts["weights"]))
    assert device_cost.least(shape, work, footprint, in_file=False) == own + parts["weights"]

    def check(have: int, rows: int = 100, tokens: int = 200, **more: object) -> None:
        monkeypatch.setattr(models, "device_memory", lambda device: have)
        settled_base(recipe(large, method="mezo", base="memory", **more))[1](rows, tokens)

    assert own < peak - parts["weights"]
    check(own)  # the file's pages are read again and again, but it works
    with pytest.raises(FitError) as error:
        check(own - 1)
    said = error.value.message
    assert "mezo with 16 x 200 tokens a step in fp32, base memory, takes at least" in said
    assert f"{human_bytes(own)} beside pages of files, and there are {human_bytes(own - 1)}" in said
    assert f"what fits: fleetune plan {quoted(large)} --ram" in (error.value.hint or "")
    check(own - 1, tokens=100)  # shorter rows
    check(own - 1, rows=8)  # a client has fewer rows than a step
    check(own - 1, set={"batch_size": 8})
    check(own - 1, ram="10GB")  # who knows better says so
    monkeypatch.setattr(models, "check_device", lambda *_: "cuda")
    check(own - 1)  # the weights are not in this memory
