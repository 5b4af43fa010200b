"""The server's side of a real fleet, over a link in memory whose devices die, come back, lie and answer twice."""

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.common import __version__, files
from fleetune.errors import FleetError, Interrupted, StorageError
from fleetune.fleet import remote
from fleetune.fleet.link import BURST, REST
from fleetune.fleet.orders import NOTHING_KEPT, Device, DeviceReply, Job, Order
from fleetune.fleet.remote import ASKED, Asking, Pace, RemoteFleet
from fleetune.fleet.table import FILE, LATE, Devices
from fleetune.tuning.rounds.fleets import Answer, Wanted

JOB = Job("a" * 32, "fedkseed", {}, "m", "b" * 64, "fp32", 64, (), 3)
QUICK = Pace(grace=0.3, poll=0.001)


@dataclass
class Memory:
    """A link in memory: `chance(what)` says whether something odd happens, and each device answers honestly else."""

    devices: dict[str, Device]
    chance: random.Random
    odd: float = 0.0  # how often
    marks: dict[str, int] = field(default_factory=dict)
    queue: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # number -> key, order
    done: dict[str, bytes | None] = field(default_factory=dict)
    number: int = 0
    seen: list[Order] = field(default_factory=list)
    away: set[str] = field(default_factory=set)

    def online(self) -> Mapping[str, str]:
        for key in self.devices:
            if self.chance.random() < self.odd:
                self.marks[key] = self.marks.get(key, 0) + 1  # restarted: what it had taken is lost
                self.queue = {n: q for n, q in self.queue.items() if q[0] != key}
        return {key: str(self.marks.get(key, 0)) for key in self.devices if key not in self.away}

    def name(self, key: str) -> str:
        return f"device-{key}"

    def push(self, key: str, data: bytes, common: int, room: int) -> str | None:
        self.number += 1
        self.queue[str(self.number)] = key, data
        return str(self.number)

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        for number, (key, data) in list(self.queue.items()):
            if key not in self.away and not self.held(key, Order.decode(data)):
                del self.queue[number]
                self.done[number] = self.answer(key, Order.decode(data))
        for number in sorted(numbers & self.done.keys(), key=lambda n: self.chance.random()):
            data = self.done.pop(number)
            yield number, None if self.chance.random() < self.odd else data

    def held(self, key: str, order: Order) -> bool:
        """Whether the device has not begun with it yet."""
        return False

    def drop(self, numbers: set[str]) -> None:
        for number in numbers:
            self.queue.pop(number, None)
            self.done.pop(number, None)

    def answer(self, key: str, order: Order) -> bytes:
        self.seen.append(order)
        nonce = order.nonce
        if order.what == "job":
            return DeviceReply("ready", nonce, order.round, self.devices[key].to_json()).encode()
        body = f"{key} did {order.body.decode()}".encode()
        return DeviceReply("done", nonce, order.round, body, (order.round, 5), 0.1, 9).encode()


def link(count: int = 3, seed: int = 0, odd: float = 0.0) -> Memory:
    devices = {f"k{i}": Device(10 + i, f"{i}" * 64, 1 << 33, 1, "0") for i in range(count)}
    return Memory(devices, random.Random(seed), odd)


def fleet_of(link: Memory, folder: Path, pace: Pace = QUICK, **more: Any) -> RemoteFleet:
    devices = Devices(folder)
    devices.register([(key, key) for key in link.devices])
    made = RemoteFleet(link, devices, JOB, 42, pace, **more)
    made.wait_for(len(link.devices))
    return made


def test_every_client_answers_once_and_knows_its_number_key_and_memory(tmp_path):
    memory = link()
    made = fleet_of(memory, tmp_path)
    assert list(made.rows) == [10, 11, 12]
    assert list(made.present()) == [0, 1, 2]
    for round in (1, 2):
        answers = {a.client: a for a in made.ask(round, [0, 2], {0: b"a", 2: b"bcd"})}
        told = {0: (b"k0 did a", "ok", 1), 2: (b"k2 did bcd", "ok", 3)}
        assert {c: (a.data, a.status, a.sent) for c, a in answers.items()} == told
    work = [o for o in memory.seen if o.what == "work"]
    assert {o.kept for o in work if o.round == 1} == {NOTHING_KEPT}
    assert {o.kept for o in work if o.round == 2} == {(1, 5)}
    assert len({o.key for o in work}) == len({o.nonce for o in work}) == 4
    assert made.kept() == {0: (2, 5), 2: (2, 5)}
    made.check_kept({0: (1, 4)})
    list(made.ask(2, [0, 2], b"a"))
    assert [o.kept for o in memory.seen[-2:] if o.client == 0] == [(1, 4)]


