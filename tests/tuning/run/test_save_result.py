"""The figures of a run: the base is the untouched model, a run that moved nothing says so; what it keeps of people's rows."""

import json
import re
import stat
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import contract_harness
import pytest

import fleetune
from fleetune import models
from fleetune.cli.main import main
from fleetune.errors import DataError, Interrupted, RecipeError
from fleetune.evaluation.losses import response_loss
from fleetune.models import Model, tiny_bert, tiny_llama
from fleetune.runs import rundir
from fleetune.runs.listener import Silent
from fleetune.tuning import methods
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe
from heard import Heard

RECIPE: dict[str, Any] = {"clients": 2, "rounds": 1, "held_out": 6, "samples": 0, "max_length": 64}
FAST: dict[str, Any] = RECIPE | {"offline": True, "listener": Silent()}
DEAF = "def same(model, batch):\n    return 1.5\n\ndef size(model, batch):\n    return float(batch.labels.shape[0])\n"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("figures")
    for name, model in (("llama", tiny_llama()), ("bert", tiny_bert(labels=("no", "yes")))):
        models.save(model.net, model.tokenizer, at / name)
    rows = [{"instruction": f"is {n} odd?", "output": "yes" if n % 2 else "no"} for n in range(30)]
    (at / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (at / "own.py").write_text(DEAF)
    return at


def tune(places: Path, out: Path, method: str = "fedkseed", model: str = "llama", **more: Any) -> Any:
    given = FAST | {"method": method, "out": out} | more
    return fleetune.tune(str(places / model), str(places / "rows.jsonl"), **given)


@pytest.fixture(scope="module")
def untouched(places: Path) -> float:
    given = {"model": str(places / "llama"), "data": str(places / "rows.jsonl"), "method": "fedkseed"}
    job = prepare.prepare(recipe.make({**RECIPE, **given, "set": {"lr": 1e-3}}), offline=True)
    return response_loss(models.load(given["model"], offline=True), job.held)


TOLD = ("start=", "module=", "layers_rule=all", "backprop=0.5")
OTHERS = [case for case in contract_harness.VARIANTS if any(word in case for word in TOLD)]


@pytest.mark.parametrize(
    "name",
    [
        *sorted(methods.entries()),
        *(case if "module=p" in case else pytest.param(case, marks=pytest.mark.slow) for case in OTHERS),
    ],
)
def test_the_base_row_is_the_untouched_model_bit_for_bit(name, places, untouched, tmp_path):
    method, _, changes = name.partition(":")
    pairs = [pair.replace(";", ",").split("=") for pair in changes.split(",") if pair]
    settings = contract_harness.QUICK.get(method, {}) | dict(pairs)
    if "ranks" in settings:
        settings["ranks"] = "2,4"
    watching = Heard(lambda heard: bool(heard.of("eval")))
    with pytest.raises(Interrupted):
        tune(places, tmp_path, method, settings=settings, listener=watching)
    assert watching.of("eval")[0].loss == untouched


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        ("fedpetuning", {"module": "prefix", "size": 4}, True),
        ("fedpeptao", {"tokens": 4, "lanczos": 2}, True),
        ("fedpetuning", {"module": "lora", "size": 4}, False),
        ("fedkseed", {"K": 4, "tau": 2, "lr": 1e-3}, False),
    ],
)
def test_a_start_that_is_not_the_base_is_told(method, settings, told, places, untouched, tmp_path):
    done = tune(places, tmp_path, method, settings=settings).done
    assert done.base["loss"] == untouched
    assert (done.start is not None) == told
    assert any("the untrained module changes the model" in text for text in done.remarks) == told
    if told:
        assert abs(done.start["loss"] - untouched) > 1e-3
        assert json.loads((Path(done.run) / "eval.json").read_text())["start"] == done.start


