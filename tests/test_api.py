"""The Python library: its public names, its functions on names and on objects, and what they give back."""

import dataclasses
import inspect
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import fleetune
from command_line import FEW
from fleetune import errors, models
from fleetune.api import names
from fleetune.compression.methods import qronos
from fleetune.data import Example, read
from fleetune.data.encode import encode_all
from fleetune.deploy import harness
from fleetune.deploy.serve import ENGINES
from fleetune.evaluation import losses
from fleetune.runs.compression_folder import OPTIONS, CompressRequest
from fleetune.tuning.methods import fedkseed
from fleetune.tuning.recipe import objects
from fleetune.tuning.recipe.recipe import Recipe, choices
from heard import Heard

PYTHON = True  # plans speak as in Python
ROWS = [{"instruction": f"say {i}", "response": f"{i} it is"} for i in range(24)]
SMALL = {"K": 16, "tau": 2, "lr": 1e-2, "batch_size": 2}


@pytest.fixture(autouse=True)
def at(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny").symlink_to(tiny)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tune(model: object = "tiny", data: Any = "rows.jsonl", **given: Any) -> fleetune.TuneResult:
    return fleetune.tune(model, data, **{"settings": SMALL, **FEW, **given})


# The surface ------------------------------------------------------------------------------------------
def test_the_public_names_are_these():
    functions = (
        "chat compress compressors evaluate export generate list_runs load_ledger measure methods open plan "
        "release resume_compression resume_run resume_sweep serve sweep targets tune verify"
    )
    classes = (
        "CompressResult Compressed Conversation ExportResult Ledger Listener MeasureResult Model Plain Plan Progress Recipe "
        "Run Session Silent SweepResult TuneResult"
    )
    assert {"errors", "events", "__version__", *functions.split(), *classes.split()} == set(fleetune.__all__)
    assert all(getattr(fleetune, name) is not None for name in fleetune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tuna'"):
        fleetune.tuna  # noqa: B018


def test_completion_shows_the_public_names_alone():
    shown = {name for name in dir(fleetune) if not name.startswith("__")}
    assert shown == {name for name in fleetune.__all__ if not name.startswith("__")}


def test_a_setting_that_is_given_as_an_option_is_a_setting(at):
    with pytest.raises(errors.RecipeError, match="eps") as error:
        tune(method="fedkseed", eps="many", learning_rate=1e-4)
    assert len(error.value.problems) == 1
    assert not Path("runs").exists()


def test_options_of_compress_are_those_of_a_request():
    defaults = {f.name: f.default for f in dataclasses.fields(CompressRequest) if f.name in OPTIONS}
    taken = inspect.signature(fleetune.compress).parameters
    stated = {name: one.default for name, one in taken.items() if name in OPTIONS}
    assert stated | {"data": ""} == defaults


# Results ----------------------------------------------------------------------------------------------
def test_a_run_gives_its_model_its_ledger_and_its_history(at):
    log = Heard()
    run = tune(rounds=2, listener=log)
    told = [type(e).__name__ for e in log.events if type(e).__name__ not in ("ClientReply", "Diverging")]
    round = ["RoundEvaluated", "RoundDone"]
    assert told == ["TuneStart", *round, *round, "RoundEvaluated", "TuneDone"]
    assert run.done == log.events[-1]
    assert run.history["round"] == [0, 1, 2]
    assert run.history["loss"][0] == run.done.base["loss"]
    assert run.history["loss"][2] == run.done.tuned["loss"]
    assert sum(b for b in run.history["bytes_up"] if b) == run.done.bytes_up
    assert len({len(column) for column in run.history.values()}) == 1
    ledger, model = run.ledger(), run.model()
    assert ledger.head.checks["2"] == run.digest
    rows = [losses.response_loss(model, [row]) for row in _encoded(model)]
    assert np.isfinite(rows).all()
    assert len(fleetune.load_ledger(run.path)) == len(ledger)
    with pytest.raises(errors.UsageError, match="leaves a ledger, no adapter"):
        run.adapter()
    opened = fleetune.open("latest")
    assert isinstance(opened, fleetune.Run)
    assert opened.ledger().fingerprint() == ledger.fingerprint()
    assert len(opened.held_out()) == 4
    assert run.report.is_file()


def _encoded(model: Any) -> Any:
    return encode_all([Example((("user", "say 1"),), "1 it is", {})], model.tokenizer, 64)[0]


def test_an_adapters_run_gives_its_tensors():
    run = tune(method="fedit", settings={"r": 2, "steps": 1})
    names = run.adapter()
    assert names
    assert all("lora_" in name for name in names)
    with pytest.raises(errors.UsageError, match="leaves an adapter, no ledger"):
        run.ledger()


def test_a_method_may_be_its_own_dataclass():
    by_name = tune()
    assert tune(method=fedkseed.Method(**SMALL), settings={}).digest == by_name.digest
    with pytest.raises(errors.UsageError, match=r"list of builtins is no method"):
        tune(method=[])
    with pytest.raises(errors.UsageError, match="the method is a class"):
        tune(method=fedkseed.Method)


def test_a_recipe_says_everything():
    recipe = Recipe(model="tiny", data="rows.jsonl", method="fedkseed", set=SMALL, **FEW)
    assert fleetune.tune(recipe).digest == tune().digest
    for beside in ({"data": "rows.jsonl"}, {"method": "fedit"}):
        with pytest.raises(errors.UsageError, match="nothing is given beside it"):
            fleetune.tune(recipe, **beside)


# Objects ----------------------------------------------------------------------------------------------
def test_models_and_rows_in_memory_give_what_their_files_give(at):
    net, tokenizer = (lambda m: (m.net, m.tokenizer))(models.load("tiny", device="cpu"))
    net.config.architectures = None  # as of one that a configuration made; saving states it
    from_files, from_objects = tune(), tune(net, ROWS, tokenizer=tokenizer)
    assert tune(net, ROWS, tokenizer=tokenizer).digest == from_files.digest
    assert from_objects.digest == from_files.digest
    saved = Path(fleetune.open(from_objects.folder).recipe.model)  # type: ignore[union-attr]
    assert saved.parent == Path("runs/objects")
    assert tune(models.load("tiny", device="cpu"), iter(ROWS)).digest == from_files.digest
    assert len(list(Path("runs/objects").iterdir())) == 2, "the same content is written once"
    assert fleetune.resume_run(from_objects.folder).digest == from_files.digest


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of PEFT's own constructor
def test_a_peft_model_is_tuned_from_its_merged_weights(at):
    base = models.load("tiny", device="cpu")
    adapted = get_peft_model(base.net, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        before = adapted(input_ids=ids).logits
    log = Heard()
    run = tune(adapted, ROWS, tokenizer=base.tokenizer, listener=log)
    assert "merged into a copy" in log.notes[0]
    plain = fleetune.open(fleetune.open(run.folder).recipe.model)  # type: ignore[union-attr]
    with torch.inference_mode():
        torch.testing.assert_close(plain.load().net(input_ids=ids).logits, before)
        assert torch.equal(adapted(input_ids=ids).logits, before), "the given model is left as it was"


def shortest(model: Any, batch: Any) -> float:
    """An objective of this module."""
    return losses.batch_loss(model, batch) / 2


def test_an_objective_may_be_a_function():
    named = tune(settings=SMALL | {"objective": shortest})
    recipe = fleetune.open(named.folder).recipe  # type: ignore[union-attr]
    assert recipe.set["objective"] == f"{__name__}:shortest"
    seen: list[int] = []

    def local(model: Any, batch: Any) -> float:
        seen.append(1)
        return shortest(model, batch)

    assert tune(settings=SMALL | {"objective": local}).digest == named.digest
    assert seen


@pytest.mark.parametrize(
    ("model", "data", "want"),
    [
        (object(), ROWS, "a object is not a model"),
        ("tiny", 7, "a int is not rows"),
        ("tiny", ["text"], "row 1 is a str, not a dict"),
        ("tiny", [{"response": {1, 2}}], "row 1 cannot be written as JSON"),
    ],
)
def test_wrong_objects_are_clear_errors(model, data, want, at):
    with pytest.raises(errors.UsageError, match=want):
        tune(model, data)
    with pytest.raises(errors.ModelError, match="needs its tokenizer"):
        tune(models.load("tiny", device="cpu").net, ROWS)


# The rest of the pipeline -------------------------------------------------------------------------------
def test_the_pipeline_goes_from_a_run_to_a_file(at, monkeypatch):
    monkeypatch.setattr(harness, "measured", harness.carry_out)  # here, and not in a process for each figure
    run, log = tune(), Heard()
    small = fleetune.compress(run, settings={"group": 8}, windows=2, length=16, listener=log)
    told = [type(e).__name__ for e in log.events]
    assert told == ["CompressStart", "BlockSolved", "BlockSolved", "CompressDone"]
    loss = fleetune.evaluate(small, tasks=["loss"], device="cpu")["loss"]
    assert small.done.after["loss"] == pytest.approx(loss, rel=1e-5)
    typed = fleetune.compress(run, method=qronos.Solver(group=8), windows=2, length=16)
    assert typed.done.digest == small.done.digest
    assert fleetune.resume_compression(small.folder).done.digest == small.done.digest
    file = fleetune.export(small, to="hf")
    assert file.path == small.folder / "hf"
    assert file.done.exact == file.done.tensors
    plain = fleetune.open(file.path)
    assert isinstance(plain, fleetune.Plain)
    opened = fleetune.open(small)
    assert isinstance(opened, fleetune.Compressed)
    theirs = dict(models.named_tensors(opened.load().net))
    for name, tensor in models.named_tensors(plain.load().net):
        assert torch.equal(tensor, theirs.pop(name)), name
    assert not theirs
    table = fleetune.measure(small, prompt_tokens=8, new_tokens=2, repeats=1)
    assert [row.name for row in table.rows] == ["base", "tuned", "compressed"]
    assert small.table()[0] == ["", "before", "after"]
    assert "tensors hold" in file._repr_html_()
    for name, word in ((run, "fedkseed"), (small, "qronos"), (file.path, "hf")):
        assert word in fleetune.open(name)._repr_html_()
    assert table.rows[1].loss == pytest.approx(small.done.before["loss"], rel=1e-4)


def test_a_plan_has_every_method_and_its_best():
    plan = fleetune.plan("tiny", ram="4GB", uplink="1Mbps")
    assert set(fleetune.methods()) <= {row.method for row in plan.rows}
    assert plan.settings().method in fleetune.methods()
    assert len(repr(plan)) < 800
    assert "tokens (max_length)" in repr(plan)
    assert "tokens (max_length)" in plan._repr_html_()
    with pytest.raises(errors.FitError, match="no method fits"):
        fleetune.plan("tiny", ram=1000).settings()


# Names ------------------------------------------------------------------------------------------------
def test_a_name_means_the_same_everywhere(at):
    run = tune()
    small = fleetune.compress(run, method="rtn", settings={"group": 8})
    assert fleetune.open("latest") == fleetune.Compressed(Path("runs/0002-rtn-fedkseed-tiny"))
    assert fleetune.open(run) == fleetune.Run(at / "runs" / "0001-fedkseed-tiny")
    for name in ("1", "0001-fedkseed-tiny", "runs/0001-fedkseed-tiny"):
        assert fleetune.open(name) == fleetune.Run(Path("runs/0001-fedkseed-tiny"))
    for name in ("2", "0002-rtn-fedkseed-tiny", "runs/0002-rtn-fedkseed-tiny", small):
        assert fleetune.open(name) == fleetune.Compressed(small.folder)
    artefact = small.folder / "model"
    assert fleetune.open(artefact) == fleetune.Compressed(None, artefact)
    assert fleetune.open("tiny") == fleetune.Plain("tiny")
    for name in ("7", "007"):
        with pytest.raises(errors.UsageError, match=f"no run '{name}'"):
            fleetune.open(name)
    with pytest.raises(errors.UsageError, match="a int is not the name of a model"):
        fleetune.open(7)
    tune()
    assert fleetune.open("latest") == fleetune.Run(Path("runs/0003-fedkseed-tiny"))


def test_importing_it_and_looking_a_name_up_load_nothing_heavy(at):
    tune()
    script = (
        "import sys, fleetune, fleetune.api.tuning, fleetune.api.deployment, fleetune.api.evaluation\n"
        "for n in ('1', 'latest', 'tiny'): fleetune.open(n)\n"
        "print([m for m in ('torch', 'transformers', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What a careless caller does ------------------------------------------------------------------------------
class Table:
    """What a pandas DataFrame offers, as far as it is used."""

    columns = ("instruction", "response")

    def to_dict(self, orient: str) -> list[dict[str, str]]:
        assert orient == "records"
        return ROWS


class Holes(Table):
    """A DataFrame with missing values, as pandas has them: NaN, and NA, of which nothing is true or false."""

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        class NAType:
            def __ne__(self, other: object) -> bool:
                raise TypeError("boolean value of NA is ambiguous")

        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        told = {"messages": np.array(turns)}
        return [told | {"n": np.float64(2)}, told | {"n": float("nan")}, told | {"n": NAType()}]


def test_missing_values_of_a_table_are_no_texts(tmp_path):
    rows = read(objects.data_name(Holes(), tmp_path))
    assert [row.meta for row in rows] == [{"n": "2.0"}, {}, {}]
    assert {row.response for row in rows} == {"a"}


def test_columns_are_rows_and_pairs_are_told_to_be_dicts(at):
    name = objects.data_name({"question": ["q", "r"], "answer": ["a"]}, at)
    assert Path(name).read_text() == '{"question": "q", "answer": "a"}\n{"question": "r", "answer": null}\n'
    with pytest.raises(errors.DataError, match="row 1 is a tuple, not a dict") as no:
        objects.data_name([("q", "a")], at)
    assert no.value.hint == '{"prompt": .., "response": ..}'


def test_numpy_numbers_are_numbers_and_other_objects_are_said(at):
    assert tune(settings=SMALL | {"K": np.int64(16), "lr": np.float64(1e-2)}).digest == tune().digest
    with pytest.raises(errors.RecipeError, match=r"K = None is not a text, a number"):
        tune(settings={"K": None})
    with pytest.raises(errors.RecipeError, match="settings are a dict"):
        tune(settings=["K=1"])


def test_rows_to_validate_on_are_taken_as_objects():
    held = [{"instruction": f"tell {i}", "response": f"{i}, then"} for i in range(5)]

    class Held(Table):
        def to_dict(self, orient: str) -> list[dict[str, str]]:
            return held

    lora: dict[str, Any] = {"method": "fedit", "settings": {"r": 2, "steps": 1}, "eval_rows": 5}
    runs = [tune(data=ROWS, eval_data=given, **lora) for given in (held, Held(), iter(held))]
    assert {run.done.rows for run in runs} == {5}
    assert {json.dumps(run.done.base) for run in runs} == {json.dumps(runs[0].done.base)}
    recipe = fleetune.open(runs[0]).recipe  # type: ignore[union-attr]
    assert [json.loads(line) for line in Path(recipe.eval_data).read_text().splitlines()] == held
    assert fleetune.tune(recipe).digest == runs[0].digest
    assert fleetune.evaluate(runs[0])["loss"] == pytest.approx(runs[0].done.tuned["loss"])
    grid = fleetune.sweep("tiny", ROWS, vary={"lr": [1e-3, 1e-2]}, eval_data=held, **FEW | lora)
    assert {run.done.rows for run in grid.runs} == {5}


class Broken(fleetune.Silent):
    def step(self, client: int, step: int) -> None:
        raise KeyError("my own mistake")


def test_a_listeners_own_error_is_raised_and_blamed_on_no_client(at):
    whole = tune(rounds=2)
    with pytest.raises(KeyError, match="my own mistake"):
        tune(rounds=2, listener=Broken())
    looks = iter([False] * 5 + [True] * 99)
    with pytest.raises(errors.Interrupted, match="finished rounds are kept"):
        tune(rounds=2, listener=Heard(lambda heard: next(looks)))
    assert fleetune.resume_run("latest").digest == whole.digest
    with pytest.raises(errors.UsageError, match="a function is no listener: it has no header, event"):
        tune(listener=lambda event: None)
    assert len(list(Path("runs").glob("0*"))) == 3, "it was refused before a folder was made"


def test_nothing_is_ignored_in_silence(at):
    with pytest.raises(errors.ModelError, match="has its own tokenizer"):
        tune("tiny", tokenizer=models.load("tiny", device="cpu").tokenizer)
    with pytest.raises(errors.RecipeError, match="calibrate = 'client' is not one of server, clients, fleet"):
        fleetune.compress("tiny", calibrate="client")
    with pytest.raises(errors.RecipeError, match="quorum = 3, but 2 clients are asked"):
        tune(quorum=3)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(errors.UsageError, match="is not a speed"):
            fleetune.plan("tiny", uplink=wrong)
    with pytest.raises(errors.UsageError, match="is more than 1,000,000"):
        fleetune.plan("tiny", steps=2_000_000)
    for call, name in (("evaluate", "limit"), ("measure", "windows"), ("compress", "length")):
        with pytest.raises(errors.UsageError, match=f"{name} = '3' is not an integer"):
            getattr(fleetune, call)("tiny", **{name: "3"})
    with pytest.raises(errors.UsageError, match="is not the name of a model"):
        fleetune.plan(models.load("tiny", device="cpu").net)
    with pytest.raises(errors.UsageError, match="measure needs a model"):
        fleetune.measure()


def test_two_threads_load_and_tune_as_one_would(at):
    def tuned(seed: int, out: str = "both") -> str:
        return tune(method="fedit", settings={"r": 2, "steps": 2}, seed=seed, out=f"{out}-{seed}").digest

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: models.load("tiny", device="cpu"), range(6)))
        assert list(pool.map(tuned, (0, 1))) == [tuned(seed, "alone") for seed in (0, 1)]


def test_the_names_that_an_editor_completes_are_those_that_there_are():
    assert sorted(get_args(names.MethodName)) == sorted(["auto", *fleetune.methods()])
    assert sorted(get_args(names.CompressorName)) == sorted(fleetune.compressors())
    assert sorted(get_args(names.TargetName)) == sorted(fleetune.targets())
    for kind, option in ((names.Trains, "train"), (names.Base, "base"), (names.Device, "device")):
        assert sorted(get_args(kind)) == sorted(choices(option))
    assert list(get_args(names.Dtype)) == choices("dtype")
    assert get_args(names.Engine) == ("auto", *ENGINES)