def test_a_device_that_has_lost_its_memory_is_next_asked_for_work_without_one(tmp_path, monkeypatch):
    memory = link(2)
    made, honest = fleet_of(memory, tmp_path), memory.answer

    def forgets(key: str, order: Order) -> bytes:
        done = honest(key, order)
        lost = DeviceReply("failed", order.nonce, order.round, code="remembers 1").encode()
        return lost if (key, order.what, order.round) == ("k0", "work", 2) else done

    monkeypatch.setattr(memory, "answer", forgets)
    found = {r: {a.client: a.status for a in made.ask(r, [0, 1], b"a")} for r in (1, 2, 3)}
    assert found == {1: {0: "ok", 1: "ok"}, 2: {0: "failed", 1: "ok"}, 3: {0: "ok", 1: "ok"}}
    work = {(o.client, o.round): o.kept for o in memory.seen if o.what == "work"}
    assert [work[0, r] for r in (1, 2, 3)] == [NOTHING_KEPT, (1, 5), NOTHING_KEPT]
    assert [work[1, r] for r in (1, 2, 3)] == [NOTHING_KEPT, (1, 5), (2, 5)]


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.0, 0.1), st.integers(1, 5))
def test_whatever_restarts_or_is_lost_each_client_has_one_answer_its_own(tmp_path_factory, seed, odd, count):
    made = fleet_of(link(count, seed, odd), tmp_path_factory.mktemp("run"), Pace(grace=20, poll=0))
    for round in (1, 2, 3):
        answers = sorted(made.ask(round, range(count), f"r{round}".encode()))
        assert [a.client for a in answers] == list(range(count))
        assert [a.data for a in answers] == [f"k{c} did r{round}".encode() for c in range(count)]


def test_one_that_does_not_come_back_is_dropped_after_the_grace_and_asked_again_when_it_is_there(tmp_path):
    memory = link()
    made = fleet_of(memory, tmp_path)
    memory.away.add("k1")
    answers = {a.client: a for a in made.ask(1, [0, 1, 2], b"x")}
    assert (answers[1].status, answers[1].data) == ("dropped", None)
    assert "not there" in answers[1].reason
    assert answers[0].status == answers[2].status == "ok"
    assert list(made.present()) == [0, 2]
    memory.away.clear()
    memory.marks["k1"] = 9
    for _ in range(3):
        made.present()
        list(made.ask(2, [0], b"x"))
    assert list(made.present()) == [0, 1, 2]


def test_one_that_is_back_and_loads_is_waited_for_but_not_one_that_dies_of_it_again_and_again(tmp_path):
    memory = link(2)
    made, notes = fleet_of(memory, tmp_path), list[str]()
    memory.marks["k1"], loaded, made.note = 1, time.monotonic() + 4 * (QUICK.grace or 0), notes.append
    memory.held = lambda key, order: key == "k1" and time.monotonic() < loaded  # type: ignore[method-assign]
    assert {a.client: a.status for a in made.ask(1, [0, 1], b"x")} == {0: "ok", 1: "ok"}
    assert [n.partition(":")[0] for n in notes] == [
        "device device-k1 has come in anew",
        "device device-k1 is back",
    ]
    loaded, made.look = math.inf, lambda: memory.marks.update(k1=memory.marks["k1"] + 1)
    assert {a.client: a.status for a in made.ask(2, [0, 1], b"x")} == {0: "ok", 1: "dropped"}


