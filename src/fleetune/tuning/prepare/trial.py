"""Try learning rates on one round of a few clients, and take the one after which the loss on other rows is lowest.

All rows are training rows.  Each trial begins at the base model and leaves it as it was.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np

from fleetune import adapters
from fleetune.data import Batches, Encoded
from fleetune.evaluation.losses import pad_id, response_loss
from fleetune.models.net.model import Model
from fleetune.models.net.packed import packing
from fleetune.privacy.mechanism import Privacy
from fleetune.seeds.noise import derive
from fleetune.seeds.view import View
from fleetune.tuning.methods import Method, Reply

STEPS: Final = 4  # of a device in a trial, at most
AT_SERVER: Final = 4  # clients of a trial of the server's step, which is as noisy as they are few
MEASURED: Final = 32  # rows on which a trial is measured, at most
FACTOR: Final = 3.0
TRIALS: Final = 5  # in each direction, at most
FINER: Final = 2.0  # of trials that cost an evaluation only
FINE_TRIALS: Final = 14
SLACK: Final = 0.1  # of the best fall of the loss
FLAT: Final = 1e-4  # of the loss: a rate that changes it by less does nothing,
LEAP: Final = 10.0  # and one so many times as large is tried,
LEAPS: Final = 6  # so often at most
MOVES: Final = 32  # rounds at most until a server that waits for agreement has moved
HELD_ROUNDS: Final = 20  # in which a rate that is held moves the model so often, at most
SMALLER: Final = 3  # rates that are tried below the one that is held


class Size(NamedTuple):
    """How far a trial goes."""

    clients: int = 2  # at most: one overfits where the mean of a fleet does not
    moves: int = 3  # of the model, for which a rate is held, at most


WHOLE: Final = Size()


class Tried(NamedTuple):
    """A learning rate, and the loss (nats) after it; infinite where the model was lost."""

    rate: float
    loss: float


@dataclass(frozen=True)
class Bench:
    """What a trial is made on."""

    model: Model
    clients: Sequence[Sequence[Encoded]]
    rows: Sequence[Encoded]  # measured on, not trained on
    seed: int
    on_loss: Callable[[], None] = lambda: None  # called before each measurement

    def loss(self) -> float:
        """Return the loss on the measured rows, infinite where it is no number."""
        self.on_loss()
        few = list(self.rows)
        found = response_loss(self.model, few)
        return found if math.isfinite(found) else math.inf

    def begin(self, method: Method) -> Any:
        """Return the method's first state."""
        return method.init(self.model, derive(self.seed, "init"))

    def round(self, method: Method, state: Any, number: int, private: Privacy | None = None) -> list[Reply]:
        """Return the good replies of all clients of the trial; `private` hides their rows."""
        kinds, good = method.kinds(state), []
        for client, rows in enumerate(self.clients):
            key = derive(self.seed, "try", number, client)
            batches = Batches(rows, pad_id(self.model), key, self.model.device, client, private)
            payload = replace(kinds[method.kind_of(client)][0])  # its own: it takes the arrays out
            with packing(self.model.net, method.packs and private is None) as batches.packed:
                reply = method.local(self.model, payload, batches, key, {})
            if all(np.isfinite(a).all() for a in reply.arrays.values() if a.dtype.kind == "f"):
                good.append(Reply(client, key, reply))
        return good


class Trials(NamedTuple):
    """What was tried, in the order of the rates, and the loss before."""

    start: float
    tried: list[Tried]

    def best(self) -> float:
        """Return the middle (by ratio) of the rates around the best one whose loss is as low, but for a tenth of the fall.

        Losses after a few steps differ by chance; of a plateau the middle is the safest.  Where no loss fell, the lowest rate.
        """
        losses = [t.loss for t in self.tried]
        at = min(range(len(losses)), key=losses.__getitem__)
        if not losses[at] < self.start:
            return self.tried[0].rate
        low = high = at
        as_low = losses[at] + SLACK * (self.start - losses[at])
        while low > 0 and losses[low - 1] <= as_low:
            low -= 1
        while high < len(losses) - 1 and losses[high + 1] <= as_low:
            high += 1
        return math.sqrt(self.tried[low].rate * self.tried[high].rate)


