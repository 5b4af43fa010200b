"""Processes of a real fleet are killed at random instants, again and again: the run ends in the digest of no kill at all.

`make faults` runs it; FLEETUNE_KILLS says how often (default 12), FLEETUNE_MINUTES for how long at most.
"""

import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import preloaded
import pytest
from devices_harness import digest_of, fates, free_port, lay_out, numbered, run_in, simulated

import fleetune
from fleetune.cli.main import main
from fleetune.common import files
from fleetune.fleet.audit import FILE, verify
from fleetune.runs import compression_folder, rundir

KILLS = int(os.environ.get("FLEETUNE_KILLS", "12"))
ALONE = int(os.environ.get("FLEETUNE_KILLS", "1"))  # of the server alone
DEVICES = 2
PATIENCE = 120.0  # seconds for a part of the work without a kill
# in which so many are killed, or as many as it takes
MINUTES = float(os.environ.get("FLEETUNE_MINUTES", "15"))
RECIPE = """\
model = "model"
data = "rows.jsonl"
clients = 2
rounds = {rounds}
held_out = 4
eval_rows = 4
samples = 0
keep = "last"
max_length = 48
device = "cpu"
threads = 1
"""
METHODS = {
    "fedkseed": 'aggregation = "mean:1"\nmethod = "fedkseed"\n[set]\nK = 16\ntau = 40\nlr = 1e-3\nbackprop = 0.5\n',
    "scaffold": 'aggregation = "mean:1"\nmethod = "fedit"\n[set]\nr = 2\nsteps = 12\nscaffold = true\n',
}

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["preloaded"])


class Process:
    """A command of ours that can be killed and started again."""

    def __init__(self, name: str, words: str, held: bool = False) -> None:
        self.name, self.words, self.held = name, words.split(), held
        self.running: ForkServerProcess | None = None

    def start(self) -> None:
        """Start it; what it says is added to its own file."""
        given = self.words, f"{self.name}.txt", self.held
        self.running = FORKED.Process(target=preloaded.command, args=given)
        self.running.start()

    def kill(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.join()

    @property
    def ended(self) -> int | None:
        """Its exit code, None while it runs."""
        return None if self.running is None else self.running.exitcode


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path, DEVICES)
    return tmp_path


def joining(words: str, *, held: bool = False) -> list[Process]:
    """Devices that join with these words, in which {c} is the number of each."""
    common = "fleet join --data rows/client-{c:03d}.jsonl --model model --state state-{c} "
    return [Process(f"device-{c}", (common + words).format(c=c), held) for c in range(DEVICES)]


def started(recipe: str, *, held: bool = False) -> tuple[Process, Process, list[Process]]:
    """The simulation of a recipe, then a server and devices of the same; (server, its resumption, devices)."""
    Path("recipe.toml").write_text(recipe)
    assert main(["tune", "-c", "recipe.toml", "--out", "simulated", "-qq"]) == 0
    assert main(["fleet", "split", "-c", "recipe.toml", "--to", "rows", "-qq"]) == 0
    port = free_port()
    common = f"--port {port} --keys keys --certificate certs --out real"
    begin = Process("server", f"fleet serve -c recipe.toml {common}")
    again = Process("server", f"fleet serve --resume latest {common}")
    devices = joining(f"localhost:{port} --key dev-{{c}} --ca certs/ca.pem", held=held)
    warm = FORKED.Process(target=os.getpid)  # everything is imported before the first start
    warm.start()
    warm.join()
    for process in (begin, *devices):
        process.start()
    return begin, again, devices


@pytest.mark.injects
def test_a_server_killed_alone_in_the_middle_of_long_orders_gets_all_devices_back(place, injected):
    """It is up again before the orders are over, so that no device meets a server that is gone."""
    begin, again, devices = started(RECIPE.format(rounds=ALONE + 1) + METHODS["scaffold"], held=True)
    server = begin
    try:
        for kill in range(1, ALONE + 1):
            wait_until(lambda: all_do("at work", kill), server)  # noqa: B023
            server.kill()
            server = again
            server.start()
            wait_until(lambda: said("server").count("0 of 2 devices are ready") > kill, server)  # noqa: B023
            if kill % 2 == 0:  # a heartbeat brings them back while they work, else the end of the work
                wait_until(lambda: all_do("joining", kill - 1), server)  # noqa: B023
            Path(f"go-{kill}").touch()
        Path(f"go-{ALONE + 1}").touch()
        wait_until(lambda: server.ended is not None, None)
        assert server.ended == 0, said("server")[-2000:]
    finally:
        for process in (begin, again, *devices):
            process.kill()
    assert digest_of("real") == digest_of("simulated")
    for device in devices:
        assert "no server there" not in said(device.name).partition("connected to")[2]
        assert said(device.name).count("answered again from the disk") == ALONE  # no work is done twice
    injected("kill -9 of the server", ALONE)


