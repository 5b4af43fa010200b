# SPDX-License-Identifier: Apache-2.0
"""Ask real devices: whoever is there, with patience for those that are killed, restarted or cut off.

The server keeps what it needs to go on in the run's folder (`devices.py`, the checkpoints), and nothing in the link: a
link that is opened anew after a kill knows no message of the one before, and every order is given again.  A device that
has answered an order keeps its answer until the next, so no work is done twice (`worker.py`).

What a method remembers of a device stays on the device.  The server knows round and checksum of it, and says with every
order on which memory the work stands; so a run that goes on from an earlier checkpoint goes on from the earlier memory.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from fleetune.errors import FleetError, MessageError
from fleetune.fleet.orders import NOTHING_KEPT, Device, Job, Order, Reply
from fleetune.fleet.table import Devices
from fleetune.runs.events import ClientReply
from fleetune.seeds.noise import derive
from fleetune.tuning.fleets import Answer

log = logging.getLogger(__name__)

FAREWELL: Final = 5.0  # seconds in which devices are told that the run is over


class Link(Protocol):
    """Carry bytes between the server and devices, which are known by the hash of their keys."""

    def online(self) -> Mapping[str, str]:
        """Return the devices that are there now: key -> a mark that changes when the device comes in anew."""
        ...

    def name(self, key: str) -> str:
        """Return what the device with this key is called."""
        ...

    def push(self, key: str, data: bytes) -> str | None:
        """Queue an order for a device; its number, or None where the device is not known."""
        ...

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield (number, answer) of the orders that are answered by now; None where the answer was lost."""
        ...

    def drop(self, numbers: set[str]) -> None:
        """Forget orders that nobody waits for any longer."""
        ...


@dataclass(frozen=True)
class Pace:
    """How long the server waits."""

    grace: float = 60.0  # seconds for a device that has gone, before the round goes on without it
    deadline: float = 0.0  # seconds for a round; 0: as long as devices work
    poll: float = 0.05  # seconds between two looks


@dataclass
class _Order:
    """An order on its way: to whom, in which session of the device."""

    key: str
    mark: str
    order: Order