def test_one_that_loads_when_a_round_ends_is_not_said_to_be_away(tmp_path):
    memory = link(2)
    made, pull = fleet_of(memory, tmp_path), memory.pull
    memory.marks["k1"] = 1

    def never(numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        memory.queue = {n: q for n, q in memory.queue.items() if q[0] != "k1"}
        if made.doing()[1][2] == "joining" and made._asking and made._asking.joining:
            yield from pull(numbers)

    memory.pull = never  # type: ignore[method-assign]
    answers = {a.client: (a.status, a.reason) for a in made.ask(1, [0, 1], b"x", goal=1)}
    assert answers == {0: ("ok", ""), 1: ("dropped", "loads the model")}


def test_the_grace_is_twice_the_last_rounds_median_time_but_not_where_devices_stand_apart(
    tmp_path, monkeypatch
):
    memory, clock, each = link(), time.monotonic, [3.0]
    now = [clock()]
    made, honest = fleet_of(memory, tmp_path, Pace(poll=0)), memory.answer

    def slow(key: str, order: Order) -> bytes:
        now[0] += each[0] if order.what == "work" else 0
        return honest(key, order)

    monkeypatch.setattr(memory, "answer", slow)
    monkeypatch.setattr("fleetune.fleet.remote.time.monotonic", lambda: now[0])
    assert made.grace == 60  # before the first round
    for round, (seconds, grace) in enumerate([(3.0, 18), (0.1, 10), (99.0, 60), (4.0, 24)], 1):
        # all answers are taken when the three have worked one after another
        each[0], now[0] = seconds, clock()
        list(made.ask(round, [0, 1, 2], b"x"))
        assert made.grace == pytest.approx(grace, abs=1)
    list(made.exchange(4, "keys", {0: b"", 1: b""}))  # a step of a secure sum is no work
    assert made.grace == pytest.approx(24, abs=1)
    made.apart = True
    assert made.grace == 60
    assert RemoteFleet(memory, made.devices, JOB, 42, Pace(grace=3)).grace == 3


def test_one_that_comes_after_the_end_is_told_and_written_down_once(tmp_path):
    memory, notes, log = link(2), list[str](), list[tuple[str, object]]()
    table = Devices(tmp_path)
    table.register([("k0", "k0"), ("k1", "k1"), ("k2", "k2")])
    audit = lambda what, **fields: log.append((what, fields["name"]))  # noqa: E731
    made = RemoteFleet(memory, table, JOB, 42, QUICK, note=notes.append, audit=audit)
    made.wait_for(2)
    memory.devices["k2"] = Device(7, "e" * 64, 1, 1, "0")
    for mark in (0, 0, 5):
        memory.marks["k2"] = mark
        made.end("the run is finished")
    ended = [o for o in memory.seen if o.what == "end"]
    assert len(ended) == 4  # each in each session, once
    assert [note for note in notes if LATE in note] == [f"device device-k2 {LATE}"]
    assert [what for what, _ in log if what == LATE] == [LATE]
    assert [m.late for m in Devices(tmp_path).members] == [False, False, True]
    assert made.doing()[2] == ("k2", 2, LATE)
    assert Devices(tmp_path).join("k2", "k2", memory.devices["k2"], [0]) == 2


def test_waiting_with_patience_goes_on_with_those_that_are_there(tmp_path):
    memory, notes = link(2), list[str]()
    table = Devices(tmp_path)
    table.register([("old", "press-0"), ("k0", "press-0"), ("k1", "press-1")])
    memory.away.add("k1")
    made = RemoteFleet(memory, table, JOB, 42, QUICK, note=notes.append)
    made.wait_for(2, 0.2)
    assert "1 of 2 devices is ready; missing: press-1" in notes
    assert notes[-1] == "1 of 2 devices came within 0.2 s; missing: press-1: the others are not waited for"
    memory.away.add("k0")
    alone = RemoteFleet(memory, table, JOB, 42, QUICK)
    with pytest.raises(FleetError, match=r"none of 2 devices came within 0\.2 s; missing: press-0, press-1"):
        alone.wait_for(2, 0.2)


def test_waiting_without_end_says_what_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "WORD", 0.0)
    memory, notes, looks = link(2), list[str](), [None] * 50
    memory.away.add("k1")
    made = RemoteFleet(memory, Devices(tmp_path), JOB, 42, QUICK, look=looks.pop, note=notes.append)
    with pytest.raises(IndexError):
        made.wait_for(2)
    helps = "for 1 more of 2 devices; or stop it, and go on with --wait 1"
    assert (notes[-1], made.waits) == (f"the run waits {helps}", helps)


