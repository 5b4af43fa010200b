"""Ask real devices: whoever is there, with patience for those that are killed, restarted or cut off.

What the server needs to go on is in the run's folder (`table.py`, the checkpoints), nothing in the link.  A device that has
answered an order keeps its answer until the next, and the memory of a method stays on it: every order names the memory to start
from, by round and checksum, so a run that resumes from an earlier checkpoint also uses the earlier memory.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final, NamedTuple

from fleetune.common.display import counted, human_time
from fleetune.common.events import ClientReply
from fleetune.errors import FleetError, MessageError, cut_reason
from fleetune.fleet.link import Link, Sparing, answer_in
from fleetune.fleet.orders import NOTHING_KEPT, REFUSED, Device, DeviceReply, Job, Order
from fleetune.fleet.table import LATE, Devices, apart
from fleetune.seeds.noise import derive
from fleetune.tuning.rounds.fleets import ONE, STEPS, Answer, Fleet, Step, Wanted, outrun

log = logging.getLogger(__name__)

ROOM: Final = 1 << 24  # bytes that any answer may have
WIDER: Final = 4  # or so many times the bytes of its order: numbers may be wider on the way back
ASKED: Final = 10  # times that a client is given its order in a round: its device may die of the work itself
FAREWELL: Final = 5.0  # seconds in which devices are told that the run is over
# where no deadline is given, a round takes so many times the median device once half have answered, and no fewer seconds
SLOWEST: Final = 20
LEAST: Final = 600.0


@dataclass
class _Order:
    """An order on its way: to whom, in which session of the device."""

    key: str
    mark: str
    order: Order


class RemoteFleet(Fleet):
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
        kinds: Wanted = ONE,
        apart: bool = False,
    ) -> None:
        """Where a sum is private, devices stand `apart`: none has a say in whether another is asked, asked again or given up."""
        self.apart = apart
        self.link, self.devices, self.job, self.seed, self.pace = link, devices, job, seed, pace
        self.look, self.note, self.audit, self.kinds = look, note, audit, kinds
        self._ready: dict[str, str] = {}  # key -> mark of the session in which the device took the job
        self._greeted: dict[str, str] = {}  # key -> mark of the session in which it was sent
        self._greetings = Sparing()  # by key: one that comes in anew all the time waits, and fills no log
        self._refused: dict[str, str] = {}  # key -> why it takes no part, until it comes in anew
        self._last_refusal = 0.0  # when
        self._said = set[str]()  # of devices' versions
        self._ended: dict[str, str] = {}  # key -> mark of the session in which it was told of the end
        self._orders: dict[str, _Order] = {}  # by number
        self._kept: dict[int, tuple[int, int]] = {}
        self._digests: dict[int, str] = {}  # client -> SHA-256 of its last reply
        self._oldest = 0
        self.told: dict[int, Device] = {}  # client -> what it said of itself last
        self._asking: Asking | None = None
        self._gone: set[int] = set()  # clients that were waited for in vain, until they are back
        self._declined = set[int]()  # clients that declined when they were last asked
        self._missed = Counter[int]()  # round -> replies that do not count
        self.next = 0  # the round that a resumed run begins with
        self.waits = ""  # what the first round waits for, and what helps
        self._took: Sequence[float] = ()  # seconds until each answer of the last round

    @property
    def grace(self) -> float:
        """Return how long a device that has gone is waited for: as stated, else twice the last round's median time.

        `apart`, a minute: how fast others are is no reason to give one up.
        """
        if self.pace.grace is not None:
            return self.pace.grace
        return 60.0 if self.apart or not self._took else max(10.0, min(60.0, 2 * median(self._took)))

    @property
    def run(self) -> str:
        """Return the number of the run, as its devices know it."""
        return self.job.run

    # What every fleet has ---------------------------------------------------------------------------------

    @property
    def rows(self) -> Sequence[int]:
        """Rows of every client; 0 for one that has never joined."""
        return self.devices.rows

    def present(self) -> Sequence[int]:
        """Return the clients that may be asked: those that have joined, and were not waited for in vain since.

        `apart`: all that have ever joined.  Where nobody is there it waits until somebody is.
        """
        next_word = time.monotonic()
        while True:
            self._greet()
            self.devices.give_kinds(self.kinds)
            joined = [c for c, rows in enumerate(self.devices.rows) if rows]
            if there := self.ready() if self.apart else [c for c in joined if c not in self._gone]:
                return joined if self.apart else there
            self._check_prospect(1)
            if time.monotonic() >= next_word:
                next_word = time.monotonic() + WORD
                self.note("no device is there: waiting for one")
            self.look()
            for _ in self._answers():
                pass
            time.sleep(self.pace.poll)

    def kind(self, client: int) -> int:
        """Return the kind of work that a device was given, by what fits it."""
        return self.devices.members[client].kind

    def ready(self) -> list[int]:
        """Return the clients that are there now and have taken the job, ascending."""
        keys = {key for key, mark in self._greet().items() if self._ready.get(key) == mark}
        return [c for c, member in enumerate(self.devices.members) if member.key in keys]

    def kept(self) -> Mapping[int, tuple[int, int]]:
        """Return client -> (round, CRC-32) of what each device has said that it remembers."""
        return {c: kept for c, kept in self._kept.items() if kept != NOTHING_KEPT}

    def check_kept(self, stated: Mapping[int, tuple[int, int]]) -> None:
        """Take what a checkpoint states; each device compares it with what it has, when it is asked."""
        self._kept = dict(stated)

    def heard(self, reply: ClientReply) -> str:
        """Write into the log what became of a client's reply; return that of the first few of a round that do not count."""
        about = {"bytes": reply.bytes_up, "sha256": self._digests.get(reply.client, "")}
        name = self.record(reply.status, reply.client, round=reply.round, **about, reason=reply.reason)
        if reply.status == "ok":
            return ""
        self._missed[reply.round] += 1
        more = "; fleetune fleet status has the others" if self._missed[reply.round] == SHOWN else ""
        said = f"round {reply.round}: {name} {reply.status}: {reply.reason}{more}"
        return said if self._missed[reply.round] <= SHOWN else ""

    def record(self, what: str, client: int, **fields: object) -> str:
        """Write into the log what became of a client's answer; return the device's name."""
        member = self.devices.members[client]
        self.audit(what, device=member.key, name=member.name, client=client, **fields)
        return member.name

    def forget_before(self, round: int) -> None:
        """Let devices delete memories that a newer one, not after `round`, replaces."""
        self._oldest = max(0, round)

    def ask(
        self, round: int, clients: Sequence[int], message: bytes | Mapping[int, bytes], goal: int = 0
    ) -> Iterator[Answer]:
        """Yield the answers of these clients as they come.

        A device that is away is waited for, and asked when it is back; one that comes in anew is asked again.
        """
        orders = {
            c: self._work(round, c, message if isinstance(message, bytes) else message[c]) for c in clients
        }
        return self._given(Asking(round, orders, goal))

    def exchange(
        self, round: int, step: Step, bodies: Mapping[int, bytes], room: int = 0
    ) -> Iterator[Answer]:
        """Send each client its own message in a step of a secure sum."""
        orders = {c: Order(step, round, c, body=body) for c, body in bodies.items()}
        return self.give(orders, room=max(ROOM, 2 * room))

    def give(self, orders: Mapping[int, Order], *, at_once: int = 0, room: int = 0) -> Iterator[Answer]:
        """Yield the answers to these orders, by client and of one round, as they come.

        No more than `at_once` are on their way at a time, where it is given.  An answer may have `room` bytes, 0: the usual.
        """
        round = max((order.round for order in orders.values()), default=0)
        return self._given(Asking(round, orders, at_once=at_once, room=room))

    def _given(self, asking: Asking) -> Iterator[Answer]:
        self._asking = asking
        while asking.goes_on():
            self.look()
            here = self._greet()
            for number, order, reply in self._answers():  # also of those that have left since
                yield from self._taken(asking, number, order, reply)
            if not asking.goes_on():
                break
            asking.lost(self._lost(asking.sent, here))
            self._give_out(asking, here)
            asking.await_joining(
                {c: mark for c in asking.waiting if (mark := self._joins(self.devices.members[c].key, here))}
            )
            yield from self._given_up(asking)
            for word in asking.word(lambda client: self.devices.members[client].name, self.grace):
                self.note(word)
            time.sleep(self.pace.poll)
        self._took = asking.took or self._took
        yield from self._left(asking, outrun(asking.goal))

    def _lost(self, numbers: Iterable[str], here: Mapping[str, str]) -> set[str]:
        """Forget those of the orders whose devices have gone, or come in anew; return their numbers."""
        lost = {n for n in numbers if here.get(self._orders[n].key) != self._orders[n].mark}
        self._forget(lost)
        return lost

    def _taken(
        self, asking: Asking, number: str, order: Order, reply: DeviceReply | None
    ) -> Iterator[Answer]:
        """Yield what has been answered to an order; nothing where the answer was lost, or the device has declined."""
        client = asking.answered(number, lost=reply is None)
        if client is None or reply is None:
            return
        if reply.what == "declined":
            self._declined.add(client)
            asking.decline(client, reply.reason)
            return
        asking.heard += 1
        asking.replies += reply.what == "done"
        if reply.what == "done" and order.what not in STEPS:
            asking.took.append(time.monotonic() - asking.began)
        yield self._answer(order, reply)

    def _give_out(self, asking: Asking, here: Mapping[str, str]) -> None:
        """Give their orders to the devices that are there and have taken the job in this session."""
        for client in list(asking.waiting):
            key = self.devices.members[client].key
            if self._ready.get(key, "") == here.get(key) and asking.times.get(client, 0) < ASKED:
                if asking.at_once and len(asking.sent) >= asking.at_once:
                    asking.waiting[client] = time.monotonic()  # it is here, and waits for its turn
                    continue
                self._gone.discard(client)
                self._declined.discard(client)
                if (number := self._push(key, asking.orders[client], here, asking.room)) is not None:
                    asking.given(client, number)

    def _joins(self, key: str, here: Mapping[str, str]) -> str:
        """Return the mark of a device that is there and loads the model; "" for any other."""
        mark = here.get(key, "")
        return mark if self._ready.get(key) != mark and key not in self._refused else ""

    def _given_up(self, asking: Asking) -> Iterator[Answer]:
        """Yield, without an answer, the clients that are not waited for any longer."""
        now, limit = time.monotonic(), self._limit(asking)
        if now - asking.began > limit:
            asking.over = True
            self._gone |= asking.waiting.keys()
            yield from self._left(asking, f"no answer in {limit:g} s")
            return
        for client, since in list(asking.waiting.items()):
            lost = asking.times.get(client, 0)
            if lost >= ASKED or now - since > self.grace:
                del asking.waiting[client]
                self._gone.add(client)
                why = f"{lost} times lost at work" if lost >= ASKED else f"not there for {now - since:.0f} s"
                yield self._without(asking.orders[client], "dropped", why)
        if asking.heard and not self.apart:
            yield from self._that_declined(asking)
        else:
            yield from self._that_declined(asking, ASKED)
            asking.ask_again(self.pace.again)

    def _limit(self, asking: Asking) -> float:
        """Return how many seconds a round may take: as stated, else by the median of the answers, once half of them are there."""
        if self.pace.deadline or self.apart or 2 * len(asking.took) < len(asking.orders):
            return self.pace.deadline or math.inf
        return max(LEAST, round(SLOWEST * median(asking.took)))

    def _left(self, asking: Asking, reason: str) -> Iterator[Answer]:
        """Yield, without an answer, all that are left when a round is over; those at work are late for this `reason`."""
        now = time.monotonic()
        waiting, asking.waiting = asking.waiting, {}
        for client, since in waiting.items():
            why = "loads the model" if client in asking.joining else f"not there for {now - since:.0f} s"
            yield self._without(asking.orders[client], "dropped", why)
        yield from self._that_declined(asking)
        slow, asking.sent = asking.sent, {}
        self._forget(set(slow))
        for client in slow.values():
            yield self._without(asking.orders[client], "late", reason)

    def _that_declined(self, asking: Asking, asked: int = 0) -> Iterator[Answer]:
        """Yield, without an answer, those that have declined, and were asked so often in this round."""
        for client in [c for c in asking.declined if asking.times[c] >= asked]:
            yield self._without(asking.orders[client], "declined", asking.declined.pop(client).reason)

    # Devices come and go ----------------------------------------------------------------------------------

    def wait_for(self, count: int, patience: float = 0.0) -> None:
        """Wait until so many devices are ready, or some after `patience` seconds (0: no end).

        FleetError when none is left that could be, and when none has come by then.
        """
        said, until, silent = "", time.monotonic() + (patience or math.inf), math.inf
        while True:
            self._check_prospect(count)
            here, refused = len(self._ready), len(self._refused)
            word = f"{here} of {counted(count, 'device')} {'is' if here == 1 else 'are'} ready"
            word += self._missing() if here < count else ""
            if refused and here < count:
                word += f"; {refused} cannot take part: waiting for others, or for these to come in anew"
            more = f"; or stop it, and go on with --wait {here}" if here and not patience else ""
            self.waits = f"for {count - here} more of {counted(count, 'device')}{more}" * (here < count)
            if word != said:
                self.note(word)
                said, silent = word, time.monotonic() + WORD
            if here >= count:
                return
            if time.monotonic() > silent:
                self.note(f"the run waits {self.waits}")
                silent = math.inf
            if time.monotonic() > until:
                return self._go_on_with(here, count, patience)
            self.look()
            self._greet()
            for _ in self._answers():
                pass
            time.sleep(self.pace.poll)

    def _go_on_with(self, here: int, count: int, patience: float) -> None:
        """Say who did not come in time; FleetError where nobody did."""
        why = f"{here or 'none'} of {counted(count, 'device')} came within {human_time(patience)}{self._missing()}"
        if not here:
            raise FleetError(why, hint="start them, then this again; --round-deadline SECONDS waits longer")
        self.note(f"{why}: the others are not waited for")

    def _missing(self) -> str:
        ready = {m.name for m in self.devices.members if m.key in self._ready}  # perhaps by a second key
        names = [n for n in dict.fromkeys(m.name for m in self.devices.members) if n not in ready]
        return f"; missing: {', '.join(names[:SHOWN])}{' ..' * (len(names) > SHOWN)}" if names else ""

    def _check_prospect(self, count: int) -> None:
        """FleetError when `count` devices or more have refused, and all that are known; they were told by then.

        Where any key may join, others could still come: `count` are all that are expected.
        """
        known = {m.key for m in self.devices.members} | self._greeted.keys()
        told = all(found.order.what != "end" for found in self._orders.values())
        told = told or time.monotonic() > self._last_refusal + FAREWELL
        if len(self._refused) >= max(1, count) and known <= self._refused.keys() and told:
            key, why = list(self._refused.items())[-1]
            raise FleetError(
                f"no device can take part: {len(self._refused)} came; the last, {self.link.name(key)}: {why}",
                hint="mend that on the devices, then start them and this command again",
            )

    def end(self, reason: str) -> None:
        """Tell every device that is there and was not told that the run is over; write down which came too late for it."""
        here = self.link.online()
        end, told = Order("end", reason=cut_reason(reason)), set[str]()
        for key in [key for key, mark in here.items() if self._ended.get(key) != mark]:
            if (number := self._push(key, end, here)) is not None:
                told.add(number)
                self._ended[key] = here[key]
            name = self.link.name(key)
            if key not in self._refused and self.devices.came_late(key, name):
                self.note(f"device {name} {LATE}")
                self.audit(LATE, device=key, name=name)
        until = time.monotonic() + FAREWELL
        while told and time.monotonic() < until:
            told -= {number for number, _ in self.link.pull(told)}
            time.sleep(self.pace.poll)

    @property
    def round(self) -> int:
        """Return the round that is asked for, 0 before the first."""
        return self._asking.round if self._asking is not None else 0

    def doing(self) -> list[tuple[str, int, str]]:
        """Return (name, client, what it does) of every device.

        That is ready, at work, declined, joining, away, has not joined, came after the end, or "refused: " and why.
        """
        here, asking = self.link.online(), self._asking
        does = dict.fromkeys(self._declined, "declined")
        does |= dict.fromkeys(asking.sent.values() if asking is not None else (), "at work")

        def what(client: int, key: str, rows: int) -> str:
            if self.devices.members[client].late:
                return LATE
            if key in self._refused:
                return f"refused: {self._refused[key]}"
            if key not in here:
                return "away" if rows else "has not joined"
            if self._joins(key, here):
                return "joining"
            return does.get(client, "ready")

        return [(m.name, c, what(c, m.key, m.rows)) for c, m in enumerate(self.devices.members)]

    def _greet(self) -> Mapping[str, str]:
        """Give the job to every device that has come in anew; return who is there."""
        here = self.link.online()
        for key, mark in here.items():
            if self._greeted.get(key) != mark:
                anew = " anew" * (key in self._greeted)
                self._ready.pop(key, None)
                self._refused.pop(key, None)
                if self._greetings.left_out(key) >= 0:
                    self._greeted[key] = mark
                    self.note(f"device {self.link.name(key)} has come in{anew}")
                    self._push(
                        key, Order("job", self.round or self.next, body=self.job.to_json().encode()), here
                    )
        for key in self._greeted.keys() - here.keys():
            del self._greeted[key]  # it is greeted again, even if it comes back in the same session
            self._ready.pop(key, None)
            self.note(f"device {self.link.name(key)} has gone")
        return here

    # Orders and answers -----------------------------------------------------------------------------------

    def _work(self, round: int, client: int, message: bytes) -> Order:
        """Return a client's order, the same bytes from a resumed server: the device then has its answer already."""
        nonce = hashlib.sha256(f"{self.devices.run} {round} {client}".encode()).digest()[:16]
        return Order(
            "work",
            round,
            client,
            derive(self.seed, "local", round, client),
            message,
            self._kept.get(client, NOTHING_KEPT),
            self._oldest,
            nonce=nonce,
        )

    def _push(self, key: str, order: Order, here: Mapping[str, str], room: int = 0) -> str | None:
        data = order.encode()
        number = self.link.push(key, data, order.common, room or max(ROOM, WIDER * len(data)))
        if number is not None:
            self._orders[number] = _Order(key, here.get(key, ""), order)
        return number

    def _forget(self, numbers: set[str]) -> None:
        self.link.drop(numbers)
        for number in numbers:
            self._orders.pop(number, None)

    def _answers(self) -> Iterator[tuple[str, Order, DeviceReply | None]]:
        """Yield the answers to work that have come, None for a lost one; those to the job are dealt with here."""
        for number, data in self.link.pull(set(self._orders)):
            if (found := self._orders.pop(number, None)) is None:
                continue  # it is answered already
            reply = answer_in(data, found.order)
            if found.order.what != "job":
                yield number, found.order, reply
            elif reply is not None:
                self._joined(found, reply)
            elif self._greeted.get(found.key) == found.mark:
                del self._greeted[found.key]  # it is asked again
        self.devices.save()  # before any of those that have joined is asked

    def _joined(self, found: _Order, reply: DeviceReply) -> None:
        """Take in a device that has answered the job; tell it when it cannot take part."""
        name = self.link.name(found.key)
        try:
            if reply.what != "ready":
                raise MessageError(reply.reason)
            device = Device.from_json(reply.body)
            able = self._able(device) if self.job.task == "tune" else None
            known = self.devices.client(found.key)
            here = "ready" if known is None or not self.devices.members[known].rows else "back"
            client = self.devices.join(found.key, name, device, able)
        except MessageError as error:
            self.note(f"device {name} takes no part: {error.message}")
            self._refused[found.key], self._last_refusal = error.message, time.monotonic()
            self.audit("not admitted", device=found.key, name=name, reason=error.message)
            if reply.what == "ready":
                end = Order("end", body=REFUSED, reason=error.message)
                self._push(found.key, end, {found.key: found.mark})
            return
        self._ready[found.key] = found.mark
        self.told[client] = device
        self._gone.discard(client)
        about = {"version": device.version, "torch": device.torch, "processor": device.processor}
        self.audit("joined", device=found.key, name=name, client=client, rows=device.rows, **about)
        self.note(
            f"device {name} is {here}: client {client}, {counted(device.rows, 'row')} · fleetune {device.version}, "
            f"torch {device.torch}, {device.processor}"
        )
        if (differs := apart(device)) and (word := f"device {name}: {differs}") not in self._said:
            self._said.add(word)
            self.note(word)

    def _able(self, device: Device) -> list[int]:
        """Return the kinds of the run's work that a device can do; MessageError where there are none."""
        count = len(self.kinds.names)
        able = sorted(kind for kind in set(device.kinds) if 0 <= kind < count)
        if not able:
            raise MessageError(f"the device can do none of the run's {count} kinds of work")
        return able

    def _answer(self, order: Order, reply: DeviceReply) -> Answer:
        if reply.what != "done":
            if reply.code.startswith("remembers "):
                self._kept.pop(order.client, None)  # its next work stands on none
            return self._without(order, "failed", reply.reason)
        if order.what == "work":
            self._kept[order.client] = reply.kept
        self._digests[order.client] = hashlib.sha256(reply.body).hexdigest()
        return Answer(order.client, order.key, reply.body, "ok", "", reply.seconds, len(order.body))

    @staticmethod
    def _without(order: Order, status: str, reason: str) -> Answer:
        return Answer(order.client, order.key, None, status, reason, 0.0, len(order.body))


