# SPDX-License-Identifier: Apache-2.0
"""Dropout of LoRA's inputs is torch's, bit for bit, and keeps less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from fleetune.adapters.lora import DroppedLinear


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 5, 64)])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_it_is_torchs_dropout_bit_for_bit(shape: tuple[int, ...], share: float, kind: torch.dtype) -> None:
    """In autocast for the types of 16 bits."""

    def run(own: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        plain = nn.Linear(64, 8, bias=False)
        x = torch.randn(shape, requires_grad=True)
        torch.manual_seed(8)
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            y = DroppedLinear.around(plain, share)(x) if own else plain(F.dropout(x, share))
        after = torch.rand(3)  # as many numbers were drawn
        (y.float().sin() * torch.arange(8.0)).sum().backward()
        assert x.grad is not None
        assert plain.weight.grad is not None
        return y.detach(), x.grad, plain.weight.grad, after

    for ours, theirs in zip(run(True), run(False), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_it_drops_nothing_outside_of_training() -> None:
    plain, x = nn.Linear(64, 8, bias=False), torch.randn(3, 64)
    assert torch.equal(DroppedLinear.around(plain, 0.5).eval()(x), plain(x))


def test_layers_with_one_input_keep_it_once() -> None:
    """Of four layers: the input, and a byte a number for each, where torch keeps eight."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        held.append(tensor)
        return tensor

    held: list[Tensor] = []
    x = torch.randn(100, 64, requires_grad=True)
    layers = [DroppedLinear.around(nn.Linear(64, 8, bias=False), 0.1) for _ in range(4)]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        for layer in layers:
            layer(x)
    weights = sum(layer.weight.nbytes for layer in layers)
    assert sum(kept.values()) == x.nbytes + 4 * x.numel() + weights
