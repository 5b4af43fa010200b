# SPDX-License-Identifier: Apache-2.0
"""Ask real devices: whoever is there, with patience for those that are killed, restarted or cut off.

The server keeps what it needs to go on in the run's folder (`table.py`, the checkpoints), and nothing in the link: a
link that is opened anew after a kill knows no message of the one before, and every order is given again.  A device that
has answered an order keeps its answer until the next, so no work is done twice (`worker.py`).

What a method remembers of a device stays on the device.  The server knows round and checksum of it, and says with every
order on which memory the work stands; so a run that goes on from an earlier checkpoint goes on from the earlier memory.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from fleetune.errors import FleetError, MessageError
from fleetune.fleet.orders import NOTHING_KEPT, Device, Job, Order, Reply
from fleetune.fleet.table import Devices
from fleetune.runs.events import ClientReply
from fleetune.seeds.noise import derive
from fleetune.tuning.fleets import Answer

log = logging.getLogger(__name__)

WORD: Final = 30.0  # seconds of waiting, after which it is said for whom
ASKED: Final = 10  # times that a client is given its order in a round: its device may die of the work itself
FAREWELL: Final = 5.0  # seconds in which devices are told that the run is over


class Link(Protocol):
    """Carry bytes between the server and devices, which are known by the hash of their keys."""

    def online(self) -> Mapping[str, str]:
        """Return the devices that are there now: key -> a mark that changes when the device comes in anew."""
        ...

    def name(self, key: str) -> str:
        """Return what the device with this key is called."""
        ...

    def push(self, key: str, data: bytes, common: int = 0) -> str | None:
        """Queue an order for a device; its number, or None where the device is not known.

        The last `common` bytes may be those of other orders too: a link keeps them once.
        """
        ...

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield (number, answer) of the orders that are answered by now.

        None where the answer was lost, so that the order is to be given again; b"" where it is no answer.
        """
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


