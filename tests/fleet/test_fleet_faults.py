"""Faults of the machines and of the network around a fleet: cut connections, full disks, clocks that jump, torn files.

The slow ones run on the loopback with threads for devices: `make faults`.  Kills are in test_fleet_kills.py.
"""

import contextlib
import dataclasses
import datetime
import errno
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from devices_harness import Wire, fates, free_port, run_in
from test_loopback import FEDIT, FEDKSEED, device, devices, folder, place, serve, served, split
from test_remote import Memory, fleet_of
from test_remote import link as memory_of
from test_worker import job, make_worker, message, take
from test_worker import place as device_place

import fleetune
from fleetune.errors import FleetuneError, StorageError
from fleetune.fleet import audit as audits
from fleetune.fleet import line, table
from fleetune.fleet.audit import Audit, verify
from fleetune.fleet.door import Door
from fleetune.fleet.orders import DeviceReply, Job, Order
from fleetune.fleet.remote import Pace
from fleetune.fleet.table import Devices
from fleetune.fleet.worker import ANSWER
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.rounds.local_work import Memories
from fleetune.tuning.run import resume as resuming

__all__ = ["device_place", "folder", "job", "place"]
DAY = datetime.timedelta(days=1)
REAL = datetime.datetime


def simulated(recipe: dict[str, Any]) -> str:
    """The digest of the run in a simulated fleet; the rows of each client are written."""
    digest = str(fleetune.tune(recipes.make(recipe), out="simulated").done.digest)
    split(recipe)
    return digest


class Jumped(datetime.datetime):
    """The machine's clock, `by` too far ahead."""

    by = datetime.timedelta()

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return REAL.now(tz) + cls.by


@contextlib.contextmanager
def jump(by: datetime.timedelta) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Jumped, "by", by)
        patch.setattr(datetime, "datetime", Jumped)
        seconds, real = by.total_seconds(), time.time
        patch.setattr(time, "time", lambda: real() + seconds)
        yield


@pytest.mark.faults
@pytest.mark.parametrize("days", [1, -1])
def test_a_run_goes_on_while_the_clock_jumps(place, injected, days):
    expected, port = simulated(FEDIT), free_port()

    class Jumping(fleetune.Silent):
        def event(self, event: Any) -> None:
            if event.event == "round" and event.round == 1:
                Jumped.by = days * DAY

    with jump(0 * DAY), devices(port) as joined, served(port) as fleets:
        found = serve(FEDIT, fleets, Jumping())
    assert found.done.digest == expected
    assert [d.outcome for d in joined] == ["the run is finished"] * 3
    injected("clock of server and devices set by a day in a run", 1)


@pytest.mark.faults
@pytest.mark.parametrize("recipe", [FEDKSEED, FEDIT], ids=lambda r: str(r["method"]))
def test_connections_that_are_cut_in_the_middle_of_a_message(place, injected, monkeypatch, recipe):
    monkeypatch.setattr(line, "LONGEST", 0.5)
    monkeypatch.setattr(Door, "_is_called", lambda self, address: True)  # the wire has another port
    recipe = {**recipe, "rounds": 40}
    expected, port, rng = simulated(recipe), free_port(), random.Random(3)
    wire = Wire(port, [rng.randint(200, 12_000) for _ in range(60)])
    with devices(wire.port) as joined, served(port, Pace(grace=60, poll=0.01)) as fleets:
        found = serve(recipe, fleets)
    wire.close()
    print(f"{recipe['method']}: {wire.cut} cuts")
    assert found.done.digest == expected
    assert [d.outcome for d in joined] == ["the run is finished"] * 3
    assert wire.cut >= 15  # the others had ended before
    injected("connections cut in a message", wire.cut)


class Unruly(Memory):
    """Answers come late, in any order, again and again, and with those of rounds long past."""

    messages = 0

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        past = self.__dict__.setdefault("past", [])
        for number, data in super().pull(numbers):
            if self.chance.random() < 0.3:
                self.done[number] = data  # it comes later
                continue
            past.append((number, data))
            for again in [(number, data), *self.chance.choices(past, k=self.chance.randint(0, 4))]:
                self.messages += 1
                yield again
            del past[:-50]


def unruly(folder: Path, messages: int, seed: int) -> int:
    link, round = Unruly(memory_of(4).devices, random.Random(seed)), 0
    made = fleet_of(link, folder, Pace(grace=20, poll=0))
    while link.messages < messages:
        round += 1
        answers = sorted(made.ask(round, range(4), f"r{round}".encode()))
        assert [(a.client, a.data) for a in answers] == [(c, f"k{c} did r{round}".encode()) for c in range(4)]
    return link.messages


