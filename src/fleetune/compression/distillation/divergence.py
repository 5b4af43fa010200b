# SPDX-License-Identifier: Apache-2.0
"""How far a student's next-token distributions are from a teacher's, and how likely it is to write what stands there.

The divergence is GKD's (arXiv 2306.13649, section 3.1; see `gkd.py`).  Of the logits only a chunk of tokens is there at a
time; for the gradient each chunk is made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fleetune.data.encode import MASKED, Batch
from fleetune.evaluation.losses import CHUNK_BYTES, predictors

Predictors = tuple[Tensor, Callable[[Tensor], Tensor]]  # what `losses.predictors` gives


def divergence(Q: Tensor, P: Tensor, beta: float) -> Tensor:
    """D of each row, in nats, from logits [n, V] of student Q and teacher P: float32 [n] (float64 stays)."""
    q, p = (logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1) for logits in (Q, P))
    if beta == 0:
        return _kl(p, q)
    if beta == 1:
        return _kl(q, p)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def divergences(
    student: Predictors, teacher: nn.Module, batch: Batch, beta: float, *, chunk: int = 0
) -> Tensor:
    """D of each of the batch's N scored tokens, `chunk` of them at a time (0: by memory): float32 [N].

    `student` is what its `predictors` gave.  With gradients enabled the result can be back-propagated to it; nothing
    goes to the teacher.
    """
    head = student[1]
    with torch.no_grad():
        known, teach = predictors(teacher, batch)

    def compare(rows: Tensor, known: Tensor) -> Tensor:
        with torch.no_grad():
            P = teach(known)
        Q = head(rows)
        V = min(P.shape[-1], Q.shape[-1])
        return divergence(Q[:, :V], P[:, :V], beta)

    return _chunked(compare, student, known, chunk)


def log_probs(student: Predictors, batch: Batch, temperature: float, *, chunk: int = 0) -> Tensor:
    """log of the probability with which each of the N scored tokens is written at `temperature`: float32 [N].

    As `divergences`, it can be back-propagated.
    """
    head, labels = student[1], batch.labels[:, 1:]

    def take(rows: Tensor, tokens: Tensor) -> Tensor:
        Q = head(rows)
        Q = Q.to(torch.promote_types(Q.dtype, torch.float32)) / temperature
        return -F.cross_entropy(Q, tokens, reduction="none")

    return _chunked(take, student, labels[labels != MASKED], chunk)


def _chunked(
    function: Callable[[Tensor, Tensor], Tensor], student: Predictors, other: Tensor, chunk: int
) -> Tensor:
    """`function(rows, other)` [N], a chunk at a time; for a gradient each is made again rather than kept."""
    rows, head = student
    # A chunk's backward pass has some 20 arrays [chunk, V] alive, so each is a quarter of what a lone loss may take.
    size = chunk or max(1, CHUNK_BYTES // (16 * head(rows[:0]).shape[-1]))
    pieces = [(rows[a : a + size], other[a : a + size]) for a in range(0, max(1, len(rows)), size)]
    if not torch.is_grad_enabled():
        return torch.cat([function(*piece) for piece in pieces])
    return torch.cat([
        cast(Tensor, checkpoint(function, *piece, use_reentrant=False, preserve_rng_state=False))
        for piece in pieces
    ])  # fmt: skip
