"""Descend by integer coefficients along directions, by slopes from two forward passes or from a gradient.

With a random direction z and the losses at w + eps z and w - eps z on one batch, `g = (l+ - l-) / (2 eps)` estimates the slope
along z (Malladi et al. 2023, arXiv 2305.17333, Definition 1; Spall 1992).  The step `w <- w - lr g z` is taken and recorded as
the integer `c = -lr g / grid`: the integers alone give the weights.

A gradient g is projected on the K directions z_k[i] = D[i] H[place(i), k] of a pool (`noise`) as it is back-propagated (`Tape`),
by one fold s and one fast Walsh-Hadamard transform:

    s[j] = sum over the i whose place is j of D[i] g[i],    p = H s,    p_k = z_k . g exactly

(1/K) sum_k p_k z_k is the mean of K two-point estimates on one batch, without their error in eps.  (Ferret, Shu et al., ICML
2025, arXiv 2409.06277, projects on independent directions, a pass over the weights each.)  By its slope alone, a step at the rate
eta lowers the loss l by f = eta |p|^2 / K.  So that no rate loses the model, eta is cut to f <= l / 2 (Loizou et al. 2021, arXiv
2002.10542, SPS_max), and at the first step until the batch's loss falls by f / 10 (Vaswani et al. 2019, arXiv 1905.09997).
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from fleetune.data import Batch
from fleetune.data.encode import Drawn
from fleetune.evaluation.losses import batch_loss, row_losses
from fleetune.evaluation.objectives import Objective, loss_tensor
from fleetune.models.net.layers import by_layer
from fleetune.models.net.model import Model
from fleetune.privacy.mechanism import PrivateSum
from fleetune.seeds.noise import derive, fwht, passes, philox4x32, probe
from fleetune.seeds.view import Tape, Unpaired, View
from fleetune.seeds.weights import CHUNK, MovedWeights

log = logging.getLogger(__name__)
T = TypeVar("T")

# tokens of a step up to which both signs run in one forward: it reads the base once, in the memory of twice the activations;
# beyond, making the weights takes little of a step
PAIRED: Final = 512
_COMPARED: Final[WeakSet[nn.Module]] = WeakSet()  # nets whose first step was taken both ways
_UNPAIRED: Final[WeakSet[nn.Module]] = WeakSet()  # nets that were seen not to keep the signs' rows apart


def two_point(
    view: View, direction: tuple[int, np.ndarray], eps: float, loss: Callable[[], T]
) -> tuple[T, T]:
    """Return (l+, l-): `loss()` at the view's point + eps z and - eps z.  The point is restored."""
    try:
        view.probe(direction, eps)
        plus = loss()
        view.probe(direction, -eps)
        return plus, loss()
    finally:
        view.probe(None)


def slope(
    model: Model,
    view: View,
    direction: tuple[int, np.ndarray],
    batch: Batch,
    objective: Objective,
    *,
    eps: float,
    clip: float,
) -> tuple[float, float]:
    """Return (g, l): the slope along a direction at the view's point, |g| cut to `clip` (0: not), and the mean loss.

    g is not finite where a loss was not.
    """
    if batch.drawn is not None:
        return _private_slope(model, view, direction, batch, batch.drawn, eps), 0.0
    plus, minus = _losses(model, view, direction, batch, objective, eps)
    g = (plus - minus) / (2 * eps)
    if clip and math.isfinite(g):
        g = max(-clip, min(clip, g))
    return g, (plus + minus) / 2


def _private_slope(
    model: Model, view: View, direction: tuple[int, np.ndarray], batch: Batch, drawn: Drawn, eps: float
) -> float:
    """Return the mean slope with each row hidden: DPZero's (Zhang et al. 2024, arXiv 2310.09639, Algorithm 1).

    d_i = (l_i+ - l_i-) / (2 eps) of every row is cut to the clip; the noise is not of the direction's generator, as it is in
    the published code, where a published seed takes it off again.
    """

    def mean_losses() -> np.ndarray:
        sums, counts = row_losses(model, batch)
        return np.asarray(sums / np.maximum(counts, 1))

    plus, minus = two_point(view, direction, eps, mean_losses)
    total = PrivateSum(drawn.privacy, {"g": np.zeros(1)})
    for slope in ((plus - minus) / (2 * eps))[: drawn.rows]:
        total.add(1.0, {"g": np.array([slope])})
    return float(total.tensors()["g"][0])


