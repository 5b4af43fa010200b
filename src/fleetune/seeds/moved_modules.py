# SPDX-License-Identifier: Apache-2.0
"""Run the modules of a net with the weights of a view (`view.py`), one sign of its probe or both in one forward, and back.

With both signs, the batch has every row twice: the first half runs with the probe, the second with its opposite.  Everything
that has no weights runs once for both halves; a layer makes its weights of both signs from one read of the base and multiplies
each half by its own, with the operations and shapes of a forward of one sign, so that the numbers are the same.

Back-propagation (`Tape`) makes no copy of the weights.  A view computes weights block by block and forgets them.  So that
backward can run, a linear layer keeps its input alone; on the way back each row block W_r of its weights is computed again from
base and ledger, and with g the gradient of the output

    gradient of the input    += g[:, r] W_r
    gradient of the block     = g[:, r]' x,      handed to `sink` at once

so that nothing of the size of a matrix ever exists.  An embedding's gradient is that of the rows in use; norms, biases and
layers of other kinds are seen whole, and so is their gradient.  The loss of a (tied) output head runs over blocks of the
vocabulary in both directions (`evaluation/losses.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fleetune.models.lazy import LazyWeight
from fleetune.seeds.noise import TILE

WHOLE: Final = (
    1 << 22
)  # numbers of a tensor that is seen whole, at most, while both signs run: two copies exist then


class WeightSlot(NamedTuple):
    """A trainable tensor and the global index of its first element.

    The index decides which element of a direction a weight gets, so it must not depend on device, shards or threads.
    """

    name: str
    tensor: Tensor
    start: int


Read = Callable[[WeightSlot, int, int], Tensor]
Direction = tuple[int, np.ndarray]  # Philox id, table


def read_stored(slot: WeightSlot, first: int, last: int) -> Tensor:
    """Return elements first..last of a tensor: the stored memory itself; of a mapped base scratch, which the next call reuses."""
    if isinstance(slot.tensor, LazyWeight):
        return slot.tensor.piece(first, last)
    return slot.tensor.detach().view(-1)[first:last]


def layout(named: Iterable[tuple[str, Tensor]]) -> list[WeightSlot]:
    """Lay name-ordered tensors end to end, each starting at a multiple of 4096 (the spec's index)."""
    slots, start = [], 0
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        slots.append(WeightSlot(name, tensor, start))
        start += -(-tensor.numel() // TILE) * TILE
    return slots


class Moved(Protocol):
    """What modules need of a view: its weights, a piece at a time, and the modules that own them."""

    device: torch.device
    owners: list[tuple[nn.Module, dict[str, WeightSlot]]]
    tape: Tape | None
    running: int
    paired: int

    def product(self, slot: WeightSlot, xs: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
        """Return x W' + bias, of each x with the weights of its sign."""
        ...

    def blocks(self, slot: WeightSlot) -> Iterable[tuple[Any, ...]]:
        """Yield (first row, rows of each sign) of a matrix; the next ones overwrite them."""
        ...

    def signs(self, slot: WeightSlot, first: int, last: int) -> tuple[Tensor, ...]:
        """Return some elements for each sign that runs."""
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


class Unpaired(Exception):
    """A module does not keep the rows of the two signs apart: each sign must have a forward of its own."""


def count_running(view: Moved, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)  # `generate` reads its signature
    def counted(*args: Any, **kwargs: Any) -> Any:
        view.running += 1
        try:
            return forward(*args, **kwargs)
        finally:
            view.running -= 1

    return counted


class ReadParameters(dict[str, Any]):
    """A module's own parameters; while the net runs, at the view's point for whoever reads them.

    A module's parent may read its weights and never call it (a Mamba mixer those of its convolution).  Reads go
    through `__getitem__` (`nn.Module.__getattr__`); `named_parameters` and the like see what is stored.
    """

    def __init__(self, view: Moved, module: nn.Module, own: dict[str, WeightSlot]) -> None:
        super().__init__(module._parameters)
        self.view, self.own = view, own

    def __getitem__(self, name: str) -> Any:
        found, slot = super().__getitem__(name), self.own.get(name)
        if slot is None or not self.view.running:
            return found
        if found is not slot.tensor:  # put there by the module's own forward
            return found
        if self.view.paired:
            raise Unpaired
        return _signs(self.view, slot)[0]


def forward_for(view: Moved, module: nn.Module, own: dict[str, WeightSlot]) -> Callable[..., Any]:
    if type(module) is nn.Linear and "weight" in own:
        return lambda input: _linear(view, module, own, input)
    if type(module) is nn.Embedding and module.max_norm is None:
        return lambda input: _embedding(view, own["weight"], input)
    return _any_forward(view, module, own)


def _linear(view: Moved, module: nn.Linear, own: dict[str, WeightSlot], x: Tensor) -> Tensor:
    if view.tape is not None:
        bias = view.tape.whole(own["bias"]) if "bias" in own else module.bias
        out = view.tape.linear(own["weight"], x)
        return out if bias is None else out + bias
    xs = _halves(view, x) if view.paired and x.numel() else (x,)
    biases = _signs(view, own["bias"]) if "bias" in own else [module.bias] * len(xs)
    return view.product(own["weight"], xs, biases[: len(xs)])


def _embedding(view: Moved, slot: WeightSlot, ids: Tensor) -> Tensor:
    if view.tape is not None:
        return view.tape.embedding(slot, ids)
    if view.paired and ids.dim() == 2 and len(ids) == 1:  # positions, the same for every row
        ids = ids.expand(2 * view.paired, -1)
    elif view.paired and (ids.dim() < 2 or len(ids) != 2 * view.paired):
        raise Unpaired
    _, table, where = view.table(slot, ids)
    halves = (where[: view.paired], where[view.paired :]) if view.paired else (where,)
    found = [F.embedding(part, rows) for part, rows in zip(halves, table, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _halves(view: Moved, x: Tensor, least: int = 3) -> tuple[Tensor, ...]:
    """Return the rows of each sign; Unpaired where the first dimension is not that of the batch (experts, say)."""
    if x.dim() < least or x.shape[0] != 2 * view.paired:
        raise Unpaired
    return x[: view.paired], x[view.paired :]


def _signs(view: Moved, slot: WeightSlot) -> list[Tensor]:
    """Return a whole tensor for each sign that runs, in memory of its own."""
    if view.tape is not None:
        return [view.tape.whole(slot)]
    if not view.paired:
        return [nn.Parameter(view.whole(slot), requires_grad=False)]
    if slot.tensor.numel() > WHOLE:
        raise Unpaired
    return [
        nn.Parameter(part.clone().view(slot.tensor.shape), requires_grad=False)
        for part in view.signs(slot, 0, slot.tensor.numel())
    ]


def _any_forward(view: Moved, module: nn.Module, own: dict[str, WeightSlot]) -> Callable[..., Any]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        stored: dict[str, Any] = {name: slot.tensor for name, slot in own.items()}
        seen = {name: _signs(view, slot) for name, slot in own.items()}
        try:
            if not view.paired:
                module._parameters.update({name: values[0] for name, values in seen.items()})  # type: ignore[misc]
                return original(*args, **kwargs)
            if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
                raise Unpaired
            found = []
            ids = isinstance(module, nn.Embedding)  # of a class of its own
            for sign, x in enumerate(_halves(view, args[0], least=2 if ids else 3)):
                module._parameters.update({name: values[sign] for name, values in seen.items()})  # type: ignore[misc]
                found.append(original(x))
                if not isinstance(found[-1], Tensor) or len(found[-1]) != view.paired:
                    raise Unpaired  # a router's several answers, say
            return torch.cat(found)
        finally:
            module._parameters.update(stored)

    return forward


Sink = Callable[[int, Tensor], None]  # (global index of the first element, gradient of any shape, row-major)


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
