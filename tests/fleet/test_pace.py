"""How long a round waits: more devices than needed, replies that come late, devices that decline; and who does what."""

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_remote import JOB, Memory, link

from fleetune.errors import Interrupted
from fleetune.fleet import remote
from fleetune.fleet.orders import Device, Order, Reply
from fleetune.fleet.remote import ASKED, Asking, Pace, RemoteFleet
from fleetune.fleet.table import Devices
from fleetune.tuning.rounds.fleets import Answer, Wanted

PACE = Pace(grace=0.2, poll=0.001, again=0.02)


@dataclass
class Slow(Memory):
    """Devices of which some work until they are let go, and some decline."""

    slow: set[str] = field(default_factory=set)
    declining: dict[str, str] = field(default_factory=dict)

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        asked = {n: q for n, q in self.queue.items() if q[0] in self.slow}
        held = {n: q for n, q in asked.items() if Order.decode(q[1]).what == "work"}
        self.queue = {n: q for n, q in self.queue.items() if n not in held}
        yield from list(super().pull(numbers))
        self.queue |= held

    def answer(self, key: str, order: Order) -> bytes:
        if order.what == "work" and key in self.declining:
            self.seen.append(order)
            return Reply("declined", order.nonce, order.round, code=self.declining[key]).encode()
        return super().answer(key, order)


def made(
    folder: Path, count: int = 4, pace: Pace = PACE, *, seed: int = 0, odd: float = 0.0
) -> tuple[Slow, RemoteFleet, list[str]]:
    """A fleet of so many devices over a link in memory, and what it notes; a round that never ends fails."""
    there, notes = Slow(link(count).devices, random.Random(seed), odd), list[str]()
    until, devices = time.monotonic() + 60, Devices(folder)
    devices.register([(key, key) for key in there.devices])

    def look() -> None:
        assert time.monotonic() < until, "the round does not end"

    fleet = RemoteFleet(there, devices, JOB, 42, pace, look=look, note=notes.append)
    fleet.wait_for(count)
    return there, fleet, notes


def look_around(fleet: RemoteFleet, look: Callable[[], object]) -> None:
    """Look until those who have come are asked, have answered and are taken."""
    for _ in range(3):
        look()
        list(fleet._answers())


def asked(fleet: RemoteFleet, round: int, goal: int = 0) -> dict[int, Answer]:
    return {a.client: a for a in fleet.ask(round, fleet.present(), f"r{round}".encode(), goal)}


def test_the_round_is_over_when_as_many_have_replied_as_are_needed(tmp_path):
    there, fleet, _ = made(tmp_path, pace=dataclasses.replace(PACE, grace=99))
    there.slow = {"k1"}
    there.away = {"k3"}
    found = asked(fleet, 1, goal=2)
    assert [found[c].status for c in range(4)] == ["ok", "late", "ok", "dropped"]
    assert found[1].reason == "2 others were faster"
    assert list(fleet.present()) == [0, 1, 2, 3]  # none of them was waited for in vain
    there.slow, there.away = set(), set()
    assert {a.status for a in asked(fleet, 2).values()} == {"ok"}


def test_after_the_deadline_those_at_work_are_late(tmp_path):
    there, fleet, _ = made(tmp_path, pace=dataclasses.replace(PACE, deadline=0.05))
    there.slow = {"k0", "k1", "k2", "k3"}
    assert {a.status for a in asked(fleet, 1).values()} == {"late"}
    there.slow = set()
    assert {a.status for a in asked(fleet, 2).values()} == {"ok"}


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.0, 0.1), st.integers(2, 5))
def test_whatever_is_late_or_lost_work_counts_once_and_for_its_round(tmp_path_factory, seed, odd, count):
    pace = dataclasses.replace(PACE, grace=20, poll=0)
    there, fleet, _ = made(tmp_path_factory.mktemp("run"), count, pace, seed=seed, odd=odd)
    rng, taken = random.Random(seed), list[bytes]()
    for round in range(1, 6):
        present = fleet.present()
        there.slow = {k for k in sorted(there.slow) if rng.random() < 0.5}
        there.slow |= {f"k{c}" for c in present[1:] if rng.random() < 0.4}
        free = sum(f"k{c}" not in there.slow for c in present)
        for a in fleet.ask(round, present, f"r{round}".encode(), free if free < len(present) else 0):
            if a.data is not None:
                assert a.data == f"k{a.client} did r{round}".encode()
                taken.append(a.data)
    assert len(taken) == len(set(taken)) > 0


def test_a_device_that_declines_is_absent_for_the_round_and_asked_in_the_next(tmp_path):
    there, fleet, _ = made(tmp_path)
    there.declining = {"k1": "battery"}
    found = asked(fleet, 1)
    assert (found[1].status, found[1].reason, found[1].data) == ("declined", "it runs on its battery", None)
    assert {a.status for c, a in found.items() if c != 1} == {"ok"}
    assert ("k1", 1, "declined") in fleet.doing()
    there.declining = {}
    assert asked(fleet, 2)[1].status == "ok"
    assert ("k1", 1, "ready") in fleet.doing()


