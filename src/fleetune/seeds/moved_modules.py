# SPDX-License-Identifier: Apache-2.0
"""Run the modules of a net with the weights of a view (`view.py`), one sign of its probe or both in one forward.

With both, the batch has every row twice: the first half runs with the probe, the second with its opposite.  Everything that
has no weights runs once for both halves; a layer makes its weights of both signs from one read of the base and multiplies
each half by its own, with the operations and shapes of a forward of one sign, so that the numbers are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fleetune.seeds.tape import Tape

if TYPE_CHECKING:
    from fleetune.seeds.view import WeightSlot

WHOLE: Final = (
    1 << 22
)  # numbers of a tensor that is seen whole, at most, while both signs run: two copies exist then


class Unpaired(Exception):
    """A module does not keep the rows of the two signs apart: each sign must have a forward of its own."""


class Moved(Protocol):
    """What modules need of a view."""

    tape: Tape | None
    running: int
    paired: int

    def product(self, slot: WeightSlot, xs: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
        """Return x W' + bias, of each x with the weights of its sign."""
        ...

    def signs(self, slot: WeightSlot, first: int, last: int) -> tuple[Tensor, ...]:
        """Return some elements for each sign that runs."""
        ...

    def table(self, slot: WeightSlot, ids: Tensor) -> tuple[list[int], Tensor, Tensor]:
        """Return the different ids, their rows for each sign, and for each id its place among them."""
        ...

    def whole(self, slot: WeightSlot) -> Tensor:
        """Return a whole tensor, in memory of its own."""
        ...


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
