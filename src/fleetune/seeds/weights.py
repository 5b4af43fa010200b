"""The weights of a net at another point of weight space, computed a piece at a time from the stored ones, which stay as they are.

    w[i] = round( w0[i] + grid * sum_k c_k z_k[i]  +  eps z[i] )

from base, ledger and probe: bit-equal to a replay of the ledger (docs/view.md).  Only `read_stored` reads the base.
"""

import importlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fleetune.common.hearing import heard
from fleetune.errors import UsageError
from fleetune.models.lazy import LazyWeight
from fleetune.models.net.model import Pieces
from fleetune.seeds import VARIABLE, chosen_kernels
from fleetune.seeds.noise import EMPTY, TILE, Passes

log = logging.getLogger(__name__)

CALL = 16  # rows of a table that are made in about the time of a call
CHUNK = 1 << 20  # elements of scratch: 4 MB in fp32, so that it stays in the cache until the product reads it
WORK = 1 << 27  # elements times passes between two looks whether to stop, on a CPU: seconds


def kernels(device: torch.device, backend: str = "auto") -> ModuleType:
    """Return the kernel module for a device: Numba on a CPU that has it, plain torch everywhere else.

    `backend` is auto (see `chosen_kernels`), numba or torch; UsageError when numba is asked for and is not usable here.
    """
    wanted = chosen_kernels(backend)
    if wanted == "torch" or (wanted == "auto" and device.type != "cpu"):
        return importlib.import_module("fleetune.seeds.kernels_torch")
    hint = f"{VARIABLE}=auto takes torch's kernels there"
    if device.type != "cpu":
        raise UsageError(f"Numba's kernels are for a CPU, the weights are on {device.type}", hint=hint)
    try:
        return importlib.import_module("fleetune.seeds.kernels_numba")
    except ImportError as error:
        if wanted == "numba":
            raise UsageError(f"Numba is not usable here: {error}", hint=hint) from error
        log.warning("Numba is not usable here: directions are computed by torch, which is slower")
        return importlib.import_module("fleetune.seeds.kernels_torch")


class WeightSlot(NamedTuple):
    """A trainable tensor and the global index of its first element.

    The index decides which element of a direction a weight gets, so it must not depend on device, shards or threads.
    """

    name: str
    tensor: Tensor
    start: int


Direction = tuple[int, np.ndarray]  # Philox id, table


def read_stored(slot: WeightSlot, first: int, last: int) -> Tensor:
    """Return elements first..last of a tensor: the stored memory itself; of a mapped base scratch, which the next call reuses."""
    if isinstance(slot.tensor, LazyWeight):
        return slot.tensor.piece(first, last)
    return slot.tensor.detach().view(-1)[first:last]


