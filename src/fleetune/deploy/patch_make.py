"""Make a patch (`patch.py`) of a run's ledger; and give a GGUF file the scales that a run has trained."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from fleetune import adapters, models
from fleetune.common.display import counted
from fleetune.common.ggml import BLOCK, SCALES
from fleetune.common.sums import sha256
from fleetune.deploy.formats import Report
from fleetune.deploy.patch import SILENT, BlockPlace, Entries, Moves, Patch, patched, told, write
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
    """A matrix whose scales a run has moved."""

    place: BlockPlace
    scales: Callable[[], np.ndarray]  # new bits uint16 [rows, scales of a row], rows in the model's order


def write_run(base: Path, run: Path, out: Path, *, name: str, offline: bool, listener: Listener) -> None:
    """Write the GGUF file `base`, the model `name`, with the scales of a run that trained them.

    ModelError where the file is not the run's base; LedgerError where a ledger does not rebuild the weights that it states.
    """
    if finished.result_of(run).name == finished.RESULT["ledger"]:
        matrices = _of_ledger(finished.ledger_of(run), name, offline=offline, listener=listener)
    else:
        model = finished.load(run, model=name, offline=offline)
        weights = weights_of(model.net)

        def matrix(layer: str, bits: np.ndarray) -> Matrix:
            place = _place(weights[layer].stored, start=0)
            return Matrix(place, lambda: bits.view(np.uint16).reshape(place.rows, -1))

        matrices = sorted(matrix(layer, bits.numpy()) for layer, bits in adapters.moved_scales(model).items())
    write(base, tuple(matrix.place for matrix in matrices), _moves(matrices), out, listener)


def of_ledger(
    base: Path, ledger: Ledger, *, name: str = "", offline: bool = False, listener: Listener = SILENT
) -> Patch:
    """Return the patch from a GGUF file to the ledger's model; `name` is the model that the file belongs to, if not a path.

    UsageError for a ledger that moves weights, or takes more passes than a device computes; LedgerError where it belongs to
    another base, or does not rebuild the weights that it states; ModelError where its entries do not make the scales.
    """
    head, compact = ledger.head, ledger.compact()
    entries = Entries(
        head.run_key, head.law, head.K, head.grid, compact.ids, compact.coefficients.astype(np.int64)
    )
    if head.trains == SCALES and not entries.fit():
        raise UsageError(
            f"the ledger takes {counted(entries.passes, 'pass', 'passes')}, more than a device computes",
            hint="export the run, and send the file: fleetune export RUN --to gguf",
        )
    matrices = _of_ledger(ledger, name or str(base), offline=offline, listener=listener)
    places = tuple(matrix.place for matrix in matrices)
    computed, found = entries.moves(places), _moves(matrices)

    def moved(number: int, first: int, blocks: np.ndarray) -> np.ndarray:
        new = found(number, first, blocks)
        if not np.array_equal(computed(number, first, blocks), new):
            raise ModelError("the patch would not make the scales of the run")
        return new

    sha, done, size = hashlib.sha256(), 0, base.stat().st_size
    tell = told(listener, "bytes patched", Patch("", "", places, entries).work)
    for part in patched(base, places, moved):
        sha.update(part)
        done += len(part)
        tell(done, size)
    return Patch(sha256(base), sha.hexdigest(), places, entries)


def _of_ledger(ledger: Ledger, name: str, *, offline: bool, listener: Listener) -> list[Matrix]:
    """Return the matrices of the ledger's model, in the file's order."""
    if ledger.head.trains != SCALES:
        raise UsageError(
            "this ledger moves all weights, which no quantised file holds",
            hint="tune with --train scales, or export the run: fleetune export RUN --to gguf",
        )
    model = finished.base_of(ledger, name, base=BLOCKS, offline=offline)
    view = place_at(model, ledger)
    assert isinstance(view, ScaleView)
    tensors = finished.told(
        view.pieces(), listener, model.n_params, counted(ledger.count_passes(), "pass", "passes")
    )
    finished.require_digest(models.digest(tensors), ledger.final_check(), "the ledger")
    return sorted(
        Matrix(_place(cast(Any, slot.tensor).stored, slot.start), functools.partial(view.packed, slot))
        for slot in view.slots
    )


def _moves(matrices: Sequence[Matrix]) -> Moves:
    """Return what gives blocks the scales of these matrices."""

    @functools.lru_cache(maxsize=1)
    def in_file(number: int) -> np.ndarray:
        place, scales = matrices[number]
        rows: np.ndarray = scales()[place.in_model()]
        return rows

    def moved(number: int, first: int, blocks: np.ndarray) -> np.ndarray:
        new = in_file(number)[first : first + len(blocks) // matrices[number].place.blocks]
        return new.reshape(len(blocks), -1)

    return moved


def _place(stored: Stored, start: int) -> BlockPlace:
    rows, width = stored.shape
    heads, order = 0, stored.order
    if order is not None:
        half = int(np.flatnonzero(order == 1)[0])  # rows of half a head
        heads = rows // (2 * half)
    place = BlockPlace(stored.offset, stored.kind, rows, width // BLOCK, heads, start)
    if stored.size != place.size or (
        order is not None and not np.array_equal(np.argsort(order), place.in_model())
    ):
        raise UsageError(f"{stored.file.path} has an order of rows that a patch cannot state")
    return place