def all_do(what: str, round: int) -> bool:
    """Whether all devices do that in this round, as `fleet status` has it."""
    word = next(Path("real").glob("0*/fleet.json"), None)
    now = None if word is None else files.read_json(word, "")
    return now is not None and now["round"] == round and all(d["does"] == what for d in now["devices"])


@pytest.mark.faults
@pytest.mark.parametrize("method", list(METHODS))
def test_kills_of_server_and_devices_change_nothing(place, injected, method):
    rounds = 4 + 2 * KILLS
    begin, again, devices = started(RECIPE.format(rounds=rounds) + METHODS[method])
    try:
        wait_until(lambda: "round 1/" in said("server"), begin, seconds=5 * PATIENCE)
        server, rng, kills = begin, random.Random(f"{method} 1"), Counter[str]()
        until = time.monotonic() + 60 * MINUTES
        finished = False
        while not finished and kills.total() < KILLS and time.monotonic() < until:
            time.sleep(rng.uniform(0.1, 6.0))
            victims = rng.choice([[server], [server], [rng.choice(devices)], [server, *devices]])
            if server.ended is not None:
                break
            for victim in victims:
                if victim.ended is None:
                    victim.kill()
                    kills[victim.name.partition("-")[0]] += 1
            for victim in victims:
                if victim is server:
                    finished = rundir.status_of(rundir.find("latest", Path("real"))) == "done"
                    server = again
                if not finished:
                    victim = server if victim in (begin, again) else victim
                    victim.start()
        wait_until(lambda: finished or server.ended is not None, None, seconds=5 * PATIENCE + 4 * rounds)
        print(f"{method}: {kills}, {rounds} rounds")
        assert finished or server.ended == 0, said("server")[-2000:]
    finally:
        for process in (begin, again, *devices):
            process.kill()
    assert digest_of("real") == digest_of("simulated")
    run = run_in("real")
    assert verify(run / FILE).bad == 0
    ok = [(e["round"], e["client"]) for e in fates(run) if e["status"] == "ok"]
    assert kills
    assert sorted(ok) == [(r, c) for r in range(1, rounds + 1) for c in range(DEVICES)]
    injected("kill -9 of the server", kills["server"])
    injected("kill -9 of a device", kills["device"])


def said(name: str) -> str:
    file = Path(f"{name}.txt")
    return file.read_text(errors="replace") if file.exists() else ""


def wait_until(met: Callable[[], bool], process: Process | None, seconds: float = PATIENCE) -> None:
    until = time.monotonic() + seconds
    while not met():
        assert process is None or process.ended is None, said(process.name)[-2000:]
        assert time.monotonic() < until, said("server")[-2000:]
        time.sleep(0.1)


PATIENCE_OF_BLOCKS = 400.0  # seconds for the work without a kill
ASKED = "--set group=8 --windows 64 --length 128"


@pytest.mark.faults
def test_kills_of_server_and_devices_change_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbered(simulated("ledger", layers=2 * KILLS, rows=400))  # many blocks, so that there is time for kills
    few = {"settings": {"group": 8}, "windows": 64, "length": 128}
    want = fleetune.compress(Path("runs/latest"), calibrate="clients", out="simulated", **few)
    port = free_port()
    begin = Process("server", f"compress latest --calibrate fleet {ASKED} --wait 2 --port {port}")
    again = Process("server", f"compress --resume 2 --port {port}")
    devices = joining(f"127.0.0.1:{port} --calibrate --device cpu --threads 1")
    for process in (begin, *devices):
        process.start()
    try:
        wait_until(lambda: any(Path("runs").glob("0002-*/parts/block-*")), begin, seconds=PATIENCE_OF_BLOCKS)
        server, rng, killed = begin, random.Random(3), 0
        while server.ended is None and killed < KILLS:
            time.sleep(rng.uniform(0.1, 2.0))
            for victim in rng.choice([[server], [rng.choice(devices)], [server, *devices]]):
                if victim.ended is None:
                    victim.kill()
                    killed += 1
                    server = again if victim is server else server
                    (again if victim is begin else victim).start()
        assert killed
        wait_until(lambda: server.ended is not None, None, seconds=PATIENCE_OF_BLOCKS)
        assert server.ended == 0, said("server")[-2000:]
    finally:
        for process in (begin, again, *devices):
            process.kill()
    folder = compression_folder.get("2", Path("runs"))
    assert compression_folder.record(folder)["result"]["digest"] == want.done.digest
    assert verify(folder / FILE).bad == 0
    assert "left out" not in said("server")
