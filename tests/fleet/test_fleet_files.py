"""Torn files and full disks, of the server and of the devices: mended, or refused by name; nothing is half done."""

import contextlib
import dataclasses
import errno
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from devices_harness import fates, free_port, run_in
from test_fleet_faults import simulated
from test_loopback import FEDIT, FEDKSEED, devices, folder, place, serve, served
from test_worker import job, make_worker, message, take
from test_worker import place as device_place

import fleetune
from fleetune.errors import FleetuneError, StorageError
from fleetune.fleet import audit as audits
from fleetune.fleet import table
from fleetune.fleet.audit import Audit, verify
from fleetune.fleet.orders import Job, Order, Reply
from fleetune.fleet.table import Devices
from fleetune.fleet.worker import ANSWER
from fleetune.tuning.rounds.local_work import Memories
from fleetune.tuning.run import resume as resuming

__all__ = ["device_place", "folder", "job", "place"]


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


@pytest.mark.parametrize("spoil", [torn_table, torn_log])
def test_torn_files_of_the_server_are_mended_or_named(tmp_path, spoil):
    assert spoil(tmp_path, 30) > 60


@pytest.mark.faults
@pytest.mark.parametrize("spoil", [torn_table, torn_log])
def test_torn_files_of_the_server_at_many_places(tmp_path, injected, spoil):
    injected("torn files of the server", spoil(tmp_path, 500))


def torn_device(device_place: Path, state: Path, job: Job, count: int) -> int:
    """The last answer of a device is spoilt: the work is done again.  Its memory is: it says which file."""
    worker, done = make_worker(device_place, state), 0
    take(worker, job)
    order = Order("work", 1, 0, 7, message(device_place, job, 1)).encode()
    first = Reply.decode(worker.answer(order))
    answer, memory = state / ANSWER, next((state / f"run-{job.run}").iterdir())
    kept = answer.read_bytes()
    for data in spoilt(kept, count, "answer"):
        answer.write_bytes(data)
        again = Reply.decode(worker.answer(order))
        assert (again.what, again.body, again.kept) == (first.what, first.body, first.kept)
        done += 1
    remembered = memory.read_bytes()
    for i, data in enumerate(spoilt(remembered, count, "memory")):
        memory.write_bytes(data)
        later = Order("work", 2, 0, 8 + i, message(device_place, job, 2), first.kept, 1)
        memories = Memories(worker.loaded.memories.folder)  # restarted, with the model still in memory
        worker.loaded = dataclasses.replace(worker.loaded, memories=memories)
        said = Reply.decode(worker.answer(later.encode()))
        assert (said.what, said.code) == ("failed", "remembers 1")
        done += 1
    memory.write_bytes(remembered)
    later = Order("work", 2, 0, 8, message(device_place, job, 2), first.kept, 1)
    assert Reply.decode(worker.answer(later.encode())).what == "done"
    return done


@pytest.mark.faults
def test_torn_files_of_a_device(device_place, tmp_path, job, injected):
    injected("torn files of a device", torn_device(device_place, tmp_path, job, 40))


def test_torn_files_of_a_device_at_a_few_places(device_place, tmp_path, job):
    assert torn_device(device_place, tmp_path, job, 1) == 6


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
