# SPDX-License-Identifier: Apache-2.0
"""The app for a Flower that is there already ends in the digest of the simulation.

Most of it runs in this process, on a grid that calls the ClientApp itself, anew for each message as a SuperNode does;
`make slow` has the same with Flower's own programs.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

import fleetune
from fleetune import models
from fleetune.cli.main import main
from fleetune.errors import FleetError, MessageError, RecipeError, UsageError
from fleetune.fleet import keys
from fleetune.fleet.flower import client_app, server_app, wire
from fleetune.fleet.link import answer_in
from fleetune.fleet.orders import Order, Reply
from fleetune.fleet.remote import ROOM
from fleetune.runs import rundir
from fleetune.tuning.recipe import recipe as recipes

CLIENTS = 2
RECIPE = """\
model = "model"
data = "rows.jsonl"
method = "fedkseed"
clients = 2
rounds = 2
held_out = 4
eval_rows = 4
samples = 0
max_length = 48
device = "cpu"
threads = 1
[set]
K = 16
tau = 2
lr = 1e-2
"""
CONFIG: dict[str, Any] = {
    "recipe": "recipe.toml",
    "resume": "",
    "out": "real",
    "wait": 0,
    "grace": 20.0,
    "round-deadline": 0.0,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, rows, a recipe and the rows of each client."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server_app, "POLL", 0.0)
    for name, value in (("task_id", 1), ("run_id", 1), ("node_id", SUPERLINK_NODE_ID)):
        monkeypatch.setattr(TaskIdentity, f"_{name}", value)
    made = models.tiny_llama()
    models.save(made.net, made.tokenizer, tmp_path / "model")
    rows = [
        {"instruction": f"count to {i}", "response": " ".join(map(str, range(1 + i % 8)))}
        for i in range(1, 25)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Path("recipe.toml").write_text(RECIPE)
    assert main(["fleet", "split", "-c", "recipe.toml", "--to", "rows", "-qq"]) == 0
    return tmp_path


class GridHere:
    """A grid whose SuperNodes are contexts in this process; node 7 is called edge-0 and node 3 edge-1."""

    def __init__(self) -> None:
        self.nodes = [
            NodeInfo(node_id=node, name=f"edge-{c}", public_key=f"key {c}".encode(), last_activated_at="then")
            for c, node in enumerate((7, 3))
        ]
        self.contexts = {
            info.node_id: Context(
                0,
                info.node_id,
                {
                    "data": f"rows/client-{c:03d}.jsonl",
                    "model": "model",
                    "device": "cpu",
                    "threads": 1,
                    "state": f"state-{c}",
                },
                RecordDict(),
                {},
            )
            for c, info in enumerate(self.nodes)
        }
        self.replies: dict[str, Message] = {}
        self.pushed = self.stop_after = 0
        self.errors: list[int] = []  # codes of the next replies

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        numbers = []
        for message in messages:
            self.pushed += 1
            if self.pushed == self.stop_after:
                raise KeyboardInterrupt
            wire.set_id(message, f"message {self.pushed}")
            client_app._worker.cache_clear()  # a new process
            node = message.metadata.dst_node_id
            self.replies[f"message {self.pushed}"] = self._answer(message, self.contexts[node])
            numbers.append(f"message {self.pushed}")
        return numbers

    def _answer(self, message: Message, context: Context) -> Message:
        if self.errors:
            return Message(Error(self.errors.pop(0), "because"), reply_to=message)
        return client_app.app(message, context)

    def pull_messages(self, numbers: Iterable[str]) -> Iterator[Message]:
        yield from [self.replies.pop(n) for n in numbers if n in self.replies]


def run(grid: GridHere, **config: Any) -> None:
    server_app.main(grid, Context(1, 0, {}, RecordDict(), {**CONFIG, **config}))  # type: ignore[arg-type]


def digest_of(out: str) -> str:
    (run,) = (p for p in Path(out).iterdir() if not p.is_symlink())
    return str([e for e in rundir.events(run) if e["event"] == "done"][-1]["digest"])


def test_a_run_over_a_grid_stopped_and_resumed_ends_in_the_digest_of_the_simulation(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = server_app.values_from("recipe.toml") | {
        "aggregation": "mean:1"
    }  # two SuperNodes outvote nobody
    simulated = fleetune.tune(recipes.make(values), out="simulated")
    grid = GridHere()
    grid.errors = [ErrorCode.NODE_UNAVAILABLE]  # the first job is lost, and given again
    grid.stop_after = 6  # jobs 1 to 3, work 4 and 5, and the first of round 2
    with pytest.raises(KeyboardInterrupt):
        run(grid)
    run(grid, recipe="", resume="latest")
    assert digest_of("real") == simulated.done.digest
    assert main(["fleet", "devices", "latest", "--out", "real"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "edge" in line] == [
        ["0", "edge-0"],
        ["1", "edge-1"],
    ]


def test_a_run_ends_when_all_supernodes_have_refused(place: Path) -> None:
    """Flower's own simulation starts them without rows."""
    grid = GridHere()
    for context in grid.contexts.values():
        del context.node_config["data"]
    with pytest.raises(
        FleetError, match=r"no device can take part: 2 came; the last, edge-[01]: it was not told which rows"
    ) as ends:
        run(grid)
    assert ends.value.exit_code == 4


