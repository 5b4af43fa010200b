# SPDX-License-Identifier: Apache-2.0
"""Two real devices and a real server, each a process of its own: an empty round's time, and a device's memory beside its model.

The methods do one local step on the built-in tiny model; a round's time is less what its devices say that their work took.
FedKSeed's kernels take memory of their own on a device, in a simulated fleet too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import free_port, memory_of
from fleetune import models
from fleetune.runs import rundir

DEVICES = 2
RECIPE = """\
model = "model"
data = "rows.jsonl"
clients = 2
rounds = {rounds}
method = "{method}"
held_out = 4
eval_rows = 4
eval_every = 0
samples = 0
max_length = 48
device = "cpu"
threads = 1
[set]
{values}
"""
METHODS = {"fedit": "r = 2\nsteps = 1", "fedkseed": "K = 16\ntau = 1"}
LOADED = """\
import sys
from fleetune import models
models.load("model", device="cpu")
print("loaded", flush=True)
sys.stdin.read()
"""


def run(method: str, rounds: int) -> dict[str, Any]:
    """Play the rounds; their seconds, and the bytes of a device and of a process that has loaded the model and no more."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, method, rounds)
        alone = subprocess.Popen(
            [sys.executable, "-c", LOADED], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert alone.stdout is not None
        alone.stdout.readline()
        model = memory_of([alone.pid])
        alone.communicate(b"")
        return {"devices": DEVICES, "model_rss": model, **_play(folder)}


def _prepare(folder: Path, method: str, rounds: int) -> None:
    made = models.tiny_llama()
    models.save(made.net, made.tokenizer, folder / "model")
    rows = [
        {"instruction": f"count to {i}", "response": " ".join(map(str, range(1, 2 + i % 8)))}
        for i in range(1, 31)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "recipe.toml").write_text(RECIPE.format(rounds=rounds, method=method, values=METHODS[method]))
    _start(folder, "split", "split", "-c", "recipe.toml", "--to", "rows").wait()


def _start(folder: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.txt").open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "fleetune", "fleet", *words], cwd=folder, stdout=said, stderr=said
        )


def _play(folder: Path) -> dict[str, Any]:
    port = str(free_port())
    server = _start(folder, "server", "serve", "-c", "recipe.toml", "--port", port, "--out", "runs")
    devices = [
        _start(folder, f"device-{c}", "join", f"127.0.0.1:{port}", "--data", f"rows/client-{c:03d}.jsonl",
               "--model", "model", "--state", f"state-{c}")
        for c in range(DEVICES)
    ]  # fmt: skip
    most, until = 0, time.monotonic() + 180
    try:
        while server.poll() is None:
            if time.monotonic() > until:
                raise RuntimeError((folder / "server.txt").read_text()[-2000:])
            most = max(most, *(memory_of([d.pid]) for d in devices))
            time.sleep(0.1)
        if server.returncode:
            raise RuntimeError((folder / "server.txt").read_text()[-2000:])
    finally:
        for process in (server, *devices):
            process.kill()
            process.wait()
    (run,) = (p for p in (folder / "runs").iterdir() if not p.is_symlink())
    events = list(rundir.events(run))
    work = {e["round"]: 0.0 for e in events if e["event"] == "round"}
    for e in events:
        if e["event"] == "client":
            work[e["round"]] = max(work[e["round"]], e["seconds"])
    seconds = [e["seconds"] - work[e["round"]] for e in events if e["event"] == "round"]
    return {"seconds": seconds, "work": list(work.values()), "device_rss": most}


def main() -> None:
    """Print what was measured, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("rounds", type=int)
    args = parser.parse_args()
    print(json.dumps(run(args.method, args.rounds)))


if __name__ == "__main__":
    main()
