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
