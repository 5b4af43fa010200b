"""Train the scales of a quantised base by back-propagation, and leave its codes as they are.

PEQA (Kim et al., NeurIPS 2023, arXiv 2305.14152, section 3): a linear layer's weight is W = s q with frozen codes q and a scale s
for each group.  Here a group is a block of ggml, which may also have an offset, and what is trained is a move delta of p, about
log2 |s|, in fp32 (`seeds/scale_view.py`).  A forward pass uses the nearest scales in fp16, so the model that is trained is the
file that is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fleetune.adapters.attachment import Part, attachment_of
from fleetune.common.ggml import BLOCK, HALVES
from fleetune.errors import ModelError
from fleetune.models import lazy
from fleetune.models.lazy import LazyWeight, in_blocks, kinds_of, replace_parameters
from fleetune.models.net.model import Model
from fleetune.models.stored import apply_scales, check_scales, scale_bits, write_codes
from fleetune.seeds.scale_view import gradient_of_places, on_grid, place_of


@dataclass(frozen=True)
class Scales:
    """The scales of the linear layers, the output head's not."""

    def put_on(self, model: Model, seed: int) -> ScalesPart:
        """Let the layers run on scales that can move, which start at the file's whatever the seed."""
        return ScalesPart(model.net)


class ScalesPart(Part):
    """The moves of a net's scales: of each layer float32 [rows, blocks of a row, 1 or 2], in steps of log2."""

    def __init__(self, net: Any) -> None:
        self._net, head = net, net.get_output_embeddings()
        self._layers: dict[str, nn.Linear] = {
            name: module
            for name, module in net.named_modules()
            if type(module) is nn.Linear and in_blocks(module.weight) and module is not head
        }
        linears = ((n, m.weight) for n, m in net.named_modules() if type(m) is nn.Linear and m is not head)
        check_scales(kinds_of(linears))
        moves = {
            name: nn.Parameter(torch.zeros(_shape(_weight(layer)))) for name, layer in self._layers.items()
        }
        self.parameters = {f"{name}.scales": delta for name, delta in moves.items()}
        for name, layer in self._layers.items():
            layer.forward = _forward(layer, moves[name])  # type: ignore[method-assign]

    def remove(self) -> None:
        """Let the layers run on the file's scales."""
        for layer in self._layers.values():
            del layer.forward

    def fold(self) -> None:
        """Put the matrices of the moved scales into memory, as the stored weights."""
        made = {
            id(layer.weight): nn.Parameter(_matrix(_weight(layer), delta).clone(), requires_grad=False)
            for layer, delta in self._moves()
        }
        replace_parameters(self._net, made)

    def bits(self) -> dict[str, Tensor]:
        """Return the scales' bits now by the weight's name: fp16 as int16 [blocks, 1 or 2], rows as in the model."""
        return {
            f"{name}.weight": torch.cat([bits for _, _, bits in _moved(_weight(layer), delta)])
            for name, (layer, delta) in zip(self._layers, self._moves(), strict=True)
        }

    def _moves(self) -> Iterator[tuple[nn.Linear, Tensor]]:
        """Yield each layer, and the moves of its scales."""
        for name, layer in self._layers.items():
            yield layer, self.parameters[f"{name}.scales"]


def moved_scales(model: Model) -> dict[str, Tensor]:
    """Return `ScalesPart.bits` of a model that carries one; ModelError where it does not."""
    part = attachment_of(model).parts[0]
    if not isinstance(part, ScalesPart):
        raise ModelError("the model carries no moved scales", hint="tune with --train scales")
    return part.bits()


def _weight(layer: nn.Linear) -> LazyWeight:
    assert isinstance(layer.weight, LazyWeight)
    return layer.weight


def _shape(weight: LazyWeight) -> tuple[int, int, int]:
    rows, width = weight.stored.shape
    return rows, width // BLOCK, HALVES[weight.stored.kind]


def _forward(layer: nn.Linear, delta: nn.Parameter) -> Any:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, delta, [layer.weight])  # type: ignore[no-untyped-call]
        return y if layer.bias is None else y + layer.bias

    return forward


class _Product(torch.autograd.Function):
    """x W' with W' the matrix of the moved scales, which is made in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, held: list[LazyWeight]) -> Tensor:
        ctx.save_for_backward(x, delta)
        ctx.held = held
        return nn.functional.linear(x, _matrix(held[0], delta))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,), (x, delta), (weight,) = gradients, ctx.saved_tensors, ctx.held
        flat, inputs = g.flatten(0, -2), x.flatten(0, -2)
        back = flat.mm(_matrix(weight, delta)).view(x.shape) if ctx.needs_input_grad[0] else None
        of_delta = torch.empty_like(delta)
        for rows, blocks, bits in _moved(weight, delta):
            of_weights = flat[:, rows].T @ inputs
            moved = gradient_of_places(of_weights, blocks, bits, weight.stored.kind)
            of_delta[rows] = moved.view_as(of_delta[rows])
        return back, of_delta, None


def _moved(weight: LazyWeight, delta: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, their blocks uint8 [n, bytes], the bits of their moved scales int16 [n, 1 or 2]), some rows at a time."""
    stored = weight.stored
    count, width = stored.shape
    step = max(1, lazy.BLOCK // width)
    for top in range(0, count, step):
        rows = slice(top, min(top + step, count))
        blocks = stored.blocks(rows.start, rows.stop)
        bits = scale_bits(blocks, stored.kind)
        p = place_of(bits).add_(delta.detach()[rows].view(bits.shape))
        yield rows, blocks, on_grid(p, bits, 0.5)


def _matrix(weight: LazyWeight, delta: Tensor) -> Tensor:
    """Return W' in the model's dtype, in scratch that the next matrix overwrites."""
    count, width = weight.stored.shape
    out = weight.memory.scratch(count * width).view(count, width)
    for rows, blocks, bits in _moved(weight, delta):
        part = out[rows].view(-1, BLOCK)
        write_codes(part, blocks, weight.stored.kind)
        apply_scales(part, bits.view(torch.float16).float())
    return out.to(weight.dtype)