def _losses(
    model: Model,
    view: View,
    direction: tuple[int, np.ndarray],
    batch: Batch,
    objective: Objective,
    eps: float,
) -> tuple[float, float]:
    """Return what `two_point` does, from one forward where that is the same; on a net's first step both ways are compared."""
    two_forwards = functools.partial(
        two_point, view, direction, eps, functools.partial(objective, model, batch)
    )
    one = _in_one_forward(model, view, direction, batch, eps) if _can_pair(view, batch, objective) else None
    if one is None:
        return two_forwards()
    if view.net not in _COMPARED:
        _COMPARED.add(view.net)
        two = two_forwards()
        if repr(one) != repr(two):  # NaN is equal to itself here
            log.info("both signs in one forward give %s, two forwards %s: each sign runs alone", one, two)
            _UNPAIRED.add(view.net)
        return two
    return one


def _can_pair(view: View, batch: Batch, objective: Objective) -> bool:
    """Return whether both signs may run in one forward: of the loss, and for a batch that is small beside the weights."""
    if objective is not batch_loss or batch.labels.ndim != 2 or view.stored is not None:
        return False
    rows, length = batch.labels.shape
    # a net that puts tokens first could not be told from one that puts rows first
    return rows * length <= PAIRED and length != 2 * rows and view.net not in _UNPAIRED


def _in_one_forward(
    model: Model, view: View, direction: tuple[int, np.ndarray], batch: Batch, eps: float
) -> tuple[float, float] | None:
    """Return what `two_point` does of the loss, from one forward of every row twice; None where the net cannot."""
    rows = len(batch.labels)
    ids, mask, labels = (
        torch.cat([part, part]) for part in (batch.input_ids, batch.attention_mask, batch.labels)
    )
    twice = Batch(ids, mask, labels, lengths=batch.lengths)
    try:
        view.probe(direction, eps)
        view.paired = rows
        sums, counts = row_losses(model, twice)
    except Unpaired:
        _UNPAIRED.add(view.net)
        return None
    finally:
        view.paired = 0
        view.probe(None)
    if not counts[:rows].sum():
        return math.nan, math.nan
    plus, minus = (float(sums[half].sum() / counts[half].sum()) for half in (slice(rows), slice(rows, None)))
    return plus, minus


class Position:
    """A point of weight space as a growing list of (direction id, integer coefficient)."""

    def __init__(self, law: str, K: int, ids: np.ndarray, coefficients: np.ndarray) -> None:
        self.law, self.K = law, K
        self.ids, self.coefficients = list(ids.tolist()), list(coefficients.tolist())

    def move(self, id: int, c: int) -> None:
        """Add c units along direction `id`."""
        if c:
            self.ids.append(id)
            self.coefficients.append(c)

    def place(self, view: View) -> None:
        """Put a view at this point."""
        ids, coefficients = np.array(self.ids, np.uint64), np.array(self.coefficients, np.int64)
        view.place(passes(self.law, self.K, ids, coefficients))


class Steps(NamedTuple):
    """The outcome of a device's descent: the integer of every step, the mean loss, steps without a finite slope."""

    coefficients: np.ndarray  # int64[steps]
    loss: float
    skipped: int


def descend(
    model: Model,
    view: View,
    position: Position,
    ids: Sequence[int],
    batches: Iterable[Batch],
    objective: Objective,
    *,
    eps: float,
    clip: float,
    to_units: Callable[[int, float], int],
) -> Steps:
    """Make one step of two-point descent for every id and batch; `position` moves along.

    `to_units(step, g)` turns the slope into the integer that is taken and reported.  |g| is cut to `clip`
    (0: not); a batch without a finite slope is skipped.  Afterwards the view is where the steps led.
    """
    coefficients, losses, skipped = [], [], 0
    for step, (id, batch) in enumerate(zip(ids, batches, strict=False)):
        position.place(view)
        direction = probe(view.law, position.K, id)
        g, loss = slope(model, view, direction, batch, objective, eps=eps, clip=clip)
        if not math.isfinite(g):
            coefficients.append(0)
            skipped += 1
            continue
        c = to_units(step, g)
        position.move(id, c)
        coefficients.append(c)
        losses.append(loss)
    position.place(view)
    view.warn_unreached()
    return Steps(np.array(coefficients, np.int64), float(np.mean(losses)) if losses else math.inf, skipped)


# Random choices that both sides must make alike come from Philox, not from numpy, whose streams may change.


