"""Every client's loss before and after: on its own rows, held out where there are enough, few enough to cost little."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fleetune
from fleetune.cli.main import main
from fleetune.common import files
from fleetune.data.encode import encode_all
from fleetune.evaluation.losses import response_loss
from fleetune.models import tiny_llama
from fleetune.runs import rundir
from fleetune.runs.listener import Silent
from fleetune.tuning import methods
from fleetune.tuning.prepare import estimate, prepare
from fleetune.tuning.recipe import recipe
from fleetune.tuning.recipe.defaults import given
from fleetune.tuning.result import finished
from fleetune.tuning.run import evaluation
from heard import Heard

FAST: dict[str, Any] = {"samples": 0, "max_length": 64, "rounds": 1, "offline": True, "listener": Silent()}
SITES = ("north", "south", "west")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("clients")
    tiny_llama().save(at / "llama")
    answers = (("no", "yes")[n % 2] for n in range(36))
    rows = [{"instruction": f"is {n} odd?", "output": a, "site": SITES[n % 3]} for n, a in enumerate(answers)]
    (at / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return at


def tune(places: Path, out: Path, method: str = "fedit", **more: Any) -> Any:
    given = FAST | {"method": method, "out": out} | more
    return fleetune.tune(str(places / "llama"), str(places / "rows.jsonl"), **given)


def job_of(places: Path, **more: Any) -> prepare.TuneJob:
    values = {"model": str(places / "llama"), "data": str(places / "rows.jsonl"), "set": {"lr": 0.01}}
    return prepare.prepare(recipe.make({**values, "method": "fedit", "max_length": 64, **more}), offline=True)


def test_losses_before_and_after_are_those_of_the_clients_own_rows(places, tmp_path):
    result = tune(places, tmp_path, partition="column:site", held_out=12, settings={"lr": 0.01})
    found = result.done.per_client
    assert (found["rows"], found["n"]) == ("held-out", [2, 2, 2])
    assert found == files.read_json(result.folder / "eval.json", "")["per_client"]
    job = job_of(places, partition="column:site", held_out=12)
    for model, key in ((job.model, "base"), (result.model(offline=True), "tuned")):
        for client, site in enumerate(SITES):
            own = [row for row, e in zip(job.held, job.examples, strict=True) if e.meta["site"] == site][:2]
            assert found[key][client] == pytest.approx(response_loss(model, own), rel=1e-5)
    assert found["base"] != found["tuned"]
    text = (result.folder / "report.html").read_text()
    assert "Loss of each client before and after" in text
    assert ">north</text>" in text
    start = next(rundir.events(result.folder))
    assert start["names"] == list(SITES)
    assert {"model", "data", "method", "partition", "held_out", "samples", "set.lr"} <= set(start["changed"])
    assert not {"seed", "client_rows", "threads"} & set(start["changed"])
    assert start["params"] == job.model.n_params  # without the adapter


def test_rows_that_are_trained_on_are_used_and_said_where_held_out_ones_are_too_few(places):
    job = job_of(places, partition="column:site", held_out=3)
    kind, own = evaluation.client_rows(job) or ("", [])
    assert kind == "training"
    for rows, chosen in zip(job.rows, own, strict=True):
        assert {id(r) for r in chosen} <= {id(r) for r in rows}
    _, again = evaluation.client_rows(job) or ("", [])
    assert [[id(r) for r in rows] for rows in again] == [[id(r) for r in rows] for rows in own]


@pytest.mark.parametrize(
    ("more", "size", "clients", "rows"),
    [
        ({"rounds": 1}, 12, 8, 2),  # 36 passes a client: 5 % are less than one row before and after
        ({"rounds": 10}, 12, 8, 4),
        ({"rounds": 3, "participation": 0.25}, 36, 8, 2),
        ({"rounds": 100, "client_rows": 1}, 12, 8, 1),
    ],
)
def test_a_short_run_measures_fewer_rows(more, size, clients, rows):
    made = recipe.make({"model": "m", "data": "d", **more})
    assert estimate.client_rows_of_each(made, [size] * clients) == rows


def test_many_clients_are_measured_only_where_it_is_asked_for(places, monkeypatch):
    monkeypatch.setattr(estimate, "MOST_CLIENTS", 2)
    job = job_of(places, partition="iid", clients=3)
    assert evaluation.client_rows(job) is None
    job = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, client_rows=6))
    _, own = evaluation.client_rows(job) or ("", [])
    assert [len(rows) for rows in own] == [6, 6, 6]


def test_steps_and_tokens_are_counted(places, tmp_path):
    heard, seen = Heard(), set[tuple[int, int]]()  # a step is heard of between its pieces, too
    heard.step = lambda client, step: seen.add((client, step))  # type: ignore[method-assign]
    settings = {"K": 8, "tau": 3, "batch_size": 2, "lr": 1e-3}
    tune(places, tmp_path, "fedkseed", clients=2, held_out=4, listener=heard, settings=settings)
    steps = Counter(client for client, _ in seen)
    assert {r.client: r.steps for r in heard.of("client")} == dict(steps) == {0: 3, 1: 3}
    job = job_of(places, clients=2, held_out=4)
    for reply in heard.of("client"):
        lengths = [len(row.ids) for row in job.rows[reply.client]]
        assert 6 * min(lengths) <= reply.tokens <= 6 * max(lengths)


def test_a_setting_that_is_written_at_its_default_is_not_changed(places):
    defaults = {s.name: s.default for s in methods.settings("fedkseed")}
    same = recipe.make({"model": "m", "data": "d", "method": "fedkseed", "set": defaults})
    assert not [name for name in given(same) if name.startswith("set.")]
    other = {"lr": str(defaults["lr"]), "tau": "7"}
    whole = methods.values_of(methods.make("fedkseed", other).written_out())
    texts = recipe.make({"model": "m", "data": "d", "method": "fedkseed", "set": whole})
    assert [name for name in given(texts) if name.startswith("set.")] == ["set.tau"]


def test_eval_of_a_run_gives_the_loss_that_the_run_ended_with(place, capsys):
    rows = [{"instruction": "say", "response": "word " * (40 if i < 9 else 2)} for i in range(20)]
    Path("data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {"r": 2, "steps": 1, "lr": 3e-4}
    few: dict[str, Any] = FAST | {"max_length": 32, "held_out": 6, "clients": 2, "device": "cpu"}
    done = fleetune.tune("tiny", "data.jsonl", method="fedit", settings=settings, **few)
    assert main(["eval", "1", "--tasks", "loss", "--device", "cpu", "--json"]) == 0
    event = json.loads(capsys.readouterr().out)
    assert event["loss"] == pytest.approx(done.done.tuned["loss"], abs=1e-6)
    assert (event["rows"], event["of"], event["max_length"]) == (6, 6, 32)
    model = finished.load(done.folder, device="cpu")
    long = response_loss(model, encode_all(finished.held_out(done.folder), model.tokenizer, 512)[0])
    assert abs(long - event["loss"]) > 1e-3  # rows that are cut otherwise have another loss
