"""Simulate a fleet in this process: one model in memory, the clients in turn.

Every message goes through bytes both ways.  Drop-outs and stragglers are pure functions of (seed, round, client).
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from fleetune.common.display import quoted
from fleetune.common.memory import is_out_of_memory
from fleetune.data import Batches, Encoded
from fleetune.errors import FAULTS, FitError, Interrupted, MessageError, StorageError, fault
from fleetune.models.net.model import Model
from fleetune.privacy.mechanism import Privacy, Sealed
from fleetune.seeds.noise import derive
from fleetune.tuning.exchange.messages import decode
from fleetune.tuning.methods import Method
from fleetune.tuning.rounds.fleets import Answer, Fleet, Step, Wanted, outrun, wanted
from fleetune.tuning.rounds.local_work import Memories, work
from fleetune.tuning.rounds.sealed import Participant

log = logging.getLogger(__name__)


class _ListenerError(BaseException):
    """Carries what `on_step` raised past the code that works for a client."""

    def __init__(self, original: BaseException) -> None:
        super().__init__(str(original))
        self.original = original


@dataclass(frozen=True)
class Faults:
    """Faults of a simulated fleet; see the recipe's `drop`, `stragglers` and `deadline`."""

    drop: float = 0.0
    stragglers: float = 0.0
    deadline: float = 0.0

    def slowness(self, seed: int, round: int, client: int) -> float:
        """Return how many times as long as a usual client this one takes."""
        if _chance(seed, "slow", client) < self.stragglers:
            return 2.0 + 8.0 * _chance(seed, "slower", round, client)
        return 1.0

    def outcomes(
        self, seed: int, round: int, clients: Sequence[int], goal: int
    ) -> Iterator[tuple[int, str, str]]:
        """Yield (client, status, reason): ok, dropped or late; with a `goal`, those after so many others are late too.

        Usual clients take equally long, so who of them is first is drawn anew in every round.
        """
        slower = {client: self.slowness(seed, round, client) for client in clients}
        dropped = {client for client in clients if _chance(seed, "drop", round, client) < self.drop}
        most = max(1.0, self.deadline) if self.deadline else math.inf  # a usual client is never late
        here = [client for client in clients if client not in dropped and slower[client] <= most]
        here.sort(key=lambda client: (slower[client], _chance(seed, "first", round, client)))
        outran = set(here[goal:] if goal else ())
        for client in clients:
            if client in dropped:
                yield client, "dropped", "simulated drop-out"
            elif slower[client] > most:
                yield client, "late", f"simulated straggler, {slower[client]:.1f} times slower"
            else:
                yield (client, "late", outrun(goal)) if client in outran else (client, "ok", "")


def _chance(seed: int, what: str, *parts: int) -> float:
    return derive(seed, what, *parts) / 2.0**64


