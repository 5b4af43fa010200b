"""The learning rate that is found before round 1: formulas against float64 references, trials, whole runs."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import contract_harness as harness
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import command_line
import fleetune
from fleetune import adapters, models
from fleetune.data import collate
from fleetune.errors import RecipeError
from fleetune.evaluation.losses import pad_id, token_losses
from fleetune.models.net.model import Model
from fleetune.runs import rundir
from fleetune.seeds import slopes
from fleetune.seeds.noise import probe, run_key
from fleetune.seeds.slopes import Probe, Slopes, along, rate
from fleetune.seeds.view import View
from fleetune.tuning import methods
from fleetune.tuning.prepare import prepare, rates
from fleetune.tuning.prepare.rates import Search, rounded
from fleetune.tuning.prepare.trial import Bench, Size, Trials, Tried, climb, hold, loss_after
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe
from heard import Heard

HOW = Probe(law="hashed", K=128, eps=1e-3, key=5, batch=5)
LOSSES = st.lists(st.floats(0.1, 50), min_size=2, max_size=12)


def of(gradient: float, noise: float, curvature: float) -> Slopes:
    return Slopes(gradient, noise, curvature, (), ())


@given(LOSSES, st.integers(0, 1000))
def test_slope_variance_and_curvature_are_those_of_a_ratio_of_sums(middle, seed):
    draw = np.random.default_rng(seed)
    b, eps = len(middle), 1e-2
    tokens = draw.integers(1, 40, b)
    plus, minus = np.array(middle) + draw.normal(size=b), np.array(middle) + draw.normal(size=b)
    slope, variance, curvature = along(np.array(middle), plus, minus, tokens, eps)
    total = float(tokens.sum())
    assert slope == pytest.approx((plus.sum() / total - minus.sum() / total) / (2 * eps))
    residuals = [(p - m) / (2 * eps) - slope * n for p, m, n in zip(plus, minus, tokens, strict=True)]
    mean_tokens = total / b
    # Cochran, equation 2.46 with f = 0
    expected = sum(r * r for r in residuals) / (b - 1) / (b * mean_tokens**2)
    assert variance == pytest.approx(expected)
    assert curvature == pytest.approx((plus.sum() + minus.sum() - 2 * sum(middle)) / total / eps**2, abs=1e-6)


def test_the_rate_is_a_share_of_the_best_first_step_and_takes_the_worst_point():
    point = of(4.0, 32.0, 200.0)
    best = 4.0 / (200.0 * (4.0 + 32.0 / 8))  # minimises -eta G + eta^2 / 2 h (G + s^2 / b)
    change = [-e * 4.0 + e * e / 2 * 200.0 * 8.0 for e in (0.9 * best, best, 1.1 * best)]
    assert min(change) == change[1]
    assert rate([point], 8) == pytest.approx(slopes.CAREFUL * best)
    assert rate([point, of(4.0, 32.0, 800.0)], 8) == pytest.approx(slopes.CAREFUL * best / 4)
    assert rate([point, of(1.0, 56.0, 100.0)], 8) == pytest.approx(slopes.CAREFUL * 0.125 / 200.0)


def test_a_mean_of_walks_goes_further_but_each_walk_stays_stable():
    noisy, clear = of(1.0, 99.0, 10.0), of(1.0, 0.0, 10.0)
    assert rate([noisy], 1, averaged=4) == pytest.approx(2 * rate([noisy], 1))
    assert rate([clear], 1, averaged=10_000) == slopes.CAP / 10.0


@pytest.mark.parametrize("point", [of(-1.0, 5.0, 10.0), of(1.0, 1.0, 0.0), of(1.0, 1.0, math.inf)])
def test_without_a_slope_or_a_curvature_there_is_no_rate(point):
    assert rate([point], 8) == 0.0


@given(st.floats(1e-9, 100))
def test_a_rate_is_rounded_to_the_nearest_of_the_series_and_stays(value):
    found, series = rounded(value), [s * 10.0**power for power in range(-10, 3) for s in rates.SERIES]
    assert abs(math.log(found / value)) == pytest.approx(
        min(abs(math.log(s / value)) for s in series), abs=1e-9
    )
    assert rounded(found) == found
    assert len(f"{found:.9e}".rstrip("0").split("e")[0].replace(".", "").rstrip("0")) <= 2


@pytest.fixture(scope="module")
def model() -> Model:
    return models.tiny_llama()


def test_the_curvature_is_that_of_the_loss_along_the_direction():
    """Against the second derivative by autograd, along the same direction, on the same rows."""
    model = models.tiny_llama()
    model.net.get_input_embeddings().padding_idx = None  # autograd gives the row of the padding no gradient
    rows = harness.rows(model)
    before = harness.logits(model)
    (point,) = slopes.measure(model, rows, HOW, lambda _: 0.0)
    assert model.attachment is None
    assert torch.equal(harness.logits(model), before)
    size = min(slopes.ROWS, len(rows))
    batch = collate([rows[i % len(rows)] for i in range(size)], pad_id(model))
    parameters = dict(models.named_tensors(model.net))
    z = direction_of(model, 0)
    for p in parameters.values():
        p.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        loss = token_losses(model.net, batch)[0].double().mean()
    gradient = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    slope = sum((g * z[n]).sum() for n, g in zip(parameters, gradient, strict=True))
    second = torch.autograd.grad(slope, list(parameters.values()))  # type: ignore[arg-type]
    curvature = sum(float((h * z[n]).sum()) for n, h in zip(parameters, second, strict=True))
    assert point.slopes[0] == pytest.approx(float(slope.detach()), rel=2e-2)  # type: ignore[union-attr]
    assert point.curvatures[0] == pytest.approx(curvature, rel=5e-2)


def direction_of(model: Model, k: int) -> dict[str, torch.Tensor]:
    """The +1s and -1s of direction k, by name, read from a view that stands at the weights + z."""
    named = list(models.named_tensors(model.net))
    view = View(named, model.net, run_key=run_key(HOW.key.to_bytes(8, "little")), law=HOW.law, grid=1e-9)
    try:
        view.probe(probe(HOW.law, HOW.K, k), 1.0)
        return {n: (t - dict(named)[n]).round().clone() for n, t in view.tensors()}
    finally:
        view.remove()


def test_rates_are_tried_up_and_down_until_clearly_worse():
    def loss(rate: float) -> float:
        return 2.0 + math.log10(rate / 1e-2) ** 2 if rate < 1 else math.inf

    found = climb(5.0, loss, 1e-3, 10.0, 5)
    assert [t.rate for t in found.tried] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert found.best() == pytest.approx(1e-2)


def test_where_no_loss_falls_the_lowest_rate_is_taken():
    assert Trials(4.0, [Tried(1e-4, 4.0), Tried(1e-3, 4.1), Tried(1e-2, math.inf)]).best() == 1e-4


def test_a_rate_that_does_not_last_is_made_smaller():
    losses = {9.0: math.inf, 3.0: 7.0, 1.0: 2.0, 1 / 3: 3.0}
    found = hold(lambda rate: losses[rate], 9.0)
    assert [t.rate for t in found] == pytest.approx([9.0, 3.0, 1.0, 1 / 3])
    assert [t.loss for t in found] == list(losses.values())
    assert len(hold(lambda rate: {9.0: 2.0, 3.0: 2.0}[rate], 9.0)) == 2


@pytest.mark.parametrize(("name", "moves"), [("fedit", 3), ("fwdllm", 2)])
def test_a_rate_is_held_until_the_model_has_moved_so_often(name, moves, model):
    """Against the rounds done by hand.  FwdLLM waits for more directions in between: its state counts its moves."""
    waits = {"threshold": 1e-9, "patience": 3, "P": 1, "discriminative": False} if name == "fwdllm" else {}
    given = {**harness.QUICK[name], **waits}
    rows = harness.rows(model)
    bench = Bench(model, [rows[4:8], rows[8:12]], rows[:4], 7)

    def make(rate: float) -> Any:
        return methods.make(name, {**given, "lr": rate})

    before = harness.logits(model)
    found = loss_after(bench, make, moves, bench.loss(), given["lr"])
    assert torch.equal(harness.logits(model), before)
    assert model.attachment is None
    method, state = make(given["lr"]), bench.begin(make(given["lr"]))
    try:
        rounds = moves if name == "fedit" or moves == 1 else 3 * moves
        for number in range(1, rounds + 1):
            state = method.aggregate(state, iter(bench.round(method, state, number)))
            method.apply(model, state)
        assert found == bench.loss()
        assert name == "fedit" or state.batch == (moves if moves > 1 else 0)
    finally:
        adapters.detach(model)


def searches(recipe: Recipe, rows: int = 400, *, clients: int = 8, asked: int = 8) -> list[Search]:
    names, method = rates.wanted(recipe), methods.make(recipe.method, recipe.set)
    return rates.searches(recipe, method, names, [n for n in names if n in recipe.set], rows, clients, asked)


def recipe_of(method: str, rounds: int = 10, **given: Any) -> Recipe:
    return recipes.make({"model": "m", "data": "d", "method": method, "rounds": rounds, "set": given})


@pytest.mark.parametrize("name", ["fedit", "fedpetuning", "fedpeptao"])
def test_a_rate_that_nobody_gave_is_searched_for_as_far_as_the_run_is_long(name):
    """A trial of both clients, held for three rounds, takes 120 steps; of one client 60, and for one round 24."""
    for rounds, sizes in ((10, 3), (5, 2), (3, 1), (1, 0)):
        found = searches(recipe_of(name, rounds, steps=4))
        assert [s.size for s in found] == list(rates.SIZES)[3 - sizes :]
        assert all(not s.due and s.steps <= rounds * 8 * 4 / 2 for s in found)
    assert [s.size for s in searches(recipe_of(name, 1, steps=4, lr="auto"))] == [Size()]
    assert searches(recipe_of(name, lr=1e-3)) == []
    assert [rates.wanted(recipe_of("fedkseed", backprop=share)) for share in (0.5, 1.0)] == [["lr"], []]


@pytest.mark.parametrize("name", ["mezo", "zosgd", "fedkseed", "onebyte", "fwdllm"])
def test_where_the_published_rate_moves_nothing_it_is_searched_for_in_any_run(name):
    assert [s.due for s in searches(recipe_of(name, 1))] == [True]


FEW: dict[str, Any] = command_line.FEW | {"rounds": 2, "settings": {"K": 16, "tau": 4, "batch_size": 2}}


def test_a_run_records_what_was_found_and_repeats_it(place):
    first = fleetune.tune("tiny", "rows.jsonl", **FEW)
    folder = Path(first.done.run)
    (event,) = [e for e in rundir.events(folder) if e["event"] == "rate"]
    written = recipes.read(folder / "run.toml")
    assert written["set"]["lr"] == event["rate"] > 0
    assert event["way"] == "slopes"
    assert len(event["slopes"]) == 2 * slopes.DIRECTIONS
    again = fleetune.tune(recipes.make(written))
    assert again.digest == first.digest
    # nothing is searched for twice
    assert not [e for e in rundir.events(Path(again.done.run)) if e["event"] == "rate"]
    assert fleetune.tune("tiny", "rows.jsonl", **FEW).digest == first.digest


def test_a_run_that_back_propagates_finds_its_rate_or_says_that_it_does_not(place):
    few = {**FEW, "method": "fedit", "settings": {"r": 2, "steps": 1, "batch_size": 2}}
    runs = {}
    for rounds in (6, 2):
        heard = Heard()
        run = fleetune.tune("tiny", "rows.jsonl", **{**few, "rounds": rounds}, listener=heard)
        folder = Path(run.done.run)
        found = [e["rate"] for e in rundir.events(folder) if e["event"] == "rate"]
        runs[rounds] = (run.digest, recipes.read(folder / "run.toml"), found, heard.notes)
    digest, written, found, said = runs[6]
    assert found == [written["set"]["lr"]] != [3e-4]
    assert "finding lr on training rows .." in said
    assert fleetune.tune(recipes.make(written)).digest == digest
    _, written, found, said = runs[2]
    assert (found, written["set"]["lr"]) == ([], 3e-4)
    assert sum(text.startswith("lr = 0.0003 as published, not searched for") for text in said) == 1


def of_two(values: dict[str, Any], **more: Any) -> Any:
    given = {"model": "tiny", "data": "rows.jsonl", "method": "fedkseed", "clients": 2, "held_out": 4}
    return recipes.make({**given, "set": {"K": 16, "batch_size": 2, **values}, **more})


def test_a_real_fleets_server_finds_what_the_simulation_finds(place):
    simulated, real = (prepare.prepare(of_two({"tau": 4}), simulated=s) for s in (True, False))
    assert simulated.recipe.set["lr"] == real.recipe.set["lr"] > 0
    assert len(simulated.found_rates) == len(real.found_rates) == 1
    assert simulated.estimate.search == simulated.found_rates[0].seconds


@pytest.mark.parametrize(
    ("settings", "more", "step"),
    [
        ({}, {}, round(math.sqrt(2), 3)),
        ({"lr": 1e-4}, {}, 0.0),  # the rate is the user's, and so is what the server makes of it
        ({}, {"aggregation": "norm-clip", "clients": 4}, 2.0),
        ({}, {"privacy": "client", "epsilon": 8.0, "clients": 10}, 0.0),  # noise would grow with it
    ],
)
def test_with_a_rate_that_is_found_the_server_steps_by_the_root_of_the_clients(settings, more, step, place):
    recipe = of_two({"tau": 2, "backprop_steps": 1, **settings}, **more)
    for simulated in (True, False):
        job = prepare.prepare(recipe, simulated=simulated)
        assert job.recipe.set["server_lr"] == job.method.server_lr == step  # type: ignore[attr-defined]
    assert prepare.prepare(job.recipe).recipe.set["server_lr"] == step  # a run that is repeated


def test_auto_is_refused_where_no_device_would_use_the_rate():
    with pytest.raises(RecipeError, match="backprop_lr=auto does nothing: it is used only with backprop"):
        prepare.check(recipe_of("fedkseed", backprop_lr="auto"))
    some = recipe_of("fedkseed", backprop_lr="auto", backprop=0.5)
    prepare.check(dataclasses.replace(some, kinds="0,1"))


def test_auto_is_refused_where_it_cannot_be_found(place):
    with pytest.raises(RecipeError, match="found from slopes of the loss"):
        fleetune.tune("tiny", "rows.jsonl", **{**FEW, "settings": {"lr": "auto", "objective": "rouge_l"}})
    with pytest.raises(RecipeError, match="K = 'auto' is not an integer"):
        fleetune.tune("tiny", "rows.jsonl", **{**FEW, "settings": {"K": "auto"}})
