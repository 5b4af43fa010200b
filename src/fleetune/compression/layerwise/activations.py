# SPDX-License-Identifier: Apache-2.0
"""The inputs of a block's layers: calibration windows on their way through a model that is compressed block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fleetune.compression.layerwise.hessian import accumulate, whole
from fleetune.models.layers import layers_of
from fleetune.models.model import Model

# (layer, H): solves it.  With a true-sequential driver the layer has its compressed weights afterwards.
Settle = Callable[[str, Tensor], None]


class Source(Protocol):
    """Where the Hessians of a block's layers come from; blocks are asked for in order."""

    def walk(self, number: int, linears: Mapping[str, nn.Linear], settle: Settle) -> None:
        """Call `settle(name, H)` for every layer that is read, H float32 [C, C] the sum of 2 x x^T over all tokens."""
        ...

    def advance(self, number: int) -> None:
        """Go on to the next block; this one's layers have their compressed weights while it is called."""
        ...


class _Stop(Exception):
    """Ends a forward pass once all that is asked of it is known."""


class Stream:
    """The windows' hidden states, moved on a block at a time."""

    def __init__(self, model: Model, calibration: Tensor, true_sequential: bool = False) -> None:
        modules = dict(model.net.named_modules())
        self.model, self.blocks = model, [modules[layer.name] for layer in layers_of(model.net)]
        self.true_sequential = true_sequential
        self.kwargs = _keywords(model, self.blocks, calibration[:1])
        self.states = self.begin(calibration)
        if true_sequential:
            self.states = [torch.cat(self.states)]
        self._ahead: Tensor | None = None  # the states behind a block whose layers were solved on their way

    def begin(self, calibration: Tensor) -> list[Tensor]:
        """The states that go into the first block, for windows of the same length."""
        states: list[Tensor] = []
        with _caught(self.blocks[0], lambda args, kwargs: states.append(_input(args, kwargs))):
            for window in calibration:
                try:
                    self.model.net(input_ids=window[None].to(self.model.device), use_cache=False)
                except _Stop:
                    continue
        return states

    def forward(self, number: int, state: Tensor) -> Tensor:
        """What comes out of a block."""
        out = self.blocks[number](state, **self.kwargs[number])
        return out if isinstance(out, Tensor) else out[0]

    def walk(self, number: int, linears: Mapping[str, nn.Linear], settle: Settle) -> None:
        """Solve a block's layers: each on its way through the block, or all of them after it."""
        if self.true_sequential:
            self._ahead = self._on_the_way(number, linears, settle)
            return
        H = self.hessians(number, linears)
        for name in [name for name in linears if name in H]:
            settle(name, H[name])

    def hessians(self, number: int, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """H by layer name; layers that read one tensor have the same H."""
        H: dict[str, Tensor] = {}
        shared = _Shared()
        called, order = (
            list[str](),
            list[str](),
        )  # in this window, and in the first where that is every layer once

        def see(name: str, x: Tensor) -> None:
            first = shared.first(name, x)
            if name not in H:
                H[name] = torch.zeros(x.shape[-1], x.shape[-1]) if first == name else H[first]
            if first == name:
                accumulate(H[name], x.cpu())
            called.append(name)
            if called == order:  # what follows is not needed
                raise _Stop

        with _seen(linears, see):
            for state in self.states:
                with suppress(_Stop):
                    self.forward(number, state)
                if not order and sorted(called) == sorted(linears):
                    order = called.copy()
                called.clear()
                shared = _Shared()
        for h in {id(h): h for h in H.values()}.values():
            whole(h)
        return H

    def _on_the_way(self, number: int, linears: Mapping[str, nn.Linear], settle: Settle) -> Tensor | None:
        shared, done, last = _Shared(), set[str](), number + 1 == len(self.blocks)
        H = torch.empty(0)

        def see(name: str, x: Tensor) -> None:
            nonlocal H
            if name in done:
                return
            if shared.first(name, x) == name:
                H = torch.zeros(x.shape[-1], x.shape[-1])
                accumulate(H, x.cpu())
                whole(H)
            settle(name, H)
            done.add(name)
            if last and len(done) == len(linears):  # nobody reads what comes out of it
                raise _Stop

        with _seen(linears, see), suppress(_Stop):
            return self.forward(number, self.states[0])
        return None

    def advance(self, number: int) -> None:
        """Make the states what comes out of the block."""
        if self._ahead is not None:
            self.states, self._ahead = [self._ahead], None
            return
        for i, state in enumerate(self.states):
            self.states[i] = self.forward(number, state)


class _Shared:
    """Which layers read one tensor: those that are called with the tensor of the layer before."""

    def __init__(self) -> None:
        self.of = ""  # the first layer that read the tensor of the last call
        self._x: Tensor | None = None

    def first(self, name: str, x: Tensor) -> str:
        """The first layer that read x, `name` itself where x is new."""
        if x is not self._x:
            self._x, self.of = x, name
        return self.of


@contextmanager
def _seen(linears: Mapping[str, nn.Linear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`see(name, x)` is called with what a layer is about to read."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, args[0])

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    state: Tensor = args[0] if args else kwargs["hidden_states"]
    return state


@contextmanager
def _caught(block: nn.Module, take: Callable[[tuple[Any, ...], Mapping[str, Any]], None]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args, kwargs)
        raise _Stop

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _keywords(model: Model, blocks: Sequence[nn.Module], window: Tensor) -> list[dict[str, Any]]:
    """What each block is called with beside the hidden states (masks, positions): the same for every window.

    The first block is run, the others hand its output on: what they are called with does not depend on it.
    """
    found: list[dict[str, Any]] = []
    given: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append({k: v for k, v in kwargs.items() if k != "hidden_states"})
        if len(found) == len(blocks):
            raise _Stop  # neither the last block nor the head is needed

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        given.append(out)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[0].register_forward_hook(after))
    for block in blocks[1:]:
        block.forward = lambda *args, **kwargs: given[0]
    try:
        model.net(input_ids=window.to(model.device), use_cache=False)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks[1:]:
            del block.forward
    return found
