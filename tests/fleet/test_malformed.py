"""The door: every malformed answer of a device that has a key is refused with its own reason, and changes nothing.

The devices are in memory; what they send goes the way of a real run: `RemoteFleet`, the checks of a round, the method's sum.
"""

import random
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import malformed
import numpy as np
import pytest
from malformed import WORK, Honest
from methods_harness import bits, usual
from test_remote import JOB, Memory

import hostile
from fleetune import models
from fleetune.common.events import ClientReply
from fleetune.errors import REASON
from fleetune.fleet.orders import Device, Order
from fleetune.fleet.remote import Pace, RemoteFleet
from fleetune.fleet.table import FILE, Devices
from fleetune.runs.rundir import RunDir, create
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, Payload, encode
from fleetune.tuning.rounds.replies import Replies, Round

BASE, ROWS, ROUND, LIAR = bytes(range(8)), 9, 2, 1
CLIENTS = 4
FEDIT = ("fedit", {"r": 2, "steps": 1, "dropout": 0.0})
LEFT = ("refused", "failed")
SECONDS = 2.0  # of processor time that a malformed answer may cost


class Toy(NamedTuple):
    """A method, its state, and what each client would answer."""

    method: Any
    state: Any
    replies: list[Payload]


def toy(name: str, settings: dict[str, Any]) -> Toy:
    method = methods.make(name, settings)
    state = method.init(models.tiny_llama(layers=1), 5)
    return Toy(method, state, [usual(method, state, c) for c in range(CLIENTS)])


@dataclass
class Lying(Memory):
    """Honest devices, of which one answers with what `lie` makes of its honest answer."""

    replies: list[Payload] = field(default_factory=list)
    lie: Callable[[Honest], bytes] | None = None
    about: str = "work"  # the kind of order that it lies about
    dies: str = ""  # the device that dies of its work

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        for number, (key, data) in list(self.queue.items()):
            if key == self.dies and Order.decode(data).what == "work":
                del self.queue[number]
                self.marks[key] = self.marks.get(key, 0) + 1
        yield from super().pull(numbers)

    def answer(self, key: str, order: Order) -> bytes:
        client = int(key[1:])
        past = Order("work", ROUND), Order("work", ROUND - 1)
        honest = Honest(order, BASE, self.replies[client], self.devices[key], ROWS, *past)
        if client == LIAR and self.lie is not None and order.what == self.about:
            return self.lie(honest)
        return honest.reply() if order.what == "work" else honest.told()


class Place:
    """A server with its devices, and what becomes of a round."""

    def __init__(self, toy: Toy, run: RunDir, folder: Path) -> None:
        self.toy, self.run, self.notes = toy, run, list[str]()
        known = {f"k{c}": Device(ROWS, f"{c}" * 64, 1 << 33, 1, "0") for c in range(CLIENTS)}
        self.link = Lying(known, random.Random(1), replies=toy.replies)
        self.table = Devices(folder)
        self.table.register([(key, key) for key in known])
        self.events: list[ClientReply] = []
        self.log: list[dict[str, Any]] = []
        self.fleet = self.anew()
        self.fleet.wait_for(CLIENTS)

    def anew(self) -> RemoteFleet:
        """The same server after a restart, with the same table of devices."""

        def audit(what: str, **fields: Any) -> None:
            self.log.append({"what": what, **fields})

        pace = Pace(grace=0.05, poll=0)
        return RemoteFleet(self.link, self.table, JOB, 42, pace, note=self.notes.append, audit=audit)

    def played(self) -> Any:
        """The state after a round in which all clients are asked."""
        self.events.clear()
        kinds = self.toy.method.kinds(self.toy.state)
        sent = {c: encode(Message(ROUND, BASE, kinds[c % len(kinds)][0])) for c in range(CLIENTS)}
        round = Round(ROUND, BASE, self.fleet.rows, self.toy.state)
        with Replies(self.toy.method, round, self.run, self.events.append) as replies:
            replies.gather(self.fleet.ask(ROUND, range(CLIENTS), sent))
            return replies.aggregate()

    def outcome(self, client: int) -> ClientReply:
        return [e for e in self.events if e.client == client][-1]

    def others(self) -> set[str]:
        """What became of the replies of honest devices."""
        return {self.outcome(c).status for c in range(CLIENTS) if c != LIAR}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    with create(tmp_path, "averaging", "toy") as opened:
        yield opened


def knock(place: Place, reference: Any) -> tuple[int, list[str]]:
    """Let the liar send every malformed answer; return how many were survived, and what was wrong of the others."""
    faults: list[str] = []
    for name, (make, reason) in WORK.items():
        place.link.lie = make
        began = time.process_time()
        state = place.played()
        seconds, said = time.process_time() - began, place.outcome(LIAR)
        if said.status not in LEFT or reason not in said.reason or len(said.reason) > REASON:
            faults.append(f"{name}: {said.status}, {said.reason}")
        elif place.others() != {"ok"}:
            faults.append(f"{name}: the others' replies were not taken")
        elif bits(state) != bits(reference):
            faults.append(f"{name}: the state is another")
        elif seconds > SECONDS:
            faults.append(f"{name}: {seconds:.1f} s")
    return len(WORK) - len(faults), faults


