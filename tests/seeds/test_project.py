# SPDX-License-Identifier: Apache-2.0
"""Projected gradients: against the dense definition z_k . g, and as a walk through a pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fleetune import models
from fleetune.data.encode import Encoded, collate
from fleetune.models.net.layers import by_layer
from fleetune.models.net.model import named_tensors
from fleetune.seeds import noise
from fleetune.seeds.descent import Position, Projection, descend_projected, fold
from fleetune.seeds.view import Tape, View
from fleetune.seeds.weights import kernels
from law_definition import slow_places

KEY, EPOCH = 0x0123456789ABCDEF, 3
SHAPES = {"a": (70, 61), "b": (4096,), "c": (1,), "d": (3, 2731), "e": (4097,)}  # 4270, 4096, 1, 8193, 4097


def dense(K: int, start: int, g: np.ndarray) -> np.ndarray:
    """p_k = sum_i D[i] H[place(i), k] g[i], written out; H after Sylvester."""
    H = np.ones((1, 1))
    while len(H) < K:
        H = np.block([[H, H], [H, -H]])
    D = noise.signs(KEY, EPOCH, start, g.size).astype(np.float64)
    return (D * g) @ H[slow_places(K, start, g.size)]


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("K", [1, 2, 64, 512])
def test_a_fold_and_a_transform_are_the_slopes_along_all_directions(K, backend):
    rng = np.random.default_rng(K)
    sums, expected, start, size = np.zeros(K), np.zeros(K), 0, 0.0
    for shape in SHAPES.values():
        g = rng.normal(size=shape).astype(np.float32)
        fold(sums, torch.from_numpy(g), start, KEY, EPOCH, kernels(torch.device("cpu"), backend))
        expected += dense(K, start, g.astype(np.float64).ravel())
        start, size = start + -(-g.size // 4096) * 4096, size + float((g.astype(np.float64) ** 2).sum())
    np.testing.assert_allclose(noise.fwht(sums), expected, rtol=0, atol=1e-5 * size**0.5)


@pytest.mark.parametrize("K", [4096, 16384])
def test_pools_wider_than_a_tile(K):
    """Against single slopes of some directions: the start of a tensor is then any multiple of 4096 modulo K."""
    g = np.random.default_rng(0).normal(size=3 * K + 777).astype(np.float32)
    start, sums = 5 * 4096, np.zeros(K)
    fold(sums, torch.from_numpy(g), start, KEY, EPOCH, kernels(torch.device("cpu")))
    p = noise.fwht(sums)
    D = noise.signs(KEY, EPOCH, start, g.size).astype(np.float64)
    for k in (0, 1, 4095, K // 2, K - 1):
        column = noise.hadamard_column(K, k)[slow_places(K, start, g.size)]
        assert p[k] == pytest.approx(float((D * column) @ g), abs=1e-2)


def test_backends_threads_and_16_bit_gradients_agree(monkeypatch):
    monkeypatch.setattr("fleetune.seeds.descent.CHUNK", 5000)  # cut in the middle of tiles and of rows
    g = torch.randn(3, 4111, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        seen = []
        for backend, threads in (("numba", 1), ("numba", 3), ("torch", None)):
            sums = np.zeros(256)
            fold(sums, g.to(dtype), 8192, KEY, EPOCH, kernels(torch.device("cpu"), backend), threads=threads)
            seen.append(sums)
        whole = np.zeros(256)
        np.add.at(
            whole,
            slow_places(256, 8192, g.numel()),
            g.to(dtype).double().numpy().ravel() * noise.signs(KEY, EPOCH, 8192, g.numel()),
        )
        for sums in seen:
            np.testing.assert_allclose(sums, whole, rtol=0, atol=1e-4)


def batch():
    ids = [np.arange(3 + i, 15 + i, dtype=np.int32) for i in range(3)]
    return collate([Encoded(row, 4) for row in ids], 0)


def moved_view(K=64):
    model = models.tiny_llama()
    view = View(named_tensors(model.net), model.net, run_key=KEY, law="hashed", grid=1e-3 / 256)
    c = np.random.default_rng(5).integers(-400, 400, K)
    position = Position("hashed", K, np.arange(K, dtype=np.uint64) + (np.uint64(EPOCH) << np.uint64(32)), c)
    position.place(view)
    return model, view, position


def loss_of(net, b):
    logits = net(input_ids=b.input_ids, attention_mask=b.attention_mask).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), b.labels[:, 1:].flatten(), ignore_index=-100)


def plain_gradient(view, b):
    """The gradient at the view's point of an ordinary model that holds the moved weights."""
    other = models.tiny_llama()
    with torch.no_grad():
        tensors = dict(named_tensors(other.net))
        for name, tensor in view.tensors():
            tensors[name].copy_(tensor)
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    loss_of(other.net, b).backward()
    return {name: t.grad.double().numpy().ravel() for name, t in tensors.items()}


