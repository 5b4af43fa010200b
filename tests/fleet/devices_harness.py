"""What tests of a finished run on real devices share: a run of a tiny model, and devices in threads on this machine."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import fleetune
from command_line import FEW
from fleetune import models
from fleetune.cli.main import main
from fleetune.errors import Interrupted
from fleetune.fleet import device, keys
from fleetune.fleet.audit import Audit
from fleetune.fleet.device import Home
from fleetune.fleet.keys import Place
from fleetune.fleet.orders import Job, Order
from fleetune.fleet.remote import Pace, RemoteFleet
from fleetune.fleet.server import Served
from fleetune.fleet.table import Devices
from fleetune.fleet.worker import Brings, Worker
from fleetune.runs import rundir
from fleetune.runs.listener import Listener
from fleetune.tuning.recipe import recipe as recipes

QUICK = Pace(grace=60, poll=0.03)
COMMON: dict[str, Any] = FEW | {"model": "model", "data": "rows.jsonl", "max_length": 48}
RECIPES = {
    "ledger": {**COMMON, "method": "fedkseed", "set": {"K": 4, "tau": 1, "lr": 1e-2}},
    "adapter": {**COMMON, "method": "fedit", "set": {"r": 2, "steps": 1, "lr": 1e-2, "dropout": 0.0}},
}


def write_rows(path: str, first: int, last: int) -> None:
    counts = {i: " ".join(map(str, range(1 + i % 8))) for i in range(first, last)}
    rows = [{"instruction": f"count to {i}", "response": said} for i, said in counts.items()]
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))


def lay_out(place: Path, count: int) -> None:
    """Put a model, rows, a certificate, and the keys of so many devices into a folder."""
    models.tiny_llama().save(place / "model")
    write_rows(str(place / "rows.jsonl"), 1, 31)
    keys.make_certificate(place / "certs", ["localhost", "127.0.0.1"])
    (place / "keys").mkdir()
    for c in range(count):
        keys.make(place / f"dev-{c}")
        (place / f"dev-{c}.pub").rename(place / "keys" / f"dev-{c}.pub")


def entered(made: Path, place: Path, patch: pytest.MonkeyPatch) -> Path:
    """Go to a folder with links to all that was made in another."""
    for path in made.iterdir():
        (place / path.name).symlink_to(path)
    patch.chdir(place)
    return place


def simulated(kind: str, layers: int = 2, rows: int = 20, **more: Any) -> Path:
    """Tune a model in the working directory; its clients' rows are then in rows/."""
    models.tiny_llama(layers=layers).save(Path("model"))
    write_rows("rows.jsonl", 1, 1 + rows)
    recipe = recipes.make(RECIPES[kind] | more)
    Path("recipe.toml").write_text(recipes.to_toml(recipe))
    assert main(["fleet", "split", "-c", "recipe.toml", "--to", "rows", "-q"]) == 0
    return fleetune.tune(recipe, out="runs").folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def door(port: int, wait: int = 2, pace: Pace = QUICK) -> Served:
    """A door on this machine for any device."""
    return Served(Place("127.0.0.1", port), wait, pace)


def brings_of(number: int, **brings: Any) -> Brings:
    rows = {"data": f"rows/client-{number:03d}.jsonl", "calibrate": True} | brings
    return Brings(model="model", device="cpu", threads=1, offline=True, **rows)


class Device(threading.Thread):
    """A device in a thread; `leave` makes it go as a closed lid would."""

    def __init__(self, port: int, number: int, home: dict[str, Any] | None = None, **brings: Any) -> None:
        super().__init__(daemon=True)
        self.port, self.number = port, number
        self.home = Home(Path(f"state-{number}"), **{"poll": 0.1, **(home or {})})
        self.brings = brings_of(number, **brings)
        self.leave = threading.Event()
        self.notes: list[str] = []
        self.outcome: object = None

    def run(self) -> None:
        """Stay until the end; the outcome is why it is over, or the error."""
        try:
            server, hears = f"{'localhost' if self.home.ca else '127.0.0.1'}:{self.port}", self.notes.append
            self.outcome = device.join(server, self.brings, self.home, stop=self.leave.is_set, note=hears)
        except Exception as error:
            self.outcome = error


