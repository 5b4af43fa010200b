# SPDX-License-Identifier: Apache-2.0
"""The driver: Hessians of what a compressed model really feeds its layers, resume, memory, and several families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spy_harness import Spy, text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig, Qwen2Config, Qwen3Config

from fleetune import compression, models
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.activations import HiddenStates
from fleetune.compression.layerwise.blocks import FinishedBlocks, block_file
from fleetune.compression.layerwise.driver import linears_of, place_weights, restored_weights
from fleetune.errors import DataError, RecipeError
from fleetune.models import Model
from fleetune.models.artefact import Quantised

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=8),
    "gemma2": Gemma2Config(**SMALL, sliding_window=8, query_pre_attn_scalar=8),
}


def model_of(family: str) -> Model:
    model = models.tiny_llama()
    if family != "llama":
        torch.manual_seed(1)
        model.net = AutoModelForCausalLM.from_config(FAMILIES[family]).eval().requires_grad_(False)
    return model


def inputs_of(model: Model, linears: Mapping[str, nn.Linear], windows: Tensor) -> dict[str, Tensor]:
    """float64 [tokens, C] by layer: what it reads while the model runs, window by window."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}

    def hook(name: str) -> Any:
        return lambda module, args: seen[name].append(args[0][0])

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    with torch.inference_mode():
        for window in windows:
            model.net(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found).double() for name, found in seen.items()}


def compressed_inputs(
    model: Model, parts: FinishedBlocks, windows: Tensor, true_sequential: bool
) -> Iterator[tuple[str, Tensor]]:
    """(name, inputs) of each layer in the order they were solved, from the model with the blocks before it compressed.

    With `true_sequential` the layers of its own block that were solved before it are compressed too.
    """
    every = {name: linear for _, linears in linears_of(model) for name, linear in linears.items()}
    done: dict[str, Any] = {}
    for block in parts.blocks:
        names = [matrix.name for matrix in block.matrices]
        for at, name in enumerate(names):
            own = {n: every[n] for n in names[:at]} if true_sequential else {}
            with restored_weights(done | own):
                place_weights(done | own, parts)
                x = inputs_of(model, {name: every[name]}, windows)[name]
            yield name, x
        done |= {n: every[n] for n in names}


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
@pytest.mark.parametrize("true_sequential", [False, True])
def test_hessians_are_of_the_inputs_in_the_compressed_model(
    family: str, true_sequential: bool, tmp_path: Path
) -> None:
    """Layer by layer what the compressed model feeds it: with its own block as it was, or up to this layer."""
    model, spy, windows = model_of(family), Spy(), text(3, 20)
    before = {n: p.clone() for n, p in model.net.named_parameters()}
    parts = driver.run(model, spy, windows, tmp_path, true_sequential=true_sequential)
    assert all(torch.equal(p, before[n]) for n, p in model.net.named_parameters())  # the model is as it was
    blocks = linears_of(model)
    names = [
        matrix.name for block in parts.blocks for matrix in block.matrices
    ]  # in the order they were solved
    assert sorted(names) == sorted(name for _, linears in blocks for name in linears)
    assert len(spy.seen) == len(names) == len(parts)
    for at, (_, x) in enumerate(compressed_inputs(model, parts, windows, true_sequential)):
        assert len(x) == 60
        got = spy.seen[at].double()
        torch.testing.assert_close(got, 2 * x.T @ x, rtol=1e-4, atol=1e-4 * got.abs().max().item())