@pytest.mark.parametrize("messages", [500, pytest.param(10_000, marks=pytest.mark.faults)])
def test_answers_that_come_twice_late_or_out_of_order_count_once(tmp_path, injected, messages):
    injected("answers twice, late or out of order", unruly(tmp_path, messages, seed=2))


@pytest.mark.faults
def test_devices_that_are_away_or_slow_hold_no_round_longer_than_was_said(tmp_path, injected):
    rng, link, away = random.Random(4), memory_of(6, seed=5), 0
    made = fleet_of(link, tmp_path, Pace(grace=1.0, deadline=5.0, poll=0.01))
    for round in range(1, 21):
        for key in link.away:  # one that comes back is in a new session
            link.marks[key] = round
        link.away = {key for key in link.devices if rng.random() < 0.3}
        away += len(link.away)
        began = time.monotonic()
        answers = {a.client: a for a in made.ask(round, range(6), b"x")}
        assert time.monotonic() - began < 4
        assert len(answers) == 6
        gone = {int(key[1:]) for key in link.away}
        assert all((answers[c].status == "ok") == (c not in gone) for c in range(6))
    injected("devices away or slow for a round", away)


@pytest.mark.faults
def test_two_processes_with_one_key_are_one_device(place, injected):
    """Copies of a device's folder: the server has one answer of the client a round, or says why there is none."""
    simulated(FEDIT)
    port = free_port()
    shutil.copytree("rows", "rows-again")
    with devices(port), served(port) as fleets:
        twin = device(port, 0)
        twin.home = dataclasses.replace(twin.home, state=Path("state-twin"))
        twin.start()
        found = serve({**FEDIT, "rounds": 8}, fleets)
        twin.leave.set()
        twin.join(20)
    events = fates(run := run_in("real"))
    asked = [(r, c) for r in range(1, 9) for c in range(3)]
    assert sorted((e["round"], e["client"]) for e in events) == asked
    assert all(e["status"] == "ok" for e in events if e["client"] != 0)
    assert all(e["reason"] for e in events if e["status"] != "ok")
    assert found.done.digest
    assert verify(run / audits.FILE).bad == 0
    injected("two processes with one key", 1)


def spoilt(data: bytes, count: int, seed: str) -> Iterator[bytes]:
    """The data cut at so many places, and with so many bits flipped."""
    rng = random.Random(seed)
    yield b""
    for _ in range(count):
        yield data[: rng.randrange(len(data))]
        at = rng.randrange(len(data))
        yield data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def refusal(work: Callable[[], object]) -> StorageError | None:
    """The error with which a file is refused, None where it is taken."""
    try:
        work()
    except StorageError as error:
        return error
    return None


def torn_table(folder: Path, count: int) -> int:
    made = Devices(folder)
    made.register([(f"{c}" * 64, f"dev-{c}") for c in range(5)])
    file, done = folder / table.FILE, 0
    whole = file.read_bytes()
    for data in spoilt(whole, count, "table"):
        file.write_bytes(data)
        error = refusal(lambda: Devices(folder))
        if error is None:
            assert len(Devices(folder)) == len(made)  # a letter or a digit may be another: nothing tells
        else:
            assert str(file) in error.message
            assert error.hint
        done += 1
    return done


def torn_log(folder: Path, count: int) -> int:
    audit = Audit(folder)
    for i in range(8):
        audit.write("ok", client=i)
    whole, done = audit.file.read_bytes(), 0
    for data in spoilt(whole, count, "log"):
        audit.file.write_bytes(data)
        error = refusal(lambda: Audit(folder).write("ok", client=9))
        if error is None:
            assert verify(audit.file).bad == 0
            lines = whole.splitlines(keepends=True)
            assert audit.file.read_bytes().startswith(b"".join(lines[: verify(audit.file).entries - 1]))
        else:
            assert str(audit.file) in error.message
            assert "does not follow" in error.message
        done += 1
    return done


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.faults)])
@pytest.mark.parametrize("spoil", [torn_table, torn_log])
def test_torn_files_of_the_server_are_mended_or_named(tmp_path, injected, spoil, count):
    done = spoil(tmp_path, count)
    assert done > 2 * count
    injected("torn files of the server", done)


