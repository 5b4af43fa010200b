"""Run a net whose matrices are moved by outer products of signs (`noise.py`, the law `outer`)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fleetune.common.hearing import heard
from fleetune.seeds import noise
from fleetune.seeds.noise import Passes, rows_of
from fleetune.seeds.view import View
from fleetune.seeds.weights import WeightSlot, read_stored


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
