"""The settings under which a method fits a device: what is given up, in which order, and what is then said to `tune`."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

import fleetune
from command_line import ok
from fleetune import models
from fleetune.cli.main import build_parser, main
from fleetune.errors import FitError, UsageError
from fleetune.models.shapes import shape_of
from fleetune.planning import device_cost, plan
from fleetune.planning.device_cost import Workload
from fleetune.planning.plan import Search
from fleetune.tuning import methods
from fleetune.tuning.exchange.footprint import Footprint

GB = 10**9


@pytest.fixture(scope="module")
def shape() -> Any:
    """A model of 30 M parameters, of which back-propagation needs much more than its weights."""
    return shape_of(models.tiny_llama(vocab=8192, hidden=512, layers=8, heads=8).net.config)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is simply rows x tokens x bytes of a weight, and an evaluation takes none."""

    def memory(shape: Any, work: Workload, footprint: Footprint) -> dict[str, int]:
        return {"weights": work.batch * work.length * work.size * (footprint.gradient != "none")}

    monkeypatch.setattr(plan, "SERVER", 0)
    monkeypatch.setattr(device_cost, "FLOOR", 0)
    monkeypatch.setattr(plan, "_cached", lambda shape, work: 0)
    monkeypatch.setattr(device_cost, "memory", memory)


def found(shape: Any, ram: int, *order: str, **more: Any) -> tuple[str, int, int, str]:
    best = Search(shape, ram, **more).best(order or ("fedit",))
    return best.method, best.work.batch, best.work.length, best.work.dtype


@pytest.mark.usefixtures("counted")
def test_rows_are_given_up_first_then_tokens_then_the_type(shape):
    def at(rows: int, tokens: int, size: int) -> tuple[str, int, int, str]:
        return found(shape, rows * tokens * size * 10 // 9 + 1)

    assert at(8, 512, 4) == ("fedit", 8, 512, "fp32")
    assert at(7, 512, 4) == ("fedit", 4, 512, "fp32")
    assert at(1, 512, 4) == ("fedit", 1, 512, "fp32")
    assert at(1, 511, 4) == ("fedit", 1, 256, "fp32")
    assert at(1, 64, 4) == ("fedit", 1, 64, "fp32")
    assert at(1, 64, 2) == ("fedit", 1, 64, "bf16")


@pytest.mark.usefixtures("counted")
def test_the_first_method_that_can_be_made_to_fit_is_taken_and_a_tight_fit_last(shape):
    small = 64 * 2
    assert found(shape, small * 10 // 9 + 1, "fedpetuning", "fedit")[0] == "fedpetuning"
    assert found(shape, small, "fedpetuning", "fedit") == ("fedpetuning", 1, 64, "bf16")  # tight
    with pytest.raises(FitError) as error:
        found(shape, small - 28, "fedpetuning", "fedit")
    assert error.value.message == (
        "no method fits 100 B: the smallest, fedit with 1 x 64 tokens a step in bf16, base mapped, needs 28 B more (128 B, of "
        "which 128 B are weights)"
    )


@pytest.mark.usefixtures("counted")
def test_what_was_asked_for_stays(shape):
    asked = {"batch": 3, "length": 100, "dtype": "fp32"}
    assert found(shape, 100_000, asked=asked) == ("fedit", 3, 100, "fp32")
    assert found(shape, 500, asked={"batch": 3}) == ("fedit", 3, 64, "bf16")
    assert found(shape, 4_000, asked={"length": 512}) == ("fedit", 1, 512, "fp32")
    with pytest.raises(FitError) as error:
        found(shape, 1_000, asked=asked)
    assert "3 x 100 tokens a step in fp32" in error.value.message
    assert error.value.hint == "leave out --batch, --length, --dtype, or take a smaller model"


def test_the_peak_is_that_of_the_step_or_of_the_evaluation(shape):
    every = list(Search(shape, GB).tried("fedit"))
    tried = {(s.work.batch, s.work.length, s.work.dtype): s for s in every if s.work.base == "memory"}
    mapped = {(s.work.batch, s.work.length, s.work.dtype): s for s in every if s.work.base == "mapped"}
    assert len(tried) == len(mapped) == 4 * 4 * 2
    assert all(mapped[key].peak < s.peak for key, s in tried.items() if key[2] == "fp32")
    assert [s.work.base for s in every[:4]] == ["memory", "mapped"] * 2  # before anything is made smaller
    work = Workload(8, 512)
    footprint = methods.make("fedit", {}).footprint(shape)
    server = plan.SERVER * 4 * footprint.module.size
    assert tried[8, 512, "fp32"].peak == sum(device_cost.memory(shape, work, footprint).values()) + server
    one = Workload(1, 64)
    measured = sum(device_cost.memory(shape, Workload(8, 64), Footprint("none")).values())
    step = device_cost.memory(shape, one, footprint)
    assert tried[1, 64, "fp32"].peak == max(measured, sum(step.values())) + server
    assert tried[1, 64, "fp32"].weights == step["weights"]
    few = device_cost.memory(shape, Workload(1, 512), footprint)
    every_row = device_cost.memory(shape, work, Footprint("none"))
    found = next(s for s in Search(shape, GB, {"batch": 1}).tried("fedit"))
    # an evaluation is of 8 rows
    assert found.peak == max(sum(few.values()), sum(every_row.values())) + server


def test_the_printed_command_makes_tune_use_what_was_planned(large, tmp_path, capsys):
    every = list(Search(shape_of(models.load_config(large)), 1).tried("fedit"))
    ram = min(s.peak for s in every) * 10 // 9 + 1
    (wanted, *_) = [s.work for s in every if s.peak <= 0.9 * ram]
    assert wanted.base == "mapped"
    told = ok(capsys, "plan", large, "--ram", str(ram))[-1]
    assert told["event"] == "plan_settings"
    stated = {"method": "fedit", "dtype": wanted.dtype, "base": "mapped", "ram": ram}
    assert told.items() >= stated.items()
    assert told["batch_size"] < 8
    assert told["peak"] <= 0.9 * ram
    assert main(["plan", large, "--ram", str(ram)]) == 0
    out = capsys.readouterr().out
    assert told["command"] in out
    size = f"{told['batch_size']} x {told['max_length']} tokens a step in {wanted.dtype}"
    assert f"fedit with {size}, base mapped: about " in out

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a {i}", "response": "b"}) + "\n" for i in range(6)))
    words = [str(rows) if word == "DATA" else word for word in shlex.split(told["command"])[1:]]
    from fleetune.cli.commands import tune

    recipe = tune.recipe_of(build_parser().parse_args(words), print)
    method = methods.make(recipe.method, recipe.set)
    found = {"batch_size": method.batch_size} | {
        n: getattr(recipe, n) for n in ("max_length", "dtype", "base")
    }
    assert told.items() >= found.items()


def test_the_function_returns_the_settings_as_arguments_of_tune(large):
    whole = fleetune.plan(large, ram="64GB")
    assert whole.settings().options() == {"method": "fedit"}
    assert whole.settings().method == "fedit"
    assert whole.settings().work.length == plan.longest() == 512
    small = fleetune.plan(large, ram="64GB", batch=3, length=100, dtype="fp32").settings()
    assert small.options() == {"method": "fedit", "settings": {"batch_size": 3}, "max_length": 100}
    with pytest.raises(UsageError, match="--batch 0"):
        fleetune.plan(large, batch=0)
    assert device_cost.Workload().batch == 8
