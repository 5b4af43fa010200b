"""A run is calibrated on its rows and on text that comes with Fleetune, and measured on more of that text."""

from collections import Counter
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
from fleetune.models.net.model import Model
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
    ("tokens", "count", "whole", "beside"),
    [(60, 32, 3, 8), (200, 32, 12, 12), (1600, 128, 64, 32), (200, 7, 4, 3), (60, 1, 1, 0)],
)
def test_rows_come_first_and_there_is_as_much_other_text(
    tokens: int, count: int, whole: int, beside: int
) -> None:
    found, loaded = inputs.of_run(asked(count), inputs_of(tokens), Silent())
    assert found.shape == (whole + beside, LENGTH)
    assert torch.equal(found[:whole].flatten(), torch.arange(whole * LENGTH))
    assert torch.equal(found[whole:], inputs.of_package(loaded.model, LENGTH, beside)[0])
    assert loaded.source == f"rows: {counted(whole, 'window')}, and {beside} of {inputs.OWN}"


def windows_of(kind: str, model: Model) -> list[list[int]]:
    texts = [model.tokenizer(text)["input_ids"] for text in inputs.documents(kind)]
    return driver.windows([np.asarray(ids) for ids in texts], LENGTH, 1 << 20).tolist()


def test_any_first_part_of_the_text_that_comes_along_is_a_mix_by_the_shares() -> None:
    model = models.tiny_llama()
    kinds = {tuple(w): kind for kind in inputs.SHARES for w in windows_of(kind, model)}
    found, _ = inputs.of_package(model, LENGTH, 32)
    for count, times in ((16, 1), (32, 2)):
        assert Counter(kinds[tuple(w)] for w in found[:count].tolist()) == {
            kind: times * share for kind, share in inputs.SHARES.items()
        }
    whole = inputs.of_package(model, LENGTH, 1 << 20)[0]
    assert len(whole) == sum(len(windows_of(kind, model)) for kind in inputs.SHARES) - inputs.MEASURED


def test_what_is_measured_on_is_not_calibrated_on() -> None:
    loaded = inputs.with_other(asked(128), inputs_of(60))
    found = inputs.of_package(loaded.model, LENGTH, 1 << 20)[0]
    texts = [tuple(row.ids) for row in loaded.other]
    assert len(set(texts)) == inputs.MEASURED
    assert not set(texts) & {tuple(window.tolist()) for window in found}
    measured = loaded.measure(loaded.model, Silent(), Path())
    assert measured == {"other_perplexity": row_perplexity(loaded.model, loaded.other)}
    assert 1 < measured["other_perplexity"] < 1000


def test_texts_that_fill_no_window_are_left_out() -> None:
    model = models.tiny_llama()
    longest = max(len(windows_of(kind, model)) for kind in inputs.SHARES) * LENGTH
    found, measured = inputs.of_package(model, longest, 8)
    assert (found.shape, measured) == ((1, longest), [])
    with pytest.raises(DataError, match="fills no window"):
        inputs.of_package(model, longest + LENGTH, 1)
    assert not inputs.of_package(model, 1, 4)[1], "in windows of one token nothing is predicted"


@pytest.mark.parametrize(("tokens", "count"), [(15, 8), (12, 3), (12, 1), (0, 8)])
def test_where_the_rows_fill_no_window_all_are_other_text(tokens: int, count: int) -> None:
    notes = Heard()
    found, loaded = inputs.of_run(asked(count), inputs_of(tokens), notes)
    assert torch.equal(found, inputs.of_package(loaded.model, LENGTH, count)[0])
    assert loaded.source == inputs.OWN
    assert f"rows has {tokens} tokens, fewer than a window of {LENGTH}" in notes.notes[0]
    notes.notes.clear()
    filled, _ = inputs.of_run(asked(count), inputs_of(LENGTH), notes)
    assert torch.equal(filled[0], torch.arange(LENGTH)), "just one window"
    assert not any("a window of" in note for note in notes.notes)


def test_a_client_with_too_little_text_is_left_out() -> None:
    rows = {1: [Encoded(ids=np.arange(40), n_prompt=1)] * 2, 4: [Encoded(ids=np.arange(9), n_prompt=1)]}
    loaded, heard = Inputs(models.tiny_llama(), [], [], [], "rows", rows), Heard()
    found = inputs.of_clients(CompressRequest("run", True, "optq", length=10, windows=7), loaded, heard)
    assert {client: tuple(own.shape) for client, own in found.items()} == {1: (3, 10)}
    assert heard.notes == ["client 4 is left out: the calibration text has 9 tokens, a window needs 10"]
    with pytest.raises(DataError, match="no client has text for a window of 90"):
        inputs.of_clients(CompressRequest("run", True, "optq", length=90, windows=7), loaded, heard)
