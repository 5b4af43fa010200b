# SPDX-License-Identifier: Apache-2.0
"""Move the scales of a quantised base, and leave its codes as they are.

A block of ggml holds 32 codes q and one or two fp16 numbers, its scale d and perhaps an offset m: w = d q + m.  Training the
scales alone (PEQA, Kim et al. 2023, arXiv 2305.14152; EfficientQAT, Chen et al. 2024, arXiv 2407.11062) leaves a file of the
same codes, so nothing is rounded after training.  Here a direction moves them on the grid of fp16 itself (`scale_grid.py`).
z has a number for each scale, a 16th or a 32nd of what the weights would need, so a pass costs next to nothing.

For back-propagation the rounding is passed over (`scale_steps.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fleetune.common.ggml import BLOCK, HALVES
from fleetune.errors import UsageError
from fleetune.models.dtypes import WEIGHTS
from fleetune.models.mapped.lazy import LazyWeight
from fleetune.models.mapped.quants import apply_scales, scale_bits, write_codes
from fleetune.models.model import Model, Pieces, named_tensors
from fleetune.seeds.scale_grid import rounding
from fleetune.seeds.scale_steps import gradient_of_places, holds_scales, on_grid, place_of
from fleetune.seeds.slots import WeightSlot, layout
from fleetune.seeds.view import View


def scales_of(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, tuple[int, ...]]]:
    """Return (name, shape [rows, blocks, 1 or 2]) of the scales of a net; UsageError where it has none."""
    found: list[tuple[str, tuple[int, ...]]] = [
        (f"{name}.scales", (t.shape[0], t.shape[1] // BLOCK, HALVES[t.stored.kind]))
        for name, t in named
        if isinstance(t, LazyWeight) and holds_scales(t)
    ]
    layers = [
        name for name, _ in found if any(part.isdigit() for part in name.split("."))
    ]  # they have a number
    if not layers:
        raise UsageError(
            "this base has no scales that could be trained",
            hint=f"train=scales is for a GGUF file of {', '.join(HALVES)}, with base=mapped",
        )
    return found


def moved_tensors(model: Model) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Return (name, shape, dtype) of what directions move of a model, in name order."""
    named, dtype = named_tensors(model.net), WEIGHTS[model.dtype].full
    if model.trains == "scales":
        return tuple((name, shape, dtype) for name, shape in scales_of(named))
    return tuple((n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in named)


def view_on(model: Model, *, run_key: int, law: str, grid: float) -> View:
    """Return a view of a model that moves what `model.trains` says."""
    kind = ScaleView if model.trains == "scales" else View
    return kind(named_tensors(model.net), model.net, run_key=run_key, law=law, grid=grid)


class ScaleView(View):
    """Runs a net whose matrices lie in a GGUF file, with other scales than the file's."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], net: Any, **how: Any) -> None:
        tensors = list(named)
        super().__init__([(n, t) for n, t in tensors if holds_scales(t)], net, **how)
        self.folds = True
        self._offsets: dict[str, Tensor] = {}

    @staticmethod
    def layout(named: Iterable[tuple[str, Tensor]]) -> list[WeightSlot]:
        """Lay the scales end to end; a slot has the weight that they are of."""
        weights = dict(named)
        counted = [
            (n.removesuffix(".scales"), torch.zeros(()).expand(shape))
            for n, shape in scales_of(weights.items())
        ]
        return [slot._replace(tensor=weights[slot.name]) for slot in layout(counted)]

    def moved_slots(self) -> list[WeightSlot]:
        """Return the scales."""
        shapes = dict(scales_of((s.name, s.tensor) for s in self.slots))
        return [s._replace(tensor=torch.zeros(()).expand(shapes[f"{s.name}.scales"])) for s in self.slots]

    def piece(self, slot: WeightSlot, first: int, last: int, out: Tensor | None = None) -> Tensor:
        """Return elements first..last of a matrix at the view's point, as `View.piece` does."""
        if self.point is None and self.direction is None and not self.folded.sums:
            self.reached.add(slot.name)
            base = self.read(slot, first, last)
            return base if out is None else out.copy_(base)
        (found,) = self._made(slot, first, last, signs=1)
        return found if out is None else out.copy_(found)

    def signs(self, slot: WeightSlot, first: int, last: int) -> tuple[Tensor, ...]:
        """Return (piece,) or, while both signs run, also that for the probe's opposite."""
        return self._made(slot, first, last, signs=2) if self.paired else (self.piece(slot, first, last),)

    def pulled_back(self, slot: WeightSlot, first: int, gradient: Tensor) -> tuple[int, Tensor]:
        """Return the gradient of p, from that of whole rows from element `first` on."""
        stored = _weight(slot).stored
        top, end = first // stored.width, (first + gradient.numel()) // stored.width
        blocks, (bits,) = self._bits(slot, top, end, signs=1)
        moved = gradient_of_places(gradient, blocks, bits, stored.kind)
        return slot.start + top * _per_row(slot), moved.view(-1)

    def pieces(self) -> Iterator[tuple[str, Pieces | Tensor]]:  # type: ignore[override]
        """Yield (name, tensor) of all tensors of the net at the view's point, those with scales in pieces."""
        slots = {slot.name: slot for slot in self.slots}
        for name, tensor in named_tensors(self.net):
            if (slot := slots.get(name)) is None:
                yield name, tensor
            else:
                yield name, Pieces(tensor.dtype, tensor.shape, self._pieces(slot))

    def write(self) -> None:
        """Overwrite the stored weights with the view's point, and take the view off: nothing has scales any more."""
        super().write()
        self.remove()

    def storing(self) -> Any:
        """Refuse: a direction that is written out has a number for each weight."""
        raise UsageError("a direction of scales is not written out", hint="use mezo, fedkseed or onebyte")

    def scales(self, slot: WeightSlot) -> Tensor:
        """Return the fp16 scales of a matrix at the view's point, int16 [blocks, 1 or 2]: their bits, rows as in the model."""
        return self._bits(slot, 0, _weight(slot).stored.shape[0], signs=1)[1][0]

    def _made(self, slot: WeightSlot, first: int, last: int, signs: int) -> tuple[Tensor, ...]:
        self.reached.add(slot.name)
        weight = _weight(slot)
        width = weight.stored.width
        top, end = first // width, -(-last // width)
        blocks, moved = self._bits(slot, top, end, signs)
        room = self._take(signs * (end - top) * width, torch.float32).view(signs, -1, BLOCK)
        write_codes(room[-1], blocks, weight.stored.kind)
        found = []
        for number, (out, bits) in enumerate(zip(room, moved, strict=True)):
            if number < signs - 1:
                out.copy_(room[-1])
            apply_scales(out, bits.view(torch.float16).float())
            found.append(out.view(-1)[first - top * width : last - top * width].to(weight.dtype))
        return tuple(found)

    def _bits(self, slot: WeightSlot, top: int, end: int, signs: int) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the blocks of some rows, uint8 [n, bytes], and for each sign the bits of their scales int16 [n, 1 or 2]."""
        stored, per_row = _weight(slot).stored, _per_row(slot)
        blocks = stored.blocks(top, end)
        bits = scale_bits(blocks, stored.kind)
        flat = bits.view(-1)
        at = place_of(flat)
        sums = self.folded.sums.get(slot.name)
        lo, hi = top * per_row, end * per_row
        part = None if sums is None else sums[lo:hi]
        outs = [torch.empty_like(at) for _ in range(signs)]
        self._sweep(outs[0], at, slot.start + lo, part, self.direction, *outs[1:])
        offsets = self._offsets_of(slot)[lo:hi]
        return blocks, [on_grid(p, flat, offsets.float().add_(0.5).div_(256)).view_as(bits) for p in outs]

    def _offsets_of(self, slot: WeightSlot) -> Tensor:
        """Return 256 u - 0.5 of the scales of a matrix: uint8."""
        if slot.name not in self._offsets:
            count = slot.tensor.shape[0] * _per_row(slot)
            self._offsets[slot.name] = torch.from_numpy(rounding(self.run_key, slot.start, count))
        return self._offsets[slot.name]


def _weight(slot: WeightSlot) -> LazyWeight:
    assert isinstance(slot.tensor, LazyWeight)
    return slot.tensor


def _per_row(slot: WeightSlot) -> int:
    stored = _weight(slot).stored
    return stored.width // BLOCK * HALVES[stored.kind]
