"""The time of a run before it begins, and a run that is made to fit into a stated time."""

import dataclasses
from pathlib import Path
from typing import Any

import contract_harness as harness
import pytest
import torch

import fleetune
from fleetune import models
from fleetune.errors import FitError, ModelError, RecipeError
from fleetune.models.net.model import Model
from fleetune.tuning import methods
from fleetune.tuning.prepare import estimate, prepare
from fleetune.tuning.prepare.estimate import Estimate, advice, fitted, seconds_of
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe


def recipe(method: str, **values: Any) -> Recipe:
    return recipes.make({"model": "m", "data": "d", "method": method, **values})


def fit(method: str, found: Estimate, within: float) -> tuple[Recipe, Estimate]:
    chosen, made, smaller = fitted(recipe(method), methods.make(method, {}), found, within, found.clients)
    assert chosen.set == methods.values_of(made) or smaller is found
    return chosen, smaller


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20m", 1200), ("1.5 h", 5400), ("2d", 172800), ("45 min", 2700), ("", 0)],
)
def test_a_time_is_read_as_people_write_it(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["20", "soon", "-1h", "0m", "1h30"])
def test_what_is_no_time_is_refused_before_any_work(text):
    with pytest.raises(RecipeError, match="within = "):
        prepare.check(recipe("fedit", within=text))


def test_a_run_is_its_rounds_times_clients_times_steps():
    found = Estimate(10, 8, 12.5, 0.4, 11, 3.0)
    assert found.seconds == pytest.approx(10 * 8 * 12.5 * 0.4 + 33)
    said = "about 7m13s: 10 rounds × 8 clients × 12 steps of 400 ms, and 11 evaluations of 3.0 s"
    assert found.text == said
    assert not advice(found)
    assert "--within 1h" in advice(Estimate(10, 8, 200, 2.0, 11, 3.0))


def test_what_is_around_the_rounds_gives_way_where_it_and_the_evaluations_take_more_than_a_fifth():
    small = Estimate(10, 2, 10, 0.1, 11, 0.05, 20, 4, 1.0, 24, 0.5)  # 20 + 0.55 + 8 + 24 seconds
    chosen, smaller = fit("fedit", small, 40.0)
    assert (chosen.client_rows, chosen.samples, smaller.client_rows, smaller.answers) == (0, 4, 0, 4)
    assert smaller.seconds <= 32.0
    assert chosen.answer_tokens == smaller.tokens == 70
    chosen, smaller = fit("fedit", small, 10.0)
    assert (chosen.client_rows, chosen.samples, smaller.answers, chosen.answer_tokens) == (0, 1, 1, 32)
    assert smaller.seconds <= 8.0
    words = "measured rows of clients 24 -> 0, answers 4 -> 1, tokens of an answer 96 -> 32"
    assert words in estimate.made_smaller(small, smaller, "10s")
    chosen, smaller = fit("fedit", small, 5.0)
    assert (chosen.samples, smaller.answers) == (0, 0)
    assert "tokens" not in estimate.made_smaller(small, smaller, "5s")
    scored = fitted(recipe("fedit", rouge_rows=3), methods.make("fedit", {}), small, 20.0, 2)
    assert (scored[0].answer_tokens, scored[0].samples, scored[2].answers) == (96, 3, 3)


def test_what_fits_stays_as_it_is():
    found = Estimate(10, 8, 10, 0.1, 11, 1.0)
    assert fit("fedit", found, 200.0) == (recipe("fedit"), found)


def test_steps_after_each_other_stay_longest():
    found = Estimate(10, 8, 100, 0.5, 11, 0.1, 20)
    long = [(300.0, 10, 8, 5, 8), (200.0, 9, 8, 4, 8), (100.0, 4, 8, 4, 8), (40.0, 3, 5, 4, 8)]
    short = [(10.0, 3, 1, 4, 8), (4.0, 3, 1, 5, 2), (2.0, 2, 1, 4, 2), (1.5, 1, 1, 5, 2)]
    for within, rounds, clients, steps, batch in long + short:
        chosen, smaller = fit("fedit", found, within)
        shape = chosen.rounds, smaller.clients, chosen.set["steps"], chosen.set["batch_size"]
        assert shape == (rounds, clients, steps, batch), within
        assert chosen.participation == pytest.approx(clients / 8)
        assert smaller.seconds <= 0.8 * within
        few = "are too few to learn from" in estimate.made_smaller(found, smaller, "2s")
        assert few == (rounds * steps < 8)