def test_where_all_decline_they_are_asked_again_until_one_works(tmp_path):
    def look() -> None:
        if sum(o.what == "work" for o in there.seen) >= 6:
            there.declining.pop("k0", None)

    there, fleet, _ = made(tmp_path, 2)
    fleet.look = look
    there.declining = {"k0": "busy 75", "k1": "battery"}
    assert {c: a.status for c, a in asked(fleet, 1).items()} == {0: "ok", 1: "declined"}
    assert sum(o.what == "work" for o in there.seen) >= 7


def test_where_all_decline_the_deadline_ends_the_round(tmp_path):
    there, fleet, _ = made(tmp_path, 2, dataclasses.replace(PACE, deadline=0.1, again=60))
    there.declining = {"k0": "busy 75", "k1": "battery"}
    assert {c: a.status for c, a in asked(fleet, 1).items()} == {0: "declined", 1: "declined"}


@dataclass
class Clock:
    """The time of the server, which goes on while it sleeps."""

    now: float = 1e3

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 0.05


@dataclass
class Moody(Memory):
    """Devices that decline, leave, come back, take their time or die of the work: each by what it is, and by the clock alone."""

    clock: Clock = field(default_factory=Clock)
    moods: dict[str, tuple[str, float]] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    began: float = math.inf

    def online(self) -> Mapping[str, str]:
        def gone(key: str) -> bool:
            mood, number = self.moods.get(key, ("", 0.0))
            return mood == "away" and self.began <= self.clock.now < self.began + number

        self.away = {key for key in self.devices if gone(key)}
        return super().online()

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        slow = {k: self.began + n for k, (mood, n) in self.moods.items() if mood == "slow"}
        held = {n: q for n, q in self.queue.items() if self.clock.now < slow.get(q[0], 0.0)}
        self.queue = {n: q for n, q in self.queue.items() if n not in held}
        yield from list(super().pull(numbers))
        self.queue |= held

    def answer(self, key: str, order: Order) -> bytes:
        mood, number = self.moods.get(key, ("", 0.0))
        if order.what == "work":
            self.asked[key] = self.asked.get(key, 0) + 1
            if mood == "declines" and self.asked[key] <= number:
                return Reply("declined", order.nonce, order.round, code="battery").encode()
            if mood == "dies" and self.asked[key] <= number:
                self.marks[key] = self.marks.get(key, 0) + 1
        return super().answer(key, order)


MOOD = st.one_of(
    st.tuples(st.just("works"), st.just(0.0)),
    st.tuples(st.sampled_from(["declines", "dies"]), st.integers(1, 12).map(float)),
    st.tuples(st.just("away"), st.sampled_from([0.1, 0.5, 1.5, 5.0])),
    st.tuples(st.just("slow"), st.sampled_from([0.3, 0.9, 2.0, 4.0])),
)


def of_first(moods: Sequence[tuple[str, float]], folder: Path, deadline: float) -> list[tuple[str, str, int]]:
    """What becomes of the first device in two rounds, and how often it is asked, beside others of these moods."""
    clock = Clock()
    there = Moody(link(len(moods)).devices, random.Random(0), clock=clock)
    devices, pace, found = Devices(folder), Pace(grace=1.0, deadline=deadline, again=0.2), []
    devices.register([(key, key) for key in there.devices])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "time", clock)
        patch.setattr(remote, "Asking", lambda *args, **more: Asking(*args, began=clock.now, **more))
        fleet = RemoteFleet(there, devices, JOB, 42, pace, note=lambda text: None, apart=True)
        fleet.wait_for(len(moods))
        there.moods = {f"k{i}": mood for i, mood in enumerate(moods)}
        for round in (1, 2):
            assert list(fleet.present()) == list(range(len(moods)))
            there.began, there.asked = clock.now, {}
            answers = {a.client: a for a in fleet.ask(round, range(len(moods)), b"x")}
            found.append((answers[0].status, answers[0].reason, there.asked.get("k0", 0)))
            there.began = math.inf
            clock.now += 10  # all are back
            look_around(fleet, fleet.ready)
    return found


@settings(max_examples=40)
@given(MOOD, st.lists(MOOD, max_size=3), st.sampled_from([0.0, 3.0]))
def test_where_devices_stand_apart_each_has_what_is_its_own_doing(tmp_path_factory, mood, others, deadline):
    """One that declined was asked again if no other worked, and one that came back late was left out if another had come."""
    alone = of_first([mood], tmp_path_factory.mktemp("alone"), deadline)
    assert of_first([mood, *others], tmp_path_factory.mktemp("among"), deadline) == alone
    declined, away = "ok" if mood[1] < ASKED else "declined", "ok" if mood[1] < 1.0 else "dropped"
    expected = {"works": "ok", "declines": declined, "away": away}
    assert alone[0][0] == expected.get(mood[0], alone[0][0])


