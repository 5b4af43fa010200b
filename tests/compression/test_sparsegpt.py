# SPDX-License-Identifier: Apache-2.0
"""SparseGPT on one matrix, against optimal-brain updates with explicit inverses in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_harness import brain_surgeon, damped, dense, work
from torch import Tensor

from fleetune import compression
from fleetune.compression.layerwise.grids import Grid


@pytest.mark.parametrize("bits", [0, 4])
def test_sparsegpt_unstructured_is_the_surgeon_with_a_mask(bits: int) -> None:
    """C < 128: one block, so the mask comes from the weights and U as they are at its start."""
    W, H = work(3, 6, 16)
    solver = compression.make("sparsegpt", {"sparsity": 0.4, "bits": bits, "group": 8, "grid": "asymmetric"})
    got = dense(solver.solve(W.clone(), H.clone())).double()
    H = damped(H, 0.01)
    spread = torch.tensor([torch.linalg.inv(H[i:, i:])[0, 0] for i in range(16)], dtype=W.dtype)
    score = (W**2 / spread).reshape(-1)
    mask = torch.zeros(len(score), dtype=torch.bool)
    mask[score.argsort()[: int(0.4 * len(score))]] = True
    mask = mask.view_as(W)
    assert int((got == 0).sum()) >= int(mask.sum()) == 38
    fits: dict[int, tuple[Tensor, Tensor]] = {}

    def settle(i: int, now: Tensor) -> Tensor:
        if not bits:
            return now[:, i].masked_fill(mask[:, i], 0.0)
        if i % 8 == 0:
            fits[i // 8] = Grid("asymmetric", 4).find(now[:, i : i + 8].masked_fill(mask[:, i : i + 8], 0.0))
        scale, zero = fits[i // 8]
        q = scale * ((torch.round(now[:, i] / scale) + zero).clamp(0, 15) - zero)
        return q.masked_fill(mask[:, i], 0.0)

    torch.testing.assert_close(got, brain_surgeon(W, H, settle), rtol=0, atol=1e-6 if bits else 1e-9)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
def test_sparsegpt_patterns_follow_the_updated_weights(n: int, m: int) -> None:
    W, H = work(4, 6, 32)
    got = dense(compression.make("sparsegpt", {"n": n, "m": m}).solve(W.clone(), H.clone()))
    assert ((got.view(6, -1, m) == 0).sum(2) == n).all()
    H = damped(H, 0.01)
    spread = torch.tensor([torch.linalg.inv(H[i:, i:])[0, 0] for i in range(32)], dtype=W.dtype)
    mask = torch.zeros_like(W, dtype=torch.bool)

    def settle(i: int, now: Tensor) -> Tensor:
        if i % m == 0:
            score = now[:, i : i + m] ** 2 / spread[i : i + m]
            mask[:, i : i + m].scatter_(1, score.argsort(1)[:, :n], True)
        return now[:, i].masked_fill(mask[:, i], 0.0)

    torch.testing.assert_close(got, brain_surgeon(W, H, settle), rtol=0, atol=1e-9)


@given(seed=st.integers(0, 99), sparsity=st.floats(0, 0.99), C=st.integers(1, 200), R=st.integers(1, 8))
@settings(max_examples=15)
def test_exactly_the_share_of_each_block_is_pruned(seed: int, sparsity: float, C: int, R: int) -> None:
    W, H = work(seed, R, C, torch.float32)
    got = dense(compression.make("sparsegpt", {"sparsity": sparsity}).solve(W.clone(), H))
    want = [int(len(W[:, a : a + 128].reshape(-1)) * sparsity) for a in range(0, C, 128)]
    assert [int((got[:, a : a + 128] == 0).sum()) for a in range(0, C, 128)] == want
