# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by layer: the gradients of a pass that keeps everything, bit for bit, with less kept."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fleetune.models.net import layers
from fleetune.models.net.layers import by_layer, layers_of
from tiny_families import build

IDS = torch.tensor([[5, 9, 20, 5, 3, 26, 2], [1, 4, 2, 3, 12, 8, 9]])


def trained(net: Any, context: Any) -> tuple[dict[str, Tensor], int]:
    """The gradients of a step in train mode, and the numbers that autograd kept for it."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.is_leaf and tensor.requires_grad else tensor.numel()
        return tensor

    net.train().requires_grad_(True)
    torch.manual_seed(7)
    with context:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = net(input_ids=IDS, labels=IDS, use_cache=False).loss
        before = kept  # the backward pass keeps a layer's for a while
        loss.backward()
    found = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found, before


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mamba"])
def test_gradients_are_the_same_bits_with_dropout_and_less_is_kept(family: str) -> None:
    changes = {"gpt2": {"resid_pdrop": 0.2, "attn_pdrop": 0.2}, "falcon": {"hidden_dropout": 0.2}}.get(
        family, {}
    )
    net: Any = build(family, **changes)
    whole, much = trained(net, nullcontext())
    again, less = trained(net, by_layer(net, small=0))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert less < 0.7 * much


def test_the_layers_are_as_they_were_afterwards() -> None:
    net = build("llama")
    layers = [net.get_submodule(layer.name) for layer in layers_of(net)]
    mark = layers[0].forward = layers[0].forward  # one has a forward of its own
    with pytest.raises(RuntimeError, match="stop"), by_layer(net):
        assert all("forward" in layer.__dict__ for layer in layers)
        raise RuntimeError("stop")
    assert [layer.__dict__.get("forward") for layer in layers] == [mark, None]


def test_a_small_batch_keeps_its_activations() -> None:
    net: Any = build("llama")
    entering = IDS.numel() * net.config.hidden_size * 4 * net.config.num_hidden_layers
    _, all_of_them = trained(net, nullcontext())
    assert trained(net, by_layer(net))[1] == all_of_them
    assert trained(net, by_layer(net, small=entering + 1))[1] == all_of_them
    assert trained(net, by_layer(net, small=entering))[1] < all_of_them


def test_free_memory_is_given_back_every_few_layers_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    net: Any = build("llama", num_hidden_layers=7)
    given: list[int] = []
    monkeypatch.setattr(layers, "give_back", lambda: given.append(1))
    trained(net, by_layer(net, small=0))
    assert not given  # a layer is entered by some kB
    monkeypatch.setattr(layers, "LARGE", 1)
    trained(net, by_layer(net, small=0))
    assert len(given) == 2  # one layer of each five, on the way there and back
