# SPDX-License-Identifier: Apache-2.0
"""Compute the cross-entropy of an output head in pieces, so that no array of tokens x vocabulary exists.

Four kinds of head, in the memory of a few pieces each:

    measured     a forward pass alone: piece by piece
    not trained  (LoRA and the like) the gradient of a token's loss l_i to the head's input x_i is

                     dl_i / dx_i = (softmax(W x_i) - onehot(y_i)) W,

                 all of which the forward pass has at hand.  It is made there, and backward only scales it: the head
                 runs twice a step, not three times, and its logits are never kept (as the fused linear cross-entropy
                 of Liger Kernel does, Hsu et al. 2024, arXiv 2410.10989)
    trained      each piece is computed again in the backward pass
    of a view    (`seeds/view.py`) weights that are computed on demand go by in blocks of the vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 32 * 2**20  # float32 logits alive at a time where no gradient is wanted
GRADIENT_SHARE = 4  # ... and this part of them where one is: they and their gradient are alive together


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log softmax(logits)[target] in float32: logits [n, V], targets int64 [n] -> [n]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def head_nll(head: nn.Module, rows: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Return `nll` of what a head makes of its inputs: rows [N, H], targets int64 [N] -> float32 [N].

    `vocabulary` is the number V of its logits.  With gradients enabled it can be back-propagated, twice if need be.
    """
    blocks = getattr(head, "row_blocks", None)
    if not torch.is_grad_enabled():
        if blocks:
            return _stream(rows, None, blocks, targets)
        return torch.cat([nll(_logits(head, rows[at]), targets[at]) for at in _pieces(rows, vocabulary)])
    if blocks and blocks.root is not None:
        return _stream(rows, blocks.root, blocks, targets)
    if _logits(head, rows[:0].detach()).requires_grad:
        return _again(head, rows, targets, vocabulary)
    return cast(Tensor, _FrozenNll.apply(rows, head, targets, vocabulary))  # type: ignore[no-untyped-call]


def _pieces(rows: Tensor, vocabulary: int) -> list[slice]:
    """Return slices of rows whose logits are alive together."""
    size = tokens_a_piece(vocabulary)
    return [slice(a, a + size) for a in range(0, max(1, len(rows)), size)]


def tokens_a_piece(vocabulary: int) -> int:
    """Return how many tokens have their logits alive together."""
    share = GRADIENT_SHARE if torch.is_grad_enabled() else 1
    return max(1, CHUNK_BYTES // (4 * share * vocabulary))


def _logits(head: nn.Module, rows: Tensor) -> Tensor:
    return cast(Tensor, head(rows.unsqueeze(0))[0])


def _again(head: nn.Module, rows: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Compute each piece again in the backward pass instead of keeping it."""

    def piece(rows: Tensor, targets: Tensor) -> Tensor:
        return nll(_logits(head, rows), targets)

    return torch.cat(
        [
            cast(Tensor, checkpoint(piece, rows[at], targets[at], use_reentrant=False))
            for at in _pieces(rows, vocabulary)
        ]
    )


class _FrozenNll(torch.autograd.Function):
    """Compute `nll` of a head that is not trained, and the gradient of its inputs, in one forward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: nn.Module, targets: Tensor, vocabulary: int) -> Tensor:
        losses, back = [], torch.empty_like(rows)
        with torch.enable_grad():
            for at in _pieces(rows, vocabulary):
                x = rows[at].detach().requires_grad_()
                logits = _logits(head, x)
                log_p = F.log_softmax(logits.detach().float(), -1)
                losses.append(-log_p.gather(1, targets[at, None])[:, 0])
                gradient = log_p.exp_()  # of the piece's logits: softmax - onehot
                gradient.scatter_add_(1, targets[at, None], gradient.new_full((len(x), 1), -1.0))
                back[at] = torch.autograd.grad(logits, x, gradient.to(logits.dtype))[0]
        ctx.head = head
        ctx.save_for_backward(rows, targets, back)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, targets, back = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: by the loss itself
            losses = nll(_logits(ctx.head, rows), targets)
            return torch.autograd.grad(losses, rows, gradients[0], create_graph=True)[0], None, None, None
        return back * gradients[0][:, None].to(back.dtype), None, None, None


def _stream(rows: Tensor, root: Tensor | None, blocks: Any, targets: Tensor) -> Tensor:
    return cast(Tensor, _StreamedNll.apply(rows, root, blocks, targets))  # type: ignore[no-untyped-call]


class _StreamedNll(torch.autograd.Function):
    """Compute `nll` for a head whose weights are computed on demand (`seeds/view.py`), each block of them once a direction.

    The log-sum-exp is taken online over blocks of the vocabulary (Milakov and Gimelshein 2018, arXiv
    1805.02867, Algorithm 3), so that all logits never exist at once, for any number of rows.  Backward goes over the blocks
    once more: the gradient of a block's logits is softmax - onehot.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, root: Tensor | None, blocks: Any, targets: Tensor) -> Tensor:
        top = torch.full((len(rows),), -math.inf, device=rows.device)
        total, own = torch.zeros_like(top), torch.zeros_like(top)
        for first, weight in blocks():
            for at in _rows_beside(len(rows), len(weight)):
                logits = F.linear(rows[at], weight).float()
                inside, here = _here(targets[at], first, len(weight))
                own[at][inside] = logits[inside, here]
                higher = torch.maximum(top[at], logits.amax(1))
                seen = total[at] * torch.exp(top[at] - higher)
                total[at] = seen + logits.sub_(higher[:, None]).exp_().sum(1)
                top[at] = higher
        ctx.blocks = blocks
        log_sums = top + total.log()
        ctx.save_for_backward(rows, log_sums, targets)
        return log_sums - own

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, log_sums, targets = ctx.saved_tensors
        back = torch.zeros_like(rows)
        for first, weight in ctx.blocks():
            gradient = torch.zeros_like(weight)
            for at in _rows_beside(len(rows), len(weight)):
                p = F.linear(rows[at], weight).float().sub_(log_sums[at, None]).exp_()
                inside, here = _here(targets[at], first, len(weight))
                p[inside, here] -= 1.0
                p = p.mul_(gradients[0][at, None]).to(weight.dtype)
                back[at].addmm_(p, weight)
                gradient.addmm_(p.t(), rows[at])
            ctx.blocks.gradient(first, gradient)
        return back, None, None, None


def _rows_beside(rows: int, width: int) -> Iterator[slice]:
    """Yield slices of rows, of which `width` float32 numbers each are at most `CHUNK_BYTES`."""
    size = max(1, CHUNK_BYTES // (4 * width))
    return (slice(a, a + size) for a in range(0, rows, size))


def _here(targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return which targets are among `count` tokens from `first` on, and these counted from there."""
    here = targets - first
    inside = (here >= 0) & (here < count)
    return inside, here[inside]
