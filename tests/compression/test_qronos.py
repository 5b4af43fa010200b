"""Qronos against the paper's algorithm written with a least-squares problem for every column, and what the driver gives it."""

from typing import Any

import pytest
import torch
from solver_harness import curvature, damped, dense, onto
from torch import Tensor

from fleetune import compression
from fleetune.compression.layerwise.grids import KINDS, Grid
from fleetune.errors import RecipeError

C, GROUP, DAMPING = 32, 8, 0.02


def drifted(seed: int, share: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [R, C], inputs X and Y [tokens, C] in the dense and the compressed model), float64."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(C, C, generator=g, dtype=torch.float64))[0]
    spread = torch.arange(1, C + 1)[:, None] ** -0.7 * turn
    X = torch.randn(4 * C, C, generator=g, dtype=torch.float64) @ spread
    Y = X + share * X.std() * torch.randn(X.shape, generator=g, dtype=torch.float64)
    return torch.randn(5, C, generator=g, dtype=torch.float64), X, Y


def sums(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """(H, D) in float64."""
    return 2 * Y.T @ Y, 2 * (X - Y).T @ Y


def paper(W: Tensor, X: Tensor, Y: Tensor, settle: Any) -> Tensor:
    """Algorithm 1, [R, C]: for each column its best value with the others held, then least squares
    for all later ones.  settle(i, updated W) gives column i.

    Damping is data: rows that ask every weight to stay as it is.
    """
    lam = (DAMPING * (2 * Y.T @ Y).diagonal().mean() / 2).sqrt()
    rows = lam * torch.eye(C, dtype=W.dtype)
    X, Y = torch.cat([X, rows]), torch.cat([Y, rows])
    wanted, now = X @ W.T, W.T.clone()
    for i in range(C):
        y = Y[:, i : i + 1]
        others = [j for j in range(C) if j != i]
        now[i] = torch.linalg.lstsq(y, wanted - Y[:, others] @ now[others]).solution[0]
        if i == 0:  # what the first grid is fitted to: the later columns as they are best with this value
            now[1:] = torch.linalg.lstsq(Y[:, 1:], wanted - y @ now[:1]).solution
        now[i] = settle(i, now.T)
        now[i + 1 :] = torch.linalg.lstsq(Y[:, i + 1 :], wanted - Y[:, : i + 1] @ now[: i + 1]).solution
    return now.T


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_papers_algorithm(kind: str) -> None:
    W, X, Y = drifted(2)
    H, D = sums(X, Y)
    values = {"group": GROUP, "grid": kind, "damping": DAMPING}
    solver: Any = compression.make("qronos", values)
    got = dense(solver.solve(solver.correct(W, H, D), H))
    grid, fits = Grid(kind, 4), dict[int, tuple[Tensor, Tensor]]()
    h = curvature(damped(H, DAMPING))

    def settle(i: int, now: Tensor) -> Tensor:
        g = i // GROUP
        if g not in fits:
            fits[g] = grid.find(now[:, i : i + GROUP], h[i : i + GROUP])
        return onto(grid, now[:, i], *fits[g])

    want = paper(W, X, Y, settle)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    plain: Any = compression.make("optq", values)
    assert not torch.equal(dense(plain.solve(W, H)), got)


@pytest.mark.parametrize("kind", ["ggml", "iq4_nl", "q4_k"])
def test_without_drift_it_is_optq(kind: str) -> None:
    g = torch.Generator().manual_seed(4)
    W, x = torch.randn(6, 256, generator=g), torch.randn(600, 256, generator=g)
    H, D = sums(x, x)
    values = {"grid": kind, "damping": DAMPING}
    solver: Any = compression.make("qronos", values)
    assert torch.equal(solver.correct(W, H, D), W)
    same = compression.make("optq", values)
    assert torch.equal(dense(solver.solve(W, H)), dense(same.solve(W, H)))


def test_zeros_stay_and_dead_inputs_go() -> None:
    W, X, Y = drifted(5)
    W[:, ::3] = 0.0
    Y[:, 7] = 0.0
    H, D = sums(X, Y)
    solver: Any = compression.make("qronos", {"group": GROUP})
    Q = dense(solver.solve(solver.correct(W, H, D), H))
    assert not Q[:, ::3].any()
    assert not Q[:, 7].any()
    assert Q[:, 1].any()
    assert torch.isfinite(Q).all()
    with pytest.raises(RecipeError, match="exactly 0"):
        compression.make("qronos", {"group": GROUP, "grid": "iq4_nl"}).correct(W, H, D)  # type: ignore[union-attr]


def test_a_first_input_that_is_always_zero_does_no_harm() -> None:
    W, X, Y = drifted(7)
    Y[:, 0] = 0.0
    H, D = sums(X, Y)
    solver: Any = compression.make("qronos", {"group": GROUP, "damping": 0})
    rest = torch.linalg.lstsq(Y[:, 1:], X @ W.T).solution.T
    torch.testing.assert_close(solver.correct(W, H, D)[:, 1:], rest)


def test_without_a_factor_nothing_is_corrected() -> None:
    W, X, Y = drifted(6)
    solver: Any = compression.make("qronos", {"group": GROUP})
    _, D = sums(X, Y)
    assert solver.correct(W, torch.zeros(C, C, dtype=W.dtype), D) is W