def layout(named: Iterable[tuple[str, Tensor]]) -> list[WeightSlot]:
    """Lay name-ordered tensors end to end, each starting at a multiple of 4096 (the spec's index)."""
    slots, start = [], 0
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        slots.append(WeightSlot(name, tensor, start))
        start += -(-tensor.numel() // TILE) * TILE
    return slots


class MovedWeights:
    """The trainable tensors of a net at `w0 + grid * passes (+ eps z)`: `place` sets the point, `probe` the perturbation."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], *, run_key: int, law: str, grid: float) -> None:
        self.slots = self.layout(named)
        self.run_key, self.law, self.grid = run_key, law, grid
        self.threads: int | None = None  # torch's number
        self.device = self.slots[0].tensor.device
        self.kernels = kernels(self.device)
        self.point: Passes | None = None
        self.direction: Direction | None = None
        self.stored: StoredDirection | None = None  # where a probe's direction is written out, if anywhere
        self.reached: set[str] = set()
        self.limit(0)
        self.paired = 0  # rows of a half of the batch, while both signs of a probe run in one forward
        self._scratch = torch.empty(0)

    @staticmethod
    def layout(named: Iterable[tuple[str, Tensor]]) -> list[WeightSlot]:
        """Return the tensors that change, and where in a direction the numbers of each begin."""
        return layout(named)

    def limit(self, most: int) -> None:
        """UsageError after `most` passes from now on (0: any number).

        A pass is one direction, or one epoch of a pool, over as many elements as the weights have.
        """
        self.swept = 0
        self.most = most * sum(slot.tensor.numel() for slot in self.slots)

    def pulled_back(self, slot: WeightSlot, first: int, gradient: Tensor) -> tuple[int, Tensor]:
        """Return the gradient of what is moved, from that of the elements from `first` on, and where it begins."""
        return slot.start + first, gradient

    def place(self, passes: Passes | None) -> None:
        """Set the point: the ledger's passes, which are computed in each forward, or None for the base."""
        self.point = passes if passes is not None and len(passes.ids) else None

    def probe(self, direction: Direction | None, eps: float = 0.0) -> None:
        """Add `eps * z` to the point, for the direction (Philox id, table [K]) of `noise.probe`; None ends it."""
        self.direction = direction and (direction[0], (direction[1] * np.float32(eps)).astype(np.float32))
        if self.stored is not None and direction is not None:
            self.stored.write(direction, eps)

    @contextmanager
    def storing(self) -> Iterator[None]:
        """Read the probe's direction from memory while the block runs, as classical methods do."""
        self.stored = StoredDirection(self)
        try:
            yield
        finally:
            self.stored = None

    def piece(self, slot: WeightSlot, first: int, last: int, out: Tensor | None = None) -> Tensor:
        """Return elements first..last of a tensor at the view's point: 1-D, in the stored dtype.

        The result lives in `out`, or in shared scratch that the next call overwrites, or (when nothing is
        placed or probed) is the stored memory itself.
        """
        self.reached.add(slot.name)
        base = read_stored(slot, first, last)
        if self.point is None and self.direction is None:
            heard()
            return base if out is None else out.copy_(base)
        if out is None:
            out = self._take(last - first, base.dtype)
        if self.stored is not None and self.direction is not None:
            x = torch.empty_like(base, dtype=torch.float32)
            self.sweep(x, base.float(), slot.start + first, self.point, None)
            self.stored.add(x, slot.name, first)
            return out.copy_(x)
        self.sweep(out, base, slot.start + first, self.point, self.direction)
        return out

    def signs(self, slot: WeightSlot, first: int, last: int) -> tuple[Tensor, ...]:
        """Return (piece,) or, while both signs run, also that for the probe's opposite; the next call overwrites them."""
        if not self.paired:
            return (self.piece(slot, first, last),)
        self.reached.add(slot.name)
        base = read_stored(slot, first, last)
        plus, minus = self._take(2 * (last - first), base.dtype).view(2, -1).unbind()
        self.sweep(plus, base, slot.start + first, self.point, self.direction, minus=minus)
        return plus, minus

    def sweep(
        self,
        out: Tensor,
        base: Tensor,
        start: int,
        passes: Passes | None,
        probe: Direction | None,
        *,
        minus: Tensor | None = None,
    ) -> None:
        """Set out = base moved by passes and by the probe, as `kernels_torch.sweep`."""
        passes, gaussian = passes or EMPTY, self.law == "gaussian"
        step = WORK // max(1, len(passes.ids)) // TILE * TILE if self.device.type == "cpu" else out.numel()
        for first in range(0, out.numel(), step := max(TILE, step)):
            heard()
            part = slice(first, first + step)
            self.count(len(passes.ids) * out[part].numel())
            move = (start + first, self.run_key, passes, self.grid, probe)
            other = None if minus is None else minus[part]
            self.kernels.sweep(
                out[part], base[part], *move, gaussian=gaussian, minus=other, threads=self.threads
            )

    def count(self, moved: int) -> None:
        """Count elements times passes; UsageError beyond the limit."""
        self.swept += moved
        if 0 < self.most < self.swept:
            raise UsageError(
                "the directions take more passes over the weights than a device makes at a time",
                hint="law=hashed takes a pass for K directions; or take fewer directions, or fewer steps",
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of every trainable tensor at the view's point, in name order."""
        for slot in self.slots:
            yield slot.name, self.whole(slot)

    def pieces(self) -> Iterator[tuple[str, Pieces]]:
        """Yield (name, pieces) of the same, for a digest that never has a whole tensor."""
        for slot in self.slots:
            yield slot.name, Pieces(slot.tensor.dtype, slot.tensor.shape, self._pieces(slot))

    def _pieces(self, slot: WeightSlot) -> Iterator[Tensor]:
        for first in range(0, slot.tensor.numel(), CHUNK):
            yield self.piece(slot, first, min(first + CHUNK, slot.tensor.numel())).cpu()

    def fill(self, slot: WeightSlot, out: Tensor) -> Tensor:
        """Write a whole tensor at the view's point to `out` (1-D, its dtype and size)."""
        for first in range(0, out.numel(), CHUNK):
            last = min(first + CHUNK, out.numel())
            self.piece(slot, first, last, out[first:last])
        return out

    def whole(self, slot: WeightSlot) -> Tensor:
        """Return a whole tensor at the view's point, in memory of its own."""
        out = torch.empty(slot.tensor.numel(), dtype=slot.tensor.dtype, device=slot.tensor.device)
        return self.fill(slot, out).view(slot.tensor.shape)

    def blocks(self, slot: WeightSlot) -> Iterator[tuple[Any, ...]]:
        """Yield (first row, rows [r, n_in]) of a matrix, few enough for the cache; the next ones overwrite them.

        While both signs run, the rows for the probe's opposite come third.
        """
        n_out, n_in = slot.tensor.shape
        rows = max(1, CHUNK // n_in)
        for r in range(0, n_out, rows):
            s = min(r + rows, n_out)
            yield r, *(part.view(s - r, n_in) for part in self.signs(slot, r * n_in, s * n_in))

    def product(self, slot: WeightSlot, xs: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
        """Return x W' + bias for a matrix at the view's point; of two x, the second is for the probe's opposite.

        The products of several are one after the other along the first dimension.
        """
        n_out, n_in = slot.tensor.shape
        if not xs[0].numel():
            return xs[0].new_empty(*xs[0].shape[:-1], n_out)
        if n_out <= max(1, CHUNK // n_in):
            _, *whole = next(iter(self.blocks(slot)))
            found = [torch.nn.functional.linear(x, W, b) for x, W, b in zip(xs, whole, biases, strict=True)]
            return found[0] if len(found) == 1 else torch.cat(found)
        flat = [x.reshape(-1, n_in) for x in xs]
        out = flat[0].new_empty(len(xs), len(flat[0]), n_out)
        for r, *blocks in self.blocks(slot):
            for x, block, part in zip(flat, blocks, out, strict=True):
                torch.mm(x, block.t(), out=part[:, r : r + len(block)])
        for part, bias in zip(out, biases, strict=True):
            if bias is not None:
                part += bias
        return out.view(len(xs) * xs[0].shape[0], *xs[0].shape[1:-1], n_out)

    def table(self, slot: WeightSlot, ids: Tensor) -> tuple[list[int], Tensor, Tensor]:
        """Return the different ids, their rows of a table at the view's point, and for each id its place among them.

        The rows are [signs, ids, width]: one sign, or both while both run.
        """
        width, count = slot.tensor.shape[1], 2 if self.paired else 1
        rows, where = torch.unique(ids, return_inverse=True)
        if len(slot.tensor) <= min(CHUNK // width, CALL * len(rows)):  # one call in place of one for each row
            _, *parts = next(iter(self.blocks(slot)))
            return rows.tolist(), torch.stack([part[rows] for part in parts]), where
        table = torch.empty(count, len(rows), width, dtype=slot.tensor.dtype, device=slot.tensor.device)
        numbers = rows.tolist()
        for place, row in enumerate(numbers):
            for sign, part in enumerate(self.signs(slot, row * width, (row + 1) * width)):
                table[sign, place] = part
        return numbers, table, where

    def _take(self, size: int, dtype: torch.dtype) -> Tensor:
        if self._scratch.numel() < size or self._scratch.dtype != dtype:
            with torch.inference_mode(False):  # or it could not be written to outside of that mode
                self._scratch = torch.empty(size, dtype=dtype, device=self.device)
        return self._scratch[:size]


class StoredDirection:
    """One direction at a time, written out in full: z[i] for every weight i, in the weights' dtype and on their device.

    Classical zeroth-order methods do so, at the price of one more copy of the weights.  It is here to be measured
    (`methods/zosgd.py`).  The numbers are those that the kernels compute on the fly, rounded to the weights' type: exact
    for directions of +1 and -1.
    """

    def __init__(self, weights: MovedWeights) -> None:
        self.weights = weights
        self.z: dict[str, Tensor] = {}
        self.direction: Direction | None = None
        self.eps = 0.0

    def write(self, direction: Direction, eps: float) -> None:
        """Write `direction` out, unless it is stored already; `eps` is the factor that `add` takes."""
        self.eps = float(np.float32(eps))
        last = self.direction
        if last is not None and last[0] == direction[0] and np.array_equal(last[1], direction[1]):
            return
        whole = direction[0], direction[1].astype(np.float32)
        for slot in self.weights.slots:
            z = torch.zeros(slot.tensor.numel(), dtype=slot.tensor.dtype, device=slot.tensor.device)
            self.z[slot.name] = z
            self.weights.sweep(z, z, slot.start, None, whole)
        self.direction = direction

    def add(self, x: Tensor, name: str, first: int) -> None:
        """Add eps z to x: float32 elements from `first` on of the tensor `name`."""
        x.add_(self.z[name][first : first + x.numel()].float() * self.eps)