def test_a_device_that_goes_is_named(tmp_path):
    memory, notes = link(2), list[str]()
    made = fleet_of(memory, tmp_path, note=notes.append)
    memory.away.add("k1")
    made.ready()
    made.ready()
    assert notes[-1] == "device device-k1 has gone"
    assert notes.count("device device-k1 has gone") == 1


def test_one_that_is_there_and_never_answers_does_not_hold_up_the_others_for_ever(tmp_path, monkeypatch):
    """A round ends by itself once half of its devices have answered; where they stand apart, by the deadline alone."""
    monkeypatch.setattr(remote, "LEAST", 0.2)
    made = fleet_of(memory := link(), tmp_path)
    memory.held = lambda key, order: key == "k2"  # type: ignore[method-assign]
    found = {a.client: (a.status, a.reason) for a in made.ask(1, [0, 1, 2], b"x")}
    assert found == {0: ("ok", ""), 1: ("ok", ""), 2: ("late", "no answer in 0.2 s")}
    asking = Asking(2, dict.fromkeys(range(3), Order("work")))
    limits = []
    for took in ([], [1.0], [1.0, 1.0], [1.0, 50.0, 1.0], [99.0, 99.0]):
        asking.took = took
        limits.append(made._limit(asking))
    assert limits == [math.inf, math.inf, 20, 20, 1980]
    made.apart = True
    assert made._limit(asking) == math.inf


def test_a_device_is_its_key_and_brings_the_same_rows(tmp_path):
    made = fleet_of(link(), tmp_path)
    run = made.devices.run
    again = link()
    again.devices["k1"] = Device(99, "f" * 64, 1, 1, "0")
    again.devices = dict(reversed(again.devices.items()))
    notes: list[str] = []
    table = Devices(tmp_path)
    assert table.run == run
    second = RemoteFleet(again, table, JOB, 42, QUICK, note=notes.append)
    second.wait_for(2)
    assert list(second.rows) == [10, 11, 12]
    assert any("brings 99 rows" in n and "brought 11" in n for n in notes)
    assert [a.status for a in sorted(second.ask(1, [0, 1, 2], b"x"))] == ["ok", "dropped", "ok"]
    ordered = [*map(Order.decode, [data for _, data in again.queue.values()]), *again.seen]
    assert any(o.what == "end" and "99 rows" in o.reason for o in ordered)


def test_a_newcomer_gets_the_next_number(tmp_path):
    memory = link(2)
    made = fleet_of(memory, tmp_path)
    memory.devices["new"] = Device(7, "e" * 64, 1, 1, "0")
    for _ in range(3):
        list(made.ask(1, made.present(), b"x"))
    assert list(made.rows) == [10, 11, 7]
    assert list(made.present()) == [0, 1, 2]


class Refusing(Memory):
    """Devices that refuse the job; those that `lie` say they are ready, with rows that cannot be, and then may be `silent`."""

    lie: bool = False
    silent: bool = False

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        yield from ((n, data) for n, data in super().pull(numbers) if data)

    def answer(self, key: str, order: Order) -> bytes:
        self.seen.append(order)
        if order.what == "end":
            return b"" if self.silent else DeviceReply("done", order.nonce).encode()
        if self.lie:
            body = Device(1, "0" * 64, 1, 1, "0").to_json().replace(b'"rows": 1', b'"rows": 0')
            return DeviceReply("ready", order.nonce, body=body).encode()
        return DeviceReply("refused", order.nonce, code="model").encode()


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("lie", [True, False])
def test_waiting_ends_when_all_that_could_come_have_refused(tmp_path, registered, lie):
    memory, notes = Refusing(link(3).devices, random.Random(0)), list[str]()
    memory.lie = lie
    devices = Devices(tmp_path)
    devices.register([(key, key) for key in memory.devices] if registered else [])
    made = RemoteFleet(memory, devices, JOB, 42, QUICK, note=notes.append)
    why = r"no device can take part: 3 came; the last, device-k\d: "
    with pytest.raises(FleetError, match=why) as refused:
        made.wait_for(3)
    assert refused.value.exit_code == 4
    assert ("rows = 0: must be at least 1" if lie else "it has not the run's model") in str(refused.value)
    assert sum("takes no part" in n for n in notes) == 3
    assert [o.what for o in memory.seen].count("end") == 3 * lie  # each knows why


