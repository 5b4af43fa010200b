# SPDX-License-Identifier: Apache-2.0
"""Make a patch (`patch.py`) from what a run leaves that trained scales or codes of a GGUF file: a ledger, or moved scales."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fleetune import adapters, models
from fleetune.common.display import counted
from fleetune.common.ggml import BLOCK, PARTS
from fleetune.common.shell import command
from fleetune.common.sums import sha256
from fleetune.deploy.formats import Report
from fleetune.deploy.formats._gguf_layout import open_written
from fleetune.deploy.patch import SILENT, Packed, Seen, patched, told
from fleetune.deploy.patch_file import Patch, Place, check_work, with_changes, with_entries
from fleetune.errors import ModelError, UsageError
from fleetune.models import placement
from fleetune.models.bases import BLOCKS
from fleetune.models.mapped.lazy import LazyWeight, weights_of
from fleetune.models.mapped.stored import Stored
from fleetune.runs.listener import Listener
from fleetune.seeds.block_view import BlockView
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.slots import WeightSlot
from fleetune.tuning import finished
from fleetune.tuning.methods._zeroth import place_at


def file_of(name: str, *, offline: bool = False) -> Path:
    """Return the GGUF file of a built-in model or a path; UsageError for a model that is none."""
    _, tensors = placement.tensors_of(
        name, functools.partial(models.resolve, offline=offline), offline=offline, blocks=True
    )
    file = next(iter(tensors.values())).file.path
    if file.suffix != ".gguf":
        raise UsageError(f"{name} is no GGUF file, which could be patched", hint="give the .gguf file")
    return file


def check_order(name: str, run: str, out: Path) -> None:
    """Raise UsageError where the model and the run of `make` are given the wrong way round."""
    if Path(run).suffix == ".gguf" and Path(run).is_file() and Path(name).suffix != ".gguf":
        raise UsageError(
            f"{run} is a GGUF file: the model comes first, then the run",
            hint=command("patch", "make", run, name, "--to", out),
        )


def report(path: Path) -> Report:
    """Describe a patched file, every tensor of which is what the patch states (its SHA-256 is)."""
    kinds = Counter(tensor.tensor_type.name for tensor in open_written(path).tensors)
    count = kinds.total()
    return Report(path, "gguf", path.stat().st_size, count, count, dict(kinds))


def of_run(
    base: Path, run: Path, *, changes: bool = False, name: str = "", offline: bool = False,
    for_device: bool = False, listener: Listener = SILENT,
) -> Patch:  # fmt: skip
    """Return the patch from a GGUF file to the model of a run, as `make` does of a ledger.

    Where the run leaves moved scales and no ledger, the patch carries their differences.
    UsageError for a run that trained something else, ModelError where the file is not the run's base.
    """
    if finished.recipe_of(run).train not in PARTS:
        raise UsageError(
            f"{run} trained something else than scales or codes, which no quantised file holds",
            hint="tune with --train scales or --train codes, or export the run: fleetune export RUN --to gguf",
        )
    if finished.result_of(run).name == finished.RESULT["ledger"]:
        return make(
            base, finished.ledger_of(run), changes=changes, name=name, offline=offline,
            for_device=for_device, listener=listener,
        )  # fmt: skip
    model = finished.load(run, model=name or str(base), offline=offline)
    return _with_bits(base, weights_of(model.net), adapters.moved_scales(model), listener)


def _with_bits(
    base: Path, weights: Mapping[str, LazyWeight], bits: Mapping[str, Tensor], listener: Listener
) -> Patch:
    """Return the patch to scales with these bits, by the weight's name: int16 [blocks, 1 or 2], rows as in the model."""
    placed = sorted((_place(weights[name].stored, start=0), name) for name in bits)
    places = tuple(place for place, _ in placed)

    def moved(number: int, first: int, blocks: np.ndarray) -> np.ndarray:
        place, name = placed[number]
        at = place.in_model()[first : first + len(blocks) // place.blocks]
        new: np.ndarray = bits[name].numpy().view(np.uint16).reshape(place.rows, -1)[at]
        return new.reshape(len(blocks), -1)

    packed = Packed("scales", 9)
    result = _result(base, Patch("", "", "scales", places, lambda: moved, bytes), packed.add, listener)
    return with_changes(sha256(base), result, "scales", places, packed.all())


def _result(base: Path, patch: Patch, seen: Seen, listener: Listener) -> str:
    """Return the SHA-256 of the file that a patch makes; `seen` as of `patched`."""
    sha, done, size = hashlib.sha256(), 0, base.stat().st_size
    tell = told(listener, "bytes patched", patch.work)
    for part in patched(base, patch, seen):
        sha.update(part)
        done += len(part)
        tell(done, size)
    return sha.hexdigest()


def make(
    base: Path, ledger: Ledger, *, changes: bool = False, name: str = "", offline: bool = False,
    for_device: bool = False, listener: Listener = SILENT,
) -> Patch:  # fmt: skip
    """Return the patch from a GGUF file to the ledger's model; with `changes` it carries differences.

    `name` is the model that the file belongs to, if not a path.

    UsageError for a ledger that moves weights, LedgerError where it belongs to another base, or does not rebuild the weights
    that it states; with `for_device` ModelError where a device would have too much to compute (`check_work`).
    """
    if ledger.head.trains not in PARTS:
        raise UsageError(
            "this ledger moves all weights, which no quantised file holds",
            hint="tune with --train scales or --train codes, or export the run: fleetune export RUN --to gguf",
        )
    if for_device and not changes:
        check_work(ledger.head.law, ledger.head.K, ledger.count_passes())
    model = finished.base_of(ledger, name or str(base), base=BLOCKS, offline=offline)
    view = place_at(model, ledger)
    assert isinstance(view, BlockView)
    tensors = finished.told(
        view.pieces(), listener, model.n_params, counted(ledger.count_passes(), "pass", "passes")
    )
    finished.require_digest(models.digest(tensors), ledger.final_check(), "the ledger")
    places, slots = zip(
        *sorted((_place(_stored(slot), slot.start), slot) for slot in view.slots), strict=True
    )
    head, compact = ledger.head, ledger.compact()
    source = sha256(base)

    def carrying(result: str) -> Patch:
        return with_entries(
            source, result, view.part, places, run_key=head.run_key, law=head.law, K=head.K, grid=head.grid,
            ids=compact.ids, coefficients=compact.coefficients.astype(np.int64),
        )  # fmt: skip

    expected, packed = _Expected(view, slots, places), Packed(view.part, 6)

    def seen(old: np.ndarray, new: np.ndarray) -> None:
        expected.require(new)
        if changes:
            packed.add(old, new)

    result = _result(base, carrying(""), seen, listener)
    if changes:
        return with_changes(source, result, view.part, places, packed.all())
    return carrying(result)


class _Expected:
    """The scales or codes that the view of the net has, in the file's order."""

    def __init__(self, view: BlockView, slots: tuple[WeightSlot, ...], places: tuple[Place, ...]) -> None:
        self._part = view.part
        self._matrices = (
            view.packed(slot)[place.in_model()].reshape(-1) for slot, place in zip(slots, places, strict=True)
        )
        self._left = np.zeros(0)  # of the matrix that is compared

    def require(self, new: np.ndarray) -> None:
        """Raise ModelError unless the next numbers, all of one matrix, are these."""
        new = new.reshape(-1)
        if not len(self._left):
            self._left = next(self._matrices)
        if not np.array_equal(new, self._left[: len(new)]):
            raise ModelError(f"the patch would not make the {self._part} of the run")
        self._left = self._left[len(new) :]


def _stored(slot: WeightSlot) -> Stored:
    weight: Any = slot.tensor
    stored: Stored = weight.stored
    return stored


def _place(stored: Stored, start: int) -> Place:
    rows, width = stored.shape
    heads, order = 0, stored.order
    if order is not None:
        half = int(np.flatnonzero(order == 1)[0])  # rows of half a head
        heads = rows // (2 * half)
    place = Place(stored.offset, stored.kind, rows, width // BLOCK, heads, start)
    if stored.size != place.size or (
        order is not None and not np.array_equal(np.argsort(order), place.in_model())
    ):
        raise UsageError(f"{stored.file.path} has an order of rows that a patch cannot state")
    return place
