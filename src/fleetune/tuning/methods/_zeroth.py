"""Share a ledger between a server and its devices: as the state of zeroth-order methods and as their broadcast.

A device is sent the ledger's sums (`ledger_payload`) and opens a view of its model at that point (`open_view`).
"""

import dataclasses
import logging
from typing import Any

import numpy as np

from fleetune.common import settings
from fleetune.errors import MessageError, ModelError
from fleetune.models.net.model import Model
from fleetune.seeds.descent import Position, uniforms
from fleetune.seeds.ledger import TRAINS, Ledger, LedgerHead
from fleetune.seeds.noise import LAWS, POOL, run_key
from fleetune.seeds.scale_view import moved_tensors, view_on, view_type
from fleetune.seeds.view import View
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Payload, Scalar, narrow

log = logging.getLogger(__name__)

INT32 = (1 << 31) - 1
MOST_SUMS = 1 << 20  # in a message, of all pools so far; a device takes 40 bytes for each
MOST_POOLS = 1 << 12  # a pass over all weights for each
MOST_PASSES = 1 << 15  # of a law without pools: one for each direction
MOST_SWEEPS = 1 << 22  # passes in all forwards of a round or an evaluation: 10,000 directions in 400 forwards
MOST = 1e3  # of a learning rate and a perturbation: far beyond any that learns
UNITS = 256  # grid = lr / 256: a slope of 1 is 256 units, so a usual step is hundreds to thousands


class OfLedger(methods.Method):
    """A method whose state has a ledger: the tuned model is at its point."""

    law: str
    K: int
    lr: float
    eps: float
    batch_size: int

    @property
    def grid_lr(self) -> float:
        """The learning rate that decides the ledger's grid."""
        return self.lr

    def empty(
        self, model: Model, key: int, *, rule: str = "constant", aggregation: str = "mean weighted by rows"
    ) -> Ledger:
        """Return the ledger before round 1; `rule` says how the rate goes, `aggregation` how replies become one."""
        more = {"labels": settings.join_words(model.labels)} if model.labels else {}
        more |= {} if model.trains == "weights" else {"train": model.trains}
        head = LedgerHead(
            base=model.digest,
            tokenizer=model.tokenizer_digest,
            tensors=moved_tensors(model),
            run_key=run_key(key.to_bytes(8, "little")),
            law=self.law,
            K=self.K if self.law == POOL else 1,
            grid=grid_of(self.grid_lr),
            eps=self.eps,
            lr=rule,
            method=type(self).__module__.rpartition(".")[2],
            hyper={**dataclasses.asdict(self), **more},
            aggregation=aggregation,
        )
        return Ledger(head)

    def cannot_hide_rows(self) -> str:
        objective = getattr(self, "objective", "loss")
        return (
            ""
            if objective == "loss"
            else f"objective {objective!r} is of a batch, not of a row; use the loss"
        )

    def opened(self, model: Model, payload: Payload) -> tuple[View, Position]:
        """Return `open_view` by the method's settings."""
        return open_view(model, payload, law=self.law, K=self.K, lr=self.grid_lr)

    def apply(self, model: Model, state: Any) -> None:
        place_at(model, state.ledger)


def check_pool(law: str, K: int, *, lr: float, eps: float, tau: int, batch_size: int) -> None:
    """Raise ValueError, in plain words, for hyper-parameters that cannot be."""
    if law not in LAWS:
        raise ValueError(f"law = {law!r} is not one of {', '.join(LAWS)}")
    if not 1 <= K <= 1 << 20:
        raise ValueError(f"K = {K} is not between 1 and {1 << 20}")
    if law == POOL and K & (K - 1):
        raise ValueError(
            f"K = {K} is not a power of two, which a pool needs; "
            f"try K={1 << K.bit_length() - 1} or K={1 << K.bit_length()}, or law=rademacher"
        )
    for name, value in (("lr", lr), ("eps", eps)):
        if not 0 < value < MOST:
            raise ValueError(f"{name} = {value:g} is not between 0 and {MOST:g}; usual are 1e-7 to 1e-2")
    if tau < 1 or batch_size < 1:
        raise ValueError(f"tau = {tau} and batch_size = {batch_size} must be at least 1")


