# SPDX-License-Identifier: Apache-2.0
"""The statistics of a layer's inputs, and what the column loop needs of them.

min ||W X - Q X||^2 over Q has the Hessian H = 2 X X^T (per row of W the same).  Its sum over tokens adds exactly, also
over devices; any positive factor cancels, as damping is relative.  Of H^-1 only the rows of its upper Cholesky factor
U are used, H^-1 = U^T U: with F the columns that are not done yet, [H_F^-1]_ii = U_ii^2 and row i of H_F^-1 is
U_ii U[i, i:] (Frantar et al. 2023, arXiv 2210.17323, section 4, step 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

HARDER = 10.0  # damping grows by this factor while the matrix is not positive definite
LAST = 1.0  # and ends here


def accumulate(H: Tensor, x: Tensor) -> None:
    """H += 2 sum over tokens of x x^T; x [.., C] are inputs of real tokens (no padding), H float32 [C, C]."""
    flat = x.reshape(-1, x.shape[-1]).to(H.dtype)
    H.addmm_(flat.T, flat, alpha=2.0)


def inverse_cholesky(H: Tensor, damping: float) -> tuple[Tensor | None, Tensor, list[str]]:
    """(U, dead columns, notes): H^-1 = U^T U of the damped H [C, C], which is overwritten.

    Columns that no input touched get H_ii = 1; `damping` times the mean of the diagonal is added to it.  Where the
    factor does not exist, damping grows tenfold until 1; then U is None (nothing to go by: round to nearest).
    """
    diagonal = H.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    mean = diagonal.mean().item()
    if dead.all():
        return None, ~dead, ["nothing reached it: rounded to nearest"]
    notes = [f"{int(dead.sum())} of {len(dead)} inputs are always zero"] if dead.any() else []
    added = 0.0
    while True:
        diagonal += damping * mean - added
        added = damping * mean
        U = _factor(H)
        if U is not None:
            return U, dead, notes
        if damping >= LAST:
            return None, dead, [*notes, "no Cholesky factor at any damping: rounded to nearest"]
        damping = min(LAST, max(damping, 1e-3) * HARDER)
        notes.append(f"no Cholesky factor: damping raised to {damping:g}")


def _factor(H: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(H)
    if failed or not torch.isfinite(lower).all():
        return None
    U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed or not torch.isfinite(U).all() else U


def relative_error(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """||W X - Q X||^2 / ||W X||^2 from H = 2 X X^T; 0 where there was no input."""
    whole = ((W @ H) * W).sum().item()
    left = W - Q
    return ((left @ H) * left).sum().item() / whole if whole > 0 else 0.0
