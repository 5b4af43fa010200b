"""Run calibration windows through a model block by block, and collect the Hessians of each block's linear layers.

Where the layers of a block are solved in turn (for a `Corrector`), a window takes the time of about two passes.  With x the input
of a layer in the dense model and y its input in the compressed one, the drift is D = sum of 2 (x - y) y^T over all tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fleetune.compression.layerwise.experts import Experts, Routed, parameters_of
from fleetune.compression.layerwise.hessian import accumulate, accumulate_drift, factor_kept, mirrored
from fleetune.models.net.layers import layers_of
from fleetune.models.net.model import Model

SolveExperts = Callable[[Experts, Routed], None]
# (name, H, D=None): solve a layer with the Hessian and the drift of its inputs, [C, C]; None where nothing is known
SolveLayer = Callable[..., None]


class HessianSource(Protocol):
    """A source of the Hessians of each block's layers; blocks are visited in order."""

    def solve_layers(self, number: int, linears: Mapping[str, nn.Linear], solve: SolveLayer) -> None:
        """Call `solve(name, H)` for every layer that is used, H float32 [C, C] the sum of 2 x x^T over all tokens."""

    def advance(self, number: int) -> None:
        """Advance to the next block; called while this block's layers have their compressed weights."""


class Stop(Exception):
    """Ends a forward pass early."""


