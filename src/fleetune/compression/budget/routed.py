# SPDX-License-Identifier: Apache-2.0
"""Sum the squared gradients of the outputs of a mixture's experts, for `sensitivity.py`.

transformers multiplies the matrices of all experts of a layer in one call, of which only what goes in and comes out can be
seen: tokens x [T, H], the experts that each token chose, their weights r, and the sum of what these return,

    out_t = sum over the experts e that t chose of r_te y_te,    y = W_down a,    a = act(gate) up,    (gate, up) = W_gate_up x

So with g the gradient by `out`, that by y_te is r_te g_t, and one step back through W_down and the activation gives that by gate
and up.  Whether a layer computes just this is seen in the first window: experts that return something else (one norms y) get
these same numbers as an estimate, and are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from fleetune.compression.layerwise.experts import DOWN, GATE_UP, Experts
from fleetune.models.lazy import in_memory

ROUNDING: Final = 0.02  # relative error of outputs in bf16 that were added up in another order


class Squares(NamedTuple):
    """The sums of squared gradients."""

    sums: dict[str, Tensor]  # parameter of experts -> float64 [experts, R], over each expert's tokens
    estimated: list[str]  # experts that compute in another way, by their module's name


class _Call(NamedTuple):
    """What the experts of a layer were called with."""

    x: Tensor  # [T, H]
    chosen: Tensor  # int64 [T, k]: each token's experts
    weights: Tensor  # [T, k]: of what they return

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the tokens that chose an expert, int64 [n], and what it returns for each counts, [n, 1]."""
        token, slot = (self.chosen == number).nonzero(as_tuple=True)
        return token, self.weights[token, slot, None].float()


@contextmanager
def squares(experts: Sequence[Experts]) -> Iterator[Squares]:
    """Add up the squared gradients of the outputs of experts in every backward pass while the block runs."""
    found = Squares(
        {
            n: torch.zeros(W.shape[:2], dtype=torch.float64)
            for each in experts
            for n, W in each.matrices.items()
        },
        [],
    )
    seen = set[str]()

    def hook(each: Experts) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watch(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            call = _Call(*(given.detach() for given in args))
            if each.name not in seen:
                seen.add(each.name)
                if not _is_sum(each, call, out.detach()):
                    found.estimated.append(each.name)
            if out.requires_grad:
                out.register_hook(lambda g: _add(each, call, g, found.sums))  # type: ignore[no-untyped-call]

        return watch

    handles = [each.module.register_forward_hook(hook(each)) for each in experts]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _is_sum(each: Experts, call: _Call, out: Tensor) -> bool:
    """Return whether what experts returned is the weighted sum of what each of them computes."""
    total = torch.zeros_like(out, dtype=torch.float32)
    with in_memory(each.module):
        for number in torch.unique(call.chosen).tolist():
            token, r = call.of(number)
            a = each.activation(each.linear(GATE_UP, number, call.x[token]))
            total.index_add_(0, token, r * each.linear(DOWN, number, a).float())
    return bool((total - out.float()).norm() <= ROUNDING * total.norm())


@torch.no_grad()
def _add(each: Experts, call: _Call, g: Tensor, sums: dict[str, Tensor]) -> None:
    """Add the squares of the gradients by what the experts' matrices return; g [T, H] is that by the experts' output."""
    up, down = each.parameters
    with in_memory(each.module):
        for number in torch.unique(call.chosen).tolist():
            token, r = call.of(number)
            by_y = g[token].float() * r
            z = each.linear(GATE_UP, number, call.x[token]).float().requires_grad_()
            with torch.enable_grad():
                a = each.activation(z)
            (by_z,) = torch.autograd.grad(a, z, by_y @ each.matrices[down][number].float())
            for name, by in ((up, by_z), (down, by_y)):
                sums[name][number] += by.double().square().sum(0).cpu()
