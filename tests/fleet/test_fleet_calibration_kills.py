"""Processes are killed at random instants while devices calibrate a compression: the artefact is that of no kill at all.

`make faults` runs it; FLEETUNE_KILLS says how often (default 12).
"""

import random
import time
from pathlib import Path

import pytest
from devices_harness import free_port, numbered, simulated
from test_fleet_kills import KILLS, Process, said, wait_until

import fleetune
from fleetune.fleet.audit import FILE, verify
from fleetune.runs import compression_folder

PATIENCE = 400.0  # seconds for the work without a kill
ASKED = "--set group=8 --windows 64 --length 128"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a model with many blocks, so that there is time for kills."""
    monkeypatch.chdir(tmp_path)
    numbered(simulated("ledger", layers=2 * KILLS, rows=400))
    return tmp_path


@pytest.mark.faults
def test_kills_of_server_and_devices_change_no_code(place):
    want = fleetune.compress(
        Path("runs/latest"),
        calibrate="clients",
        settings={"group": 8},
        windows=64,
        length=128,
        out="simulated",
    )
    port = free_port()
    begin = Process("server", f"compress latest --calibrate fleet {ASKED} --wait 2 --port {port}")
    again = Process("server", f"compress --resume 2 --port {port}")
    devices = [
        Process(
            f"device-{c}",
            f"fleet join 127.0.0.1:{port} --data rows/client-{c:03d}.jsonl --calibrate --model model --state state-{c} "
            "--device cpu --threads 1",
        )
        for c in range(2)
    ]
    for process in (begin, *devices):
        process.start()
    try:
        wait_until(lambda: "block 1/" in said("server"), begin, seconds=PATIENCE)
        server, rng, killed = begin, random.Random(3), 0
        while server.ended is None and killed < KILLS:
            time.sleep(rng.uniform(0.1, 4.0))
            for victim in rng.choice([[server], [rng.choice(devices)], [server, *devices]]):
                if victim.ended is None:
                    victim.kill()
                    killed += 1
                    server = again if victim is server else server
                    (again if victim is begin else victim).start()
        print(f"{killed} kills")
        wait_until(lambda: server.ended is not None, None, seconds=PATIENCE)
        assert server.ended == 0, said("server")[-2000:]
    finally:
        for process in (begin, again, *devices):
            process.kill()
    folder = compression_folder.get("2", Path("runs"))
    assert compression_folder.record(folder)["result"]["digest"] == want.done.digest
    assert verify(folder / FILE).bad == 0
    assert "left out" not in said("server")
