# SPDX-License-Identifier: Apache-2.0
"""A run is calibrated on its rows and on text that its model writes, and measured on more of that text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_harness import call, tuned

from fleetune import models
from fleetune.common.display import counted
from fleetune.compression.jobs import inputs
from fleetune.compression.jobs.inputs import Inputs
from fleetune.compression.layerwise import driver
from fleetune.data.encode import Encoded
from fleetune.evaluation.losses import row_perplexity
from fleetune.runs.compression_folder import CompressRequest
from fleetune.runs.listener import Silent

LENGTH = 16


def inputs_of(tokens: int) -> Inputs:
    """A tiny model, and `tokens` tokens in rows of ten, of which no two are alike."""
    rows = [Encoded(ids=np.arange(at, min(at + 10, tokens)), n_prompt=1) for at in range(0, tokens, 10)]
    return Inputs(models.tiny_llama(), rows, [], [], "rows")


def asked(count: int, **more: Any) -> CompressRequest:
    return CompressRequest("run", True, "optq", windows=count, length=LENGTH, **more)


@pytest.mark.parametrize(
    ("tokens", "count", "of_rows", "own"), [(60, 128, 3, 8), (200, 6, 3, 3), (60, 1, 1, 0)]
)
def test_rows_come_first_and_at_most_half_is_written(tokens: int, count: int, of_rows: int, own: int) -> None:
    found, inputs = inputs.of_run(asked(count), inputs_of(tokens), Silent())
    assert found.shape == (of_rows + own, LENGTH)
    assert torch.equal(found[:of_rows].flatten(), torch.arange(of_rows * LENGTH))
    assert inputs.source == f"rows: {counted(of_rows, 'window')}, and {own} that its model wrote"
    assert len(inputs.own_text) == inputs.MEASURED


def test_what_is_measured_on_is_not_calibrated_on_and_follows_from_the_seed() -> None:
    found, inputs = inputs.of_run(asked(128), inputs_of(60), Silent())
    again, same = inputs.of_run(asked(128), inputs_of(60), Silent())
    other, _ = inputs.of_run(asked(128, seed=7), inputs_of(60), Silent())
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    assert torch.equal(found[:3], other[:3])  # the rows
    texts = [tuple(row.ids) for row in inputs.own_text]
    assert texts == [tuple(row.ids) for row in same.own_text]
    assert len(set(texts)) == inputs.MEASURED
    assert not set(texts) & {tuple(window.tolist()) for window in found}
    measured = inputs.measure(inputs.model, Silent(), Path())
    assert measured == {"own_perplexity": row_perplexity(inputs.model, inputs.own_text)}
    assert 1 < measured["own_perplexity"] < 1000


class Notes(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(("tokens", "count", "own"), [(15, 128, 8), (12, 3, 3), (12, 1, 1), (0, 128, 8)])
def test_where_the_rows_fill_no_window_all_are_written(tokens: int, count: int, own: int) -> None:
    notes = Notes()
    found, inputs = inputs.of_run(asked(count), inputs_of(tokens), notes)
    expected = driver.sampled_windows(inputs.model, LENGTH, own + inputs.MEASURED, 42, batch=99)
    assert torch.equal(found, expected[:own])
    assert [tuple(row.ids) for row in inputs.own_text] == [tuple(w.tolist()) for w in expected[own:]]
    assert inputs.source == f"{counted(own, 'window')} that the run's model wrote"
    assert f"rows has {tokens} tokens, and a window needs {LENGTH}" in notes.said[0]
    notes.said.clear()
    filled, _ = inputs.of_run(asked(count), inputs_of(LENGTH), notes)
    assert torch.equal(filled[0], torch.arange(LENGTH)), "just one window"
    assert not any("a window needs" in note for note in notes.said)


def test_a_run_of_few_rows_is_compressed_with_the_usual_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, tmp_path / "tiny")
    rows = [{"prompt": f"say {n}", "response": "so"} for n in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--method", "fedkseed", "--set", "K=4", "--set", "tau=1", "--set", "lr=1e-4", "--clients", "2"]
    assert call(capsys, "tune", "tiny", "rows.jsonl", *flags, "--rounds", "1", "--held-out", "4")[0] == 0
    code, events, err = call(capsys, "compress", "latest", "--set", "group=8")
    assert code == 0, err
    assert "tokens, and a window needs 512" in err
    assert list(events[-1]["before"]) == ["loss", "own_perplexity"]


def test_the_table_has_the_second_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, tmp_path / "tiny")
    tuned(capsys, "tiny")
    small = ["--windows", "8", "--length", "16", "--set", "group=8", "--set", "bits=2"]
    code, events, err = call(capsys, "compress", "latest", *small)
    assert code == 0, err
    assert "4 windows, and 4 that its model wrote" in err
    done = events[-1]
    assert list(done["before"]) == ["loss", "own_perplexity"]
    assert list(done["after"])[:3] == ["loss", "own_perplexity", "kl_divergence"]
    assert done["before"]["own_perplexity"] != done["after"]["own_perplexity"]
    _, again, _ = call(capsys, "compress", "1", *small)
    assert (again[-1]["digest"], again[-1]["after"]) == (done["digest"], done["after"])
    code, events, _ = call(capsys, "compress", "1", "--method", "rtn", "--set", "group=8")
    assert list(events[-1]["before"]) == ["loss"]  # it is not calibrated, so nothing is to be watched
