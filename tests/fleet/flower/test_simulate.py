"""Flower's own programs, started for real: its simulation engine, and a SuperLink with SuperNodes, one of which is killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from flower_app import CLIENTS, digest_of

import fleetune
from fleetune.cli.main import main
from fleetune.fleet import keys
from fleetune.tuning.recipe import recipe as recipes

BIN = Path(sys.executable).parent
programs = pytest.mark.skipif(not (BIN / "flower-superlink").exists(), reason="Flower is not installed")


@programs
@pytest.mark.slow
def test_a_simulation_in_two_processes_ends_in_the_digest_of_tune(place):
    pytest.importorskip("ray")
    values = recipes.read(Path("recipe.toml"))
    values |= {name: str(place / values[name]) for name in ("model", "data")}
    Path("recipe.toml").write_text(recipes.to_toml(recipes.make(values)))
    simulated = fleetune.tune(recipes.make(values), out="simulated")
    assert main(["fleet", "app", "app"]) == 0
    flower = Programs(place)
    try:
        flower.superlink("--insecure", "--simulation", "--host", "127.0.0.1")
        config = f"recipe='{place}/recipe.toml' out='{place}/real' simulate=true offline=true"
        several = f"num-supernodes={CLIENTS} client-resources-num-cpus=1 init-args-num-cpus=2"
        words = ["run", "app", "simulation", "--run-config", config, "--federation-config", several]
        number, until = flower.flwr(*words)["run-id"], time.monotonic() + 300
        while "the run is finished" not in (said := flower.log(number, "simulation")):
            assert time.monotonic() < until, said
            time.sleep(2)
    finally:
        for name in list(flower.running):
            flower.end(name, signal.SIGTERM)
    assert digest_of("real") == simulated.done.digest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Programs:
    """A SuperLink and its SuperNodes, as processes in groups of their own."""

    def __init__(self, place: Path) -> None:
        self.place, self.port = place, free_port()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        home = {"FLWR_HOME": str(place / "flwr"), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        self.env = os.environ | home | {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        (place / "flwr").mkdir()
        (place / "flwr" / "config.toml").write_text(
            f'[superlink.own]\naddress = "localhost:{self.port}"\nroot-certificates = "{place}/certs/ca.pem"\n'
            f'[superlink.simulation]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )

    def start(self, name: str, *words: str) -> None:
        with Path(f"{name}.txt").open("ab") as said:
            to = {"stdout": said, "stderr": said}
            self.running[name] = subprocess.Popen(words, env=self.env, start_new_session=True, **to)

    def flwr(self, *words: str) -> dict[str, Any]:
        done = subprocess.run(
            ["flwr", *words, "--format", "json"], env=self.env, capture_output=True, text=True, timeout=120
        )
        text = done.stdout[done.stdout.find("{") :]
        assert text, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(text)
        assert found["success"], found
        return found

    def superlink(self, *words: str) -> None:
        port = ["--port", str(self.port), "--disable-runtime-dependency-installation"]
        self.start("superlink", "flower-superlink", *port, *words)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise AssertionError(Path("superlink.txt").read_text())

    def supernode(self, number: int) -> None:
        link = f"--superlink localhost:{self.port} --root-certificates certs/ca.pem --port {free_port()}"
        key = f"--auth-supernode-private-key edge-{number} --node-config"
        data = f"data='{self.place}/rows/client-{number:03d}.jsonl' model='{self.place}/model' threads=1"
        config = f"{data} state='{self.place}/state-{number}'"
        self.start(f"node-{number}", "flower-supernode", *link.split(), *key.split(), config)

    def log(self, run: str, link: str = "own") -> str:
        words = ["flwr", "log", run, link, "--show"]
        return subprocess.run(words, env=self.env, capture_output=True, text=True).stdout

    def end(self, name: str, how: signal.Signals) -> None:
        process = self.running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@programs
@pytest.mark.slow
def test_stock_supernodes_one_of_them_killed_end_in_the_digest_of_the_simulation(place):
    values = {**recipes.read(Path("recipe.toml")), "aggregation": "norm-clip", "rounds": 3}
    Path("recipe.toml").write_text(recipes.to_toml(recipes.make(values)))
    simulated = fleetune.tune(recipes.make(values), out="simulated")
    assert main(["fleet", "split", "-c", "recipe.toml", "--to", "rows", "-qq"]) == 0
    assert main(["fleet", "app", "app"]) == 0
    keys.make_certificate(Path("certs"), ["localhost", "127.0.0.1"])
    flower = Programs(place)
    try:
        tls = "--ssl-certfile certs/server.pem --ssl-keyfile certs/server.key --ssl-ca-certfile certs/ca.pem"
        flower.superlink(*tls.split(), "--enable-supernode-auth")
        for c in range(CLIENTS):
            keys.make(Path(f"edge-{c}"))
            flower.flwr("supernode", "register", f"edge-{c}.pub", "own", "--name", f"edge-{c}")
            flower.supernode(c)
        config = f"recipe='{place}/recipe.toml' out='{place}/real' offline=true grace=300.0"
        number = flower.flwr("run", "app", "own", "--run-config", config)["run-id"]
        until, killed = time.monotonic() + 540, False
        while "the run is finished" not in (said := flower.log(number)):
            assert time.monotonic() < until, said
            if "round 1: val loss" in said and not killed:
                killed = True
                flower.end("node-1", signal.SIGKILL)
                flower.supernode(1)
            elif killed and flower.running["node-1"].poll() is not None:
                # Flower refuses its key, and its program ends, until the session before counts as dead
                flower.end("node-1", signal.SIGKILL)
                flower.supernode(1)
            time.sleep(2)
    finally:
        for name in list(flower.running):
            flower.end(name, signal.SIGTERM)
    assert killed
    assert digest_of("real") == simulated.done.digest
