# SPDX-License-Identifier: Apache-2.0
"""Solve the layers of a block in turn, each on inputs that have passed the compressed layers before it.

Each calibration window runs through the block up to the next layer that is to be solved, whose input is added to that layer's
Hessian.  Then the layer is solved, its compressed weights are put in place, and the windows run up to the layer after it.  In all
a window takes the time of somewhat more than two passes through a decoder's block.  Only the hidden states in front of the
block are kept.

For a solver that aims at the dense model's outputs (`Corrector`) the windows go through the dense model as well, with the
block's dense weights in place for that moment.  With x the input of a layer there and y its input in the compressed model, the
drift of its inputs is D = sum of 2 (x - y) y^T over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fleetune.compression.layerwise.activations import (
    HiddenStates,
    SolveExperts,
    SolveLayer,
    Stop,
    observed_inputs,
    observed_routes,
)
from fleetune.compression.layerwise.experts import Experts, Routed, parameters_of
from fleetune.compression.layerwise.hessian import accumulate, accumulate_drift, mirrored
from fleetune.models.net.model import Model


class StatesInTurn(HiddenStates):
    """The hidden states of the calibration windows in front of a block, whose layers are solved in turn."""

    def __init__(
        self,
        model: Model,
        calibration: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        *,
        drift: bool = False,
    ) -> None:
        """As `HiddenStates`.  With `drift` the dense model's states are kept as well."""
        super().__init__(model, calibration, weights)
        self.dense = list(self.states) if drift else []  # in front of the first block they are the same
        self._behind = set[int]()  # windows whose state in the dense model is behind the block already

    def solve_layers(
        self,
        number: int,
        linears: Mapping[str, nn.Linear],
        solve: SolveLayer,
        experts: Sequence[Experts] = (),
        solve_routed: SolveExperts = lambda experts, routed: None,
    ) -> None:
        """Solve every layer that a window reaches, and leave the compressed weights in place."""
        dense = _DenseWeights(parameters_of(linears, experts))
        left = {name: linears[name] for name in linears}
        routed = {each.name: each for each in experts}
        while (left or routed) and (found := self._next(number, left, list(routed.values()), dense)).readers:
            if found.first in routed:
                solve_routed(routed.pop(found.first), found.routed)
            for name in found.readers:
                if left.pop(name, None) is not None:
                    solve(name, found.H, found.D)
        if number + 1 < len(self.blocks):
            with dense.in_place():
                self.pass_over(number)

    def pass_over(self, number: int) -> None:
        """Run the dense model's states through a block, those that are not behind it yet, while its weights are its own."""
        for i, state in enumerate(self.dense):
            if i not in self._behind:
                self.dense[i] = self.forward(number, state)
        self._behind.clear()

    def _next(
        self, number: int, linears: Mapping[str, nn.Linear], experts: Sequence[Experts], dense: _DenseWeights
    ) -> _Next:
        """Return the first of the layers that the windows reach, with the sums over its inputs."""
        found = _Next()
        with observed_inputs(linears, found.observe), observed_routes(experts, found.observe_experts):
            for window, state in enumerate(self.states):
                y = found.input_of(self.forward, number, state)
                if y is None:
                    continue
                x = None
                if self.dense and isinstance(y, Tensor):
                    # where no other layer is left, the pass goes on to the end
                    last = len({*found.readers}) == len(linears) + len(experts)
                    with dense.in_place():
                        x = found.input_of(self.forward, number, self.dense[window], whole=last)
                    if found.output is not None:
                        self.dense[window] = found.output
                        self._behind.add(window)
                s = self.weights.get(found.first)
                found.add(y, x, state.shape[:-1].numel(), None if s is None else s[window])
        mirrored(found.H)
        return found


@dataclass
class _Next:
    """The layer that is next in a block, and the sums over its inputs in the windows so far."""

    first: str = ""  # its name
    readers: list[str] = field(default_factory=list)  # it, and those after it that read the same tensor
    H: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    D: Tensor | None = None  # None where the inputs are not of the same tokens in both models: routed experts
    calls: list[Routed] = field(default_factory=list)  # of experts
    output: Tensor | None = None  # of the block, where the last pass went through the whole of it
    _input: Tensor | Routed | None = None  # in this pass
    _called: list[str] = field(default_factory=list)  # in this pass
    _whole: bool = False  # whether this pass goes through the whole block

    @property
    def routed(self) -> Routed:
        """What experts were called with in all windows."""
        return Routed(*(torch.cat(parts) for parts in zip(*self.calls, strict=True)))

    def input_of(
        self, forward: Callable[[int, Tensor], Tensor], number: int, state: Tensor, *, whole: bool = False
    ) -> Tensor | Routed | None:
        """Run a window up to the layer, or through the `whole` block, and return the layer's input; None if it is not called."""
        self._input, self._called, self._whole, self.output = None, [], whole, None
        with suppress(Stop):
            after = forward(number, state)
            self.output = after if whole else None
        if not self.readers:
            self.readers = self._called
        return self._input

    def observe(self, name: str, x: Tensor) -> None:
        """Take the input of a layer that is called, if the layer is the next one or reads the same tensor."""
        if self._input is None:
            if name != (self.first or name):
                return
            self.first, self._input = name, x
        elif x is not self._input:
            raise Stop
        self._called.append(name)
        if self.readers and not self._whole:  # the layer itself and all behind it need not run
            raise Stop

    def observe_experts(self, each: Experts, routed: Routed) -> None:
        """Take what experts are called with, if they are next."""
        if self._input is not None:
            raise Stop
        if each.name == (self.first or each.name):
            self.first, self._input, self._called = each.name, routed, [each.name]
            raise Stop

    def add(self, y: Tensor | Routed, x: Tensor | Routed | None, tokens: int, s: Tensor | None) -> None:
        """Add a window's inputs, y in the compressed and x in the dense model; s is what its `tokens` count."""
        if isinstance(y, Routed):
            self.calls.append(y)
            return
        if not len(self.H):
            self.H = torch.zeros(y.shape[-1], y.shape[-1])
            self.D = None if x is None else torch.zeros_like(self.H)
        accumulate(self.H, y.cpu(), s)
        if not isinstance(x, Tensor) or not x.shape[:-1].numel() == y.shape[:-1].numel() == tokens:
            self.D = None
        if self.D is not None and isinstance(x, Tensor):
            accumulate_drift(self.D, x.cpu(), y.cpu(), s)


class _DenseWeights:
    """The dense weights of a block whose layers get their compressed ones in turn."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._dense = {name: parameter.data for name, parameter in parameters.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the dense weights in place, and afterwards those that were there."""
        now = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            self._put(self._dense)
            yield
        finally:
            self._put(now)

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data = weights[name]
