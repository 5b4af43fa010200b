"""The driver: resume, errors, what fits no matrix, and windows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from spy_harness import text
from torch import Tensor

from fleetune import compression, models
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.blocks import FinishedBlocks
from fleetune.compression.layerwise.driver import linears_of
from fleetune.errors import DataError, RecipeError
from fleetune.models.artefact import Quantised


def test_a_killed_run_goes_on_with_the_next_block(tmp_path: Path) -> None:
    solver, windows, half = compression.make("optq", {"group": 8}), text(4, 16), tmp_path / "half"
    whole = driver.run(models.tiny_llama(), solver, windows, tmp_path / "whole")

    def stop(block: int, blocks: int, name: str) -> None:
        if block == 1 and name.endswith("o_proj"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver.run(models.tiny_llama(), solver, windows, half, stop)
    assert [p.name for p in half.iterdir()] == ["block-0000.safetensors"]
    asked: list[int] = []
    again = driver.run(models.tiny_llama(), solver, windows, half, lambda block, *_: asked.append(block))
    assert 0 not in asked
    assert set(again) == set(whole)
    for name in whole:
        a, b = whole[name], again[name]
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scale, b.scale)


def test_a_damaged_block_is_done_again(tmp_path: Path) -> None:
    solver = compression.make("rtn", {"group": 8})
    first = driver.run(models.tiny_llama(), solver, None, tmp_path)
    path = tmp_path / "block-0001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert not FinishedBlocks(tmp_path).open(1)
    again = driver.run(models.tiny_llama(), solver, None, tmp_path)
    assert set(again) == set(first)
    assert len(again.blocks) == len(linears_of(models.tiny_llama()))


def test_a_part_gives_back_what_was_put(tmp_path: Path) -> None:
    model = models.tiny_llama()
    for name, values in (("optq", {"bits": 3, "group": 8}), ("sparsegpt", {})):
        folder = tmp_path / name
        parts = driver.run(model, compression.make(name, values), text(4, 16), folder)
        again = FinishedBlocks(folder)
        assert all(again.open(i) for i in range(len(linears_of(model))))
        assert again.blocks == parts.blocks
        for key in parts:
            left, right = parts[key], again[key]
            if isinstance(left, Quantised):
                assert torch.equal(left.dense(), right.dense())
            else:
                assert torch.equal(left, right)
                assert right.dtype == torch.float32


def test_the_stated_error_is_that_of_the_outputs(tmp_path: Path) -> None:
    model, windows = models.tiny_llama(), text(3, 20)
    parts = driver.run(model, compression.make("rtn", {"group": 8, "bits": 3}), windows, tmp_path)
    name = linears_of(model)[0][1].__iter__().__next__()
    linear = dict(model.net.named_modules())[name]
    inputs: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    with torch.inference_mode():
        for window in windows:
            model.net(input_ids=window[None], use_cache=False)
    handle.remove()
    x, weight = torch.cat(inputs), parts[f"{name}.weight"]
    want = ((x @ (linear.weight - weight.dense()).T) ** 2).sum() / ((x @ linear.weight.T) ** 2).sum()
    assert parts.blocks[0].matrices[0].error == pytest.approx(want.item(), rel=1e-3)


def test_settings_that_fit_no_matrix_are_refused_before_any_work() -> None:
    with pytest.raises(RecipeError, match="do not divide") as caught:
        driver.check(models.tiny_llama(), compression.make("optq", {"group": 7}))
    assert caught.value.hint == "--set group=4 fits every layer"
    assert all(" more" in line for line in caught.value.problems)  # each kind of problem once
    assert len(caught.value.problems) < 4
    driver.check(models.tiny_llama(), compression.make("optq", {"group": 0}))


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = models.tiny_llama()
    name, linear = next(iter(linears_of(model)[1][1].items()))
    linear.weight.data[0, 0] = float("nan")
    with pytest.raises(RecipeError, match=f"{name}.weight holds values that are not finite"):
        driver.check(model, compression.make("rtn", {"group": 8}))


def test_windows_join_texts_and_need_one_whole() -> None:
    ids = [np.arange(5), np.arange(5, 12)]
    assert driver.windows(ids, 4, 9).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert driver.windows(ids, 4, 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(DataError, match="has 12 tokens, a window needs 13"):
        driver.windows(ids, 13, 1)
    with pytest.raises(DataError, match="has 0 tokens"):
        driver.windows([], 4, 1)
