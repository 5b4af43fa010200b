"""Compute the cross-entropy of an output head by blocks of the vocabulary, so that no array of tokens x vocabulary exists.

With x_i a token's input to the head, W the head's matrix, y_i the target and p = softmax(W x_i),

    l_i = log sum_v exp(W_v x_i) - W_y x_i        dl_i / dx_i = sum_v p_v W_v - W_y

Both sums over v are taken online: a block's logits are made, the running maximum is raised, and what was summed before is scaled
down to it (Milakov and Gimelshein 2018, arXiv 1805.02867; for the second sum as in FlashAttention, arXiv 2205.14135).  For a
trained head, or any other module (LoRA, hooks), the logits of some tokens are made at a time, and again in backward.  Where a
model changes each logit after its head (Gemma 2, Granite, Cohere), with s_v the slope of that, p_v W_v becomes s_v p_v W_v.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fleetune.models.lazy import LazyWeight

CHUNK_BYTES = 32 * 2**20  # float32 logits alive at a time where no gradient is wanted
GRADIENT_SHARE = 4  # ... and this part of them where one is: they and their gradient are alive together
BLOCK = 1 << 20  # numbers of a block of the head's rows
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class LogitChange:
    """A function of each logit by itself: the setting of the configuration that states it, and its number."""

    setting: str
    number: float

    def __call__(self, logits: Tensor) -> Tensor:
        """Return what the model gives for what its head gave."""
        if self.setting == "final_logit_softcapping":
            return (logits / self.number).tanh() * self.number
        return logits / self.number if self.setting == "logits_scaling" else logits * self.number

    def slope(self, changed: Tensor) -> Tensor | float:
        """Return the derivative at the logits that it gave."""
        if self.setting == "final_logit_softcapping":
            return 1.0 - (changed / self.number).square()
        return 1.0 / self.number if self.setting == "logits_scaling" else self.number


def stated(config: Any) -> LogitChange | None:
    """Return the change that a configuration states; None where it states none that is known here."""
    for setting in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if value := getattr(config, setting, None):
            return LogitChange(setting, float(value))
    return None


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log softmax(logits)[target] in float32: logits [n, V], targets int64 [n] -> [n]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def head_nll(
    head: nn.Module, rows: Tensor, targets: Tensor, vocabulary: int, change: LogitChange | None = None
) -> Tensor:
    """Return `nll` of what a head makes of its inputs: rows [N, H], targets int64 [N] -> float32 [N].

    `vocabulary` is the number V of its logits, `change` what the model does to each of them afterwards.  With gradients
    enabled it can be back-propagated, twice if need be.
    """
    blocks = getattr(head, "row_blocks", None) or _blocks(head)
    if not torch.is_grad_enabled():
        if blocks:
            return _online(rows, blocks, targets, None, change)[0]
        pieces = _pieces(rows, vocabulary)
        return torch.cat([nll(logits_of(head, rows[at], change), targets[at]) for at in pieces])
    if not blocks:
        return _again(head, rows, targets, vocabulary, change)
    if blocks.root is not None:
        return cast(Tensor, _StreamedNll.apply(rows, blocks.root, blocks, targets, change))  # type: ignore[no-untyped-call]
    return cast(Tensor, _FrozenNll.apply(rows, head, blocks, targets, change))  # type: ignore[no-untyped-call]


class _Blocks:
    """The rows of a plain linear layer that is not trained, in memory or in a file, block by block."""

    root: Tensor | None = None  # what a loss hangs on where the rows' gradients are wanted

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows); the next ones may overwrite them."""
        if isinstance(self.weight, LazyWeight):
            yield from self.weight.blocks()
            return
        size = max(1, BLOCK // self.weight.shape[1])
        for first in range(0, len(self.weight), size):
            yield first, self.weight[first : first + size]


def _blocks(head: nn.Module) -> _Blocks | None:
    """Return a head's rows by blocks where its product with them is all that it does, and nothing trains it."""
    if type(head) is not nn.Linear or any(p.requires_grad for p in head.parameters()):
        return None
    changed = "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks
    return None if changed else _Blocks(head.weight, head.bias)


def _pieces(rows: Tensor, vocabulary: int) -> list[slice]:
    """Return slices of rows whose logits are alive together."""
    size = tokens_a_piece(vocabulary)
    return [slice(a, a + size) for a in range(0, max(1, len(rows)), size)]


def tokens_a_piece(vocabulary: int) -> int:
    """Return how many tokens have their logits alive together."""
    share = GRADIENT_SHARE if torch.is_grad_enabled() else 1
    return max(1, CHUNK_BYTES // (4 * share * vocabulary))


def logits_of(head: nn.Module, rows: Tensor, change: LogitChange | None) -> Tensor:
    """Return the logits [n, V] of a head's inputs [n, H]."""
    logits = cast(Tensor, head(rows.unsqueeze(0))[0])
    return logits if change is None else change(logits)


def _again(
    head: nn.Module, rows: Tensor, targets: Tensor, vocabulary: int, change: LogitChange | None
) -> Tensor:
    """Compute each piece again in the backward pass instead of keeping it."""

    def piece(rows: Tensor, targets: Tensor) -> Tensor:
        return nll(logits_of(head, rows, change), targets)

    return torch.cat(
        [
            cast(Tensor, checkpoint(piece, rows[at], targets[at], use_reentrant=False))
            for at in _pieces(rows, vocabulary)
        ]
    )


class _FrozenNll(torch.autograd.Function):
    """Compute `nll` of a head that is not trained, and the gradient of its inputs, in one pass over its rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, head: nn.Module, blocks: Any, targets: Tensor, change: LogitChange | None
    ) -> Tensor:
        ctx.head, ctx.change = head, change
        back = torch.zeros(rows.shape, device=rows.device)
        losses, _ = _online(rows, blocks, targets, back, change)
        ctx.save_for_backward(rows, targets, back.to(rows.dtype))
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, targets, back = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: by the loss itself
            losses = nll(logits_of(ctx.head, rows, ctx.change), targets)
            (back,) = torch.autograd.grad(losses, rows, gradients[0], create_graph=True)
            return back, None, None, None, None
        return back * gradients[0][:, None].to(back.dtype), None, None, None, None


class _StreamedNll(torch.autograd.Function):
    """Compute `nll` by blocks; backward goes over them once more, with softmax - onehot as the gradient of a block's logits."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, root: Tensor, blocks: Any, targets: Tensor, change: LogitChange | None
    ) -> Tensor:
        ctx.blocks, ctx.change = blocks, change
        losses, log_sums = _online(rows, blocks, targets, None, change)
        ctx.save_for_backward(rows, log_sums, targets)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, log_sums, targets = ctx.saved_tensors
        back, room = torch.zeros_like(rows), rows.new_empty(0)
        for first, weight in ctx.blocks():
            gradient = torch.zeros_like(weight)
            for _, at in _rows_beside(len(rows), [weight]):
                room, logits = _product(rows[at], weight, room)
                logits, slope = _changed(logits, ctx.change)
                p = logits.float().sub_(log_sums[at, None]).exp_()
                inside, here = _here(targets[at], first, len(weight))
                p[inside, here] -= 1.0
                p = p.mul_(slope) if ctx.change is not None else p
                p = p.mul_(gradients[0][at, None]).to(weight.dtype)
                back[at].addmm_(p, weight)
                gradient.addmm_(p.t(), rows[at])
            ctx.blocks.gradient(first, gradient)
        return back, None, None, None, None


def _changed(logits: Tensor, change: LogitChange | None) -> tuple[Tensor, Tensor | float]:
    """Return what the model makes of its head's output, and the slope of that."""
    if change is None:
        return logits, 1.0
    changed = change(logits)
    return changed, change.slope(changed.float())


def _online(
    rows: Tensor, blocks: Any, targets: Tensor, back: Tensor | None, change: LogitChange | None
) -> tuple[Tensor, Tensor]:
    """Return the losses and the log-sum-exp of the logits, float32 [N] each; `back` float32 [N, H], of zeros, becomes dl/dx.

    The target stays out of both running sums and is added at the end: of a token that is nearly certain, p W_y and W_y
    would cancel.
    """
    # top is finite, so that -inf among the logits is harmless; total: sum over v != y of exp(logit - top)
    top = torch.full((len(rows),), LOWEST, device=rows.device)
    total, own = torch.zeros_like(top), torch.zeros_like(top)  # own: the target's logit
    target_rows = None if back is None else torch.zeros_like(back)
    bias, slope = getattr(blocks, "bias", None), cast("Tensor | float", 1.0)
    room = rows.new_empty(0)
    # of a view that runs both signs of a probe there is a matrix for each half of the rows
    for first, *weights in blocks():
        for weight, at in _rows_beside(len(rows), weights):
            width = len(weight)
            room, logits = _product(rows[at], weight, room)
            if bias is not None:
                logits += bias[first : first + width]
            logits, slope = _changed(logits, change)
            p = logits.float()
            inside, here = _here(targets[at], first, width)
            own[at][inside] = p[inside, here]
            higher = torch.maximum(top[at], p.amax(1))
            faded = torch.exp(top[at] - higher)
            p.sub_(higher[:, None]).exp_()
            p[inside, here] = 0.0
            total[at] = total[at] * faded + p.sum(1)
            if back is not None and target_rows is not None:
                target_rows[at][inside] = weight[here].float()
                if isinstance(slope, Tensor):
                    target_rows[at][inside] *= slope[inside, here, None]
                    p = p.mul_(slope)
                part = back[at].mul_(faded[:, None])
                if p.dtype == weight.dtype:
                    part.addmm_(p, weight)
                else:
                    part += p.to(weight.dtype) @ weight
            top[at] = higher
    whole = total + torch.exp(own - top)
    if back is not None and target_rows is not None:  # (sum over v != y of p_v W_v) - (1 - p_y) W_y
        back.sub_(target_rows.mul_(total[:, None])).div_(whole[:, None])
        if not isinstance(slope, Tensor):
            back.mul_(slope)
    return (top - own) + whole.log(), top + whole.log()


def _product(x: Tensor, weight: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Return room and x W' in it: the same memory for all blocks in turn, since glibc would not use it again by itself."""
    size = len(x) * len(weight)
    room = room if room.numel() >= size else x.new_empty(size)
    return room, torch.mm(x, weight.t(), out=room[:size].view(len(x), len(weight)))


def _rows_beside(rows: int, weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, slice]]:
    """Yield (matrix, slice of the rows that it is for): a share each, in slices whose logits are at most `CHUNK_BYTES`."""
    size, share = max(1, CHUNK_BYTES // (4 * len(weights[0]))), rows // len(weights)
    for number, weight in enumerate(weights):
        for a in range(number * share, (number + 1) * share, size):
            yield weight, slice(a, min(a + size, (number + 1) * share))


def _here(targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return which targets are among `count` tokens from `first` on, and these counted from there."""
    here = targets - first
    inside = (here >= 0) & (here < count)
    return inside, here[inside]