def test_a_failing_client_app_is_a_failed_answer(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert server_app.values_from(RECIPE) == server_app.values_from("recipe.toml")
    monkeypatch.setattr(server_app, "log", logging.getLogger("said"))
    grid = GridHere()
    link = server_app.GridLink(grid)  # type: ignore[arg-type]
    (key, _) = link.online()
    order = Order("work", 3)
    grid.errors = [ErrorCode.CLIENT_APP_RAISED_EXCEPTION]
    number = link.push(key, order.encode(), 0, ROOM)
    assert number is not None
    ((_, data),) = link.pull({number})
    reply = answer_in(data, order)
    assert reply is not None
    assert (reply.what, reply.nonce, reply.round) == ("failed", order.nonce, 3)
    assert "the answer could not be read" in reply.reason
    assert "the ClientApp failed: because" in caplog.text
    assert link.push("unknown", order.encode(), 0, ROOM) is None
    assert (link.name(key), link.name("0123456789")) == ("edge-0", "01234567")


def ask(order: Order, config: dict[str, Any], state: RecordDict | None = None) -> Reply:
    return Reply.decode(client_app.answer(order.encode(), Context(0, 5, config, state or RecordDict(), {})))


def test_what_a_device_lacks_is_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client_app, "log", logging.getLogger("said"))
    reply = ask(Order("job"), {})
    assert (reply.what, reply.code, "--node-config" in caplog.text) == ("refused", "no-data", True)
    reply = ask(Order("job"), {"data": "rows", "threads": "two"})
    assert (reply.what, "no number of threads" in caplog.text) == ("refused", True)
    reply = ask(Order("work", 2), {"data": "rows"})
    assert (reply.what, reply.round, reply.code) == ("failed", 2, "no-job")
    assert (tmp_path / "fleetune-device" / "5" / ".lock").exists()
    bad = RecordDict({client_app.JOB: ConfigRecord({"order": Order("job", body=b"{}").encode()})})
    assert ask(Order("work", 2), {"data": "rows"}, bad).code == "order"
    assert "the job is not as agreed" in caplog.text
    with pytest.raises(MessageError):
        client_app.answer(b"x", Context(0, 5, {}, RecordDict(), {}))