def try_on_devices(bench: Bench, make: Callable[[float], Method], first: float) -> Trials:
    """Try rates up from `first` while it helps, then down likewise: the devices of the trial do a round at each."""
    start = bench.loss()
    return climb(start, functools.partial(loss_after, bench, make, 1, start), first, FACTOR, TRIALS)


def hold(loss_of: Callable[[float], float], first: float) -> list[Tried]:
    """Try `first` for some rounds, then rates a third as large, while these end lower."""
    tried = [Tried(first, loss_of(first))]
    while len(tried) <= SMALLER:
        rate = tried[-1].rate / FACTOR
        tried.append(Tried(rate, loss_of(rate)))
        if tried[-2].loss <= tried[-1].loss < math.inf:
            break
    return tried


def loss_after(bench: Bench, make: Callable[[float], Method], moves: int, start: float, rate: float) -> float:
    """Return the loss after rounds at a rate, until it has moved so often from `start`; infinite where the model was lost."""
    method, moved, loss = make(rate), 0, start
    with restored(bench.model):
        state = bench.begin(method)
        for number in range(1, (HELD_ROUNDS if moves > 1 else 1) + 1):
            replies = bench.round(method, state, number)
            if not replies:
                return math.inf
            state = method.aggregate(state, iter(replies))
            method.apply(bench.model, state)
            before, loss = loss, bench.loss()
            moved += loss != before
            if moved == moves or loss == math.inf:
                break
    return loss


def climb(start: float, loss_of: Callable[[float], float], first: float, factor: float, most: int) -> Trials:
    """Try `first`, then rates `factor` times as large until the loss is clearly above the best, then smaller ones likewise.

    Clearly: by more than a tenth of the best fall.  At most `most` rates in each direction.  Where `first` does nothing to the
    loss, the first of 10, 100, .. times as much that does takes its place.
    """
    tried = {first: loss_of(first)}
    for _ in range(LEAPS):
        if abs(tried[first] - start) > FLAT * abs(start):
            break
        first *= LEAP
        tried[first] = loss_of(first)
    for ratio in (factor, 1 / factor):
        rate = first
        for _ in range(most):
            best = min(tried.values())
            rate *= ratio
            tried[rate] = loss_of(rate)
            if not tried[rate] <= best + SLACK * max(0.0, start - best):
                break
    return Trials(start, [Tried(rate, tried[rate]) for rate in sorted(tried)])


def try_on_server(bench: Bench, make: Callable[[float], Method], first: float) -> Trials:
    """Try rates around `first`: devices work once, at the base, then the server steps at each rate.

    A server that waits until slopes agree is given replies until it moves; before, its state does not depend on the rate.
    """
    method, heard = make(first), list[list[Reply]]()
    with restored(bench.model):
        state = bench.begin(method)
        method.apply(bench.model, state)
        start = bench.loss()
        while len(heard) < MOVES:
            heard.append(bench.round(method, state, len(heard) + 1))
            state = method.aggregate(state, iter(heard[-1]))
            method.apply(bench.model, state)
            if bench.loss() != start:
                break

    def loss_at(rate: float) -> float:
        method = make(rate)
        with restored(bench.model):
            state = bench.begin(method)
            for replies in heard:
                state = method.aggregate(state, iter(replies))
            method.apply(bench.model, state)
            return bench.loss()

    return climb(start, loss_at, first, FINER, FINE_TRIALS)


def aside(rows: int) -> int:
    """Return how many of so many rows a trial is measured on."""
    return max(1, min(MEASURED, rows // 3))


def first_rate(method: Any, name: str) -> float:
    """Return where a trial begins: the method's own default."""
    return float(getattr(method, name)) or float(method.own_lr)


@contextmanager
def restored(model: Model) -> Iterator[None]:
    """Take off whatever the body attaches to the model."""
    try:
        yield
    finally:
        if isinstance(model.attachment, View):
            model.attachment.remove()
            model.attachment = None
        elif model.attachment is not None:
            adapters.detach(model)