@dataclass
class LocalFleet(Fleet):
    """`clients[c]` are the encoded rows of client c; `on_step(client, step)` is called before every local step."""

    model: Model
    method: Method
    clients: Sequence[Sequence[Encoded]]
    seed: int
    pad_id: int
    faults: Faults = Faults()
    on_step: Callable[[int, int], None] = lambda client, step: None
    memories: Memories = field(default_factory=Memories)
    kinds: Wanted | None = None  # None: as the method spreads them
    private: Callable[[int], Privacy] | None = None  # how a client with so many rows hides each
    sealed: Sealed | None = None  # how replies are added up, where that is by a secure sum
    batches: Batches | None = None  # of the client that works, or has worked last
    participants: dict[int, Participant] = field(default_factory=dict)  # client -> what it holds for the sum

    @property
    def rows(self) -> list[int]:
        """Rows of every client."""
        return [len(rows) for rows in self.clients]

    def present(self) -> Sequence[int]:
        """Return all clients: those that drop out are asked as well."""
        return range(len(self.clients))

    def kind(self, client: int) -> int:
        """Return the kind that is wanted of a client: the machine that simulates it can do all."""
        return (self.kinds or wanted(self.method, "")).of(client)

    def kept(self) -> Mapping[int, tuple[int, int]]:
        """Return client -> (round, CRC-32) of what each client stored last."""
        return self.memories.kept()

    def check_kept(self, stated: Mapping[int, tuple[int, int]]) -> None:
        """Raise MessageError when what a checkpoint states of the clients' memories is not there."""
        self.memories.check(stated)

    def rewind(self, round: int) -> None:
        """Delete what clients stored after `round`."""
        self.memories.rewind(round)

    def forget_before(self, round: int) -> None:
        """Delete client memories that a newer one, not after `round`, replaces."""
        self.memories.forget_before(round)

    def ask(
        self, round: int, clients: Sequence[int], message: bytes | Mapping[int, bytes], goal: int = 0
    ) -> Iterator[Answer]:
        """Yield the answers of these clients, in turn; one that is late does not work."""
        for client, status, reason in self.faults.outcomes(self.seed, round, clients, goal):
            sent = message if isinstance(message, bytes) else message[client]
            key = derive(self.seed, "local", round, client)
            if status == "ok":
                yield self._answer(round, client, key, sent)
            else:
                yield Answer(client, key, None, status, reason, 0.0, len(sent))

    def exchange(
        self, round: int, step: Step, bodies: Mapping[int, bytes], room: int = 0
    ) -> Iterator[Answer]:
        """Yield what these clients say in a step of a secure sum."""
        for client, body in bodies.items():
            began = time.monotonic()
            try:
                data, reason = self.participants[client].answer(step, round, client, body), ""
            except MessageError as error:
                data, reason = None, error.message
            status = "failed" if data is None else "ok"
            yield Answer(client, 0, data, status, reason, time.monotonic() - began, len(body))

    def _answer(self, round: int, client: int, key: int, sent: bytes) -> Answer:
        """Return the answer of a client that works; one bad client never stops a round."""
        began = time.monotonic()
        try:
            data = self._work(client, key, sent)
        except _ListenerError as error:  # the caller's own: no client is to blame
            raise error.original from None
        except (Interrupted, StorageError):
            raise
        except FAULTS as error:
            if is_out_of_memory(error):  # the machine's, which all clients share
                raise FitError(
                    f"client {client} in round {round}: not enough memory on '{self.model.device}'",
                    hint=f"see: fleetune plan {quoted(self.model.name)}   (less: batch_size, --max-length, --dtype bf16)",
                ) from error
            # its reason is shown anyway
            log.info("client %d failed in round %d", client, round, exc_info=True)
            return Answer(client, key, None, "failed", fault(error), time.monotonic() - began, len(sent))
        spent, done = time.monotonic() - began, self.batches
        steps, tokens = (done.taken or None, done.tokens or None) if done else (None, None)
        return Answer(client, key, data, "ok", "", spent, len(sent), steps, tokens)

    def _step(self, client: int, step: int) -> None:
        try:
            self.on_step(client, step)
        except FAULTS as error:
            raise _ListenerError(error) from error

    def _work(self, client: int, key: int, message: bytes) -> bytes:
        rows = self.clients[client]
        private = self.private(len(rows)) if self.private else None
        self.batches = Batches(rows, self.pad_id, key, self.model.device, client, private)
        received = decode(message)
        hold = partial(self._hold, self.sealed, client) if self.sealed else None
        data = work(self.method, self.model, self.batches, key, received, self.memories, self._step, hold)
        if private and self.batches.taken > self.method.local_steps(len(rows)):
            raise MessageError("the client took more steps than its rows' privacy is accounted for")
        return data

    def _hold(self, sealed: Sealed, client: int, round: int, moves: Mapping[str, np.ndarray]) -> None:
        self.participants[client] = Participant("", sealed)
        self.participants[client].hold(round, sealed.vector(moves))
