# SPDX-License-Identifier: Apache-2.0
"""Keep of a LoRA's dropout one byte a number until backward: the input x and which numbers stayed, not x * noise and the noise.

PEFT computes A (x * noise), for which autograd keeps x * noise and the noise: 8 bytes a number, of every layer apart.  x is one
array for all layers that read it.  Backward multiplies again, so values and gradients are the same, bit for bit, also in
`torch.autocast`.  What is dropped is what `F.dropout` would drop, where the input is contiguous: of another one torch draws in
the order of its memory.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DroppedLinear(nn.Linear):
    """A linear layer without bias, with dropout of its input in training mode, on the CPU."""

    share: float  # of the input's numbers that are dropped

    @classmethod
    def around(cls, layer: nn.Linear, share: float) -> Self:
        """Return a layer with the same parameter."""
        made = cls(1, 1, bias=False, device="meta")
        made.weight, made.share = layer.weight, share
        made.in_features, made.out_features = layer.in_features, layer.out_features
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return A (x * noise) in training mode, A x otherwise."""
        if not self.training:
            return F.linear(x, self.weight)
        stayed = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1.0 - self.share)  # as `F.dropout` draws
        return cast(Tensor, _Dropped.apply(x, self.weight, stayed, self.share))  # type: ignore[no-untyped-call]


class _Dropped(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]  # backward in autocast where forward was
    def forward(ctx: Any, x: Tensor, weight: Tensor, stayed: Tensor, share: float) -> Tensor:
        ctx.share = share
        ctx.save_for_backward(x, weight, stayed)
        return F.linear(x * _noise(stayed, share, x.dtype), weight)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, stayed = ctx.saved_tensors
        noise, g = _noise(stayed, ctx.share, x.dtype), gradients[0].reshape(-1, len(weight))
        of_weight = g.t().mm((x * noise).reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        of_x = g.mm(weight).view(x.shape) * noise if ctx.needs_input_grad[0] else None
        return of_x, of_weight, None, None


def _noise(stayed: Tensor, share: float, dtype: torch.dtype) -> Tensor:
    """Return 1 / (1 - share) for what stays and 0 for the rest."""
    return stayed.to(dtype).div_(1.0 - share)
