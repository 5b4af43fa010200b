# SPDX-License-Identifier: Apache-2.0
"""Gradients through a view against torch's own of a net that holds the moved weights, for every kind of layer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fleetune.data.encode import MASKED, Batch
from fleetune.evaluation import head_loss
from fleetune.evaluation.losses import token_losses
from fleetune.models.net.layers import by_layer
from fleetune.models.net.model import named_tensors
from fleetune.seeds import noise
from fleetune.seeds import weights as views
from fleetune.seeds.view import Tape, View
from tiny_families import DECODERS, ENCODERS, build

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
KEY, K = 0x0123456789ABCDEF, 64


def batch_for(net: nn.Module) -> Batch:
    """Two rows with padding, whose token also stands where it counts, as one that ends a turn does."""
    pad = int(net.config.pad_token_id or 0)  # type: ignore[union-attr, arg-type]
    ids = torch.tensor([[5, 9, 20, 5, pad, 26, 2], [1, 4, 2, 3, 12, pad, pad]])
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    if type(net).__name__.endswith("ForSequenceClassification"):
        return Batch(ids, mask, torch.tensor([1, 0]))
    labels = ids.masked_fill(mask == 0, MASKED)
    labels[:, :2] = MASKED
    return Batch(ids, mask, labels)


def moved(net: nn.Module) -> View:
    view = View(named_tensors(net), net, run_key=KEY, law="hashed", grid=1e-5)
    c = np.random.default_rng(5).integers(-400, 400, K)
    view.place(noise.passes("hashed", K, np.arange(K, dtype=np.uint64), c))
    return view


def by_tape(net: nn.Module, view: View, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient of each tensor, put together from what the sink is handed, and the losses."""
    whole = {slot.name: torch.zeros(slot.tensor.numel()) for slot in view.slots}
    ends = {slot.name: (slot.start, slot.start + slot.tensor.numel()) for slot in view.slots}

    def sink(start: int, gradient: Tensor) -> None:
        assert gradient.is_contiguous()
        name = next(n for n, (a, b) in ends.items() if a <= start < b)
        first = start - ends[name][0]
        whole[name][first : first + gradient.numel()] += gradient.float().view(-1)

    with Tape(view, sink), by_layer(net, small=0), torch.enable_grad():
        found, _ = token_losses(net, batch)
        found.mean().backward()
    return whole, found.detach()


def plain(net: nn.Module, view: View, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """The same by torch alone, of a copy that holds the moved weights."""
    other = dict(view.tensors())
    view.remove()
    twin = copy.deepcopy(net)
    for name, tensor in named_tensors(twin):
        tensor.data.copy_(other[name])
        tensor.requires_grad_(True)
    for module in twin.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    with torch.enable_grad():
        found, _ = token_losses(twin, batch)
        found.mean().backward()
    none = torch.zeros(1)
    return {
        n: (t.grad if t.grad is not None else none.expand(t.numel())).reshape(-1)
        for n, t in named_tensors(twin)
    }, found.detach()


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_the_gradients_are_those_of_a_net_that_holds_the_moved_weights(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "CHUNK", 700)  # several blocks of rows a matrix
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 256)  # several pieces of rows a block
    net = build(family).eval().requires_grad_(False)
    batch = batch_for(net)
    view = moved(net)
    found, loss = by_tape(net, view, batch)
    wanted, plain_loss = plain(net, view, batch)
    torch.testing.assert_close(loss, plain_loss, rtol=2e-4, atol=2e-5)
    size = max(float(g.abs().max()) for g in wanted.values())
    assert size > 1e-4
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=2e-5 * size, msg=lambda m, n=name: f"{n}: {m}"
        )
