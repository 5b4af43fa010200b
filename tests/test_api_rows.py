# SPDX-License-Identifier: Apache-2.0
"""Rows to validate on are taken as objects, as those to tune on; a slow law of directions is said once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fleetune
from fleetune import models
from fleetune.cli.main import main
from fleetune.errors import DataError

ROWS = [{"instruction": f"say {i}", "response": f"{i} it is"} for i in range(12)]
HELD = [{"instruction": f"tell {i}", "response": f"{i}, then"} for i in range(5)]
FEW: dict[str, Any] = {"rounds": 1, "clients": 2, "samples": 0, "max_length": 64}
LORA: dict[str, Any] = {"method": "fedit", "settings": {"r": 2, "steps": 1}, **FEW}


class Table:
    """What a pandas DataFrame offers, as far as it is used."""

    columns = ("instruction", "response")

    def to_dict(self, how: str) -> list[dict[str, Any]]:
        assert how == "records"
        return HELD


class Stream:
    """What a `datasets.Dataset` is here: dicts, one after the other."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(HELD)


@pytest.fixture(autouse=True)
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = models.tiny_llama()
    models.save(tiny.net, tiny.tokenizer, "tiny")


def test_rows_to_validate_on_are_taken_as_objects() -> None:
    runs = [
        fleetune.tune("tiny", ROWS, eval_data=given, out=name, **LORA)
        for name, given in (("dicts", HELD), ("frame", Table()), ("stream", Stream()))
    ]
    assert [run.done.rows for run in runs] == [5, 5, 5]
    assert {json.dumps(run.done.base) for run in runs} == {json.dumps(runs[0].done.base)}
    recipe = fleetune.open(runs[0]).recipe
    assert [json.loads(line) for line in Path(recipe.eval_data).read_text().splitlines()] == HELD
    assert fleetune.tune(recipe, out="again").digest == runs[0].digest
    assert fleetune.evaluate(runs[0])["loss"] == pytest.approx(runs[0].done.tuned["loss"])
    grid = fleetune.sweep("tiny", ROWS, vary={"lr": [1e-3, 1e-2]}, eval_data=HELD, **LORA)
    assert {run.done.rows for run in grid.runs} == {5}


def test_a_name_stays_a_name_and_what_are_no_rows_is_refused() -> None:
    Path("held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD))
    for given in ("held.jsonl", Path("held.jsonl")):
        run = fleetune.tune("tiny", ROWS, eval_data=given, **LORA)
        assert (fleetune.open(run).recipe.eval_data, run.done.rows) == ("held.jsonl", 5)
    with pytest.raises(DataError, match="row 1 is a int, not a dict"):
        fleetune.tune("tiny", ROWS, eval_data=[1, 2], out="bad", **LORA)


@pytest.mark.parametrize(
    ("law", "K", "said"), [("gaussian", 64, 1), ("gaussian", 8, 0), ("rademacher", 64, 0)]
)
def test_a_slow_law_is_said_once(law: str, K: int, said: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", f"law={law}", "--set", f"K={K}", "--set", "tau=1"]
    few = ["--rounds", "1", "--clients", "2", "--limit", "20", "--max-length", "64", "--no-samples"]
    assert main(["tune", "tiny", "demo", "--method", "fedkseed", *words, *few]) == 0
    assert capsys.readouterr().err.count("slow: every forward may compute") == said