def test_an_encoder_with_a_new_head_says_so(places, tmp_path):
    settings = {"module": "bitfit", "steps": 1}
    old = tune(places, tmp_path, "fedpetuning", "bert", settings=settings).done
    assert not any("head is new" in text for text in old.remarks)
    config = json.loads((places / "bert" / "config.json").read_text())
    bare = tmp_path / "bare"
    models.save(tiny_bert().net, tiny_bert().tokenizer, bare)
    (bare / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    new = tune(places, tmp_path, "fedpetuning", str(bare), settings=settings)
    assert any("head is new" in text for text in new.done.remarks)
    assert "head is new" in new.report.read_text()


def test_a_custom_objective_is_measured_before_and_after(places, tmp_path):
    objective = f"{places}/own.py:size"
    settings = {"objective": objective, "K": 4, "tau": 2, "batch_size": 4, "lr": 1e-3}
    result = tune(places, tmp_path, settings=settings)
    worth = (4 * 4 + 2 * 2) / 6  # batches of 4 and 2 of the 6 held-out rows, each its own number of rows
    assert result.done.base["objective"] == result.done.tuned["objective"] == pytest.approx(worth)
    written = json.loads((result.folder / "eval.json").read_text())
    assert written["base"]["objective"] == written["tuned"]["objective"] == pytest.approx(worth)
    evaluated = [e for e in rundir.events(result.folder) if e["event"] == "eval"]
    assert [e["objective"] for e in evaluated] == [pytest.approx(worth)] * 2
    assert "objective (less is better)" in result.report.read_text()
    assert result.history["objective"] == [pytest.approx(worth)] * 2


@pytest.mark.parametrize("objective", ["accuracy:yes,no", "accuracy"])
def test_an_accuracy_that_is_trained_is_measured(objective, places, tmp_path):
    settings = {"objective": objective, "K": 4, "tau": 2, "batch_size": 4, "lr": 1e-3}
    done = tune(places, tmp_path, settings=settings).done
    assert set(done.base) == set(done.tuned) == {"loss", "accuracy"}
    assert 0 <= (done.base["accuracy"] or 0) <= 100


@pytest.mark.parametrize(
    ("labels", "objective", "says"),
    [
        ("yes,no,yes", "loss", "has 'yes' twice"),
        ("yes", "loss", r"has 1 word: "),
        ("yes,,no", "loss", "has an empty word"),
        ("yes,maybe", "loss", "15 of 30 rows have another answer, the first is row 1: 'no'"),
        ("", "accuracy:Yes,No", "30 of 30 rows have another answer"),
        ("yes,no", "accuracy:yes,maybe", "differ"),
        ("", "accuracy", "batch_size = 1"),
    ],
)
def test_label_words_are_checked_before_the_model_is_loaded(labels, objective, says, places, at, monkeypatch):
    def never(*_: Any, **__: Any) -> Model:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(models, "load", never)
    with pytest.raises((RecipeError, DataError), match=says) as caught:
        tune(places, at, labels=labels, settings={"objective": objective})
    assert caught.value.hint
    assert ("a comma in a word: \\," in caught.value.hint) == ("another answer" in says)


def test_a_run_of_zeros_says_that_nothing_moved(places, tmp_path, capsys):
    words = "--method fedkseed --rounds 1 --clients 2 --samples 0 --held-out 6 --offline -q --set tau=2"
    line = ["tune", str(places / "llama"), str(places / "rows.jsonl"), *words.split(), "--out", str(tmp_path)]
    line += ["--set", f"objective={places}/own.py:same"]
    assert main(line) == 0
    shown = " ".join(capsys.readouterr().out.split())
    said = "note: nothing moved: 2 good replies added up to no change of any weight; raise the learning rate"
    assert said in shown
    assert "raise batch_size or eps" in shown
    (done,) = [e for e in rundir.events(tmp_path / "latest") if e["event"] == "done"]
    assert done["moved"] is False
    assert done["remarks"][0].startswith("nothing moved")
    assert "nothing moved" in (tmp_path / "latest" / "report.html").read_text()


def test_a_fleet_that_gave_too_few_replies_says_so(places, tmp_path):
    done = tune(places, tmp_path, "fedit", clients=3, drop=0.9, quorum=3, rounds=2).done
    assert done.moved is False
    assert re.search("nothing moved: (none of 6 clients gave|no round had 3 good replies)", done.remarks[-1])


def test_a_resumed_run_keeps_its_base_and_start(places, tmp_path):
    settings = {"module": "prefix", "size": 4, "steps": 1}
    whole = tune(places, tmp_path / "a", "fedpetuning", settings=settings, rounds=2).done
    stop = Heard(lambda heard: len(heard.of("eval")) == 2)
    with pytest.raises(Interrupted):
        tune(places, tmp_path / "b", "fedpetuning", settings=settings, rounds=2, listener=stop)
    done = fleetune.resume_run(rundir.find("latest", tmp_path / "b"), out=tmp_path / "b", offline=True).done
    same = attrgetter("base", "start", "tuned", "digest", "remarks")
    assert same(done) == same(whole)


MARK = "zanzibar"  # in every prompt and every answer


def holding(folder: Path) -> set[str]:
    """The files with the mark in them, as text or in any other bytes."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    return {str(p.relative_to(folder)) for p in files if MARK.encode() in p.read_bytes()}


def short(places: Path, out: Path, *more: str) -> int:
    rows = [{"instruction": f"what is {MARK} {n}?", "output": f"{MARK} is {n}"} for n in range(12)]
    (places / "marked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--method fedit --clients 2 --rounds 1 --held-out 3 --max-length 64 --offline --out"
    given = [str(places / "llama"), str(places / "marked.jsonl"), *words.split(), str(out), *more]
    return main(["tune", *given])


def test_no_samples_keeps_no_text_anywhere(places, tmp_path, capsys):
    words = ("--no-samples", "--rouge-rows", "2", "--answer-tokens", "4", "--set", "r=1")
    assert short(places, tmp_path, *words) == 0
    (run,) = tmp_path.glob("0001-*")
    assert holding(tmp_path) == set()
    assert not (run / "samples.md").exists()
    told = "".join(capsys.readouterr())
    assert "samples.md" not in told
    assert "the report shows the text" not in told
    assert "samples = 0" in (run / "run.toml").read_text()
    assert "This page shows the text" not in (run / "report.html").read_text()


def test_text_that_is_kept_is_the_owners_alone_and_is_told(places, tmp_path, capsys):
    assert short(places, tmp_path, "--samples", "2", "--answer-tokens", "4") == 0
    (run,) = tmp_path.glob("0001-*")
    kept = holding(run)
    assert kept == {"eval.json", "samples.md", "report.html"}
    if sys.platform != "win32":
        assert {stat.S_IMODE((run / name).stat().st_mode) for name in kept} == {0o600}
    told = "the report shows the text of 2 held-out rows"
    assert told in "".join(capsys.readouterr())
    assert main(["runs", "show", "1", "--out", str(tmp_path)]) == 0
    assert told in "".join(capsys.readouterr())
    assert "This page shows the text of 2 held-out rows" in (run / "report.html").read_text()
