# SPDX-License-Identifier: Apache-2.0
"""Back-propagate through a view without a copy of the weights, and hand each gradient on as it is made.

A view computes weights block by block and forgets them.  So that backward can run, a linear layer keeps its input alone; on
the way back each row block W_r of its weights is computed again from base and ledger, and with g the gradient of the output

    gradient of the input    += g[:, r] W_r
    gradient of the block     = g[:, r]' x,      handed to `sink` at once

so that nothing of the size of a matrix ever exists.  An embedding's gradient is that of the rows in use; norms, biases and
layers of other kinds are seen whole, and so is their gradient.  The loss of a (tied) output head runs over blocks of the
vocabulary in both directions (`evaluation/losses.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from fleetune.seeds.view import WeightSlot


Sink = Callable[[int, Tensor], None]  # (global index of the first element, gradient of any shape, row-major)


class Moved(Protocol):
    """What a tape needs of a view (`seeds/view.py`): its weights, a piece at a time, and the modules that own them."""

    device: torch.device
    owners: list[tuple[nn.Module, dict[str, WeightSlot]]]
    tape: Any

    def product(self, slot: WeightSlot, xs: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
        """Return x W' + bias of each x."""
        ...

    def blocks(self, slot: WeightSlot) -> Iterable[tuple[Any, ...]]:
        """Yield (first row, rows of each sign) of a matrix; the next ones overwrite them."""
        ...

    def table(self, slot: WeightSlot, ids: Tensor) -> tuple[list[int], Tensor, Tensor]:
        """Return the different ids, their rows [signs, ids, width], and for each id its place among them."""
        ...

    def whole(self, slot: WeightSlot) -> Tensor:
        """Return a whole tensor, in memory of its own."""
        ...

    def pulled_back(self, slot: WeightSlot, first: int, gradient: Tensor) -> tuple[int, Tensor]:
        """Return the gradient of what is moved, and the global index of its first element."""
        ...


class Tape:
    """A context in which what a view's net computes can be back-propagated; gradients of its tensors go to `sink`.

    A tensor that is used twice, as a tied head is, sends two gradients, whose sum is the whole one.
    """

    def __init__(self, view: Moved, sink: Sink) -> None:
        self.view, self.sink = view, sink
        # what a function of no other differentiable tensor hangs on, so that backward comes to it
        self.root = torch.zeros((), device=view.device, requires_grad=True)

    def __enter__(self) -> Self:
        self.view.tape = self
        embeddings = [m for m, _ in self.view.owners if isinstance(m, nn.Embedding)]
        # torch gives the padding's row no gradient, though in many models it is the token that ends a turn as well
        self._padding = [(m, m.padding_idx) for m in embeddings]
        for embedding in embeddings:
            embedding.padding_idx = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.view.tape = None
        for embedding, index in self._padding:
            embedding.padding_idx = index

    def linear(self, slot: WeightSlot, x: Tensor) -> Tensor:
        """Return x W' for a matrix at the view's point."""
        return _Linear.apply(x, self.root, self, slot)  # type: ignore[no-any-return, no-untyped-call]

    def embedding(self, slot: WeightSlot, ids: Tensor) -> Tensor:
        """Return the rows of a table."""
        return _Embedding.apply(self.root, self, slot, ids)  # type: ignore[no-any-return, no-untyped-call]

    def whole(self, slot: WeightSlot) -> Tensor:
        """Return a tensor, in memory of its own."""
        return _Whole.apply(self.root, self, slot)  # type: ignore[no-any-return, no-untyped-call]

    def rows(self, slot: WeightSlot, first: int, gradient: Tensor) -> None:
        """Hand on the gradient of rows of a matrix, from row `first` on."""
        self.sink(*self.view.pulled_back(slot, first * slot.tensor.shape[1], gradient))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor, tape: Tape, slot: WeightSlot) -> Tensor:
        ctx.tape, ctx.slot = tape, slot
        ctx.save_for_backward(x)
        return tape.view.product(slot, [x], [None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,), slot = ctx.saved_tensors, ctx.slot
        n_out, n_in = slot.tensor.shape
        flat, g = x.reshape(-1, n_in), gradients[0].reshape(-1, n_out)
        back = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        for r, weight in ctx.tape.view.blocks(slot):
            part = g[:, r : r + len(weight)]
            if back is not None:
                back.addmm_(part, weight)
            ctx.tape.rows(slot, r, part.t() @ flat)
        return None if back is None else back.view_as(x), None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, root: Tensor, tape: Tape, slot: WeightSlot, ids: Tensor) -> Tensor:
        rows, table, where = tape.view.table(slot, ids)
        ctx.tape, ctx.slot, ctx.rows = tape, slot, rows
        ctx.save_for_backward(where)
        return F.embedding(where, table[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (where,), g = ctx.saved_tensors, gradients[0]
        width = g.shape[-1]
        table = torch.zeros(len(ctx.rows), width, dtype=torch.float32, device=g.device)
        table.index_add_(0, where.reshape(-1), g.reshape(-1, width).float())
        for row, gradient in zip(ctx.rows, table, strict=True):
            ctx.tape.rows(ctx.slot, row, gradient)
        return None, None, None, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, root: Tensor, tape: Tape, slot: WeightSlot) -> Tensor:
        ctx.tape, ctx.slot = tape, slot
        return tape.view.whole(slot)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.tape.sink(*ctx.tape.view.pulled_back(ctx.slot, 0, gradients[0].contiguous()))
        return None, None, None


class RowBlocks:
    """The rows of an output head's matrix, block by block, for a loss that never has all of them (`evaluation/losses.py`)."""

    def __init__(self, view: Moved, slot: WeightSlot) -> None:
        self.view, self.slot = view, slot

    def __call__(self) -> Iterable[tuple[Any, ...]]:
        """Yield (first row, rows at the view's point); while both signs run, also the rows of the other sign."""
        return self.view.blocks(self.slot)

    @property
    def root(self) -> Tensor | None:
        """Return what the loss hangs on where gradients are wanted, else None."""
        tape: Tape | None = self.view.tape
        return None if tape is None else tape.root

    def gradient(self, first: int, rows: Tensor) -> None:
        """Take the gradient of rows, from row `first` on."""
        if self.view.tape is not None:
            self.view.tape.rows(self.slot, first, rows)