def test_one_that_comes_back_first_does_not_leave_the_others_out(tmp_path):
    there, fleet, _ = made(tmp_path, 2)
    fleet.apart = True
    there.away = {"k0", "k1"}
    assert {a.status for a in fleet.ask(1, [0, 1], b"x")} == {"dropped"}
    there.away = {"k1"}
    there.marks["k0"] = 4
    assert list(fleet.present()) == [0, 1]
    fleet.look = lambda: setattr(there, "away", set())
    assert {a.status for a in fleet.ask(2, [0, 1], b"x")} == {"ok"}


def test_an_answer_that_has_come_counts_though_its_device_has_left(tmp_path):
    """It was dropped where both were seen in the same look, and the device waited for."""
    there, fleet, _ = made(tmp_path, 2, dataclasses.replace(PACE, grace=0.1))

    def push(key: str, data: bytes, common: int, room: int) -> str:
        there.number += 1
        there.done[str(there.number)] = there.answer(key, Order.decode(data))
        there.away.add(key)
        return str(there.number)

    there.push = push  # type: ignore[method-assign]
    assert {a.status for a in fleet.ask(1, [0, 1], b"x")} == {"ok"}
    assert sum(o.what == "work" for o in there.seen) == 2


def test_a_run_waits_until_a_device_is_there(tmp_path):
    there, fleet, notes = made(tmp_path, 2)
    there.away = {"k0", "k1"}
    assert {a.status for a in asked(fleet, 1).values()} == {"dropped"}
    looks = iter(range(9))

    def look() -> None:
        if next(looks, None) == 3:
            there.away = {"k0"}
            there.marks["k1"] = 4

    fleet.look = look
    assert fleet.present() == [1]
    assert "no device is there: waiting for one" in notes
    there.away = {"k0", "k1"}
    asked(fleet, 2)

    def stop() -> None:
        raise Interrupted("stopped")

    fleet.look = stop
    with pytest.raises(Interrupted):
        fleet.present()


EVERY_OTHER = Wanted(("two-point", "back-propagation"), lambda client: client % 2)


def joined(folder: Path, *kinds: tuple[int, ...]) -> tuple[Memory, RemoteFleet, list[str]]:
    there, notes = link(len(kinds)), list[str]()
    for (key, device), own in zip(list(there.devices.items()), kinds, strict=True):
        there.devices[key] = dataclasses.replace(device, kinds=own)
    devices = Devices(folder)
    devices.register([(key, key) for key in sorted(there.devices)])
    fleet = RemoteFleet(there, devices, JOB, 42, PACE, kinds=EVERY_OTHER, note=notes.append)
    look_around(fleet, fleet._greet)
    return there, fleet, notes


BOTH = (0, 1)


@pytest.mark.parametrize(
    ("able", "kinds"),
    [
        ((BOTH, BOTH, BOTH, BOTH), [0, 1, 0, 1]),
        (((0,), (0,), BOTH, BOTH), [0, 0, 1, 1]),
        (((0,), (0,), (0,), (0,)), [0, 0, 0, 0]),
        ((BOTH, (0,), (0,), BOTH), [0, 0, 0, 1]),
        (((1, 0), BOTH, (0, 9, 3), BOTH), [0, 1, 0, 1]),
    ],
)
def test_what_a_device_does_is_by_what_it_can(tmp_path, able, kinds):
    _, fleet, _ = joined(tmp_path, *able)
    assert [fleet.kind(c) for c in fleet.present()] == kinds
    assert [m.kind for m in Devices(tmp_path).members] == kinds


def test_a_device_that_can_do_nothing_of_the_run_is_told_so(tmp_path):
    there, fleet, notes = joined(tmp_path, BOTH, (7,))
    assert list(fleet.present()) == [0]
    assert any("k1 takes no part: the device can do none of the run's 2 kinds of work" in n for n in notes)
    assert any(o.what == "end" and "none of the run's 2 kinds" in o.reason for o in there.seen)


def test_what_it_does_stays_until_it_can_do_it_no_longer(tmp_path):
    there, fleet, _ = joined(tmp_path, BOTH, BOTH, BOTH)
    assert [fleet.kind(c) for c in fleet.present()] == [0, 1, 0]
    there.devices["k1"] = dataclasses.replace(there.devices["k1"], kinds=(0,))
    for mark in (1, 2):
        there.marks = dict.fromkeys(there.devices, mark)
        look_around(fleet, fleet.present)
        assert [fleet.kind(c) for c in fleet.present()] == [0, 0, 0]
    member = Devices(tmp_path).members[1]
    assert (member.able, member.memory, member.threads) == ([0], 1 << 33, 1)


def test_a_newcomer_takes_what_is_owed(tmp_path):
    there, fleet, _ = joined(tmp_path, (0,), (0,))
    assert [fleet.kind(c) for c in fleet.present()] == [0, 0]
    there.devices["new"] = Device(7, "e" * 64, 1, 1, "0", kinds=BOTH)
    look_around(fleet, fleet.present)
    assert [fleet.kind(c) for c in fleet.present()] == [0, 0, 1]
