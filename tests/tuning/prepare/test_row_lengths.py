"""Rows that are longer than `max_length`: answers that are cut are told, and a run is measured on rows cut as its own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from fleetune import models
from fleetune.cli.main import main
from fleetune.data.encode import encode_all
from fleetune.evaluation.losses import response_loss
from fleetune.runs import rundir
from fleetune.tuning.result import finished

RUN = shlex.split(
    "--method fedit --set r=2 --set steps=1 --clients 2 --rounds 1 --held-out 6 --samples 0 --device cpu"
)


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model and rows of which 9 have long answers."""
    monkeypatch.chdir(tmp_path)
    models.tiny_llama().save(tmp_path / "tiny")
    rows = [{"instruction": "say", "response": "word " * (40 if i < 9 else 2)} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def done_of(at: Path) -> dict[str, Any]:
    return next(e for e in rundir.events(rundir.listing(at / "runs")[-1]) if e["event"] == "done")


def test_eval_of_a_run_gives_the_loss_that_the_run_ended_with(at, capsys):
    assert main(["tune", "tiny", "data.jsonl", *RUN, "--max-length", "32"]) == 0
    capsys.readouterr()
    assert main(["eval", "1", "--tasks", "loss", "--device", "cpu", "--json"]) == 0
    event = json.loads(capsys.readouterr().out)
    assert event["loss"] == pytest.approx(done_of(at)["tuned"]["loss"], abs=1e-6)
    assert (event["rows"], event["of"], event["max_length"]) == (6, 6, 32)
    run = rundir.listing(at / "runs")[0]
    model = finished.load(run, device="cpu")
    long = response_loss(model, encode_all(finished.held_out(run), model.tokenizer, 512)[0])
    assert abs(long - event["loss"]) > 1e-3  # rows that are cut otherwise have another loss