def test_waiting_ends_where_a_refused_device_does_not_answer_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FAREWELL", 0.05)
    memory = Refusing(link(1).devices, random.Random(0))
    memory.lie = memory.silent = True
    with pytest.raises(FleetError, match="no device can take part: 1 came"):
        RemoteFleet(memory, Devices(tmp_path), JOB, 42, QUICK, note=print).wait_for(1)


@pytest.mark.parametrize("key", ["k1", "new"])
def test_waiting_goes_on_while_a_device_could_come(tmp_path, key):
    """One whose key is registered, or any where any key may join; what is waited for is said."""
    memory, notes = Refusing(link(1).devices, random.Random(0)), list[str]()
    devices, looks = Devices(tmp_path), iter(range(50))
    devices.register([("k0", "k0"), ("k1", "k1")] if key == "k1" else [])

    def look() -> None:
        if next(looks, None) is None:
            raise Interrupted("stopped")

    made = RemoteFleet(memory, devices, JOB, 42, QUICK, look=look, note=notes.append)
    with pytest.raises(Interrupted):
        made.wait_for(1 if key == "k1" else 2)
    assert notes[-1].endswith("1 cannot take part: waiting for others, or for these to come in anew")
    memory.away.add("k0")  # its process has ended
    refused = "refused: it has not the run's model in this revision; its console says more"
    assert [does for *_, does in made.doing()] == [refused, "has not joined"][: len(devices)]


def test_a_run_ends_when_all_its_devices_come_back_with_other_rows(tmp_path):
    memory = link(2)
    made = fleet_of(memory, tmp_path)
    for number, key in enumerate(list(memory.devices)):
        memory.devices[key] = Device(99, "f" * 64, 1, 1, "0")
        memory.marks[key] = 7 + number
    list(made.ask(1, [0, 1], b"x"))
    with pytest.raises(FleetError, match="no device can take part: 2 came"):
        made.present()


def test_versions_are_kept_shown_and_named_once_where_they_are_others(tmp_path):
    memory, notes, log = link(2), list[str](), list[dict[str, object]]()
    versions = {"version": __version__, "torch": torch.__version__, "processor": "arm AVX"}
    own = dataclasses.replace(memory.devices["k0"], **versions)
    memory.devices |= {"k0": own, "k1": dataclasses.replace(own, version="0.0.9", torch="1.2.3+cu")}
    kept_by = {"note": notes.append, "audit": lambda what, **fields: log.append(fields)}
    made = fleet_of(memory, tmp_path, **kept_by)
    memory.marks["k1"] = 5  # it comes in anew
    made.ready()
    for _ in range(3):
        list(made.ask(1, [0, 1], b"x"))
    told = [n for n in notes if "it has" in n]
    assert len(told) == 1
    assert told[0].startswith("device device-k1: it has fleetune 0.0.9 and torch 1.2.3+cu: the digest need")
    public = torch.__version__.partition("+")[0]
    assert told[0].endswith(f"pip install fleetune=={__version__} torch=={public}")
    assert f"torch {torch.__version__}, arm AVX" in next(n for n in notes if "k0 is ready" in n)
    (joined,) = (e for e in log if e.get("name") == "device-k0" and "rows" in e)
    assert joined.items() >= versions.items()
    (kept,) = (m for m in Devices(tmp_path).members if m.key == "k1")
    assert (kept.version, kept.torch, kept.processor) == ("0.0.9", "1.2.3+cu", "arm AVX")


