"""Compute the divergence of a student's next-token distributions from a teacher's (arXiv 2306.13649, section 3.1)."""

import functools
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fleetune.data.encode import Batch
from fleetune.evaluation.head_loss import CHUNK_BYTES
from fleetune.evaluation.losses import predictors

Predictors = tuple[Tensor, Callable[[Tensor], Tensor]]  # the result of `losses.predictors`


def divergence(Q: Tensor, P: Tensor, beta: float) -> Tensor:
    """Return D of each row, in nats, from logits [n, V] of student Q and teacher P: float32 [n] (float64 stays)."""
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
    """Return D of each of the batch's N scored tokens, float32 [N], `chunk` tokens at a time (0: by memory).

    With gradients enabled the result can be back-propagated to the student; the teacher gets no gradient.
    """
    head = student[1]
    with torch.no_grad():
        hidden, teacher_head = predictors(teacher, batch)

    def compare(rows: Tensor, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            P = teacher_head(hidden)
        Q = head(rows)
        V = min(P.shape[-1], Q.shape[-1])
        return divergence(Q[:, :V], P[:, :V], beta)

    # The backward pass of a chunk has some 20 arrays [chunk, V] alive, so a chunk is a quarter of a plain loss's.
    rows, size = student[0], chunk or max(1, CHUNK_BYTES // (16 * head(student[0][:0]).shape[-1]))
    pieces = [(rows[a : a + size], hidden[a : a + size]) for a in range(0, max(1, len(rows)), size)]
    if torch.is_grad_enabled():  # each is computed again for the gradient, not stored
        again = functools.partial(checkpoint, compare, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([cast(Tensor, again(*piece)) for piece in pieces])
    return torch.cat([compare(*piece) for piece in pieces])
