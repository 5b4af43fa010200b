# SPDX-License-Identifier: Apache-2.0
"""LoRA: start, numbers in and out, training, merging into 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters_harness import LEAVES, attached, tiny, tuned

from fleetune import adapters, models
from fleetune.errors import MessageError, ModelError
from fleetune.models import Model

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])


def logits(net: Any) -> torch.Tensor:
    with torch.inference_mode():
        return net(IDS).logits


def test_all_linear_layers_but_the_head_and_nothing_else_is_trainable() -> None:
    model = attached()
    names = list(adapters.trainable(model))
    assert names == sorted(names)
    assert len(names) == 2 * 7 * 2
    assert {n.split(".")[-3] for n in names} == set(LEAVES)
    assert names[0] == "model.layers.0.mlp.down_proj.lora_A.weight"
    grads = {n.replace(".default.", ".") for n, p in model.net.named_parameters() if p.requires_grad}
    assert grads == set(names)
    shapes = {n: tuple(p.shape) for n, p in adapters.trainable(model).items()}
    assert shapes["model.layers.1.self_attn.k_proj.lora_A.weight"] == (4, 32)
    assert shapes["model.layers.1.self_attn.k_proj.lora_B.weight"] == (16, 4)
    assert shapes["model.layers.1.mlp.down_proj.lora_A.weight"] == (4, 72)


def test_export_and_load_are_inverse_and_export_is_a_copy() -> None:
    model, other = tuned(2), attached(3)
    arrays = adapters.export(model)
    adapters.load_(other, arrays)
    assert torch.equal(logits(other.net), logits(model.net))
    assert adapters.digest(adapters.export(other)) == adapters.digest(arrays)
    for array in arrays.values():
        array += 1
    assert adapters.digest(adapters.export(model)) == adapters.digest(adapters.export(other))


def test_load_refuses_what_is_not_its_own_and_changes_nothing() -> None:
    model = tuned()
    good = adapters.export(model)
    before, first, last = adapters.digest(good), next(iter(good)), list(good)[-1]
    fresh = {n: a + 1 for n, a in good.items()}
    spoilt = [
        ({n: a for n, a in fresh.items() if n != last}, "differ in 1 names"),
        (fresh | {"extra": fresh[first]}, "'extra'"),
        ({("x" if n == last else n): a for n, a in fresh.items()}, "differ in 2 names"),
        (fresh | {last: fresh[last][:-1]}, r"is float32 \[31, 4\]|is float32 \[15, 4\]"),
        (fresh | {last: fresh[last].T.copy()}, "is float32"),
        (fresh | {last: fresh[last].astype(np.float16)}, "is float16"),
        (fresh | {last: fresh[last].astype(np.float64)}, "is float64"),
    ]
    for arrays, message in spoilt:
        with pytest.raises(MessageError, match=message):
            adapters.load_(model, arrays)
        assert adapters.digest(adapters.export(model)) == before


def train(model: Model, key: int) -> str:
    optimizer = torch.optim.AdamW(adapters.trainable(model).values(), lr=1e-2, weight_decay=0.0)
    with adapters.training(model, key):
        for _ in range(3):
            loss = model.net(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return adapters.digest(adapters.export(model))


def test_training_is_a_function_of_its_key_and_lowers_the_loss() -> None:
    model = attached(dropout=0.2)
    with torch.no_grad():
        before = model.net(IDS, labels=IDS).loss.item()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = train(model, 2**63 + 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert train(attached(dropout=0.2), 2**63 + 5) == first
    assert train(attached(dropout=0.2), 6) != first
    with torch.no_grad():
        assert model.net(IDS, labels=IDS).loss.item() < before - 0.05
    assert not model.net.training
    assert not any(module.training for module in model.net.modules())
    assert all(p.grad is None for p in model.net.parameters())
    adapters.detach(model)
    assert models.digest(models.named_tensors(model.net)) == model.digest


def test_merge_into_16_bits_rounds_once() -> None:
    base, model = tiny(torch.bfloat16), tuned(dtype=torch.bfloat16)
    arrays = adapters.export(model)
    adapters.merge(model)
    weights, stored = dict(model.net.named_parameters()), dict(base.net.named_parameters())
    for layer, (b, a) in adapters.pairs(arrays).items():
        delta = torch.from_numpy(arrays[b]) @ torch.from_numpy(arrays[a]) * 2
        expected = (stored[f"{layer}.weight"].float() + delta).bfloat16()
        assert torch.equal(weights[f"{layer}.weight"], expected)


def test_a_model_with_an_adapter_is_not_saved_as_a_model(tmp_path: Path) -> None:
    model = tuned()
    with pytest.raises(ModelError, match="still carries adapters"):
        models.save(model.net, model.tokenizer, tmp_path / "out")
    adapters.merge(model)
    models.save(model.net, model.tokenizer, tmp_path / "out")
    assert models.load(str(tmp_path / "out"), device="cpu").digest == model.digest
