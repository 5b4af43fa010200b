"""Run a net whose matrices lie in a GGUF file as blocks of codes and scales, with the scales moved and the codes as they are.

A block of ggml is w = d q + m with 32 codes q, an fp16 scale d and perhaps an fp16 offset m.  Training d and m alone (PEQA, Kim
et al. 2023, arXiv 2305.14152; EfficientQAT, Chen et al. 2024, arXiv 2407.11062) leaves a file of the same codes.  A direction
moves p = b / 1024, about log2 |d|, with b the bits of |d| as a whole number (docs/scales.md).  Back-propagation passes over the
rounding (straight-through):

    dL/dp = 2^e sign(d) sum_q q dL/dw        of an offset m: 2^e sign(m) sum_q dL/dw        e the exponent of d or m
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fleetune.common.ggml import BLOCK, HALVES, SCALES, share
from fleetune.common.hearing import heard
from fleetune.errors import UsageError
from fleetune.models.families.number_types import WEIGHTS
from fleetune.models.lazy import LazyWeight, in_blocks, kinds_of
from fleetune.models.net.model import Model, Pieces, named_tensors
from fleetune.models.stored import apply_scales, check_scales, scale_bits, write_codes
from fleetune.seeds import noise
from fleetune.seeds.noise import LARGEST, OUTER, STEPS, Passes, rounding, rows_of
from fleetune.seeds.view import View
from fleetune.seeds.weights import CHUNK, WeightSlot, layout, read_stored


class OuterView(View):
    """Runs a net whose matrices are moved by outer products."""

    def __init__(self, named: Any, net: Any, **how: Any) -> None:
        super().__init__(named, net, **how)
        self._signs: dict[tuple[str, int], Tensor] = {}
        rows = rows_of([slot.tensor.shape for slot in self.slots])
        firsts = np.concatenate([[0], np.cumsum(rows)]).tolist()
        self._rows = {slot.name: firsts[i : i + 2] for i, slot in enumerate(self.slots)}

    def piece(self, slot: WeightSlot, first: int, last: int, out: Tensor | None = None) -> Tensor:
        """Return elements first..last of a tensor at the view's point, as `View.piece` does."""
        self.reached.add(slot.name)
        base = read_stored(slot, first, last)
        moved = None if self.point is None else self._moved(slot, self.point, first, last)
        if moved is None:
            heard()
            return base if out is None else out.copy_(base)
        if out is None:
            out = self._take(last - first, base.dtype)
        return out.copy_(moved.mul_(self.grid).add_(base))

    def _moved(self, slot: WeightSlot, point: Passes, first: int, last: int) -> Tensor | None:
        """Return the sum of all outer products at elements first..last, fp32; None where nothing moves them."""
        begin, end = self._rows[slot.name]
        if begin == end:
            return None
        width = slot.tensor.shape[-1]
        top, bottom = first // width, -(-last // width)
        tables = point.tables[:, begin + top : begin + bottom]
        if not tables.any():
            return None
        self.count(len(point.ids) * (last - first))
        signs = torch.stack([self._signs_of(slot, p, width) for p in point.ids.tolist()]).double()
        acc = torch.from_numpy(tables.astype(np.float64)).to(signs.device).t() @ signs
        return acc.view(-1)[first - top * width : last - top * width].float()

    def _signs_of(self, slot: WeightSlot, p: int, width: int) -> Tensor:
        """Return s of direction p for a matrix: int8 [columns]."""
        if (slot.name, p) not in self._signs:
            heard()
            found = torch.from_numpy(noise.signs(self.run_key, p, slot.start, width))
            self._signs[slot.name, p] = found.to(self.device)
        return self._signs[slot.name, p]