def test_a_device_that_comes_in_anew_all_the_time_fills_no_log(tmp_path, monkeypatch):
    memory, log, now = link(2), list[str](), [0.0]
    audit = lambda what, **fields: log.append(fields["name"])  # noqa: E731
    made = fleet_of(memory, tmp_path, audit=audit)
    monkeypatch.setattr("fleetune.fleet.link.time.monotonic", lambda: now[0])
    for second in range(600):
        memory.marks["k0"], now[0] = second, 1e6 + second
        made.ready()
        list(made._answers())
    assert (log.count("device-k0"), log.count("device-k1")) == (1 + BURST + 59, 1)
    now[0] += BURST * REST
    for _ in range(2):
        made.ready()
        list(made._answers())
    assert made.ready() == [0, 1]  # it stays, and is in again


def test_a_resumed_server_gives_the_same_order(tmp_path):
    """To the bit, so that a device that has done it answers from its disk."""
    orders = []
    for _ in range(2):
        memory = link(1)
        list(fleet_of(memory, tmp_path).ask(3, [0], b"x"))
        orders += [o.encode() for o in memory.seen if o.what == "work"]
    assert orders[0] == orders[1]


def test_a_damaged_table_is_named(tmp_path):
    fleet_of(link(), tmp_path)
    file = tmp_path / FILE
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text(file.read_text()[:40])
    with pytest.raises(StorageError, match=r"devices\.json is damaged"):
        Devices(tmp_path)
    file.write_text(files.json_text({"run": "x", "devices": [{"key": "a"}]}))
    with pytest.raises(StorageError, match="not a table of devices"):
        Devices(tmp_path)


PACE = Pace(grace=0.2, poll=0.001, again=0.02)


@dataclass
class Slow(Memory):
    """Devices of which some work until they are let go, and some decline."""

    slow: set[str] = field(default_factory=set)
    declining: dict[str, str] = field(default_factory=dict)

    def held(self, key: str, order: Order) -> bool:
        return key in self.slow and order.what == "work"

    def answer(self, key: str, order: Order) -> bytes:
        if order.what == "work" and key in self.declining:
            self.seen.append(order)
            return DeviceReply("declined", order.nonce, order.round, code=self.declining[key]).encode()
        return super().answer(key, order)


def made(
    folder: Path, count: int = 4, pace: Pace = PACE, *, seed: int = 0, odd: float = 0.0
) -> tuple[Slow, RemoteFleet, list[str]]:
    """A fleet of so many devices over a link in memory, and what it notes; a round that never ends fails."""
    there, notes = Slow(link(count).devices, random.Random(seed), odd), list[str]()
    until = time.monotonic() + 60

    def look() -> None:
        assert time.monotonic() < until, "the round does not end"

    return there, fleet_of(there, folder, pace, look=look, note=notes.append), notes


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


def test_after_the_deadline_those_at_work_are_late_and_the_round_goes_on(tmp_path):
    there, fleet, _ = made(tmp_path, pace=dataclasses.replace(PACE, grace=50, deadline=0.2))
    there.away, absent = {"k3"}, {3: "dropped"}
    for round, slow in enumerate(("012", "0", ""), 1):
        there.slow = {f"k{c}" for c in slow}
        states = {c: "late" if str(c) in slow else "ok" for c in range(3)}
        assert {c: a.status for c, a in asked(fleet, round).items()} == states | absent
        absent = {}


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

    def held(self, key: str, order: Order) -> bool:
        mood, number = self.moods.get(key, ("", 0.0))
        return mood == "slow" and self.clock.now < self.began + number

    def answer(self, key: str, order: Order) -> bytes:
        mood, number = self.moods.get(key, ("", 0.0))
        if order.what == "work":
            self.asked[key] = self.asked.get(key, 0) + 1
            if mood == "declines" and self.asked[key] <= number:
                return DeviceReply("declined", order.nonce, order.round, code="battery").encode()
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
    pace, found = Pace(grace=1.0, deadline=deadline, again=0.2), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "time", clock)
        patch.setattr(remote, "Asking", lambda *args, **more: Asking(*args, began=clock.now, **more))
        fleet = fleet_of(there, folder, pace, note=lambda text: None, apart=True)
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