def torn_device(device_place: Path, state: Path, job: Job, count: int) -> int:
    """The last answer of a device is spoilt: the work is done again.  Its memory is: it says which file."""
    worker, done = make_worker(device_place, state), 0
    take(worker, job)
    order = Order("work", 1, 0, 7, message(device_place, job, 1)).encode()
    first = DeviceReply.decode(worker.answer(order))
    answer, memory = state / ANSWER, next((state / f"run-{job.run}").iterdir())
    kept = answer.read_bytes()
    for data in spoilt(kept, count, "answer"):
        answer.write_bytes(data)
        again = DeviceReply.decode(worker.answer(order))
        assert (again.what, again.body, again.kept) == (first.what, first.body, first.kept)
        done += 1
    remembered = memory.read_bytes()
    for i, data in enumerate(spoilt(remembered, count, "memory")):
        memory.write_bytes(data)
        later = Order("work", 2, 0, 8 + i, message(device_place, job, 2), first.kept, 1)
        memories = Memories(worker.loaded.memories.folder)  # restarted, with the model still in memory
        worker.loaded = dataclasses.replace(worker.loaded, memories=memories)
        said = DeviceReply.decode(worker.answer(later.encode()))
        assert (said.what, said.code) == ("failed", "remembers 1")
        done += 1
    memory.write_bytes(remembered)
    later = Order("work", 2, 0, 8, message(device_place, job, 2), first.kept, 1)
    assert DeviceReply.decode(worker.answer(later.encode())).what == "done"
    return done


@pytest.mark.parametrize("count", [1, pytest.param(40, marks=pytest.mark.faults)])
def test_torn_files_of_a_device(device_place, tmp_path, job, injected, count):
    done = torn_device(device_place, tmp_path, job, count)
    assert done == 2 + 4 * count
    injected("torn files of a device", done)


@pytest.mark.injects
def test_a_log_on_a_full_disk_has_no_half_line(tmp_path, injected):
    """The system takes a part of the line (RLIMIT_FSIZE), as a disk does that becomes full."""
    audit = Audit(tmp_path)
    audit.write("ok", client=1)
    whole, limits = audit.file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1, 40):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, limits[1]))
        try:
            with pytest.raises(StorageError, match=audits.FILE):
                audit.write("ok", client=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert audit.file.read_bytes() == whole
    audit.write("ok", client=3)
    assert verify(audit.file) == (2, audit.chain, 0)
    injected("disk of the server full", 3)


class Full:
    """A disk that is full, for the files below a folder, from the n-th time that a file is to be kept."""

    def __init__(self, folder: Path, after: int) -> None:
        self.folder, self.after, self.times, self.full = folder.resolve(), after, 0, True

    def fsync(self, handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").startswith(str(self.folder)):
            self.times += 1
            if self.full and self.times > self.after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def full(folder: Path, after: int) -> Iterator[Full]:
    disk = Full(folder, after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", disk.fsync)
        yield disk


@pytest.mark.faults
@pytest.mark.parametrize("after", [5, 8, 11, 14, 17, 20])
def test_a_server_whose_disk_is_full_says_so_and_goes_on_later(place, injected, after):
    expected, port = simulated(FEDKSEED), free_port()
    with devices(port):
        Path("real").mkdir()
        with full(Path("real"), after) as disk, contextlib.suppress(FleetuneError), served(port) as fleets:
            with pytest.raises(StorageError, match="disk is full"):
                serve(FEDKSEED, fleets)
            disk.full = False
            raise StorageError("as the run did")
        with served(port) as fleets:
            found = resuming.resume(run_in("real"), fleetune.Silent(), offline=True, fleets=fleets)
    assert found.done.digest == expected
    injected("disk of the server full", 1)


@pytest.mark.faults
def test_a_device_whose_disk_is_full_fails_its_rounds_and_comes_back(place, injected):
    simulated(FEDIT)
    port = free_port()
    with full(Path("state-1"), 0) as disk:
        disk.full = False

        class Filled(fleetune.Silent):
            def event(self, event: Any) -> None:
                if event.event == "round":
                    disk.full = event.round == 1

        with devices(port), served(port) as fleets:
            serve({**FEDIT, "rounds": 4}, fleets, Filled())
    found = {(e["round"], e["client"]): (e["status"], e["reason"]) for e in fates(run_in("real"))}
    spoilt = [key for key, (status, _) in found.items() if status != "ok"]
    assert spoilt
    assert {c for _, c in spoilt} == {1}
    assert {found[key][1] for key in spoilt} == {"its disk takes no more"}
    assert found[4, 1][0] == "ok"
    injected("disk of a device full", 1)