@pytest.mark.parametrize("true_sequential", [False, True])
def test_windows_go_through_a_block_as_often_as_they_must(
    true_sequential: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, of the last block once; in turn up to each layer with an input of its own, and once more."""
    model, windows, passes = model_of("qwen2"), text(3, 20), list[tuple[int, int]]()
    forward = HiddenStates.forward

    def counted(self: HiddenStates, number: int, state: Tensor) -> Tensor:
        passes.append((number, len(state)))
        return forward(self, number, state)

    monkeypatch.setattr(HiddenStates, "forward", counted)
    products: dict[int, list[int]] = {0: [], 1: [], 2: []}  # of a block's last layer, by block
    for number, seen in products.items():
        last = linears_of(model)[number][1][f"model.layers.{number}.mlp.down_proj"]
        last.register_forward_hook(lambda module, args, out, seen=seen: seen.append(len(out)))
    readers = dict[str, int]()  # of one tensor, in the second block: how often they run
    for name in "self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj":
        readers[name] = 0
        linears_of(model)[1][1][f"model.layers.1.{name}"].register_forward_hook(
            lambda module, args, out, name=name: readers.update({name: readers[name] + 1})
        )
    driver.run(model, Spy(), windows, tmp_path, true_sequential=true_sequential)
    blocks = len(linears_of(model))
    # the first block is run for what the other blocks are called with; nobody needs what the last one gives
    if true_sequential:  # q, k and v; o; gate and up; down
        assert passes == [
            (number, 1) for number in range(blocks) for _ in range(3 * (4 if number + 1 == blocks else 5))
        ]
        # `down` is only known to be the last one after the first window
        assert products == {0: [1] * 5, 1: [1] * 4, 2: [1]}
        # the first window, which tells the readers of a tensor, runs them; the others stop in front of the first one
        assert readers == {
            "self_attn.q_proj": 1 + 4 * 3,
            "self_attn.v_proj": 1 + 4 * 3,
            "mlp.gate_proj": 1 + 2 * 3,
            "mlp.up_proj": 1 + 2 * 3,
        }
    else:
        assert passes == [
            (number, 1) for number in range(blocks) for _ in range(3 if number + 1 == blocks else 6)
        ]
        # and the first window, which tells the order of the layers, and all of them after the block is solved
        assert products == {0: [1] * 5, 1: [1] * 4, 2: [1]}


def test_a_layer_that_is_read_twice_counts_twice() -> None:
    model, windows = models.tiny_llama(), text(3, 16)
    block, linears = linears_of(model)[0]
    mlp: Any = block.mlp

    def forward(x: Tensor) -> Tensor:
        h = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return mlp.down_proj(h) + mlp.down_proj(h / 2 + 1)

    mlp.forward = forward
    with torch.inference_mode():
        H = HiddenStates(model, windows).hessians(0, linears)
    for name, x in inputs_of(model, linears, windows).items():
        torch.testing.assert_close(H[name].double(), 2 * x.T @ x, rtol=1e-4, atol=1e-3)


def test_a_layer_that_only_later_windows_read_counts() -> None:
    """As an expert that the first window has no use for."""
    model, calls, read = models.tiny_llama(), list[int](), list[Tensor]()
    block, linears = linears_of(model)[0]
    mlp: Any = block.mlp

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        out: Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))
        return out if len(calls) == 1 else out + mlp.up_proj(x).mean()

    mlp.forward = forward
    with torch.inference_mode():
        stream = HiddenStates(model, text(3, 16))
        calls.clear()
        mlp.up_proj.register_forward_pre_hook(lambda module, args: read.append(args[0][0]))
        H = stream.hessians(0, linears)
    x = torch.cat(read).double()
    assert len(x) == 32
    torch.testing.assert_close(H["model.layers.0.mlp.up_proj"].double(), 2 * x.T @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_hessians_of_more_than_a_strip_are_whole(true_sequential: bool, tmp_path: Path) -> None:
    model, spy, windows = models.tiny_llama(layers=1, hidden=160), Spy(), text(2, 12)
    driver.run(model, spy, windows, tmp_path, true_sequential=true_sequential)
    x = inputs_of(
        model,
        {"model.layers.0.self_attn.q_proj": linears_of(model)[0][1]["model.layers.0.self_attn.q_proj"]},
        windows,
    )
    (inputs,) = x.values()
    assert spy.seen[0].shape == (160, 160)
    torch.testing.assert_close(spy.seen[0].double(), 2 * inputs.T @ inputs, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(H, H.T) for H in spy.seen)


def test_an_order_for_a_source_that_has_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="true_sequential is for windows"):
        driver.run(models.tiny_llama(), Spy(), None, tmp_path, true_sequential=True)


def test_a_true_sequential_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    solver, windows = compression.make("optq", {"group": 8}), text(4, 16)
    whole = driver.run(models.tiny_llama(), solver, windows, tmp_path, true_sequential=True)
    block_file(tmp_path, len(whole.blocks) - 1).unlink()
    again = driver.run(models.tiny_llama(), solver, windows, tmp_path, true_sequential=True)
    for name in whole:
        left, right = whole[name], again[name]
        assert isinstance(left, Quantised)
        assert isinstance(right, Quantised)
        assert torch.equal(left.codes, right.codes)


def test_layers_that_read_one_tensor_share_a_hessian(tmp_path: Path) -> None:
    model = models.tiny_llama()
    _, linears = linears_of(model)[0]
    with torch.inference_mode():
        stream = HiddenStates(model, text(2, 8))
        H = stream.hessians(0, linears)
    by = {name.rsplit(".", 1)[-1]: h for name, h in H.items()}
    assert by["q_proj"] is by["k_proj"] is by["v_proj"]
    assert by["gate_proj"] is by["up_proj"]
    assert len({id(h) for h in H.values()}) == 4


def test_a_killed_run_goes_on_with_the_next_block(tmp_path: Path) -> None:
    solver, windows = compression.make("optq", {"group": 8}), text(4, 16)
    whole = driver.run(models.tiny_llama(), solver, windows, tmp_path / "whole")

    def stop(block: int, blocks: int, name: str) -> None:
        if block == 1 and name.endswith("o_proj"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver.run(models.tiny_llama(), solver, windows, tmp_path / "half", stop)
    assert [p.name for p in (tmp_path / "half").iterdir()] == ["block-0000.safetensors"]
    asked: list[int] = []
    again = driver.run(
        models.tiny_llama(),
        solver,
        windows,
        tmp_path / "half",
        lambda block, blocks, name: asked.append(block),
    )
    assert 0 not in asked
    assert set(again) == set(whole)
    for name in whole:
        a, b = whole[name], again[name]
        assert isinstance(a, Quantised)
        assert isinstance(b, Quantised)
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
                assert isinstance(right, Quantised)
                assert torch.equal(left.dense(), right.dense())
            else:
                assert isinstance(right, Tensor)
                assert torch.equal(left, right)
                assert right.dtype == torch.float32


def test_the_stated_error_is_that_of_the_outputs(tmp_path: Path) -> None:
    model, windows = models.tiny_llama(), text(3, 20)
    parts = driver.run(model, compression.make("rtn", {"group": 8, "bits": 3}), windows, tmp_path)
    name = linears_of(model)[0][1].__iter__().__next__()
    linear = dict(model.net.named_modules())[name]
    assert isinstance(linear, nn.Linear)
    inputs: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    with torch.inference_mode():
        for window in windows:
            model.net(input_ids=window[None], use_cache=False)
    handle.remove()
    x, weight = torch.cat(inputs), parts[f"{name}.weight"]
    assert isinstance(weight, Quantised)
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


def test_a_model_writes_windows_of_its_own() -> None:
    model = models.tiny_llama()
    first = driver.sampled_windows(model, 12, 10, 5)
    assert first.shape == (10, 12)
    assert torch.equal(first, driver.sampled_windows(model, 12, 10, 5))
    assert not torch.equal(first, driver.sampled_windows(model, 12, 10, 6))
    assert len(first[:, 1:].unique()) > 20  # sampled, not one token again and again
