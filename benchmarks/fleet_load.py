# SPDX-License-Identifier: Apache-2.0
"""Server under load."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.fleet_devices import key_of
from benchmarks.harness import ROOT
from fleetune.common.memory import rss
from fleetune.fleet.audit import Audit
from fleetune.fleet.flower.gate import Address, Gate
from fleetune.fleet.orders import Job
from fleetune.fleet.remote import Pace, RemoteFleet
from fleetune.fleet.table import Devices
from fleetune.runs.events import as_dict
from fleetune.runs.rundir import create
from fleetune.tuning.messages import Payload, ReplySpec
from fleetune.tuning.rounds import Hooks, RoundPlan
from fleetune.tuning.rounds import run as run_rounds


class State(NamedTuple):
    x: np.ndarray


@dataclass(frozen=True)
class NoOp:
    """A method that adds nothing up."""

    size: int
    dtype: str = "float32"

    def broadcast(self, state: State) -> Payload:
        return Payload({"x": state.x}, {"n": 8, "loss": 1.0})

    def expects(self, state: State) -> ReplySpec:
        return ReplySpec({"x": (self.dtype, (self.size,))}, {"n": (int, 1, 1 << 31), "loss": (float, 0, 1e9)})

    def aggregate(self, state: State, replies: Iterable[Any]) -> State:
        for _ in replies:
            pass
        return state


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--protocol", default="flower")
    parser.add_argument("--port", type=int, default=28470)
    parser.add_argument("--profile", action="store_true")
    o = parser.parse_args()
    keys = [key_of(n).public for n in range(o.devices)]
    gate = Gate(Address("127.0.0.1", o.port), keys)
    gate.open()
    before = rss()
    sim = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "benchmarks.fleet_devices",
            f"127.0.0.1:{o.port}",
            str(o.devices),
            o.protocol,
            "keys",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    method = NoOp(o.size)
    with tempfile.TemporaryDirectory() as folder, create(Path(folder), "bench", "model") as opened:
        devices = Devices(opened.path)
        devices.register([(k.fingerprint, k.name) for k in keys])
        fleet = RemoteFleet(
            gate,
            devices,
            Job("a" * 32, "noop", {}, "m", "b" * 64, "fp32", 64, (), o.rounds),
            7,
            Pace(),
            audit=Audit(opened.path).write,
            note=lambda t: print(t) if "waiting" in t else None,
        )
        began = time.monotonic()
        cpu = time.process_time()
        fleet.wait_for(o.devices)
        print(f"joined in {time.monotonic() - began:.2f} s, cpu {time.process_time() - cpu:.2f}")
        hooks = Hooks(lambda: None, lambda s: {}, lambda e: opened.record(as_dict(e)))
        if o.profile:
            import yappi

            yappi.start()
        seconds = []

        class Count:
            pass

        stamps = [time.monotonic()]
        cpu = time.process_time()

        def emit(e):
            opened.record(as_dict(e))
            if type(e).__name__ == "RoundDone":
                stamps.append(time.monotonic())
                assert e.accepted == o.devices, e

        hooks = Hooks(lambda: None, lambda s: {}, emit)
        run_rounds(
            method,
            fleet,
            State(np.ones(o.size, np.float32)),
            opened,
            RoundPlan(o.rounds, 1.0, 1, 7, 0, bytes(8)),
            hooks,
        )
        cpu = time.process_time() - cpu
        if o.profile:
            yappi.stop()
            yappi.get_func_stats().sort("tsub").print_all()
        fleet.end("done")
    seconds = np.diff(stamps)
    print(
        "rounds",
        [round(s, 2) for s in seconds],
        "cpu/client ms",
        1e3 * cpu / o.rounds / o.devices,
        "rss MB",
        before / 1e6,
        rss() / 1e6,
    )
    found = json.loads(sim.communicate()[0].splitlines()[-1])
    every = sorted(t for ts in found["times"].values() for t in ts)
    print(
        "p50",
        statistics.median(every),
        "p99",
        every[int(0.99 * len(every))],
        "sim cpu/client/round ms",
        1e3 * found["cpu"] / o.rounds / o.devices,
        found["failed"],
        found["errors"],
    )
    gate.close()


if __name__ == "__main__":
    main()
