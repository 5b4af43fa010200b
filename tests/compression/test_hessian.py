# SPDX-License-Identifier: Apache-2.0
"""The Hessian's sums, and the factor of its inverse against explicit inverses in float64."""

from __future__ import annotations

import pytest
import torch
from solver_harness import curvature, damped, relative_error, work

from fleetune.compression.layerwise import hessian


@pytest.mark.parametrize("C", [7, 128, 129, 300])  # less than a strip, one, and several
def test_sums_and_errors_are_those_of_the_inputs_and_outputs(C: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(50, C, generator=g).double(), torch.randn(3, C, generator=g).double()
    Q, H = torch.round(W), torch.zeros(C, C).double()
    for part in x.split(20):
        hessian.accumulate(H, part[None])
    H = hessian.mirrored(H)
    torch.testing.assert_close(H, 2 * x.T @ x)
    assert torch.equal(H, H.T)
    want = ((x @ (W - Q).T) ** 2).sum() / ((x @ W.T) ** 2).sum()
    assert relative_error(W, Q, H) == pytest.approx(want.item(), rel=1e-12)


def test_the_curvature_is_that_of_the_columns_that_are_left_and_0_for_dead_inputs() -> None:
    _, H = work(9, 1, 12)
    H[:, [2, 11]] = 0
    H[[2, 11]] = 0
    factor = hessian.inverse_cholesky(H.clone(), 0.0)
    left = H.clone()
    left[[2, 11], [2, 11]] = 1
    want = curvature(left)
    want[[2, 11]] = 0
    assert factor.curvature is not None
    torch.testing.assert_close(factor.curvature, want, rtol=1e-9, atol=1e-12)
    assert hessian.inverse_cholesky(torch.zeros(3, 3), 0.01).curvature is None


def test_u_holds_every_inverse() -> None:
    """U_ii^2 and U_ii U[i, i:] against explicit inverses of what is left."""
    _, H = work(9, 1, 12)
    U, _, _, notes = hessian.inverse_cholesky(H.clone(), 0.05)
    assert notes == ()
    for i in range(12):
        left = torch.linalg.inv(damped(H, 0.05)[i:, i:])
        torch.testing.assert_close(U[i, i] * U[i, i:], left[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("C", [1, 64, 65, 200])
def test_u_of_a_wide_layer_is_put_together_of_halves(C: int) -> None:
    _, H = work(4, 1, C)
    U, *_ = hessian.inverse_cholesky(H.clone(), 0.05)
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(damped(H, 0.05)), rtol=1e-9, atol=1e-12)
