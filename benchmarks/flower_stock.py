# SPDX-License-Identifier: Apache-2.0
"""The rival: Flower's own SuperLink and FedAvg, whose clients send back what they were sent.

Two fleets of it.  `SuperNodes` are Flower's own programs, two for every device, and a process for every message.  `light` are
the devices of `fleet_devices.py`, all in one process, which speak Flower's protocol and do nothing else: the server alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.processes import cpu_of, free_port, memory_of, tree

BIN = Path(sys.executable).parent
PYPROJECT = """\
[project]
name = "noop"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "noop.server:app"
clientapp = "noop.client:app"
[tool.flwr.app.config]
rounds = 3
nodes = 2
numbers = 16
bits = 32
out = ""
"""
SERVER = """\
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Timed(FedAvg):
    def configure_train(self, *args):
        self.out.write(f"begin {time.time()}\\n")
        self.out.flush()
        return super().configure_train(*args)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        good = sum(not r.has_error() for r in replies)
        found = super().aggregate_train(server_round, replies)
        self.out.write(f"end {time.time()} {good}\\n")
        self.out.flush()
        return found


@app.main()
def main(grid, context):
    told = context.run_config
    n = told["nodes"]
    with Path(told["out"]).open("w") as out:
        strategy = Timed(fraction_evaluate=0.0, min_train_nodes=n, min_evaluate_nodes=0, min_available_nodes=n)
        strategy.out = out
        start = ArrayRecord({"x": Array(np.ones(told["numbers"], f"float{told['bits']}"))})
        strategy.start(grid=grid, initial_arrays=start, num_rounds=told["rounds"], timeout=300)
"""
CLIENT = """\
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 8})})
    return Message(content, reply_to=message)
"""


def super_nodes(folder: Path, port: int, count: int) -> list[subprocess.Popen[bytes]]:
    """Start Flower's own devices."""
    return [
        start(folder, f"node-{i}", BIN / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
              "--host", "127.0.0.1", "--port", str(free_port()))
        for i in range(count)
    ]  # fmt: skip


def light(folder: Path, port: int, count: int) -> list[subprocess.Popen[bytes]]:
    """Start simulated devices, all in one process."""
    return [start(folder, "light", sys.executable, "-m", "benchmarks.fleet_devices", f"127.0.0.1:{port}",
                  str(count), "stock", "register")]  # fmt: skip


def run(
    nodes: Callable[[Path, int, int], list[subprocess.Popen[bytes]]],
    count: int,
    rounds: int,
    numbers: int,
    bits: int,
) -> dict[str, Any]:
    """Run FedAvg with so many nodes; seconds of every round, and memory and CPU time of server and nodes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        port = write(folder)
        with super_link(folder, port) as link:
            made = nodes(folder, port, count)
            try:
                found = measured(folder, link, made, count, rounds, numbers, bits)
                return (
                    found if nodes is super_nodes else {k: v for k, v in found.items() if k != "device_rss"}
                )
            finally:
                for process in made:
                    end(process)


def write(folder: Path) -> int:
    """Write the app and Flower's settings; return the port of the server."""
    port = free_port()
    (folder / "app" / "noop").mkdir(parents=True)
    for path, text in (("pyproject.toml", PYPROJECT), ("noop/__init__.py", ""), ("noop/server.py", SERVER),
                       ("noop/client.py", CLIENT)):  # fmt: skip
        (folder / "app" / path).write_text(text)
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    return port


def environment(folder: Path) -> dict[str, str]:
    """Return the environment in which Flower's programs run."""
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(folder / "home"),
    }
    return {**os.environ, **quiet, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def start(folder: Path, name: str, *command: object) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own; what it says goes to a file."""
    with (folder / f"{name}.txt").open("wb") as said:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment(folder), stdout=said, stderr=said, start_new_session=True
        )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """End a program and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def super_link(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start Flower's server."""
    link = start(folder, "superlink", BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port,
                 "--disable-runtime-dependency-installation")  # fmt: skip
    try:
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                break
            except OSError as error:
                if link.poll() is not None or time.monotonic() > until:
                    raise RuntimeError((folder / "superlink.txt").read_text()[-2000:]) from error
                time.sleep(0.2)
        yield link
    finally:
        end(link)


def measured(
    folder: Path, link: subprocess.Popen[bytes], nodes: list[subprocess.Popen[bytes]], count: int, rounds: int,
    numbers: int, bits: int,
) -> dict[str, Any]:  # fmt: skip
    """Start the run, wait for its end, and look at the processes meanwhile."""
    out = folder / "rounds.txt"
    told = f"rounds={rounds} nodes={count} numbers={numbers} bits={bits} out='{out}'"
    command = [str(BIN / "flwr"), "run", str(folder / "app"), "own", "--run-config", told, "--format", "json"]
    said = subprocess.run(command, env=environment(folder), capture_output=True, text=True).stdout
    if not json.loads(said[said.index("{") :])["success"]:
        raise RuntimeError(said)
    until = time.monotonic() + 240
    cpu = server = device = 0.0
    while (text := out.read_text() if out.exists() else "").count("end") < rounds:
        if time.monotonic() > until:
            raise RuntimeError(f"{text}\n{(folder / 'superlink.txt').read_text()[-3000:]}")
        links, devices = tree(link.pid), [pid for node in nodes for pid in tree(node.pid)]
        server, device = max(server, memory_of(links)), max(device, memory_of(devices))
        cpu = cpu or (cpu_of(links) if "begin" in text else 0.0)
        time.sleep(0.5)
    stamps = [line.split() for line in text.splitlines()]
    begun, ended = ([float(s[1]) for s in stamps if s[0] == word] for word in ("begin", "end"))
    if any(int(s[2]) < count for s in stamps if s[0] == "end"):
        raise RuntimeError(f"not all of {count} nodes answered: {text}")
    return {
        "devices": count, "seconds": [b - a for a, b in zip(begun, ended, strict=True)],
        "server_rss": server, "device_rss": device / count,
        "cpu_per_client": (cpu_of(tree(link.pid)) - cpu) / rounds / count,
    }  # fmt: skip


if __name__ == "__main__":
    kinds = {"light": light, "supernodes": super_nodes}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=kinds)
    for name in ("nodes", "rounds", "numbers", "bits"):
        parser.add_argument(name, type=int)
    kind, *numbers = vars(parser.parse_args()).values()
    print(json.dumps(run(kinds[kind], *numbers)))