class HiddenStates:
    """The hidden states of the calibration windows in front of a block."""

    def __init__(self, model: Model, calibration: Tensor) -> None:
        """calibration: int64 [n, length]."""
        modules = dict(model.net.named_modules())
        self.model, self.blocks = model, [modules[layer.name] for layer in layers_of(model.net)]
        self.tokens = calibration.numel()
        self.kwargs = _block_arguments(model, self.blocks, calibration[:1])
        self.states = self.first_block_inputs(calibration)
        self._in_tuple = False  # whether blocks return their states in a tuple

    def first_block_inputs(self, calibration: Tensor) -> list[Tensor]:
        """Return the inputs of the first block, for windows of the same length."""
        states: list[Tensor] = []

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])
            raise Stop

        with self.blocks[0].register_forward_pre_hook(take, with_kwargs=True):
            for window in calibration:
                with suppress(Stop):
                    self.model.net(input_ids=window[None].to(self.model.device), use_cache=False)
        return states

    def forward(self, number: int, state: Tensor) -> Tensor:
        """Return the output of a block."""
        out = self.blocks[number](state, **self.kwargs[number])
        self._in_tuple = not isinstance(out, Tensor)
        after: Tensor = out[0] if self._in_tuple else out
        return after

    def _as_output(self, state: Tensor) -> Tensor | tuple[Tensor]:
        """Return states as a block of this net returns them."""
        return (state,) if self._in_tuple else state

    def solve_layers(
        self,
        number: int,
        linears: Mapping[str, nn.Linear],
        solve: SolveLayer,
        experts: Sequence[Experts] = (),
        solve_routed: SolveExperts = lambda experts, routed: None,
    ) -> None:
        """Solve a block's layers, on what reaches them through its dense weights."""
        H, routed = self.inputs(number, linears, experts)
        with factor_kept():
            for name in [name for name in linears if name in H]:
                solve(name, H[name])
        for each in experts:
            if each.name in routed:
                solve_routed(each, routed.pop(each.name))

    def hessians(self, number: int, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """Return H by layer name; layers that read the same tensor share one H."""
        return self.inputs(number, linears, ())[0]

    def inputs(
        self, number: int, linears: Mapping[str, nn.Linear], experts: Sequence[Experts]
    ) -> tuple[dict[str, Tensor], dict[str, Routed]]:
        """Return H by layer name, as `hessians` does, and the inputs of each expert module in use by its name."""
        calls = {each.name: list[Routed]() for each in experts}
        H = self._collect(number, linears, experts, lambda each, routed: calls[each.name].append(routed))
        joined = {
            name: Routed(*(torch.cat(parts) for parts in zip(*calls.pop(name), strict=True)))
            for name in [name for name, found in calls.items() if found]
        }
        return H, joined

    def _collect(
        self, number: int, linears: Mapping[str, nn.Linear], experts: Sequence[Experts], take: SolveExperts
    ) -> dict[str, Tensor]:
        """Return H by layer name; `take` gets what experts are called with, in every window."""
        H: dict[str, Tensor] = {}
        shared = _SharedInputs()
        called = list[str]()  # in this window
        order = list[str]()  # in the first window that calls every layer exactly once

        def observe(name: str, x: Tensor) -> None:
            first = shared.first(name, x)
            if name not in H:
                H[name] = torch.zeros(x.shape[-1], x.shape[-1]) if first == name else H[first]
            if first == name:
                accumulate(H[name], x.cpu())
            note(name)

        def note(name: str) -> None:
            called.append(name)
            if called == order:  # the rest of the block is not needed
                raise Stop

        def observe_experts(each: Experts, routed: Routed) -> None:
            take(each, routed)
            note(each.name)

        every = sorted([*linears, *(each.name for each in experts)])
        with observed_inputs(linears, observe), observed_routes(experts, observe_experts):
            for state in self.states:
                with suppress(Stop):
                    self.forward(number, state)
                if not order and sorted(called) == every:
                    order = called.copy()
                called.clear()
                shared = _SharedInputs()
        for h in {id(h): h for h in H.values()}.values():
            mirrored(h)
        return H

    def head_hessian(self) -> Tensor:
        """Return the Hessian of the head's inputs, float32 [H, H]; the states are those behind the last block."""
        head: Any = self.model.net.get_output_embeddings()
        H = torch.zeros(head.weight.shape[1], head.weight.shape[1])

        def observe(name: str, x: Tensor) -> None:
            accumulate(H, x.cpu())
            raise Stop

        with observed_inputs({"head": head}, observe):
            for state in (one[None] for states in self.states for one in states):
                with _passed_on(self.blocks, functools.partial(self._as_output, state)), suppress(Stop):
                    ids = torch.zeros(state.shape[:2], dtype=torch.int64, device=self.model.device)
                    self.model.net(input_ids=ids, use_cache=False)
        return mirrored(H)

    def advance(self, number: int) -> None:
        """Replace the states by the output of the block."""
        for i, state in enumerate(self.states):
            self.states[i] = self.forward(number, state)


class _SharedInputs:
    """Finds layers that read the same tensor: those called with the tensor of the layer before."""

    def __init__(self) -> None:
        self.reader = ""  # the first layer that read the last tensor
        self._x: Tensor | None = None

    def first(self, name: str, x: Tensor) -> str:
        """Return the first layer that read x; `name` itself where x is new."""
        if x is not self._x:
            self._x, self.reader = x, name
        return self.reader


def hooked(handles: Iterable[RemovableHandle]) -> ExitStack:
    """Return a context that removes hooks at its end."""
    stack = ExitStack()
    for handle in handles:
        stack.enter_context(handle)
    return stack


def observed_inputs(linears: Mapping[str, nn.Linear], observe: Callable[[str, Tensor], None]) -> ExitStack:
    """Return a context in which `observe(name, x)` is called with the input of a layer, just before the layer runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: observe(name, args[0])

    return hooked(linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items())


def observed_routes(experts: Sequence[Experts], observe: SolveExperts) -> ExitStack:
    """Return one in which `observe(experts, routed)` gets what experts are called with, on the CPU, just before they run."""

    def hook(each: Experts) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: observe(each, Routed(args[0].cpu(), args[1].cpu()))

    return hooked(each.module.register_forward_pre_hook(hook(each)) for each in experts)


def _block_arguments(model: Model, blocks: Sequence[nn.Module], window: Tensor) -> list[dict[str, Any]]:
    """Return the arguments of each block besides the hidden states (masks, positions); all windows share them.

    Only the first block is run.  The others pass its output on, since their other arguments do not depend on it.
    """
    found: list[dict[str, Any]] = []
    given: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append({k: v for k, v in kwargs.items() if k != "hidden_states"})
        if len(found) == len(blocks):
            raise Stop  # neither the last block nor the head is needed

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        given.append(out)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[0].register_forward_hook(after))
    with hooked(handles), _passed_on(blocks[1:], lambda: given[0]), suppress(Stop):
        model.net(input_ids=window.to(model.device), use_cache=False)
    return found


@contextmanager
def _passed_on(blocks: Sequence[nn.Module], given: Callable[[], Any]) -> Iterator[None]:
    """Let each block return what `given` returns, instead of running."""
    for block in blocks:
        block.forward = lambda *args, **kwargs: given()
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class StatesInTurn(HiddenStates):
    """The hidden states in front of a block whose layers are solved in turn, in the compressed and in the dense model."""

    def __init__(self, model: Model, calibration: Tensor) -> None:
        """calibration: int64 [n, length]."""
        super().__init__(model, calibration)
        self.dense = list(self.states)  # in front of the first block they are the same
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
            with factor_kept():
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
                if isinstance(y, Tensor):
                    # where no other layer is left, the pass goes on to the end
                    last = len({*found.readers}) == len(linears) + len(experts)
                    with dense.in_place():
                        x = found.input_of(self.forward, number, self.dense[window], whole=last)
                    if found.output is not None:
                        self.dense[window] = found.output
                        self._behind.add(window)
                found.add(y, x, state.shape[:-1].numel())
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
        """The inputs of the experts in all windows."""
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

    def add(self, y: Tensor | Routed, x: Tensor | Routed | None, tokens: int) -> None:
        """Add a window's inputs, y in the compressed and x in the dense model."""
        if isinstance(y, Routed):
            self.calls.append(y)
            return
        if not len(self.H):
            self.H = torch.zeros(y.shape[-1], y.shape[-1])
            self.D = None if x is None else torch.zeros_like(self.H)
        accumulate(self.H, y.cpu())
        if not isinstance(x, Tensor) or not x.shape[:-1].numel() == y.shape[:-1].numel() == tokens:
            self.D = None
        if self.D is not None and isinstance(x, Tensor):
            accumulate_drift(self.D, x.cpu(), y.cpu())


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
