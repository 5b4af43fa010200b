# SPDX-License-Identifier: Apache-2.0
"""Run a net whose matrices lie in a GGUF file as blocks of codes and scales, with one of the two moved.

A block of ggml holds 32 codes q and one or two fp16 numbers, its scale d and perhaps an offset m: w = d q + m.  A point of such
a view is a file of the same kinds, so nothing is rounded after training.  What moves is the scales (`scale_view.py`) or the
codes (`code_view.py`); whatever is not in blocks stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fleetune.errors import UsageError
from fleetune.models.mapped.lazy import LazyWeight, in_blocks, kinds_of
from fleetune.models.mapped.stored import check_part
from fleetune.models.model import Pieces, named_tensors
from fleetune.seeds.slots import WeightSlot, layout
from fleetune.seeds.view import CHUNK, View


class BlockView(View):
    """Runs a net on blocks of which a part differs from the file's."""

    part: ClassVar[str]  # one of `PARTS`

    def __init__(self, named: Iterable[tuple[str, Tensor]], net: Any, **how: Any) -> None:
        super().__init__([(n, t) for n, t in named if in_blocks(t)], net, **how)

    @classmethod
    def moved_of(cls, named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, tuple[int, ...]]]:
        """Return (name, shape) of what directions move of a net; ModelError where none of its layers is in blocks."""
        named = list(named)
        check_part(kinds_of(named), cls.part)
        found = [(n, cls.shape_of(t)) for n, t in named if isinstance(t, LazyWeight) and in_blocks(t)]
        return [(f"{name}.{cls.part}", shape) for name, shape in found]

    @classmethod
    def layout(cls, named: Iterable[tuple[str, Tensor]]) -> list[WeightSlot]:
        """Lay what moves end to end; a slot has the weight that it is of."""
        weights = dict(named)
        counted = [
            (n.removesuffix(f".{cls.part}"), torch.zeros(()).expand(shape))
            for n, shape in cls.moved_of(weights.items())
        ]
        return [slot._replace(tensor=weights[slot.name]) for slot in layout(counted)]

    @staticmethod
    def shape_of(weight: LazyWeight) -> tuple[int, ...]:
        """Return the shape of what moves of a weight."""
        raise NotImplementedError

    def rows(self, slot: WeightSlot, top: int, end: int, signs: int) -> Tensor:
        """Return rows top..end of a matrix at the view's point, and for 2 signs at the opposite: float32 [signs, numbers].

        They live in scratch, which the next call overwrites.
        """
        raise NotImplementedError

    def packed_rows(self, slot: WeightSlot, top: int, end: int) -> np.ndarray:
        """Return what moves of rows top..end at the view's point, as the file holds it: [rows, n] of `part`'s type."""
        raise NotImplementedError

    def packed(self, slot: WeightSlot) -> np.ndarray:
        """Return what moves of a whole matrix, as `packed_rows` does; rows are in the model's order."""
        count, width = weight_of(slot).stored.shape
        step = max(1, CHUNK // width)
        return np.concatenate(
            [self.packed_rows(slot, top, min(top + step, count)) for top in range(0, count, step)]
        )

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
        raise UsageError(
            f"a direction of {self.part} is not written out", hint="use mezo, fedkseed or onebyte"
        )

    def _made(self, slot: WeightSlot, first: int, last: int, signs: int) -> tuple[Tensor, ...]:
        self.reached.add(slot.name)
        weight = weight_of(slot)
        width = weight.stored.width
        top, end = first // width, -(-last // width)
        begin = top * width
        return tuple(
            numbers[first - begin : last - begin].to(weight.dtype)
            for numbers in self.rows(slot, top, end, signs)
        )


def weight_of(slot: WeightSlot) -> LazyWeight:
    """Return the weight of a slot, which lies in a file."""
    assert isinstance(slot.tensor, LazyWeight)
    return slot.tensor