WORD: Final = 30.0  # seconds of waiting, after which it is said for whom
SHOWN: Final = 5  # names in that word


class Refrained(NamedTuple):
    """When a device has declined, and why."""

    since: float
    reason: str


@dataclass
class Asking:
    """A round in progress; `goal` is the number of replies that end it, 0: all."""

    round: int
    orders: Mapping[int, Order]  # by client
    goal: int = 0
    at_once: int = 0  # how many may be at work, 0 for any number
    room: int = 0  # bytes that an answer may have, 0: the usual
    replies: int = 0  # that have come
    heard: int = 0  # devices that have worked for this round, well or not
    over: bool = False  # its time is up
    began: float = field(default_factory=time.monotonic)
    waiting: dict[int, float] = field(init=False)  # client -> since when it is waited for
    sent: dict[str, int] = field(init=False, default_factory=dict)  # number of an order -> client
    took: list[float] = field(init=False, default_factory=list)  # seconds from the begin to each answer
    times: dict[int, int] = field(init=False, default_factory=dict)  # client -> how often it was asked
    declined: dict[int, Refrained] = field(init=False, default_factory=dict)
    joins: dict[int, set[str]] = field(init=False, default_factory=dict)  # client -> stays in which it loaded
    joining: set[int] = field(init=False, default_factory=set)  # clients that load now
    next_word: float = field(init=False)  # when to say who is waited for

    def __post_init__(self) -> None:
        self.waiting = dict.fromkeys(self.orders, self.began)
        self.next_word = self.began + WORD

    def goes_on(self) -> bool:
        """Tell whether the round is to be waited for."""
        if self.over or (self.goal and self.replies >= self.goal):
            return False
        return bool(self.waiting or self.sent or self.declined)

    def given(self, client: int, number: str) -> None:
        """Note that a client was given its order."""
        del self.waiting[client]
        self.sent[number] = client
        self.times[client] = self.times.get(client, 0) + 1

    def await_joining(self, marks: Mapping[int, str]) -> None:
        """Wait on for clients that are there and load, as for those at work; not for one that dies of it again and again."""
        self.joining = set(marks)
        for client, mark in marks.items():
            stays = self.joins.setdefault(client, set())
            stays.add(mark)
            if len(stays) <= ASKED:
                self.waiting[client] = time.monotonic()

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

    def decline(self, client: int, reason: str) -> None:
        """Note that a client that had its order has declined."""
        self.declined[client] = Refrained(time.monotonic(), reason)

    def ask_again(self, seconds: float) -> None:
        """Let those that declined so long ago be asked again."""
        for client, found in list(self.declined.items()):
            if time.monotonic() - found.since > seconds:
                del self.declined[client]
                self.waiting[client] = time.monotonic()

    def word(self, name: Callable[[int], str], grace: float) -> Iterator[str]:
        """Yield, when it is time, for whom the round waits; `name` gives a client's name, `grace` is as in `Pace`."""
        if time.monotonic() <= self.next_word:
            return
        self.next_word = time.monotonic() + WORD  # a machine may have slept
        left = {client: max(0.0, since + grace - time.monotonic()) for client, since in self.waiting.items()}
        does = {client: f"away, for {left[client]:.0f} s more at most" for client in left}
        does |= dict.fromkeys(self.joining, "joining")
        does |= dict.fromkeys(self.sent.values(), "at work")
        does |= {client: f"declined: {found.reason}" for client, found in self.declined.items()}
        shown = [f"{name(c)} ({does[c]})" for c in sorted(does)[:SHOWN]]
        more = f" and {len(does) - SHOWN} more" if len(does) > SHOWN else ""
        few = f"{self.goal - self.replies} of " if self.goal else ""
        yield f"round {self.round}: waiting for {few}{', '.join(shown)}{more}"


@dataclass(frozen=True)
class Pace:
    """How long the server waits."""

    grace: float | None = None  # seconds for a device that has gone, before the round goes on without it
    deadline: float = 0.0  # seconds for a round; 0: as long as devices work
    poll: float = 0.05  # seconds between two looks
    again: float = 30.0  # seconds until those that declined are asked again, if no other works or has a say