@dataclass
class _Asking:
    """A round in progress: who is still to be asked, and who was."""

    round: int
    orders: Mapping[int, Order]  # by client
    began: float
    waiting: dict[int, float] = field(init=False)  # client -> since when it is waited for
    sent: dict[str, int] = field(init=False, default_factory=dict)  # number of an order -> client
    times: dict[int, int] = field(init=False, default_factory=dict)  # client -> how often it was asked
    next_word: float = field(init=False)  # when to say who is waited for

    def __post_init__(self) -> None:
        self.waiting = dict.fromkeys(self.orders, self.began)
        self.next_word = self.began + WORD

    @property
    def open(self) -> bool:
        """Whether an answer is still to come."""
        return bool(self.waiting or self.sent)

    def given(self, client: int, number: str) -> None:
        """Note that a client was given its order."""
        del self.waiting[client]
        self.sent[number] = client
        self.times[client] = self.times.get(client, 0) + 1

    def lost(self, numbers: Iterable[str]) -> None:
        """Note that the devices of these orders have gone, or come in anew, so that they are asked again."""
        for number in numbers:
            self.waiting[self.sent.pop(number)] = time.monotonic()

    def answered(self, number: str, *, lost: bool) -> int | None:
        """Note that an order is answered, or that its answer was lost; its client, None for an order of no client."""
        client = self.sent.pop(number, None)
        if client is not None and lost:
            self.waiting[client] = time.monotonic()
        return client


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
        self._asking: _Asking | None = None
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
        orders = {
            c: self._work(round, c, message if isinstance(message, bytes) else message[c]) for c in clients
        }
        asking = self._asking = _Asking(round, orders, time.monotonic())
        while asking.open:
            self.look()
            here = self._greet()
            lost = {n for n in asking.sent if here.get(self._orders[n].key) != self._orders[n].mark}
            self._forget(lost)
            asking.lost(lost)
            self._give_out(asking, here)
            yield from self._given_up(asking)
            for number, order, reply in self._answers():
                client = asking.answered(number, lost=reply is None)
                if client is not None and reply is not None:
                    yield self._answer(order, reply)
            self._say_who_is_waited_for(asking)
            time.sleep(self.pace.poll)

    def _give_out(self, asking: _Asking, here: Mapping[str, str]) -> None:
        """Give their orders to the devices that are there and have taken the job in this session."""
        for client in list(asking.waiting):
            key = self.devices.members[client].key
            if self._ready.get(key, "") == here.get(key) and asking.times.get(client, 0) < ASKED:
                self._gone.discard(client)
                if (number := self._push(key, asking.orders[client], here)) is not None:
                    asking.given(client, number)

    def _given_up(self, asking: _Asking) -> Iterator[Answer]:
        """Yield, without an answer, the clients that are not waited for any longer."""
        now = time.monotonic()
        late = bool(self.pace.deadline) and now - asking.began > self.pace.deadline
        for client, since in list(asking.waiting.items()):
            lost = asking.times.get(client, 0)
            if late or lost >= ASKED or now - since > self.pace.grace:
                del asking.waiting[client]
                self._gone.add(client)
                why = f"{lost} times lost at work" if lost >= ASKED else f"not there for {now - since:.0f} s"
                yield self._without(asking.orders[client], "dropped", why)
        if late:
            slow, asking.sent = asking.sent, {}
            self._forget(set(slow))
            for client in slow.values():
                yield self._without(asking.orders[client], "late", f"no answer in {self.pace.deadline:g} s")

    def _say_who_is_waited_for(self, asking: _Asking) -> None:
        if time.monotonic() > asking.next_word:
            asking.next_word += WORD
            names = {
                c: self.devices.members[c].name for c in sorted([*asking.waiting, *asking.sent.values()])
            }
            shown = [
                f"{n} (away)" if c in asking.waiting else f"{n} (at work)" for c, n in list(names.items())[:5]
            ]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            self.note(f"round {asking.round}: waiting for {', '.join(shown)}{more}")

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
        here = self.link.online()
        told = {n for key in here if (n := self._push(key, Order("end", reason=reason), here)) is not None}
        until = time.monotonic() + FAREWELL
        while told and time.monotonic() < until:
            told -= {number for number, _ in self.link.pull(told)}
            time.sleep(self.pace.poll)

    @property
    def round(self) -> int:
        """Return the round that is asked for, 0 before the first."""
        return self._asking.round if self._asking is not None else 0

    def doing(self) -> list[tuple[str, int, str]]:
        """Return (name, client, what it does) of every device: ready, at work, joining, away or has not joined."""
        here, asking = self.link.online(), self._asking
        busy = set(asking.sent.values()) if asking is not None else set()

        def what(client: int, key: str, rows: int) -> str:
            if key not in here:
                return "away" if rows else "has not joined"
            if self._ready.get(key) != here[key]:
                return "joining"
            return "at work" if client in busy else "ready"

        return [(m.name, c, what(c, m.key, m.rows)) for c, m in enumerate(self.devices.members)]

    def _greet(self) -> Mapping[str, str]:
        """Give the job to every device that has come in anew; return who is there."""
        here = self.link.online()
        for key, mark in here.items():
            if self._greeted.get(key) != mark:
                self._greeted[key] = mark
                self._ready.pop(key, None)
                self._push(key, Order("job", body=self.job.to_json().encode()), here)
        for key in self._ready.keys() - here.keys():
            del self._ready[key]
        return here

    # Orders and answers -----------------------------------------------------------------------------------

    def _work(self, round: int, client: int, message: bytes) -> Order:
        return Order(
            "work", round, client, derive(self.seed, "local", round, client), message,
            self._kept.get(client, NOTHING_KEPT), self._oldest,
        )  # fmt: skip

    def _push(self, key: str, order: Order, here: Mapping[str, str]) -> str | None:
        number = self.link.push(key, order.encode(), order.common)
        if number is not None:
            self._orders[number] = _Order(key, here.get(key, ""), order)
        return number

    def _forget(self, numbers: set[str]) -> None:
        self.link.drop(numbers)
        for number in numbers:
            self._orders.pop(number, None)

    def _answers(self) -> Iterator[tuple[str, Order, Reply | None]]:
        """Yield the answers to work that have come, None for a lost one; those to the job are dealt with here."""
        for number, data in self.link.pull(set(self._orders)):
            if (found := self._orders.pop(number, None)) is None:
                continue  # it is answered already
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
            if not data:
                raise MessageError("the answer could not be read")
            reply = Reply.decode(data)
            if reply.nonce != order.nonce or reply.round != order.round:
                raise MessageError("the answer belongs to another order")
            if reply.what == {"work": "ready", "job": "done"}.get(order.what):
                raise MessageError(f"'{order.what}' was answered with '{reply.what}'")
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
