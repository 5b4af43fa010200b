# SPDX-License-Identifier: Apache-2.0
"""Make a patch (`patch.py`) from what a run leaves that trained the scales of a GGUF file: a ledger, or moved scales.

A run's ledger becomes a patch of entries where a device can compute them, else, and where there is none, its scales one of
changes.  The inverse patch leads back, and is always one of changes.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fleetune import adapters, models
from fleetune.common.display import counted
from fleetune.common.ggml import BLOCK, SCALES
from fleetune.common.sums import sha256
from fleetune.deploy.formats import Report
from fleetune.deploy.patch import SILENT, Entries, Patch, Place, difference, patched, told
from fleetune.errors import ModelError, UsageError
from fleetune.models import loading
from fleetune.models.cache.cache import BLOCKS
from fleetune.models.gguf import header
from fleetune.models.lazy import weights_of
from fleetune.models.stored import Stored
from fleetune.runs.listener import Listener
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.scale_view import ScaleView
from fleetune.tuning.methods._zeroth import place_at
from fleetune.tuning.result import finished


def file_of(name: str, *, offline: bool = False) -> Path:
    """Return the GGUF file of a built-in model or a path; UsageError for a model that is none."""
    _, tensors = loading.tensors_of(name, offline=offline, blocks=True)
    file = next(iter(tensors.values())).file.path
    if file.suffix != ".gguf":
        raise UsageError(f"{name} is no GGUF file, which could be patched", hint="give the .gguf file")
    return file


def report(path: Path) -> Report:
    """Describe a patched file, every tensor of which is what the patch states (its SHA-256 is)."""
    kinds = Counter(tensor.kind for tensor in header.read(path).tensors)
    count = kinds.total()
    return Report(path, "gguf", path.stat().st_size, count, count, dict(kinds))


class Matrix(NamedTuple):
    """What a patch makes of a matrix."""

    place: Place
    scales: Callable[[], np.ndarray]  # new bits uint16 [rows, scales of a row], rows in the model's order


def of_run(
    base: Path,
    run: Path,
    *,
    inverse: bool = False,
    name: str = "",
    offline: bool = False,
    listener: Listener = SILENT,
) -> Patch:
    """Return the patch from a GGUF file to the model of a run, or with `inverse` the one that leads back.

    `name` is the model that the file belongs to, if not a path.
    UsageError for a run that trained something else, ModelError where the file is not the run's base; else as `of_ledger`.
    """
    if finished.recipe_of(run).train != SCALES:
        raise _nothing_to_move(f"{run} trained something else than scales")
    if finished.result_of(run).name == finished.RESULT["ledger"]:
        ledger = finished.ledger_of(run)
        return of_ledger(base, ledger, inverse=inverse, name=name, offline=offline, listener=listener)
    model = finished.load(run, model=name or str(base), offline=offline)
    weights = weights_of(model.net)

    def matrix(name: str, bits: np.ndarray) -> Matrix:
        place = _place(weights[name].stored, start=0)
        return Matrix(place, lambda: bits.view(np.uint16).reshape(place.rows, -1))

    moved = adapters.moved_scales(model)
    return _made(base, [matrix(name, bits.numpy()) for name, bits in moved.items()], None, inverse, listener)


def of_ledger(
    base: Path,
    ledger: Ledger,
    *,
    inverse: bool = False,
    name: str = "",
    offline: bool = False,
    listener: Listener = SILENT,
) -> Patch:
    """Return the patch from a GGUF file to the ledger's model, or with `inverse` the one that leads back.

    UsageError for a ledger that moves weights, LedgerError where it belongs to another base, or does not rebuild the weights
    that it states.
    """
    if ledger.head.trains != SCALES:
        raise _nothing_to_move("this ledger moves all weights")
    model = finished.base_of(ledger, name or str(base), base=BLOCKS, offline=offline)
    view = place_at(model, ledger)
    assert isinstance(view, ScaleView)
    tensors = finished.told(
        view.pieces(), listener, model.n_params, counted(ledger.count_passes(), "pass", "passes")
    )
    finished.require_digest(models.digest(tensors), ledger.final_check(), "the ledger")
    head, compact = ledger.head, ledger.compact()
    entries = Entries(
        head.run_key, head.law, head.K, head.grid, compact.ids, compact.coefficients.astype(np.int64)
    )
    matrices = [
        Matrix(_place(_stored(slot), slot.start), functools.partial(view.packed, slot)) for slot in view.slots
    ]
    return _made(base, matrices, entries, inverse, listener)


def _made(
    base: Path, matrices: Sequence[Matrix], entries: Entries | None, inverse: bool, listener: Listener
) -> Patch:
    """Return the patch to these scales, of entries where there are some that a device can compute.

    ModelError where the entries do not make the scales.
    """
    matrices = sorted(matrices)
    places = tuple(matrix.place for matrix in matrices)
    if entries is not None and (inverse or not entries.fit()):
        entries = None
    computed = None if entries is None else entries.moves(places)

    @functools.lru_cache(maxsize=1)
    def in_file(number: int) -> np.ndarray:
        place, scales = matrices[number]
        rows: np.ndarray = scales()[place.in_model()]
        return rows

    def moved(number: int, first: int, blocks: np.ndarray) -> np.ndarray:
        new = in_file(number)[first : first + len(blocks) // places[number].blocks].reshape(len(blocks), -1)
        if computed is not None and not np.array_equal(computed(number, first, blocks), new):
            raise ModelError("the patch would not make the scales of the run")
        return new

    packer, packed = zlib.compressobj(9), list[bytes]()

    def seen(old: np.ndarray, new: np.ndarray) -> None:
        if entries is None:
            packed.append(packer.compress(difference(new, old) if inverse else difference(old, new)))

    sha, done, size = hashlib.sha256(), 0, base.stat().st_size
    tell = told(listener, "bytes patched", "" if entries is None else Patch("", "", places, entries).work)
    for part in patched(base, places, moved, seen):
        sha.update(part)
        done += len(part)
        tell(done, size)
    ends = (sha256(base), sha.hexdigest())
    if entries is not None:
        return Patch(*ends, places, entries)
    changes = np.frombuffer(b"".join([*packed, packer.flush()]), np.uint8)
    return Patch(*(ends[::-1] if inverse else ends), places, changes=changes)


def _nothing_to_move(what: str) -> UsageError:
    return UsageError(
        f"{what}, which no quantised file holds",
        hint="tune with --train scales, or export the run: fleetune export RUN --to gguf",
    )


def _stored(slot: Any) -> Stored:
    stored: Stored = slot.tensor.stored
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