def test_clients_of_one_step_take_it_in_many_rounds():
    found = Estimate(10, 8, 1, 12.0, 11, 40.0, 40, 2, 20.0)  # 6 rows each, 8 a step
    for minutes, rounds, clients in [(4, 10, 1), (8, 10, 2), (12, 10, 3), (30, 10, 8), (120, 10, 8)]:
        chosen, smaller = fit("fedit", found, 60.0 * minutes)
        assert (chosen.rounds, smaller.clients, smaller.steps, smaller.batch) == (rounds, clients, 1, 8), (
            minutes
        )
        assert smaller is found or smaller.seconds - smaller.training <= 0.2 * 0.8 * 60 * minutes
        assert "too few" not in estimate.made_smaller(found, smaller, "a while")
    two = Estimate(10, 8, 2, 12.0, 2, 1.0, 40)  # the rounds fill the time where a client has no more steps
    assert (fit("fedit", two, 360.0)[1].rounds, fit("fedit", two, 360.0)[1].steps) == (10, 2)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_more_time_never_gives_fewer_steps_while_they_are_few(steps):
    found, last = Estimate(10, 8, steps, 12.0, 11, 40.0, 40, 2, 20.0, 24, 0.5), 0.0
    for seconds in range(100, 3000, 7):
        smaller = fit("fedit", found, seconds)[1]
        now = smaller.rounds * smaller.steps
        assert now >= min(last, 10), seconds
        assert ("too few" in estimate.made_smaller(found, smaller, "")) == (now < 8)
        last = now


def test_a_longer_time_is_advised_only_where_it_gives_more_steps():
    found = Estimate(3, 8, 1, 12.0, 4, 1.0, 40)
    smaller = fit("fedit", found, 180.0)[1]
    assert (smaller.rounds, smaller.clients, smaller.batch) == (3, 3, 8)
    assert "from: more --rounds," in estimate.made_smaller(found, smaller, "3m")


def test_a_search_leaves_time_for_steps_after_each_other(place, monkeypatch):
    monkeypatch.setattr(estimate, "_timed", lambda work, slow=0.0: 1.0 if slow else 0.01)
    own = recipe("fedit", model="tiny", data="rows.jsonl", clients=2, held_out=4, samples=0, client_rows=0)
    for within, searched in [("34s", False), ("44s", True)]:
        found = prepare.prepare(dataclasses.replace(own, within=within), find=False).estimate
        assert (found.search > 0) == searched, within
        assert found.rounds * found.steps >= 12


def test_replies_that_are_compared_with_each_other_stay_two():
    found, method = Estimate(10, 8, 100, 0.5, 11, 0.1, 20), methods.make("fedit", {})
    more = [({"aggregation": "median"}, 2), ({"quorum": 3}, 3), ({"privacy": "client"}, 2)]
    for given, least in [({}, 1), *more]:
        assert fitted(recipe("fedit", **given), method, found, 4.0, 8)[2].clients == least, given


def test_evaluations_that_take_most_of_the_time_are_fewer_and_of_fewer_rows():
    chosen, smaller = fit("fedit", Estimate(10, 2, 10, 0.1, 11, 5.0, 200), 60.0)
    assert (chosen.eval_every, chosen.eval_rows, smaller.evaluations) == (10, 192, 2)
    prepare.check(dataclasses.replace(chosen, keep="best"))  # compares evaluated rounds
    chosen, smaller = fit("fedit", Estimate(10, 2, 10, 0.1, 11, 5.0, 200), 20.0)
    assert (chosen.eval_every, chosen.eval_rows) == (10, 64)
    assert smaller.seconds <= 16.0
    chosen, smaller = fit("fedit", Estimate(10, 2, 10, 0.1, 11, 50.0, 200), 40.0)
    assert chosen.eval_rows == estimate.FEWEST_ROWS


def test_the_search_for_a_rate_counts():
    found = Estimate(10, 8, 10, 0.1, 11, 0.5, 20, search=30.0)
    assert found.seconds == pytest.approx(80 + 5.5 + 30)
    assert found.text.endswith(", after 30 s of finding a learning rate")
    _, smaller = fit("fedit", found, 60.0)
    assert 40 < smaller.seconds <= 48.0
    with pytest.raises(FitError, match="finding a learning rate, take more than 20 s") as refused:
        fit("fedit", found, 20.0)
    assert "--set lr=NUMBER" in str(refused.value.hint)


def test_measuring_leaves_the_model_as_it_was():
    model: Model = models.tiny_llama()
    rows, before = harness.rows(model), harness.logits(model)
    found = estimate.of(recipe("fedit"), harness.method("fedit"), model, [rows[:12], rows[12:24]], rows[24:])
    assert found.step > 0
    assert found.evaluation > 0
    assert found.steps == harness.method("fedit").local_steps(12)
    assert model.attachment is None
    assert torch.equal(harness.logits(model), before)