@pytest.mark.parametrize(
    ("config", "error", "what"),
    [
        ({"resume": "latest"}, UsageError, "and not both"),
        ({"recipe": ""}, UsageError, "and not both"),
        ({"wait": -1}, UsageError, "cannot be negative"),
        ({"recipe": "nowhere.toml"}, RecipeError, "no recipe at"),
        ({"recipe": "model =\nx"}, RecipeError, "is not TOML"),
    ],
)
def test_a_run_config_that_cannot_be(config: dict[str, Any], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        run(GridHere(), **config)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # flwr's use of pathspec
def test_the_app_is_what_flower_takes_and_holds_no_code_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    monkeypatch.chdir(tmp_path)
    assert main(["fleet", "app", "app"]) == 0
    config, warnings = load_and_validate(Path("app/pyproject.toml"))
    assert not warnings
    assert config["tool"]["flwr"]["app"]["config"].keys() == CONFIG.keys()
    assert len(build_fab_from_disk(Path("app"))) < 3000
    for part in ("server_app", "client_app"):
        text = Path(f"app/fleetune_app/{part}.py").read_text()
        assert (
            text.split()
            == f"from fleetune.fleet.flower import {part} as installed app = installed.app".split()
        )
    assert main(["fleet", "app", "app"]) == 2
    assert main(["fleet", "app"]) == 2
    assert "there already" in capsys.readouterr().err


# With Flower's own programs ---------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Programs:
    """A SuperLink with TLS and registered keys, and its SuperNodes, as processes in groups of their own."""

    def __init__(self, place: Path) -> None:
        self.place, self.port = place, free_port()
        self.running: list[subprocess.Popen[bytes]] = []
        bins = Path(sys.executable).parent
        self.env = {
            **os.environ,
            "FLWR_HOME": str(place / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{bins}{os.pathsep}{os.environ['PATH']}",
        }
        (place / "flwr").mkdir()
        (place / "flwr" / "config.toml").write_text(
            f'[superlink.own]\naddress = "localhost:{self.port}"\nroot-certificates = "{place}/certs/ca.pem"\n'
        )

    def start(self, name: str, *words: str) -> None:
        with Path(f"{name}.txt").open("ab") as said:
            self.running.append(
                subprocess.Popen(words, env=self.env, stdout=said, stderr=said, start_new_session=True)
            )

    def flwr(self, *words: str) -> dict[str, Any]:
        done = subprocess.run(
            ["flwr", *words, "--format", "json"], env=self.env, capture_output=True, text=True, timeout=120
        )
        text = done.stdout[done.stdout.find("{") :]
        assert text, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(text)
        assert found["success"], found
        return found

    def superlink(self) -> None:
        self.start(
            "superlink",
            "flower-superlink",
            "--port",
            str(self.port),
            "--ssl-certfile",
            "certs/server.pem",
            "--ssl-keyfile",
            "certs/server.key",
            "--ssl-ca-certfile",
            "certs/ca.pem",
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        )
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise AssertionError(Path("superlink.txt").read_text())

    def supernode(self, number: int) -> None:
        data = f"data='{self.place}/rows/client-{number:03d}.jsonl' model='{self.place}/model' threads=1"
        self.start(
            f"node-{number}",
            "flower-supernode",
            "--superlink",
            f"localhost:{self.port}",
            "--root-certificates",
            "certs/ca.pem",
            "--auth-supernode-private-key",
            f"edge-{number}",
            "--port",
            str(free_port()),
            "--node-config",
            f"{data} state='{self.place}/state-{number}'",
        )

    def status(self, run: str) -> str:
        return str(self.flwr("list", "own", "--run-id", run)["runs"][0]["status"])

    def log(self, run: str) -> str:
        return subprocess.run(
            ["flwr", "log", run, "own", "--show"], env=self.env, capture_output=True, text=True
        ).stdout

    def stop(self) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.running:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("flower-superlink") is None
    and not (Path(sys.executable).parent / "flower-superlink").exists(),
    reason="Flower's programs are not installed",
)
def test_with_flowers_own_programs_stopped_and_resumed(place: Path) -> None:
    Path("recipe.toml").write_text(
        RECIPE.replace("rounds = 2", "rounds = 30")
    )  # some must be left when it is stopped
    values = server_app.values_from("recipe.toml") | {
        "aggregation": "mean:1"
    }  # two SuperNodes outvote nobody
    simulated = fleetune.tune(recipes.make(values), out="simulated")
    keys.make_certificate(Path("certs"), ["localhost", "127.0.0.1"])
    assert main(["fleet", "app", "app"]) == 0
    programs = Programs(place)
    try:
        programs.superlink()
        for c in range(CLIENTS):
            keys.make(Path(f"edge-{c}"))
            programs.flwr("supernode", "register", f"edge-{c}.pub", "own", "--name", f"edge-{c}")
            programs.supernode(c)
        config = f"recipe='{place}/recipe.toml' out='{place}/real'"
        first = programs.flwr("run", "app", "own", "--run-config", config)["run-id"]
        until = time.monotonic() + 540
        while "round 1: val loss" not in programs.log(first):
            assert time.monotonic() < until, programs.log(first)
            assert not programs.status(first).startswith("finished"), programs.log(first)
            time.sleep(2)
        programs.flwr("stop", first, "own")
        config = f"resume='latest' out='{place}/real'"
        again = programs.flwr("run", "app", "own", "--run-config", config)["run-id"]
        while not (status := programs.status(again)).startswith("finished"):
            assert time.monotonic() < until, programs.log(again)
            time.sleep(2)
        print(programs.log(first), programs.log(again))
        assert status == "finished:completed", programs.log(again)
    finally:
        programs.stop()
    assert digest_of("real") == simulated.done.digest