class Wire(threading.Thread):
    """Forward connections to a port, cut the first ones after as many bytes as `cuts` says, keep what clients sent."""

    def __init__(self, to: int, cuts: Sequence[int] = ()) -> None:
        super().__init__(daemon=True)
        self.to, self.cuts, self.cut, self.sent = to, [*cuts], 0, bytearray()
        self.pumps, self.lock = list[threading.Thread](), threading.Lock()
        self.door = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.door.getsockname()[1])
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                one, _ = self.door.accept()
                try:
                    other = socket.create_connection(("127.0.0.1", self.to))
                except OSError:
                    one.close()
                    continue
                left = [self.cuts.pop() if self.cuts else 1 << 62]
                for way in ((one, other, left, True), (other, one, left, False)):
                    self.pumps.append(threading.Thread(target=self.pump, args=way, daemon=True))
                    self.pumps[-1].start()

    def pump(self, source: socket.socket, sink: socket.socket, left: list[int], kept: bool) -> None:
        with contextlib.suppress(OSError):
            while left[0] > 0 and (part := source.recv(1 << 14)):
                with self.lock:
                    part, cut = part[: max(0, left[0])], 0 < left[0] <= len(part)
                    left[0] -= len(part)
                    self.cut += cut
                    self.sent += part if kept else b""
                sink.sendall(part)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()

    def close(self) -> None:
        """Wait until all has gone through."""
        self.door.shutdown(socket.SHUT_RDWR)
        self.join(10)
        for pump in self.pumps:
            pump.join(10)
        self.door.close()


def numbered(folder: Path, count: int = 2) -> None:
    """Make the devices' keys and write them into the table of a run, so that device c is client c whoever comes first."""
    table = Devices(folder)
    for c in range(count):
        Path(f"state-{c}").mkdir()
        public = keys.make(Path(f"state-{c}/key")).public
        table.register([(public.fingerprint, f"device-{c}")])


def run_in(out: str) -> Path:
    (run,) = (p for p in Path(out).iterdir() if not p.is_symlink())
    return run


def fates(run: Path) -> list[dict[str, Any]]:
    return [e for e in rundir.events(run) if e["event"] == "client"]


def digest_of(out: str) -> str:
    """The digest that the one run in a folder has ended in."""
    return str([e for e in rundir.events(run_in(out)) if e["event"] == "done"][-1]["digest"])


class Direct:
    """A link in memory to workers, which answer when they are asked for; `change(key, order, reply)` may spoil an answer."""

    def __init__(self, workers: Mapping[str, Worker]) -> None:
        self.workers = dict(workers)
        self.marks = dict.fromkeys(workers, 0)
        self.queue: dict[str, tuple[str, bytes]] = {}
        self.number = self.most = 0
        self.change: Callable[[str, Order, bytes], bytes | None] = lambda key, order, reply: reply

    def online(self) -> dict[str, str]:
        return {key: str(mark) for key, mark in self.marks.items()}

    def name(self, key: str) -> str:
        return f"device-{key}"

    def push(self, key: str, data: bytes, common: int, room: int) -> str:
        self.number += 1
        self.queue[str(self.number)] = key, data
        self.most = max(self.most, len(self.queue))
        return str(self.number)

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        for number in sorted(numbers & self.queue.keys(), key=int, reverse=True):
            key, data = self.queue.pop(number)
            order = Order.decode(data)
            yield number, self.change(key, order, self.workers[key].answer(data))

    def drop(self, numbers: set[str]) -> None:
        for number in numbers:
            self.queue.pop(number, None)


class Door:
    """What `Served` is, over a `Direct` link."""

    def __init__(self, link: Direct) -> None:
        self.link, self.wait, self.farewell, self.more = link, len(link.workers), "", ""

    def where(self, count: int) -> str:
        return f"here, {count} devices"

    def wanted(self, usual: int, otherwise: int = 1) -> int:
        return self.wait

    def gather(
        self, folder: Path, devices: Devices, job: Job, seed: int, count: int, listener: Listener
    ) -> RemoteFleet:
        def look() -> None:
            if listener.stop_requested:
                raise Interrupted("stopped while waiting for devices")

        devices.register([(key, f"device-{key}") for key in self.link.workers])
        hears = {"look": look, "note": listener.note, "audit": Audit(folder).write}
        made = RemoteFleet(self.link, devices, job, seed, Pace(grace=60, poll=0.0), **hears)
        made.wait_for(count)
        return made


def worker(number: int, **brings: Any) -> Worker:
    """A device's worker, with its state in the working directory."""
    Path(f"direct-{number}").mkdir(exist_ok=True)
    return Worker(brings_of(number, **brings), Path(f"direct-{number}"), note=str)


def direct(**brings: Any) -> Direct:
    """Two workers with the rows of the run's clients."""
    return Direct({f"k{c}": worker(c, **brings) for c in range(2)})


@contextlib.contextmanager
def devices(*made: Device) -> Iterator[list[Device]]:
    """Start devices one after the other, so that they are numbered as they are given; all have left afterwards."""
    try:
        for one in made:
            one.start()
        yield list(made)
    finally:
        for one in made:
            one.leave.set()
        for one in made:
            one.join(20)