def test_the_projection_of_backward_is_the_projection_of_the_gradient_at_the_point():
    K, b = 64, batch()
    model, view, _ = moved_view(K)
    expected = np.zeros(K)
    gradient = plain_gradient(view, b)
    for slot in view.slots:
        expected += dense(K, slot.start, gradient[slot.name])
    projection = Projection(view, K, EPOCH)
    with Tape(view, projection.add):
        loss_of(model.net, b).backward()
    p = projection.take()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(p, expected, rtol=0, atol=2e-5)
    assert not projection.take().any()
    assert not any(p.requires_grad or p.grad is not None for p in model.net.parameters())


def test_a_tape_leaves_no_trace_even_after_an_error():
    model, view, _ = moved_view()
    before = {n: (p, p.clone()) for n, p in model.net.named_parameters()}
    with torch.inference_mode():
        seen = loss_of(model.net, batch())
    with pytest.raises(RuntimeError, match="stop"), Tape(view, lambda start, g: None), by_layer(model.net):
        assert loss_of(model.net, batch()).item() == pytest.approx(seen.item(), abs=1e-6)
        raise RuntimeError("stop")
    after = dict(model.net.named_parameters())
    assert all(after[n] is p and torch.equal(p, old) for n, (p, old) in before.items())
    assert not loss_of(model.net, batch()).requires_grad
    with torch.inference_mode():
        assert loss_of(model.net, batch()) == seen


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_walk_is_gradient_descent_in_the_space_of_the_pool(clip):
    """a <- a - units/K p, with p of an ordinary gradient at the point of the rounded a, step by step."""
    K, b, units = 64, batch(), 3e3
    model, view, position = moved_view(K)
    with torch.inference_mode():
        begun = loss_of(model.net, b)
    walk = descend_projected(model, view, position, EPOCH, [b, b, b], units=units, clip=clip)
    with torch.inference_mode():
        assert loss_of(model.net, b) == begun  # the view is where the walk began
    ids, moved = np.array(position.ids, np.uint64), np.zeros(K)
    for _ in range(3):
        view.place(noise.passes("hashed", K, ids, position.coefficients + np.rint(moved).astype(np.int64)))
        gradient = plain_gradient(view, b)
        p = sum(dense(K, slot.start, gradient[slot.name]) for slot in view.slots)
        moved -= units / K * (np.clip(p, -clip, clip) if clip else p)
    assert walk.steps == 3
    np.testing.assert_allclose(walk.moved, moved, rtol=0, atol=0.01)
    view.place(noise.passes("hashed", K, ids, position.coefficients + np.rint(moved).astype(np.int64)))
    with torch.inference_mode():
        assert loss_of(model.net, b) < begun


def test_a_gradient_that_is_not_finite_is_no_step():
    model, view, position = moved_view()
    with torch.no_grad():
        model.net.model.norm.weight[0] = float("nan")
    walk = descend_projected(model, view, position, EPOCH, [batch()], units=1e3, clip=0.0)
    assert (walk.steps, walk.loss) == (0, float("inf"))
    assert not walk.moved.any()