def draw(key: int, count: int, K: int, p: np.ndarray | None = None) -> np.ndarray:
    """Draw int64[count] members of a pool of K, uniformly or with the probabilities p [K]: the walk through it."""
    u = uniforms(key, "walk", count)
    if p is None:
        return np.asarray(u * K, np.int64)
    edges = np.cumsum(p.astype(np.float64))
    return np.minimum(np.searchsorted(edges / edges[-1], u, side="right"), K - 1)


def rounded(steps: np.ndarray) -> np.ndarray:
    """Return int64: the nearest integers that a ledger takes, whatever a reply has made of `steps`."""
    return np.asarray(np.clip(np.rint(steps), -INT32, INT32), np.int64)


def pool_ids(epoch: int, k: np.ndarray) -> np.ndarray:
    """Return the direction ids u64 of pool members k in an epoch: epoch << 32 | k."""
    return (np.uint64(epoch) << np.uint64(32)) | k.astype(np.uint64)


def grid_of(lr: float) -> float:
    """Return the grid of a ledger: lr / 256, in fp32."""
    return float(np.float32(lr) / np.float32(UNITS))


def ledger_payload(ledger: Ledger, pool: int, epoch: int) -> Payload:
    """Return what a device needs of a ledger: the sums of all epochs, `a` int[epochs, pool], and the head's numbers."""
    sums = np.zeros((epoch + 1, pool), np.int64)
    epochs, k = ledger.ids >> np.uint64(32), ledger.ids & np.uint64(0xFFFFFFFF)
    np.add.at(sums, (epochs.astype(np.int64), k.astype(np.int64)), ledger.coefficients.astype(np.int64))
    head = ledger.head
    numbers: dict[str, Scalar] = {"run_key": head.run_key, "law": head.law, "grid": head.grid}
    if head.trains != "weights":
        numbers["train"] = head.trains
    return Payload({"a": narrow(sums)}, numbers)


def open_view(model: Model, payload: Payload, *, law: str, K: int, lr: float) -> tuple[View, Position]:
    """Return, on a device, a view of `model` and the position that a `ledger_payload` stands for.

    MessageError for sums of another law, pool or grid than those of the run's settings, and for too many.
    """
    a, grid = payload.array("a"), grid_of(lr)
    most = max(2 * K, MOST_SUMS) if law == POOL else MOST_PASSES
    if a.dtype.kind != "i" or a.ndim != 2 or a.shape[1] != K or a.size > most or len(a) > MOST_POOLS:
        raise MessageError(f"the sums are {a.dtype} {list(a.shape)}, of a pool of {K} directions")
    if (payload.scalars.get("law"), payload.float("grid")) != (law, grid):
        raise MessageError(f"the sums are of another law or grid than {law}, {grid:g}")
    epochs, k = np.nonzero(a)
    ids = (epochs.astype(np.uint64) << np.uint64(32)) | k.astype(np.uint64)
    if (train := payload.scalars.get("train", "weights")) not in TRAINS:
        raise MessageError(f"the message trains {train!r:.40}, which is not one of {', '.join(TRAINS)}")
    model.trains = str(train)
    view = view_of(model, payload.int("run_key"), law, grid)
    view.limit(MOST_SWEEPS)
    return view, Position(law, a.shape[1] if law == POOL else 1, ids, a[epochs, k].astype(np.int64))


def view_of(model: Model, run_key: int, law: str, grid: float) -> View:
    """Return the view that `model` carries, made anew if it has none or one of another key, law or grid."""
    view = model.attachment
    if isinstance(view, View):
        same = type(view) is view_type(model, law)
        if same and (view.run_key, view.law, view.grid) == (run_key, law, grid):
            return view
        view.remove()
    elif view is not None:
        raise ModelError(
            f"the model carries a {type(view).__name__}; detach it before a zeroth-order method uses it"
        )
    made = view_on(model, run_key=run_key, law=law, grid=grid)
    model.attachment = made
    return made


def place_at(model: Model, ledger: Ledger, most: int = 0) -> View:
    """Put `model` at the point of a ledger (its stored weights stay the base's), to make `most` passes (`View.limit`)."""
    model.trains = ledger.head.trains
    view = view_of(model, ledger.head.run_key, ledger.head.law, ledger.head.grid)
    view.limit(most)
    view.place(ledger.passes())
    return view