def uniforms(key: int, domain: str, count: int) -> np.ndarray:
    """Return float64[count] in [0, 1) with 32 bits each, a pure function of (key, domain)."""
    calls = -(-count // 4)
    counter = np.zeros((calls, 4), np.uint32)
    counter[:, 0] = np.arange(calls, dtype=np.uint32)
    k = derive(key, domain)
    words = philox4x32(counter, np.array([k & 0xFFFFFFFF, k >> 32], np.uint32))
    return words.reshape(-1)[:count].astype(np.float64) / 2.0**32


# --- a gradient along the pool ------------------------------------------------------------------------------


class Projection:
    """Folds gradients as backward makes them (the `sink` of a tape); `take` returns the slopes along the pool."""

    def __init__(self, weights: MovedWeights, K: int, epoch: int) -> None:
        self.weights, self.epoch = weights, epoch
        self.sums = np.zeros(K)

    def add(self, start: int, gradient: Tensor) -> None:
        """Add the fold of a gradient: sums[j] += sum over place(i) = j of D[i] g[i], D the signs of the epoch.

        gradient: of any shape and float type, row-major; start: the global index of its first element.  Sums within a
        chunk are float32, of chunks float64.
        """
        flat, weights = gradient.detach().reshape(-1), self.weights
        for lo in range(0, flat.numel(), CHUNK):
            x = flat[lo : lo + CHUNK].float()
            folded = weights.kernels.fold(x, start + lo, weights.run_key, self.epoch, len(self.sums))
            self.sums += folded.cpu().numpy()

    def take(self) -> np.ndarray:
        """Return p float64 [K], p_k = z_k . g of all gradients since the last call."""
        p = fwht(self.sums)
        self.sums[:] = 0.0
        return p


SHARE: Final = 0.5  # of the loss: what a step may take from it by its slope, at most
FALLS: Final = 0.1  # of that: what the first step must take
HIDDEN: Final = 1.0  # nats that stand for the loss of hidden rows, which nobody may see
SLACK: Final = 0.01  # of the loss, by which it may fall less than asked: the rounding of weights and losses
TRIES: Final = 8  # forward passes of a search, at most


class Projected(NamedTuple):
    """The outcome of a device's back-propagation: how far along each direction, and the mean loss of its steps."""

    moved: np.ndarray  # float64 [K], in units of the grid
    steps: int
    loss: float


def _projected(model: Model, batch: Batch, projection: Projection) -> tuple[np.ndarray, float]:
    """Return the gradient along the pool float64 [K], and the mean loss; where rows are hidden, with noise, and 0."""
    if batch.drawn is None:
        loss = loss_tensor(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return projection.take(), loss.item()
    total = PrivateSum(batch.drawn.privacy, {"p": np.zeros(len(projection.sums))})
    for row in batch.single_rows():
        loss_tensor(model, row).backward()  # type: ignore[no-untyped-call]
        total.add(1.0, {"p": projection.take()})
    return total.tensors()["p"], 0.0


def searched(units: float, slope: float, loss: float, loss_at: Callable[[float], float]) -> float:
    """Return the largest step tried, from `units` down, that lowers the loss by a tenth of what its slope says.

    After one that does not, the next is where the parabola through both losses is least, at most half as long.
    """
    for _ in range(TRIES):
        fall, after = units * slope, loss_at(units)
        if after <= (1 + SLACK) * loss - FALLS * fall:
            break
        units *= min(1 / 2, fall / 2 / (after - loss + fall)) if math.isfinite(after) else 1 / 8
    return units


def descend_projected(
    model: Model,
    view: View,
    position: Position,
    epoch: int,
    batches: Iterable[Batch],
    *,
    units: float,
    clip: float,
) -> Projected:
    """Descend in the K-dimensional space of a pool: a_k <- a_k - units p_k / K for every batch.

    `units` is the largest learning rate over the grid; |p_k| is cut to `clip` (0: not).  A step is taken in floats and
    seen rounded to the grid; a batch without a finite gradient is skipped.  The view ends where it began: the
    caller rounds `moved` once and places it there.
    """
    K = position.K
    moved, losses = np.zeros(K), list[float]()
    pool = (np.uint64(epoch) << np.uint64(32)) | np.arange(K, dtype=np.uint64)
    ids = np.concatenate([np.array(position.ids, np.uint64), pool])
    begun = np.array(position.coefficients, np.int64)
    projection = Projection(view, K, epoch)

    def place(to: np.ndarray) -> None:
        view.place(passes(view.law, K, ids, np.concatenate([begun, np.rint(to).astype(np.int64)])))

    def loss_after(step: np.ndarray, batch: Batch, units: float) -> float:
        place(moved - units * step)
        return batch_loss(model, batch)

    with Tape(view, projection.add), by_layer(model.net, room=model.room) as kept, torch.enable_grad():
        for batch in batches:
            place(moved)
            p, value = _projected(model, batch, projection)
            if not (math.isfinite(value) and np.isfinite(p).all()):
                continue
            step = (np.clip(p, -clip, clip) if clip else p) / K
            slope, most = view.grid * float(p @ step), SHARE * (HIDDEN if batch.drawn else value)
            within = most / slope if units * slope > most else units
            if not (losses or batch.drawn):
                units = within = searched(within, slope, value, functools.partial(loss_after, step, batch))
            losses.append(value)
            moved -= within * step
    model.recomputes = kept.recomputed
    position.place(view)
    return Projected(moved, len(losses), float(np.mean(losses)) if losses else math.inf)
