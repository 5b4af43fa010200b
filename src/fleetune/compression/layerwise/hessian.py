"""Accumulate the Hessian of a layer's output error, and factor its inverse for the column loop.

||W X - Q X||^2 as a function of Q has the Hessian H = 2 X X^T, the same for every row.  The loop needs only the upper Cholesky
factor U of H^-1 = U^T U: with F the columns that are still to come, [H_F^-1]_ii = U_ii^2 and row i of H_F^-1 is U_ii U[i, i:]
(Frantar et al. 2023, section 4, step 3).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from fleetune.compression import Solved
from fleetune.models.artefact import dense

DAMPING_GROWTH = 10.0  # factor of damping while the matrix is not positive definite
MAX_DAMPING = 1.0  # no factor is sought with more
DIRECT_SIZE = 64  # columns up to which a triangle is inverted in one call
TOKENS_AT_ONCE = 4096  # tokens whose inputs are converted to H's dtype in one piece
STRIP = 128  # columns of a symmetric product computed in one piece


def accumulate(H: Tensor, x: Tensor) -> None:
    """Add 2 x x^T of every token to H float32 [C, C]; x [.., C] are the inputs of real tokens (no padding).

    Only the lower triangle is right until `mirrored` completes it: little more than half the work.
    """
    for flat in _pieces(H, x):
        for first in range(0, len(H), STRIP):
            last = first + STRIP
            H[first:last, :last].addmm_(flat[:, first:last].T, flat[:, :last], alpha=2.0)


def accumulate_drift(D: Tensor, x: Tensor, y: Tensor) -> None:
    """Add 2 (x - y) y^T of every token to D float32 [C, C]; x and y [.., C] are inputs in the dense and compressed model."""
    for of_dense, of_compressed in zip(_pieces(D, x), _pieces(D, y), strict=True):
        D.addmm_((of_dense - of_compressed).T, of_compressed, alpha=2.0)


def _pieces(H: Tensor, x: Tensor) -> Iterator[Tensor]:
    """Yield inputs [.., C] some tokens at a time, [tokens, C] in H's dtype."""
    for part in x.reshape(-1, x.shape[-1]).split(TOKENS_AT_ONCE):  # type: ignore[no-untyped-call]
        yield part.to(H.dtype)


def mirrored(H: Tensor) -> Tensor:
    """Copy the lower triangle of H to its upper one, in place, and return H."""
    for first in range(0, len(H), STRIP):
        last = first + STRIP
        H[first:last, first:last] = H[first:last, first:last].tril() + H[first:last, first:last].tril(-1).T
        H[first:last, last:] = H[last:, first:last].T
    return H


class Factor(NamedTuple):
    """The factor of H [C, C] that the column loop works with."""

    U: Tensor | None  # [C, C]: H^-1 = U^T U of the damped H; None where there is none
    dead: Tensor  # bool [C]: inputs that are always zero
    damping: float  # what was added to the diagonal
    notes: tuple[str, ...]  # what had to be done differently

    @property
    def curvature(self) -> Tensor | None:
        """How fast the error grows with that of each column, [C], when later columns correct it: 1 / U_ii^2, 0 for dead
        inputs.  None without a factor.
        """
        return None if self.U is None else self.U.diagonal().pow(-2).masked_fill(self.dead, 0.0)


def _factor(H: Tensor, damping: float) -> Factor:
    """Factor H [C, C] with `damping` times the mean of its diagonal added to the diagonal.

    Inputs that are always zero get H_ii = 1.  Where there is no factor, damping grows tenfold, up to 1; if there is
    still none, U is None, and the layer is to be rounded to nearest.
    """
    backwards, dead = H.flip(0, 1), H.diagonal() == 0
    mean = ((H.diagonal().sum() + dead.sum()) / len(H)).item()
    diagonal = backwards.diagonal()
    diagonal[dead.flip(0)] = 1.0
    if dead.all():
        return Factor(None, ~dead, 0.0, ("nothing reached it: rounded to nearest",))
    notes = [f"{int(dead.sum())} of {len(dead)} inputs are always zero"] if dead.any() else []
    added = 0.0
    while True:
        diagonal += damping * mean - added
        added = damping * mean
        U = _inverse_factor(backwards)
        if U is not None:
            return Factor(U, dead, added, tuple(notes))
        if damping >= MAX_DAMPING:
            failed = "no Cholesky factor at any damping: rounded to nearest"
            return Factor(None, dead, added, (*notes, failed))
        damping = min(MAX_DAMPING, max(damping, 1e-3) * DAMPING_GROWTH)
        notes.append(f"no Cholesky factor: damping raised to {damping:g}")


_MADE: ContextVar[Callable[[Tensor, float], Factor]] = ContextVar("made", default=_factor)


def inverse_cholesky(H: Tensor, damping: float) -> Factor:
    """Return the factor of H [C, C], see `_factor`; within `factor_kept` the last one is not made again."""
    return _MADE.get()(H, damping)


@contextmanager
def factor_kept() -> Iterator[None]:
    """Keep the last factor while the block runs: layers that read the same tensor share it.  Their H must not change."""
    before = _MADE.set(functools.lru_cache(maxsize=1)(_factor))
    try:
        yield
    finally:
        _MADE.reset(before)


def _inverse_factor(backwards: Tensor) -> Tensor | None:
    """Return U with H^-1 = U^T U, given H with rows and columns reversed; None if H is not positive definite.

    The inverse of the Cholesky factor of the reversed H is the reversed U.  So H is never inverted, which halves the
    work.
    """
    lower, failed = torch.linalg.cholesky_ex(backwards)
    if failed or not torch.isfinite(lower.sum(dtype=torch.float64)):
        return None
    U = _triangular_inverse(lower).flip(0, 1)
    return U if torch.isfinite(U.sum(dtype=torch.float64)) else None


def _triangular_inverse(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix by halves: nearly all the work is in matrix products."""
    n = len(lower)
    if n <= DIRECT_SIZE:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return solved
    k = n // 2
    first, last = _triangular_inverse(lower[:k, :k]), _triangular_inverse(lower[k:, k:])
    out = torch.zeros_like(lower)
    out[:k, :k], out[k:, k:] = first, last
    out[k:, :k] = last @ lower[k:, :k] @ first
    out[k:, :k].neg_()
    return out


def share(lost: float, given: float) -> float:
    """Return lost / given, or 0 where `given` is 0."""
    return lost / given if given > 0 else 0.0


def lost(W: Tensor, solved: Solved, H: Tensor) -> float:
    """Return the squared error of a matrix's outputs: what the solver tells, else tr(E H E^T) of the errors E of its weights."""
    return trace(W - dense(solved.weight), H) if solved.loss is None else solved.loss


def trace(W: Tensor, H: Tensor) -> float:
    """Return tr(W H W^T) of a symmetric H; each block beside the diagonal is multiplied once and counted twice."""
    total = 0.0
    for first in range(0, len(H), STRIP):
        last = first + STRIP
        strip = (W[:, first:last] @ H[first:last, :last]) * W[:, :last]
        total += 2 * strip[:, :first].sum().item() + strip[:, first:].sum().item()
    return total


def damping_problems(damping: float) -> list[str]:
    """List what is wrong with a damping."""
    return [] if 0 <= damping <= 1 else [f"damping = {damping} is not between 0 and 1"]
