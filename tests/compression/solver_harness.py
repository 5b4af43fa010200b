"""What the tests of solvers share: matrices with Hessians, and optimal-brain updates with explicit inverses in float64."""

import functools

import torch
from torch import Tensor

from fleetune import compression
from fleetune.compression.layerwise import hessian
from fleetune.compression.layerwise.grids import Grid
from fleetune.models.artefact import Quantised
from fleetune.models.families.number_types import CODEBOOKS


def work(seed: int, R: int, C: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(weights [R, C], Hessian [C, C] of inputs whose variances fall like i^-1.4, as those of language models do)."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(C, C, generator=g, dtype=dtype))[0]
    spread = torch.arange(1, C + 1, dtype=dtype)[:, None] ** -0.7
    x = torch.randn(4 * C, C, generator=g, dtype=dtype) @ (spread * turn)
    H = torch.zeros(C, C, dtype=dtype)
    hessian.accumulate(H, x)
    return torch.randn(R, C, generator=g, dtype=dtype), hessian.mirrored(H)


def relative_error(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """||W X - Q X||^2 / ||W X||^2 from H = 2 X X^T."""
    return hessian.share(hessian.trace(W - Q, H), hessian.trace(W, H))


def damped(H: Tensor, damping: float) -> Tensor:
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


@functools.lru_cache(maxsize=2)
def inverse_rows(H: Tensor) -> list[Tensor]:
    """The first row of [H_F]^-1 with F the columns from i on, solved anew for every column."""
    first = torch.eye(len(H), 1, dtype=H.dtype)
    return [torch.linalg.solve(H[i:, i:], first[: len(H) - i])[:, 0] for i in range(len(H))]


def brain_surgeon(W: Tensor, H: Tensor, settle) -> Tensor:
    """Column by column with (H_F)^-1; settle(i, updated W) gives column i."""
    W = W.clone()
    for i, row in enumerate(inverse_rows(H)):
        q = settle(i, W)
        W[:, i + 1 :] -= torch.outer((W[:, i] - q) / row[0], row[1:])
        W[:, i] = q
    return W


def onto(grid: Grid, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest values to w [R]."""
    if not grid.codebook:
        return scale * ((torch.round(w / scale) + zero).clamp(0, grid.top) - zero)
    values = scale[:, None] * torch.tensor(CODEBOOKS[grid.codebook], dtype=w.dtype)
    return values.gather(1, (values - w[:, None]).abs().argmin(1, keepdim=True))[:, 0]


def curvature(H: Tensor) -> Tensor:
    """1 / [H_F^-1]_ii with F the columns from i on, [C]."""
    return torch.stack([1 / row[0] for row in inverse_rows(H)])


def dense(solved: compression.Solved) -> Tensor:
    return solved.weight.dense() if isinstance(solved.weight, Quantised) else solved.weight
