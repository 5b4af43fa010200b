# SPDX-License-Identifier: Apache-2.0
"""Run the app on Flower's simulation engine: start a SuperLink for one run, hand it the app, and stop it.

The SuperLink listens on this machine alone, at a port that is free, and keeps its files in a folder that is removed.
Flower's own (`flwr run` without one) stays when the run is over.  Ray makes the processes of the clients: on this machine,
or on the cluster that RAY_ADDRESS names.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from fleetune.errors import FleetError
from fleetune.fleet.flower import partition, shim
from fleetune.tuning import methods
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe.recipe import Recipe, to_toml, toml_value

START: Final = 60.0  # seconds until the SuperLink answers
STOP: Final = 20.0  # seconds in which it ends
NAME: Final = "simulation"  # of the connection
ESCAPES: Final = re.compile("\x1b\\[[0-9;]*m")  # colours
BEGIN: Final = re.compile(r"^[A-Z]+ *: +")  # of a line of Flower's log
CAUSE: Final = re.compile(r"fleetune\.errors\.\w+: (.+)")  # last line of a traceback


def simulate(
    recipe: Recipe,
    out: Path,
    workers: int,
    *,
    resume: Path | None = None,
    offline: bool = False,
    note: Callable[[str], None],
) -> Path:
    """Run a recipe, or `resume` a run of it, with so many processes that are the clients; return the run's folder.

    A process has the recipe's number of threads, or one.  UsageError for a recipe that a simulation cannot run,
    FleetError when the run has failed.
    """
    partition.check(recipe)
    clients = len(prepare.split(recipe, methods.entry(recipe.method), offline=offline).clients)
    threads, cluster = recipe.threads or 1, os.environ.get("RAY_ADDRESS", "")
    with tempfile.TemporaryDirectory(prefix="fleetune-flower-") as name:
        home, port = Path(name), _free_port()
        env = {
            **os.environ,
            "FLWR_HOME": name,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": cluster
            or "local",  # else Ray looks for a cluster by itself, and finds one that is gone
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # Flower's programs
        }
        (home / "config.toml").write_text(
            f'[superlink.{NAME}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', encoding="utf-8"
        )
        shim.write(home / "app")
        values: dict[str, str | bool] = {"out": str(out.absolute()), "simulate": True, "offline": offline}
        if resume is not None:
            values["resume"] = str(resume.absolute())
        else:
            (home / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
            values["recipe"] = str(home / "recipe.toml")
        lines = [f"{key} = {toml_value(value)}\n" for key, value in values.items()]
        (home / "config-of-run.toml").write_text("".join(lines), encoding="utf-8")
        federation: dict[str, int | str] = {"num-supernodes": clients, "client-resources-num-cpus": threads}
        federation["init-args-log-to-driver"] = "false"
        if not cluster:
            federation["init-args-num-cpus"] = workers * threads
        with _superlink(home, port, env):
            return _run(home, federation, env, note)


def _run(
    home: Path, federation: Mapping[str, int | str], env: Mapping[str, str], note: Callable[[str], None]
) -> Path:
    """Run the app and note what it says; return the run's folder."""
    command = ["flwr", "run", str(home / "app"), NAME, "--stream"]
    command += ["--run-config", str(home / "config-of-run.toml")]
    command += ["--federation-config", " ".join(f"{key}={value}" for key, value in federation.items())]
    folder, why = "", None
    with subprocess.Popen(
        command, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            text = BEGIN.sub("", ESCAPES.sub("", line.rstrip()))
            note(text)
            why = CAUSE.search(text) or why
            if text.startswith(shim.DONE):
                folder = text.removeprefix(shim.DONE)
                process.terminate()  # the log has no end of its own
    if not folder:
        raise FleetError(
            f"the simulation has failed{f': {why[1]}' if why else ''}", hint="what Flower says is above"
        )
    return Path(folder)


@contextlib.contextmanager
def _superlink(home: Path, port: int, env: Mapping[str, str]) -> Iterator[None]:
    """Have a SuperLink in the block; FleetError where it does not start."""
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--disable-runtime-dependency-installation"]
    with (home / "superlink.txt").open("wb") as said:
        process = subprocess.Popen(command, env=dict(env), stdout=said, stderr=said, start_new_session=True)
    try:
        until = time.monotonic() + START
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > until:
                text = (home / "superlink.txt").read_text(errors="replace")
                raise FleetError("Flower's SuperLink does not start", hint=text[-2000:])
            time.sleep(0.2)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
