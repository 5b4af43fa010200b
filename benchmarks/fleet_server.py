# SPDX-License-Identifier: Apache-2.0
"""A fleet's server in a process of its own, with simulated devices in another: rounds of a method that does nothing.

The server is the real one from the socket to the checkpoint: gate, orders, codec, checks of replies, metrics on the disk and
the log of answers.  Only `aggregate` is empty.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.fleet_devices import key_of
from benchmarks.harness import ROOT
from benchmarks.processes import free_port
from fleetune.common.events import Recorded, RoundDone, as_dict
from fleetune.common.memory import rss
from fleetune.fleet.audit import Audit
from fleetune.fleet.flower.gate import Address, Gate
from fleetune.fleet.orders import Job
from fleetune.fleet.pace import Pace
from fleetune.fleet.remote import RemoteFleet
from fleetune.fleet.table import Devices
from fleetune.runs.rundir import create
from fleetune.tuning.messages import Payload, ReplySpec
from fleetune.tuning.rounds import Hooks, RoundPlan
from fleetune.tuning.rounds import run as run_rounds

BASE = bytes(8)


class State(NamedTuple):
    """What is sent to the devices, and comes back."""

    x: np.ndarray


@dataclass(frozen=True)
class NoOp:
    """A method whose server adds nothing up."""

    numbers: int
    dtype: str

    def broadcast(self, state: State) -> Payload:
        """The state."""
        return Payload({"x": state.x}, {"n": 8, "loss": 1.0})

    def expects(self, state: State) -> ReplySpec:
        """The same again."""
        scalars = {"n": (int, 1, 1 << 31), "loss": (float, 0, 1e9)}
        return ReplySpec({"x": (self.dtype, (self.numbers,))}, scalars)

    def aggregate(self, state: State, replies: Iterable[Any]) -> State:
        """The state as it was; every reply is read."""
        for _ in replies:
            pass
        return state


class Clocked:
    """A link that notes the seconds from giving an order out until its answer is here."""

    def __init__(self, gate: Gate) -> None:
        self.gate, self.given, self.times = gate, dict[str, float](), list[float]()
        self.online, self.name, self.drop = gate.online, gate.name, gate.drop

    def push(self, key: str, data: bytes, common: int, room: int) -> str | None:
        """As the gate's."""
        if number := self.gate.push(key, data, common, room):
            self.given[number] = time.monotonic()
        return number

    def pull(self, numbers: set[str]) -> Iterator[tuple[str, bytes | None]]:
        """As the gate's."""
        for number, data in self.gate.pull(numbers):
            self.times.append(time.monotonic() - self.given.pop(number))
            yield number, data


def serve(count: int, rounds: int, numbers: int, dtype: str, protocol: str) -> dict[str, Any]:
    """Play rounds with so many devices; what they took."""
    keys = [key_of(n).public for n in range(count)]
    port = free_port()
    gate = Gate(Address("127.0.0.1", port), keys)
    gate.open()
    before = rss()
    command = [
        sys.executable,
        "-m",
        "benchmarks.fleet_devices",
        f"127.0.0.1:{port}",
        str(count),
        protocol,
        "keys",
    ]
    devices = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = _play(gate, Path(folder), keys, rounds, NoOp(numbers, dtype))
        said = json.loads(devices.communicate(timeout=60)[0].splitlines()[-1])
    finally:
        devices.kill()
        gate.close()
    if said["failed"]:
        raise RuntimeError(f"{said['failed']} devices failed: {said['errors']}")
    return {"devices": count, "protocol": protocol, "rss_before": before, "devices_cpu": said["cpu"], **found}


def _play(gate: Gate, folder: Path, keys: list[Any], rounds: int, method: NoOp) -> dict[str, Any]:
    link = Clocked(gate)
    with create(folder, "bench", "model") as opened:
        table = Devices(opened.path)
        table.register([(k.fingerprint, k.name) for k in keys])
        job = Job("a" * 32, "noop", {}, "model", "b" * 64, "fp32", 64, (), rounds)
        fleet = RemoteFleet(
            link, table, job, 7, Pace(), audit=Audit(opened.path).write, note=lambda text: None
        )
        began = time.monotonic()
        fleet.wait_for(len(keys))
        joined = time.monotonic() - began
        link.times.clear()
        stamps, most = [time.monotonic()], 0

        def emit(event: Recorded) -> None:
            nonlocal most
            opened.record(as_dict(event))
            most = max(most, rss())
            if isinstance(event, RoundDone):
                stamps.append(time.monotonic())
                if event.accepted < len(keys):
                    raise RuntimeError(f"{event.accepted} of {len(keys)} replies were accepted")

        cpu = time.process_time()
        hooks = Hooks(lambda: None, lambda state: {}, emit)
        state = State(np.ones(method.numbers, method.dtype))
        run_rounds(method, fleet, state, opened, RoundPlan(rounds, 1.0, 1, 7, 0, BASE), hooks)  # type: ignore[arg-type]
        cpu = time.process_time() - cpu
        fleet.end("the rounds are over")
    times = sorted(link.times[: rounds * len(keys)])
    return {
        "joined": joined, "seconds": np.diff(stamps).tolist(), "p50": times[len(times) // 2],
        "p99": times[int(0.99 * len(times))], "server_rss": most, "cpu_per_client": cpu / rounds / len(keys),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("devices", "rounds", "numbers"):
        parser.add_argument(name, type=int)
    parser.add_argument("dtype", help="of the numbers: float32 or float16")
    parser.add_argument("protocol", help="exchange or flower")
    print(json.dumps(serve(*vars(parser.parse_args()).values())))
