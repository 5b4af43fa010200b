# SPDX-License-Identifier: Apache-2.0
"""Simulate a fleet in this process: one model in memory, the clients in turn.

Clients share the model, and what a method remembers on them is on disk, so memory does not grow with their
number.  Every message goes through bytes both ways, as on a network.  Drop-outs and stragglers are simulated
from the recipe, as pure functions of (seed, round, client): a resumed run meets the same ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fleetune.common.memory import is_out_of_memory
from fleetune.data import Batches, Encoded
from fleetune.errors import FAULTS, FitError, Interrupted, StorageError, fault
from fleetune.models.model import Model
from fleetune.runs.events import ClientReply
from fleetune.seeds.noise import derive
from fleetune.tuning.fleets import Answer
from fleetune.tuning.fleets.local_work import work
from fleetune.tuning.fleets.memories import Memories
from fleetune.tuning.kinds import Wanted, wanted
from fleetune.tuning.methods import Method

log = logging.getLogger(__name__)


class _ListenerError(Exception):
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

    def outcome(self, seed: int, round: int, client: int) -> tuple[str, str]:
        """Return (status, reason) of a client in a round: ok, dropped or late."""
        if _chance(seed, "drop", round, client) < self.drop:
            return "dropped", "simulated drop-out"
        if self.deadline and _chance(seed, "slow", client) < self.stragglers:
            slower = 2.0 + 8.0 * _chance(seed, "slower", round, client)
            if slower > self.deadline:
                return "late", f"simulated straggler, {slower:.1f} times slower"
        return "ok", ""


def _chance(seed: int, what: str, *parts: int) -> float:
    return derive(seed, what, *parts) / 2.0**64


@dataclass
class LocalFleet:
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

    @property
    def rows(self) -> list[int]:
        """Rows of every client."""
        return [len(rows) for rows in self.clients]

    def present(self) -> Sequence[int]:
        """Return all clients: those that drop out are asked, and do not answer."""
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

    def heard(self, reply: ClientReply) -> None:
        """Do nothing: the run's metrics say it."""

    def rewind(self, round: int) -> None:
        """Delete what clients stored after `round`."""
        self.memories.rewind(round)

    def forget_before(self, round: int) -> None:
        """Delete client memories that a newer one, not after `round`, replaces."""
        self.memories.forget_before(round)

    def ask(
        self, round: int, clients: Sequence[int], message: bytes | Mapping[int, bytes]
    ) -> Iterator[Answer]:
        """Yield the answers of these clients, in turn."""
        for client in clients:
            sent = message if isinstance(message, bytes) else message[client]
            key = derive(self.seed, "local", round, client)
            status, reason = self.faults.outcome(self.seed, round, client)
            if status != "ok":
                yield Answer(client, key, None, status, reason, 0.0, len(sent))
                continue
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
                        f"client {client} in round {round}: memory does not suffice on '{self.model.device}'",
                        hint=f"see: fleetune plan {self.model.name}   (less: batch_size, --max-length, --dtype bf16)",
                    ) from error
                # One bad client never stops a round: it is recorded, and the others go on.
                log.exception("client %d failed in round %d", client, round)
                yield Answer(client, key, None, "failed", fault(error), time.monotonic() - began, len(sent))
                continue
            yield Answer(client, key, data, "ok", "", time.monotonic() - began, len(sent))

    def _step(self, client: int, step: int) -> None:
        try:
            self.on_step(client, step)
        except FAULTS as error:
            raise _ListenerError(error) from error

    def _work(self, client: int, key: int, message: bytes) -> bytes:
        rows = self.clients[client]
        batches = Batches(rows, self.pad_id, key, self.model.device, client)
        return work(self.method, self.model, batches, key, message, self.memories, self._step)