def reference_of(place: Place) -> Any:
    """The state of a round in which the liar is away."""
    place.link.lie = lambda h: h.outer(what="failed", code="fault")
    return place.played()


@pytest.mark.injects
def test_every_malformed_answer_is_refused_with_its_own_reason(tmp_path, run, injected):
    assert len(WORK) >= 60
    place = Place(toy(*FEDIT), run, tmp_path)
    survived, faults = knock(place, reference_of(place))
    injected("malformed answers", len(WORK), survived=survived)
    assert not faults, "\n".join(faults)
    place.link.lie = None
    assert bits(place.played()) != bits(reference_of(place))  # an honest answer counts


OTHERS = [("fedpetuning", {"module": "full", "steps": 1}), ("fwdllm", {"P": 2}), ("fedpeptao", {})]


@pytest.mark.faults
@pytest.mark.parametrize("method", OTHERS, ids=lambda method: method[0])
def test_so_it_is_with_other_methods(tmp_path, run, injected, method):
    place = Place(toy(*method), run, tmp_path)
    survived, faults = knock(place, reference_of(place))
    injected("malformed answers", len(WORK), survived=survived)
    assert not faults, "\n".join(faults)


@pytest.mark.injects
def test_a_device_that_is_malformed_when_it_joins_takes_no_part(tmp_path, run, injected):
    place = Place(toy(*FEDIT), run, tmp_path)
    known, faults = (tmp_path / FILE).read_bytes(), []
    for name, (make, reason) in malformed.JOB.items():
        place.link.lie, place.link.about = make, "job"
        place.fleet, place.notes[:], place.log[:] = place.anew(), [], []
        place.fleet.wait_for(CLIENTS - 1)
        place.played()
        said = [n for n in place.notes if "takes no part" in n]
        logged = [e["reason"] for e in place.log if e["what"] == "not admitted"]
        if len(said) != 1 or reason not in said[0] or logged != [said[0].partition(": ")[2]]:
            faults.append(f"{name}: {said}, {logged}")
        elif place.outcome(LIAR).status != "dropped" or len(place.events) != CLIENTS:
            faults.append(f"{name}: {place.events}")
        elif (tmp_path / FILE).read_bytes() != known:
            faults.append(f"{name}: the table of devices has changed")
    injected("malformed answers", len(malformed.JOB), survived=len(malformed.JOB) - len(faults))
    assert not faults, "\n".join(faults)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Change a message, and mend its checksum three times in four."""
    body = hostile.mutated(rng, data[7:])
    check = zlib.crc32(body) if rng.random() < 0.75 else zlib.crc32(data)
    return data[:3] + check.to_bytes(4, "little") + body


def storm(place: Place, count: int, seed: int) -> dict[str, int]:
    """Send so many mutated answers, half of them mutated inside; a round completes with each."""
    rng, reference, found = random.Random(seed), reference_of(place), {"refused": 0, "taken": 0}

    def lie(h: Honest) -> bytes:
        return mutated(rng, h.reply()) if rng.random() < 0.5 else h.reply(mutated(rng, h.body()))

    place.link.lie = lie
    for _ in range(count):
        state = place.played()
        assert place.others() == {"ok"}
        if place.outcome(LIAR).status in LEFT:
            found["refused"] += 1
            assert place.outcome(LIAR).reason
            assert bits(state) == bits(reference)
        else:  # what is left of it is within what was agreed
            found["taken"] += 1
            assert all(np.isfinite(a).all() for a in state.tensors.values())
    return found


def test_mutated_answers_change_nothing_or_are_within_what_was_agreed(tmp_path, run):
    found = storm(Place(toy(*FEDIT), run, tmp_path), 150, seed=1)
    assert found["refused"] > 110


@pytest.mark.faults
def test_ten_thousand_mutated_answers(tmp_path, run, injected):
    found = storm(Place(toy(*FEDIT), run, tmp_path), 10_000, seed=2)
    injected("mutated answers", sum(found.values()))
    assert found["refused"] > 8_000


def test_a_device_that_dies_of_every_order_does_not_hold_the_round(tmp_path, run):
    """Or that comes in anew all the time: it is asked ten times, and the round goes on without it."""
    place = Place(toy(*FEDIT), run, tmp_path)
    reference = reference_of(place)
    place.link.lie = None
    place.link.dies = f"k{LIAR}"
    place.fleet.pace, began = Pace(grace=20, poll=0), time.monotonic()
    assert bits(place.played()) == bits(reference)
    assert (place.outcome(LIAR).status, place.outcome(LIAR).reason) == ("dropped", "10 times lost at work")
    assert time.monotonic() - began < 15