class ScaleView(View):
    """Runs a net whose matrices lie in a GGUF file, with other scales than the file's."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], net: Any, **how: Any) -> None:
        super().__init__([(n, t) for n, t in named if in_blocks(t)], net, **how)
        self._offsets: dict[str, Tensor] = {}

    @staticmethod
    def layout(named: Iterable[tuple[str, Tensor]]) -> list[WeightSlot]:
        """Lay the scales end to end; a slot has the weight that its scales are of."""
        weights = dict(named)
        scales = [
            (name.removesuffix(f".{SCALES}"), torch.zeros(()).expand(shape))
            for name, shape in _scales_of(weights.items())
        ]
        return [slot._replace(tensor=weights[slot.name]) for slot in layout(scales)]

    def pulled_back(self, slot: WeightSlot, first: int, gradient: Tensor) -> tuple[int, Tensor]:
        """Return the gradient of p, from that of whole rows from element `first` on."""
        stored = _weight(slot).stored
        top, end = first // stored.width, (first + gradient.numel()) // stored.width
        blocks, (bits,) = self._bits(slot, top, end, signs=1)
        moved = gradient_of_places(gradient, blocks, bits, stored.kind)
        return slot.start + top * _per_row(slot), moved.view(-1)

    def packed(self, slot: WeightSlot) -> np.ndarray:
        """Return the bits of a matrix's scales at the view's point: uint16 [rows, scales of a row], rows as in the model."""
        count, width = _weight(slot).stored.shape
        step = max(1, CHUNK // width)
        parts = [
            self._bits(slot, top, min(top + step, count), signs=1)[1][0].numpy()
            for top in range(0, count, step)
        ]
        return np.concatenate(parts).view(np.uint16).reshape(count, -1)

    def piece(self, slot: WeightSlot, first: int, last: int, out: Tensor | None = None) -> Tensor:
        """Return elements first..last of a matrix at the view's point, as `View.piece` does."""
        if self.point is None and self.direction is None:
            self.reached.add(slot.name)
            base = read_stored(slot, first, last)
            return base if out is None else out.copy_(base)
        (found,) = self._made(slot, first, last, signs=1)
        return found if out is None else out.copy_(found)

    def signs(self, slot: WeightSlot, first: int, last: int) -> tuple[Tensor, ...]:
        """Return (piece,) or, while both signs run, also that for the probe's opposite."""
        return self._made(slot, first, last, signs=2) if self.paired else (self.piece(slot, first, last),)

    def pieces(self) -> Iterator[tuple[str, Pieces | Tensor]]:  # type: ignore[override]
        """Yield (name, tensor) of all tensors of the net at the view's point, those in blocks in pieces."""
        slots = {slot.name: slot for slot in self.slots}
        for name, tensor in named_tensors(self.net):
            if (slot := slots.get(name)) is None:
                yield name, tensor
            else:
                yield name, Pieces(tensor.dtype, tensor.shape, self._pieces(slot))

    def write(self) -> None:
        """Overwrite the stored weights with the view's point, and take the view off: nothing is in blocks any more."""
        super().write()
        self.remove()

    def storing(self) -> Any:
        """Refuse: a direction that is written out is one of weights in memory."""
        raise UsageError("a direction of scales is not written out", hint="use mezo, fedkseed or onebyte")

    def _made(self, slot: WeightSlot, first: int, last: int, signs: int) -> tuple[Tensor, ...]:
        """Return elements at the view's point, and for 2 signs at the opposite: the file's codes times its scales, moved.

        They are made by whole rows in float32, in scratch, which the next call overwrites.
        """
        self.reached.add(slot.name)
        weight = _weight(slot)
        width = weight.stored.width
        top, end = first // width, -(-last // width)
        blocks, moved = self._bits(slot, top, end, signs)
        room = self._take(signs * (end - top) * width, torch.float32).view(signs, -1, BLOCK)
        write_codes(room[-1], blocks, weight.stored.kind)
        for number, (out, bits) in enumerate(zip(room, moved, strict=True)):
            if number < signs - 1:
                out.copy_(room[-1])
            apply_scales(out, bits.view(torch.float16).float())
        part = slice(first - top * width, last - top * width)
        return tuple(numbers[part].to(weight.dtype) for numbers in room.view(signs, -1))

    def _bits(self, slot: WeightSlot, top: int, end: int, signs: int) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the blocks of some rows, uint8 [n, bytes], and for each sign the bits of their scales int16 [n, 1 or 2]."""
        stored, per_row = _weight(slot).stored, _per_row(slot)
        blocks = stored.blocks(top, end)
        bits = scale_bits(blocks, stored.kind)
        flat = bits.view(-1)
        at = place_of(flat)
        lo, hi = top * per_row, end * per_row
        outs = [torch.empty_like(at) for _ in range(signs)]
        minus = outs[1] if signs == 2 else None
        self.sweep(outs[0], at, slot.start + lo, self.point, self.direction, minus=minus)
        offsets = self._offsets_of(slot)[lo:hi]
        return blocks, [on_grid(p, flat, offsets.float().add_(0.5).div_(256)).view_as(bits) for p in outs]

    def _offsets_of(self, slot: WeightSlot) -> Tensor:
        """Return 256 u - 0.5 of the scales of a matrix: uint8."""
        if slot.name not in self._offsets:
            count = slot.tensor.shape[0] * _per_row(slot)
            self._offsets[slot.name] = torch.from_numpy(rounding(self.run_key, slot.start, count))
        return self._offsets[slot.name]


def moved_tensors(model: Model) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Return (name, shape, dtype) of what directions move of a model, in name order; ModelError where it has none."""
    named = named_tensors(model.net)
    if model.trains == SCALES:
        return tuple((name, shape, WEIGHTS[model.dtype].full) for name, shape in _scales_of(named))
    return tuple((n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in named)


def scales_share(model: Model) -> list[str]:
    """Say how much a model trains whose layers are not all in blocks that have scales, in one text; [] for others."""
    said = share(kinds_of(named_tensors(model.net))) if model.trains == SCALES else ""
    return [said] if said else []


def view_type(model: Model, law: str) -> type[View]:
    """Return the view that moves what `model.trains` says, by a law."""
    return OuterView if law == OUTER else ScaleView if model.trains == SCALES else View


def view_on(model: Model, *, run_key: int, law: str, grid: float) -> View:
    """Return a view of a model that moves what `model.trains` says."""
    return view_type(model, law)(named_tensors(model.net), model.net, run_key=run_key, law=law, grid=grid)


def place_of(bits: Tensor) -> Tensor:
    """Return p of scales by their bits int16: float32 of the same shape."""
    return (bits & 0x7FFF).float().div_(STEPS)


def on_grid(p: Tensor, bits: Tensor, u: Tensor | float) -> Tensor:
    """Return the bits of the scales at p, which is overwritten: int16, in the sign of the file's `bits`; a scale of 0 stays."""
    whole = p.mul_(STEPS).add_(u).floor_().clamp_(0, LARGEST)
    found = whole.to(torch.int16) | (bits & -0x8000)
    return torch.where((bits & 0x7FFF) == 0, bits, found)


def gradient_of_places(of_weights: Tensor, blocks: Tensor, bits: Tensor, kind: str) -> Tensor:
    """Return dL/dp from dL/dw [n, 32] of blocks uint8 [n, bytes] whose scales have the bits int16 [n, 1 or 2]."""
    g = of_weights.reshape(-1, BLOCK).float()
    codes = torch.empty_like(g)
    write_codes(codes, blocks, kind)
    parts = [codes.mul_(g).sum(1)] + [g.sum(1)] * (bits.shape[1] - 1)
    # dd/dp is 2^(e - 15) in the sign of d, with e the exponent's bits (0: as 1)
    power = (bits & -0x400).view(torch.float16).float()
    least = (1.0 - 2.0 * (bits < 0)) * 2.0**-14
    return torch.stack(parts, 1).mul_(torch.where((bits & 0x7C00) == 0, least, power))


def _scales_of(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, tuple[int, ...]]]:
    """Return (name, shape) of the scales of a net; ModelError where none of its layers is in blocks."""
    named = list(named)
    check_scales(kinds_of(named))
    return [(f"{n}.{SCALES}", _shape(t)) for n, t in named if isinstance(t, LazyWeight) and in_blocks(t)]


def _shape(weight: LazyWeight) -> tuple[int, ...]:
    """Return [rows, blocks, 1 or 2]: the shape of the scales of a weight."""
    return (weight.shape[0], weight.shape[1] // BLOCK, HALVES[weight.stored.kind])


def _weight(slot: WeightSlot) -> LazyWeight:
    """Return the weight of a slot, which lies in a file."""
    assert isinstance(slot.tensor, LazyWeight)
    return slot.tensor


def _per_row(slot: WeightSlot) -> int:
    stored = _weight(slot).stored
    return stored.width // BLOCK * HALVES[stored.kind]
