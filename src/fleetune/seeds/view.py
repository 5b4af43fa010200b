# SPDX-License-Identifier: Apache-2.0
"""Run a model at another point of weight space while its stored weights stay as they are.

The papers perturb the weights in place (+eps, -2 eps, +eps, update): four passes that, in 16-bit dtypes,
leave rounding errors larger than the training itself.  Here nothing is ever written: while a module runs,
its weights are computed into a small scratch block

    w[i] = round( w0[i] + grid * sum_k c_k z_k[i]  +  eps z[i] )

straight from the stored base, the ledger's passes and the probe direction, and are dropped when it returns.
So there is nothing to restore, the point is bit-equal to a replay of the ledger, and a step costs one fused
pass for each of its two forwards and a few MB of memory.

The only way to the base is `Read`: one run of elements of one tensor at a time.  Of a mapped base (`models/mapped`) these
are read from its file.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fleetune.common.display import counted
from fleetune.errors import ModelError, UsageError
from fleetune.models.lazy import LazyWeight, replace_parameters
from fleetune.models.net.model import Pieces, allow_copies
from fleetune.seeds import VARIABLE, chosen_kernels, moved_modules
from fleetune.seeds.moved_modules import Direction, Read, RowBlocks, Tape, WeightSlot, layout, read_stored
from fleetune.seeds.noise import EMPTY, Passes

log = logging.getLogger(__name__)

CALL = 16  # rows of a table that are made in about the time of a call
FOLD = 16  # passes that are computed in each forward before they are folded
PIECE = 1 << 20  # elements that are folded at a time
EXACT = 1 << 24  # integers below this are exact in float32
CHUNK = 1 << 20  # elements of scratch: 4 MB in fp32, so that it stays in the cache until the product reads it


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


_WARNED: Final[WeakSet[nn.Module]] = WeakSet()  # nets whose unreached tensors were told


class View:
    """Makes `net` run at `w0 + grid * passes (+ eps z)`.

    `place` sets the point, `probe` the perturbation; with neither the net runs on its stored weights.
    `remove` takes the view off.  The net must be used through its modules (calling them, `generate`, ...).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        net: nn.Module,
        *,
        run_key: int,
        law: str,
        grid: float,
        read: Read = read_stored,
        backend: str = "auto",
        threads: int | None = None,
    ) -> None:
        self.slots = self.layout(named)
        self.run_key, self.law, self.grid = run_key, law, grid
        self.read, self.threads = read, threads
        self.device = self.slots[0].tensor.device
        self.lazy = any(isinstance(slot.tensor, LazyWeight) for slot in self.slots)
        self.folds = not self.lazy  # whether sums of passes are cached, a number for each that is moved
        self.kernels = kernels(self.device, backend)
        self.point: Passes | None = None
        self.direction: Direction | None = None
        self.stored: StoredDirection | None = None  # where a probe's direction is written out, if anywhere
        self.tape: Tape | None = None  # while what the net computes can be back-propagated
        self.reached: set[str] = set()
        self.heard: Callable[[], None] = lambda: None  # called before each piece of work, and may raise
        self.folded = FoldedSums(self.moved_slots(), run_key, self.kernels, threads)
        self._scratch = torch.empty(0)
        self.net = net
        self.owners: list[tuple[nn.Module, dict[str, WeightSlot]]] = []  # wrapped modules and what they own
        self.running = 0  # forwards of modules around those that are going on
        self.paired = 0  # rows of a half of the batch, while both signs of a probe run in one forward
        self._around: list[nn.Module] = []
        self._install(net)

    @staticmethod
    def layout(named: Iterable[tuple[str, Tensor]]) -> list[WeightSlot]:
        """Return the tensors that change, and where in a direction the numbers of each begin."""
        return layout(named)

    def moved_slots(self) -> list[WeightSlot]:
        """Return what directions move: here the weights themselves."""
        return self.slots

    def pulled_back(self, slot: WeightSlot, first: int, gradient: Tensor) -> tuple[int, Tensor]:
        """Return the gradient of what is moved, from that of the elements from `first` on, and where it begins."""
        return slot.start + first, gradient

    def place(self, passes: Passes | None, *, fold: bool = True) -> None:
        """Set the point: the ledger's passes, or None for the base.

        With `fold`, the sum of many passes is cached for the next forwards (see `FoldedSums`); without, each
        pass is computed each time, in no more memory.
        """
        self.point = passes if passes is not None and len(passes.ids) else None
        if not fold:
            self.folded.forget()
        elif self.law != "gaussian" and self.folds:  # gaussian sums are floats, in a stated order
            self.point = self.folded.rest(self.point, self.heard)

    def probe(self, direction: Direction | None, eps: float = 0.0) -> None:
        """Add `eps * z` to the point, for the direction (Philox id, table [K]) of `noise.probe`; None ends it."""
        self.direction = direction and (direction[0], (direction[1] * np.float32(eps)).astype(np.float32))
        if self.stored is not None and direction is not None:
            self.stored.write(direction, eps)

    @contextmanager
    def pairing(self, rows: int) -> Iterator[None]:
        """Run the first `rows` of a batch with the probe and the rest, as many, with its opposite, while the block runs."""
        self.paired = rows
        try:
            yield
        finally:
            self.paired = 0

    @contextmanager
    def storing(self) -> Iterator[None]:
        """Read the probe's direction from memory while the block runs, as classical methods do."""
        self.stored = StoredDirection(self.slots, self.run_key, self.law, self.kernels, self.threads)
        try:
            yield
        finally:
            self.stored = None

    def piece(self, slot: WeightSlot, first: int, last: int, out: Tensor | None = None) -> Tensor:
        """Return elements first..last of a tensor at the view's point: 1-D, in the stored dtype.

        The result lives in `out`, or in shared scratch that the next call overwrites, or (when nothing is
        placed or probed) is the stored memory itself.
        """
        self.heard()
        self.reached.add(slot.name)
        base = self.read(slot, first, last)
        sums = self.folded.sums.get(slot.name)
        if self.point is None and self.direction is None and sums is None:
            return base if out is None else out.copy_(base)
        if out is None:
            out = self._take(last - first, base.dtype)
        part = None if sums is None else sums[first:last]
        if self.stored is not None and self.direction is not None:
            x = torch.empty_like(base, dtype=torch.float32)
            self._sweep(x, base.float(), slot.start + first, part, None)
            self.stored.add(x, slot.name, first)
            return out.copy_(x)
        self._sweep(out, base, slot.start + first, part, self.direction)
        return out

    def signs(self, slot: WeightSlot, first: int, last: int) -> tuple[Tensor, ...]:
        """Return (piece,) or, while both signs run, also that for the probe's opposite; the next call overwrites them."""
        if not self.paired:
            return (self.piece(slot, first, last),)
        self.reached.add(slot.name)
        base, sums = self.read(slot, first, last), self.folded.sums.get(slot.name)
        room = self._take(2 * (last - first), base.dtype)
        plus, minus = room[: last - first], room[last - first :]
        part = None if sums is None else sums[first:last]
        self._sweep(plus, base, slot.start + first, part, self.direction, minus)
        return plus, minus

    def _sweep(
        self,
        out: Tensor,
        base: Tensor,
        start: int,
        sums: Tensor | None,
        probe: Direction | None,
        minus: Tensor | None = None,
    ) -> None:
        """Set out = base at the view's point, moved by the probe (and `minus` by its opposite).

        `sums` are the cached part of the integer sum.
        """
        point = self.point if self.point is not None else EMPTY
        if self.law == "gaussian":
            c = point.tables[:, 0].astype(np.float32)
            scaled = probe and (probe[0], float(probe[1][0]))
            self.kernels.sweep_gaussian(
                out, base, start, self.run_key, point.ids, c, self.grid, scaled, minus=minus
            )
            return
        self.kernels.sweep(
            out,
            base,
            start,
            self.run_key,
            point,
            self.grid,
            probe,
            minus=minus,
            threads=self.threads,
            sums=sums,
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
            found = [F.linear(x, W, b) for x, W, b in zip(xs, whole, biases, strict=True)]
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

    def write(self) -> None:
        """Overwrite the stored weights with the view's point (for export; the base is lost)."""
        with torch.inference_mode():
            for slot in self.slots:
                if not isinstance(slot.tensor, LazyWeight):
                    self.fill(slot, slot.tensor.detach().view(-1))
        if self.lazy:
            self._write_lazy()
        self.folded.forget()
        self.place(None)

    def _write_lazy(self) -> None:
        """Put values in memory in the places of lazy weights, and look at these from here on."""
        new = {
            slot.name: nn.Parameter(self.whole(slot), requires_grad=False)
            for slot in self.slots
            if isinstance(slot.tensor, LazyWeight)
        }
        replace_parameters(self.net, {id(s.tensor): new[s.name] for s in self.slots if s.name in new})
        self.remove()
        self.slots = [slot._replace(tensor=new.get(slot.name, slot.tensor)) for slot in self.slots]
        self.folded.slots, self.lazy = self.slots, False
        self._install(self.net)

    @property
    def words(self) -> str:
        """Say in words what it is, for the model that carries it."""
        return (
            "its weights moved by a seed ledger"
            if self.point is not None
            else "its weights ready to be moved"
        )

    def merge(self, model: Any) -> None:
        """Overwrite the stored weights of the model that carries this view, and take the view off."""
        self.write()
        self.remove()
        model.attachment = None

    def detach(self, model: Any) -> None:
        """Take the view off the model that carries it, which is then the base again."""
        self.remove()
        model.attachment = None

    def remove(self) -> None:
        """Take the view off: the net runs on its stored weights again."""
        for module in [*self._around, *(module for module, _ in self.owners)]:
            allow_copies(module)
        for module, _ in self.owners:
            module._parameters = dict(module._parameters.items())
            module.__dict__.pop("row_blocks", None)
        for module in [*self._around, *(module for module, _ in self.owners)]:
            del module.forward
        self.owners, self._around = [], []

    def warn_unreached(self) -> None:
        """Log the trainable tensors that no forward has asked for, once for a net: they are not being tuned."""
        missing = [s.name for s in self.slots if s.name not in self.reached]
        if missing and self.net not in _WARNED:
            _WARNED.add(self.net)
            log.warning(
                "%s took no part in the forward pass, e.g. %s", counted(len(missing), "tensor"), missing[0]
            )

    def _take(self, size: int, dtype: torch.dtype) -> Tensor:
        if self._scratch.numel() < size or self._scratch.dtype != dtype:
            with torch.inference_mode(False):  # or it could not be written to outside of that mode
                self._scratch = torch.empty(size, dtype=dtype, device=self.device)
        return self._scratch[:size]

    def _install(self, net: nn.Module) -> None:
        by_id = {id(slot.tensor): slot for slot in self.slots}
        for module in net.modules():
            own = {n: by_id[id(p)] for n, p in module.named_parameters(recurse=False) if id(p) in by_id}
            if "forward" in module.__dict__:
                raise ModelError(f"{type(module).__name__} is already wrapped; remove the earlier view first")
            if not own:
                if any(module.children()):
                    module.forward = moved_modules.count_running(self, module.forward)
                    self._around.append(module)
                continue
            module.forward = moved_modules.forward_for(self, module, own)
            module._parameters = moved_modules.ReadParameters(self, module, own)
            if type(module) is nn.Linear and getattr(module, "bias", None) is None and "weight" in own:
                # `losses` reads the head's weights block by block
                module.__dict__["row_blocks"] = RowBlocks(self, own["weight"])
            self.owners.append((module, own))


class FoldedSums:
    """The integer sums of some passes over the elements of tensors, and which passes were summed.

    A view computes every pass of its point anew in each forward.  For a pool that is one pass whatever K is.  Independent
    directions are a pass each, so beyond `FOLD` of them their sum is cached, 4 bytes a weight, and only what changed since
    is computed.  The sums are integers in float32, exact below 2^24; where they could reach that, nothing is cached and
    the view is slow but still exact.
    """

    def __init__(
        self, slots: Sequence[WeightSlot], run_key: int, kernels: ModuleType, threads: int | None
    ) -> None:
        self.slots, self.run_key = slots, run_key
        self.kernels, self.threads = kernels, threads
        self.folded: Passes | None = None
        self.reach = 0  # the largest sum anywhere
        self.sums: dict[str, Tensor] = {}

    def rest(self, point: Passes | None, heard: Callable[[], None]) -> Passes | None:
        """Return the passes that `point` has beside the sums; fold them in first when they are many.

        `heard()` is called before each piece of that work; what it raises leaves no sums.
        """
        if self.folded is None and (point is None or len(point.ids) <= FOLD):
            return point
        left = difference(point, self.folded)
        if len(left.ids) <= FOLD and self.reach + _most(left) < EXACT:
            return left
        if self.reach + _most(left) >= EXACT:
            log.warning(
                "slow: the sums of %d directions could pass 2^24: they are computed anew each time",
                len(left.ids),
            )
            self.forget()
            return point
        try:
            self._fold(left, heard)
        except BaseException:
            self.forget()
            raise
        self.folded = point
        return None

    def forget(self) -> None:
        """Drop the sums and their memory."""
        self.folded, self.reach, self.sums = None, 0, {}

    def _fold(self, passes: Passes, heard: Callable[[], None]) -> None:
        """Add passes to the sums, and measure the largest sum."""
        self.reach = 0
        for slot in self.slots:
            if slot.name not in self.sums:
                self.sums[slot.name] = torch.zeros(slot.tensor.numel(), device=slot.tensor.device)
            sums = self.sums[slot.name]
            for first in range(0, sums.numel(), PIECE):
                heard()
                part = sums[first : first + PIECE]
                start = slot.start + first
                self.kernels.sweep(part, part, start, self.run_key, passes, 1.0, threads=self.threads)
            low, high = torch.aminmax(sums)
            self.reach = max(self.reach, int(-low), int(high))


def difference(new: Passes | None, old: Passes | None) -> Passes:
    """Return the passes that lead from `old` to `new`, without those that cancel."""
    sides = [(p, sign) for p, sign in ((new, 1), (old, -1)) if p is not None]
    K = max(p.tables.shape[1] for p, _ in sides)
    ids, where = np.unique(np.concatenate([p.ids for p, _ in sides]), return_inverse=True)
    tables = np.zeros((len(ids), K), np.int64)
    first = 0
    for p, sign in sides:
        np.add.at(tables, where[first : first + len(p.ids)], sign * p.tables.astype(np.int64))
        first += len(p.ids)
    nonzero = tables.any(axis=1)
    left = Passes(ids[nonzero], tables[nonzero])
    return Passes(left.ids, left.tables.astype(np.int32)) if _most(left) < 1 << 31 else left


def _most(passes: Passes) -> int:
    """Return the largest sum that these passes can make at any element."""
    return int(np.abs(passes.tables.astype(np.int64)).max(axis=1, initial=0).sum())


class StoredDirection:
    """One direction at a time, written out in full: z[i] for every weight i, in the weights' dtype and on their device.

    Classical zeroth-order methods do so, at the price of one more copy of the weights.  It is here to be measured
    (`methods/zosgd.py`).  The numbers are those that the kernels compute on the fly, rounded to the weights' type: exact
    for directions of +1 and -1.
    """

    def __init__(
        self, slots: Sequence[WeightSlot], run_key: int, law: str, kernels: ModuleType, threads: int | None
    ) -> None:
        self.slots, self.run_key, self.law = slots, run_key, law
        self.kernels, self.threads = kernels, threads
        self.z: dict[str, Tensor] = {}
        self.direction: Direction | None = None
        self.eps = 0.0

    def write(self, direction: Direction, eps: float) -> None:
        """Write `direction` out, unless it is stored already; `eps` is the factor that `add` takes."""
        self.eps = float(np.float32(eps))
        last = self.direction
        if last is not None and last[0] == direction[0] and np.array_equal(last[1], direction[1]):
            return
        for slot in self.slots:
            if slot.name not in self.z:
                like = slot.tensor
                self.z[slot.name] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
            self._write(self.z[slot.name].zero_(), slot.start, direction)
        self.direction = direction

    def add(self, x: Tensor, name: str, first: int) -> None:
        """Add eps z to x: float32 elements from `first` on of the tensor `name`."""
        x.add_(self.z[name][first : first + x.numel()].float() * self.eps)

    def _write(self, z: Tensor, start: int, direction: Direction) -> None:
        id, table = direction
        if self.law == "gaussian":
            none = np.zeros(0, np.float32)
            self.kernels.sweep_gaussian(z, z, start, self.run_key, EMPTY.ids, none, 1.0, (id, 1.0))
        else:
            probe = (id, table.astype(np.float32))
            self.kernels.sweep(z, z, start, self.run_key, EMPTY, 1.0, probe, threads=self.threads)