def test_clients_that_back_propagate_are_timed_by_their_own_steps():
    def steps(**given: float) -> int:
        return methods.make("fedkseed", {"tau": 200, "backprop_steps": 3, **given}).local_steps(50)

    assert (steps(), steps(backprop=0.5), steps(backprop=1)) == (200, 200, 3)
    one = methods.make("fedkseed", {"tau": 200, "backprop_steps": 3, "backprop": 1}).sized(1, 1)
    assert one.local_steps(50) == 1


def test_local_steps_follow_the_rows_unless_they_are_given(place):
    values: dict[str, Any] = {"model": "tiny", "data": "rows.jsonl", "method": "fedkseed", "held_out": 4}
    for clients, rows, steps in ((2, 10, 50), (1, 20, 80)):
        own = recipes.make({**values, "clients": clients, "set": {"lr": 1e-3, "batch_size": 1}})
        simulated, real = (prepare.prepare(own, simulated=s) for s in (True, False))
        assert simulated.recipe.set["tau"] == real.recipe.set["tau"] == steps, (rows, steps)
    given = recipes.make({**values, "set": {"lr": 1e-3, "tau": 3}})
    assert prepare.prepare(given).recipe.set["tau"] == 3


def test_what_a_method_refuses_of_the_model_is_said_before_anything_is_written(place):
    values = {"model": "tiny", "data": "rows.jsonl", "method": "fedit", "clients": 2, "held_out": 4}
    own = recipes.make({**values, "set": {"targets": "q_proj,nowhere"}})
    for work in (prepare.dry_run, fleetune.tune):
        with pytest.raises(ModelError, match="no linear layer named 'nowhere'"):
            work(own, offline=True)
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_a_run_that_was_fitted_is_repeated_by_its_own_recipe(place, monkeypatch):
    monkeypatch.setattr(estimate, "_timed", lambda work, slow=0.0: 0.1)  # however busy the machine is
    few: dict[str, Any] = {"clients": 2, "samples": 0, "threads": 1, "device": "cpu", "offline": True}
    few |= {"method": "fedit", "settings": {"r": 2, "lr": 1e-3}, "within": "2s", "rounds": 500}
    run = fleetune.tune("tiny", "rows.jsonl", **few)
    written = recipes.read(Path(run.done.run) / "run.toml")
    assert written["within"] == ""
    assert written["rounds"] < 500
    assert fleetune.tune(recipes.make(written), offline=True).digest == run.digest


def test_within_a_time_for_less_one_client_has_all_rows_unless_a_fleet_is_asked_for(place, monkeypatch):
    monkeypatch.setattr(estimate, "_timed", lambda work, slow=0.0: 1.0 if slow else 0.01)
    own = recipe("fedit", model="tiny", data="rows.jsonl", held_out=4, samples=0, client_rows=0, rounds=50)
    many = prepare.prepare(dataclasses.replace(own, method="fwdllm"), find=False)
    assert many.recipe.clients == len(many.rows) == 8  # not the method's 100, for which the rows are too few
    short = dataclasses.replace(own, within="100s")
    alone = prepare.prepare(short, find=False)
    assert (alone.recipe.clients, len(alone.rows), prepare.ALONE in alone.about_rows()) == (1, 1, True)
    assert alone.recipe.rounds * alone.estimate.steps > 30
    again = prepare.prepare(alone.recipe, find=False, measure=False)
    assert [row.ids.tolist() for row in again.rows[0]] == [row.ids.tolist() for row in alone.rows[0]]
    more: list[dict[str, Any]] = [
        {"within": "1h"},
        {"clients": 2},
        {"participation": 0.5},
        {"aggregation": "norm-clip"},
    ]
    for asked in [*more, {"method": "fwdllm"}]:
        fleet = prepare.prepare(dataclasses.replace(short, **asked), find=False)
        assert len(fleet.rows) == asked.get("clients", len(many.rows))
        assert prepare.ALONE not in fleet.about_rows()


def test_timing_takes_its_share_of_a_stated_time_or_one_step(monkeypatch):
    model: Model = models.tiny_llama()
    rows, slow = harness.rows(model), list[float]()
    monkeypatch.setattr(estimate, "_timed", lambda work, most=1.0: slow.append(most) or 0.5)
    monkeypatch.setattr(estimate, "_answer", lambda model, prompts, recipe, most: slow.append(most) or 7.0)
    told = (recipe("fedit"), harness.method("fedit"), model, [rows[:12]], rows[12:16], [])
    assert estimate.of(*told, 40.0).answer == 7.0
    assert slow == [20.0, 1.0, pytest.approx(10.0, abs=0.1)]
    assert estimate.of(*told, 0.4).answer == 0.125 * 13  # a pass a token
    assert slow[3:] == [0.2, 1.0]
    found = estimate.of(*told, 0.2)
    assert (found.evaluation, found.answer) == (
        pytest.approx(0.05 * 4),
        pytest.approx(0.05 * 13),
    )  # 5 rows a step
    assert slow[5:] == [0.1]
