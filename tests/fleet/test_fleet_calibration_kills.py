# SPDX-License-Identifier: Apache-2.0
"""Processes are killed at random instants while devices calibrate a compression: the artefact is that of no kill at all.

`make faults` runs it; FLEETUNE_KILLS says how often (default 12).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from devices_harness import free_port, numbered, simulated

import fleetune
from fleetune.fleet.audit import FILE, verify
from fleetune.runs import compression_folder

KILLS = int(os.environ.get("FLEETUNE_KILLS", "12"))
PATIENCE = 400.0  # seconds for the work without a kill
ASKED = ("--set", "group=8", "--windows", "64", "--length", "128")


class Process:
    """A command of ours that can be killed and started again."""

    def __init__(self, name: str, *words: str) -> None:
        self.name, self.words = name, words
        self.running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; what it says is added to its own file."""
        with Path(f"{self.name}.txt").open("ab") as said:
            command = [sys.executable, "-m", "fleetune", *self.words]
            self.running = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL)

    def kill(self) -> None:
        """Kill it as a power cut would."""
        if self.running is not None:
            self.running.send_signal(signal.SIGKILL)
            self.running.wait()

    @property
    def ended(self) -> int | None:
        """Its exit code, None while it runs."""
        return None if self.running is None else self.running.poll()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a model with many blocks, so that there is time for kills."""
    monkeypatch.chdir(tmp_path)
    numbered(simulated("ledger", layers=2 * KILLS, rows=400))
    return tmp_path


@pytest.mark.faults
def test_kills_of_server_and_devices_change_no_code(place: Path) -> None:
    want = fleetune.compress(
        Path("runs/latest"),
        calibrate="clients",
        settings={"group": 8},
        windows=64,
        length=128,
        out="simulated",
    )
    port = str(free_port())
    begin = Process(
        "server", "compress", "latest", "--calibrate", "fleet", *ASKED, "--wait", "2", "--port", port
    )
    again = Process("server", "compress", "--resume", "2", "--port", port)
    devices = [
        Process(
            f"device-{c}",
            "fleet",
            "join",
            f"127.0.0.1:{port}",
            "--data",
            f"rows/client-{c:03d}.jsonl",
            "--model",
            "model",
            "--state",
            f"state-{c}",
            "--device",
            "cpu",
            "--threads",
            "1",
        )
        for c in range(2)
    ]
    for process in (begin, *devices):
        process.start()
    try:
        wait_until(lambda: "block 1/" in said("server"), begin)
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


def said(name: str) -> str:
    """What the processes of a name have said."""
    file = Path(f"{name}.txt")
    return file.read_text(errors="replace") if file.exists() else ""


def wait_until(met: Callable[[], bool], process: Process | None, seconds: float = PATIENCE) -> None:
    """Wait for something; an assertion fails when the process ends before, or it takes too long."""
    until = time.monotonic() + seconds
    while not met():
        assert process is None or process.ended is None, said(process.name)[-2000:]
        assert time.monotonic() < until, said("server")[-2000:]
        time.sleep(0.1)
