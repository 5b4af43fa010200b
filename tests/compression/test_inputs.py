"""A run is calibrated on its rows and on text that its model writes, and measured on more of that text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fleetune import models
from fleetune.common.display import counted
from fleetune.compression.jobs import inputs
from fleetune.compression.jobs.inputs import Inputs
from fleetune.compression.layerwise import driver
from fleetune.data.encode import Encoded
from fleetune.errors import DataError
from fleetune.evaluation.losses import row_perplexity
from fleetune.runs.compression_folder import CompressRequest
from fleetune.runs.listener import Silent
from heard import Heard

LENGTH = 16


def inputs_of(tokens: int) -> Inputs:
    """A tiny model, and `tokens` tokens in rows of ten, of which no two are alike."""
    rows = [Encoded(ids=np.arange(at, min(at + 10, tokens)), n_prompt=1) for at in range(0, tokens, 10)]
    return Inputs(models.tiny_llama(), rows, [], [], "rows")


def asked(count: int, **more: Any) -> CompressRequest:
    return CompressRequest("run", True, "optq", windows=count, length=LENGTH, **more)


@pytest.mark.parametrize(
    ("tokens", "count", "whole", "own"), [(60, 128, 3, 8), (200, 6, 3, 3), (60, 1, 1, 0)]
)
def test_rows_come_first_and_at_most_half_is_written(tokens: int, count: int, whole: int, own: int) -> None:
    found, loaded = inputs.of_run(asked(count), inputs_of(tokens), Silent())
    assert found.shape == (whole + own, LENGTH)
    assert torch.equal(found[:whole].flatten(), torch.arange(whole * LENGTH))
    assert loaded.source == f"rows: {counted(whole, 'window')}, and {own} that its model wrote"
    assert len(loaded.own_text) == inputs.MEASURED


def test_what_is_measured_on_is_not_calibrated_on_and_follows_from_the_seed() -> None:
    found, loaded = inputs.of_run(asked(128), inputs_of(60), Silent())
    again, same = inputs.of_run(asked(128), inputs_of(60), Silent())
    other, _ = inputs.of_run(asked(128, seed=7), inputs_of(60), Silent())
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    assert torch.equal(found[:3], other[:3])  # the rows
    texts = [tuple(row.ids) for row in loaded.own_text]
    assert texts == [tuple(row.ids) for row in same.own_text]
    assert len(set(texts)) == inputs.MEASURED
    assert not set(texts) & {tuple(window.tolist()) for window in found}
    measured = loaded.measure(loaded.model, Silent(), Path())
    assert measured == {"own_perplexity": row_perplexity(loaded.model, loaded.own_text)}
    assert 1 < measured["own_perplexity"] < 1000


@pytest.mark.parametrize(("tokens", "count", "own"), [(15, 128, 8), (12, 3, 3), (12, 1, 1), (0, 128, 8)])
def test_where_the_rows_fill_no_window_all_are_written(tokens: int, count: int, own: int) -> None:
    notes = Heard()
    found, loaded = inputs.of_run(asked(count), inputs_of(tokens), notes)
    expected = driver.sampled_windows(loaded.model, LENGTH, own + inputs.MEASURED, 42, batch=99)
    assert torch.equal(found, expected[:own])
    assert [tuple(row.ids) for row in loaded.own_text] == [tuple(w.tolist()) for w in expected[own:]]
    assert loaded.source == f"{counted(own, 'window')} that the run's model wrote"
    assert f"rows has {tokens} tokens, and a window needs {LENGTH}" in notes.notes[0]
    notes.notes.clear()
    filled, _ = inputs.of_run(asked(count), inputs_of(LENGTH), notes)
    assert torch.equal(filled[0], torch.arange(LENGTH)), "just one window"
    assert not any("a window needs" in note for note in notes.notes)


def test_a_client_with_too_little_text_is_left_out() -> None:
    rows = {1: [Encoded(ids=np.arange(40), n_prompt=1)] * 2, 4: [Encoded(ids=np.arange(9), n_prompt=1)]}
    loaded, heard = Inputs(models.tiny_llama(), [], [], [], "rows", rows), Heard()
    found = inputs.of_clients(CompressRequest("run", True, "optq", length=10, windows=7), loaded, heard)
    assert {client: tuple(own.shape) for client, own in found.items()} == {1: (3, 10)}
    assert heard.notes == ["client 4 is left out: the calibration text has 9 tokens, a window needs 10"]
    with pytest.raises(DataError, match="no client has text for a window of 90"):
        inputs.of_clients(CompressRequest("run", True, "optq", length=90, windows=7), loaded, heard)
