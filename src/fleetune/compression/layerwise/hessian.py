# SPDX-License-Identifier: Apache-2.0
"""The statistics of a layer's inputs, and what the column loop needs of them.

min ||W X - Q X||^2 over Q has the Hessian H = 2 X X^T (per row of W the same).  Its sum over tokens adds exactly, also
over devices; any positive factor cancels, as damping is relative.  Of H^-1 only the rows of its upper Cholesky factor
U are used, H^-1 = U^T U: with F the columns that are not done yet, [H_F^-1]_ii = U_ii^2 and row i of H_F^-1 is
U_ii U[i, i:] (Frantar et al. 2023, arXiv 2210.17323, section 4, step 3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HARDER = 10.0  # damping grows by this factor while the matrix is not positive definite
LAST = 1.0  # and ends here
SMALL = 64  # columns of a triangle that is solved as a whole
TOKENS = 4096  # whose inputs are converted at a time
STRIP = 128  # columns of a symmetric product that are taken at a time


def accumulate(H: Tensor, x: Tensor) -> None:
    """H += 2 sum over tokens of x x^T; x [.., C] are inputs of real tokens (no padding), H float32 [C, C].

    Only the lower triangle counts until `whole` completes it: little more than half the work.
    """
    for tokens in x.reshape(-1, x.shape[-1]).split(TOKENS):  # type: ignore[no-untyped-call]
        flat = tokens.to(H.dtype)
        for first in range(0, len(H), STRIP):
            last = first + STRIP
            H[first:last, :last].addmm_(flat[:, first:last].T, flat[:, :last], alpha=2.0)


def whole(H: Tensor) -> Tensor:
    """H with its upper triangle made that of its lower one, in place."""
    for first in range(0, len(H), STRIP):
        last = first + STRIP
        H[first:last, first:last] = H[first:last, first:last].tril() + H[first:last, first:last].tril(-1).T
        H[first:last, last:] = H[last:, first:last].T
    return H


class Factor(NamedTuple):
    """What the column loop needs of H [C, C]."""

    U: Tensor | None  # [C, C]: H^-1 = U^T U of the damped H; None where it does not exist
    dead: Tensor  # bool [C]: inputs that are always zero
    damping: float  # what was added to the diagonal
    notes: tuple[str, ...]  # what had to be done differently


def inverse_cholesky(H: Tensor, damping: float) -> Factor:
    """The factor of H [C, C]; `damping` is a share of its mean diagonal.

    Columns that no input touched get H_ii = 1; `damping` times the mean of the diagonal is added to it.  Where the
    factor does not exist, damping grows tenfold until 1; then there is none (nothing to go by: round to nearest).
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
        U = _factor(backwards)
        if U is not None:
            return Factor(U, dead, added, tuple(notes))
        if damping >= LAST:
            failed = "no Cholesky factor at any damping: rounded to nearest"
            return Factor(None, dead, added, (*notes, failed))
        damping = min(LAST, max(damping, 1e-3) * HARDER)
        notes.append(f"no Cholesky factor: damping raised to {damping:g}")


def _factor(backwards: Tensor) -> Tensor | None:
    """U with H^-1 = U^T U, from H with its rows and columns taken backwards; None where it is not positive definite.

    The inverse of the Cholesky factor of H taken backwards is U backwards, so the inverse of H is never made: half the
    work of factoring that.
    """
    lower, failed = torch.linalg.cholesky_ex(backwards)
    if failed or not torch.isfinite(lower.sum(dtype=torch.float64)):
        return None
    U = _inverted(lower).flip(0, 1)
    return U if torch.isfinite(U.sum(dtype=torch.float64)) else None


def _inverted(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves: nearly all of it is matrix products."""
    n = len(lower)
    if n <= SMALL:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return solved
    k = n // 2
    first, last = _inverted(lower[:k, :k]), _inverted(lower[k:, k:])
    out = torch.zeros_like(lower)
    out[:k, :k], out[k:, k:] = first, last
    out[k:, :k] = last @ lower[k:, :k] @ first
    out[k:, :k].neg_()
    return out


def relative_error(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """||W X - Q X||^2 / ||W X||^2 from H = 2 X X^T; 0 where there was no input."""
    return share(trace(W - Q, H), trace(W, H))


def share(lost: float, given: float) -> float:
    """lost / given, 0 where nothing was given."""
    return lost / given if given > 0 else 0.0


def trace(W: Tensor, H: Tensor) -> float:
    """tr(W H W^T) of a symmetric H: each block beside the diagonal is multiplied once and counts twice."""
    total = 0.0
    for first in range(0, len(H), STRIP):
        last = first + STRIP
        strip = (W[:, first:last] @ H[first:last, :last]) * W[:, :last]
        total += 2 * strip[:, :first].sum().item() + strip[:, first:].sum().item()
    return total