class RemoteFleet:
    """The devices of a run, over a link; `look()` is called while it waits, and may raise to stop."""

    def __init__(
        self,
        link: Link,
        devices: Devices,
        job: Job,
        seed: int,
        pace: Pace,
        *,
        look: Callable[[], None] = lambda: None,
        note: Callable[[str], None] = log.info,
        audit: Callable[..., None] = lambda what, **fields: None,
    ) -> None:
        self.link, self.devices, self.job, self.seed, self.pace = link, devices, job, seed, pace
        self.look, self.note, self.audit = look, note, audit
        self._ready: dict[str, str] = {}  # key -> mark of the session in which the device took the job
        self._greeted: dict[str, str] = {}  # key -> mark of the session in which it was sent
        self._orders: dict[str, _Order] = {}  # by number
        self._kept: dict[int, tuple[int, int]] = {}
        self._digests: dict[int, str] = {}  # client -> SHA-256 of its last reply
        self._oldest = 0
        self._gone: set[int] = set()  # clients that were waited for in vain, until they are back

    # What every fleet has ---------------------------------------------------------------------------------

    @property
    def rows(self) -> Sequence[int]:
        """Rows of every client; 0 for one that has never joined."""
        return self.devices.rows

    def present(self) -> Sequence[int]:
        """Return the clients that may be asked: those that have joined, and were not waited for in vain since."""
        self._greet()
        return [c for c, rows in enumerate(self.devices.rows) if rows and c not in self._gone]

    def kept(self) -> Mapping[int, tuple[int, int]]:
        """Return client -> (round, CRC-32) of what each device has said that it remembers."""
        return {c: kept for c, kept in self._kept.items() if kept != NOTHING_KEPT}

    def check_kept(self, stated: Mapping[int, tuple[int, int]]) -> None:
        """Take what a checkpoint states; each device compares it with what it has, when it is asked."""
        self._kept = dict(stated)

    def heard(self, reply: ClientReply) -> None:
        """Write into the log what became of a client's reply."""
        member = self.devices.members[reply.client]
        self.audit(
            reply.status, device=member.key, name=member.name, client=reply.client, round=reply.round,
            bytes=reply.bytes_up, sha256=self._digests.get(reply.client, ""), reason=reply.reason,
        )  # fmt: skip

    def rewind(self, round: int) -> None:
        """Do nothing: orders say on which memory the work stands."""

    def forget_before(self, round: int) -> None:
        """Let devices delete memories that a newer one, not after `round`, replaces."""
        self._oldest = round

    def ask(
        self, round: int, clients: Sequence[int], message: bytes | Mapping[int, bytes]
    ) -> Iterator[Answer]:
        """Yield the answers of these clients as they come.

        A device that is away is waited for, and asked when it is back; one that comes in anew is asked again.
        """
        began = time.monotonic()
        waiting = dict.fromkeys(clients, began)  # not asked yet, or to be asked again: since when
        asked = {
            c: self._work(round, c, message if isinstance(message, bytes) else message[c]) for c in clients
        }
        sent: dict[str, int] = {}  # number of an order -> client
        while waiting or sent:
            self.look()
            for number in self._lost(sent):
                waiting[sent.pop(number)] = time.monotonic()
            for client in self._here(waiting):
                pushed = self._push(self.devices.members[client].key, asked[client])
                if pushed is not None:
                    del waiting[client]
                    sent[pushed] = client
            now = time.monotonic()
            late = bool(self.pace.deadline) and now - began > self.pace.deadline
            for client, since in list(waiting.items()):
                if late or now - since > self.pace.grace:
                    del waiting[client]
                    self._gone.add(client)
                    yield self._without(asked[client], "dropped", f"not there for {now - since:.0f} s")
            if late and sent:
                self._forget(set(sent))
                for client in sent.values():
                    yield self._without(asked[client], "late", f"no answer in {self.pace.deadline:g} s")
                return
            for number, order, reply in self._answers():
                client = sent.pop(number, -1)
                if client < 0:
                    continue
                if reply is None:
                    waiting[client] = time.monotonic()
                else:
                    yield self._answer(order, reply)
            time.sleep(self.pace.poll)

    # Devices come and go ----------------------------------------------------------------------------------

    def wait_for(self, count: int) -> None:
        """Wait until so many devices are ready."""
        said = -1
        while True:
            if (here := len(self._ready)) != said:
                self.note(f"{here} of {count} devices are ready")
                said = here
            if here >= count:
                return
            self.look()
            self._greet()
            for _ in self._answers():
                pass
            time.sleep(self.pace.poll)

    def end(self, reason: str) -> None:
        """Tell every device that is there that the run is over, and wait a moment until they know."""
        told = {self._push(key, Order("end", reason=reason)) for key in self.link.online()} - {None}
        until = time.monotonic() + FAREWELL
        while told and time.monotonic() < until:
            told -= {number for number, _ in self.link.pull({n for n in told if n})}
            time.sleep(self.pace.poll)

    def _greet(self) -> None:
        """Give the job to every device that has come in anew."""
        here = self.link.online()
        for key, mark in here.items():
            if self._greeted.get(key) != mark:
                self._greeted[key] = mark
                self._ready.pop(key, None)
                self._push(key, Order("job", body=self.job.to_json().encode()))
        for key in self._ready.keys() - here.keys():
            del self._ready[key]

    def _here(self, waiting: Mapping[int, float]) -> list[int]:
        """Return those of the clients whose devices are there and have taken the job in this session."""
        self._greet()
        found = [c for c in waiting if self.devices.members[c].key in self._ready]
        self._gone.difference_update(found)
        return found

    def _lost(self, sent: Mapping[str, int]) -> list[str]:
        """Return the orders whose devices have gone, or come in anew, since; they are forgotten."""
        here = self.link.online()
        lost = [n for n in sent if here.get(self._orders[n].key) != self._orders[n].mark]
        self._forget(set(lost))
        return lost

    # Orders and answers -----------------------------------------------------------------------------------

    def _work(self, round: int, client: int, message: bytes) -> Order:
        return Order(
            "work", round, client, derive(self.seed, "local", round, client), message,
            self._kept.get(client, NOTHING_KEPT), self._oldest,
        )  # fmt: skip

    def _push(self, key: str, order: Order) -> str | None:
        mark = self.link.online().get(key, "")
        number = self.link.push(key, order.encode())
        if number is not None:
            self._orders[number] = _Order(key, mark, order)
        return number

    def _forget(self, numbers: set[str]) -> None:
        self.link.drop(numbers)
        for number in numbers:
            self._orders.pop(number, None)

    def _answers(self) -> Iterator[tuple[str, Order, Reply | None]]:
        """Yield the answers to work that have come, None for a lost one; those to the job are dealt with here."""
        for number, data in self.link.pull(set(self._orders)):
            found = self._orders.pop(number)
            reply = self._reply(found, data)
            if found.order.what == "work":
                yield number, found.order, reply
            elif reply is None:
                self._greeted.pop(found.key, None)  # it is asked again
            else:
                self._joined(found, reply)

    def _reply(self, found: _Order, data: bytes | None) -> Reply | None:
        if data is None:
            return None
        order = found.order
        try:
            reply = Reply.decode(data)
            if reply.nonce != order.nonce or reply.round != order.round:
                raise MessageError("the answer belongs to another order")
            if reply.what == "ready" and order.what == "work":
                raise MessageError("work was answered with 'ready'")
        except MessageError as error:
            return Reply("failed", order.nonce, reason=str(error))
        return reply

    def _joined(self, found: _Order, reply: Reply) -> None:
        """Take in a device that has answered the job; tell it when it cannot take part."""
        name = self.link.name(found.key)
        try:
            if reply.what != "ready":
                raise MessageError(reply.reason)
            device = Device.from_json(reply.body)
            client = self.devices.join(found.key, name, device)
        except MessageError as error:
            self.note(f"device {name} takes no part: {error.message}")
            self.audit("not admitted", device=found.key, name=name, reason=error.message)
            if reply.what == "ready":
                self.link.push(found.key, Order("end", reason=error.message).encode())
            return
        self._ready[found.key] = found.mark
        self._gone.discard(client)
        self.audit("joined", device=found.key, name=name, client=client, rows=device.rows)
        self.note(f"device {name} is ready: client {client}, {device.rows} rows")

    def _answer(self, order: Order, reply: Reply) -> Answer:
        if reply.what != "done":
            return self._without(order, "failed", reply.reason)
        self._kept[order.client] = reply.kept
        self._digests[order.client] = hashlib.sha256(reply.body).hexdigest()
        return Answer(order.client, order.key, reply.body, "ok", "", reply.seconds, len(order.body))

    @staticmethod
    def _without(order: Order, status: str, reason: str) -> Answer:
        return Answer(order.client, order.key, None, status, reason, 0.0, len(order.body))


def check_count(wanted: int, registered: int) -> None:
    """FleetError when more devices are waited for than may come in."""
    if registered < wanted:
        raise FleetError(
            f"the run waits for {wanted} devices, and {registered} keys are registered",
            hint="register the others' keys (fleetune fleet keys --help), or wait for fewer: --wait",
        )
