# SPDX-License-Identifier: Apache-2.0
"""Walk through "On five machines" of docs/fleet.md, command by command, on five machines that are network namespaces.

    sudo python -m benchmarks.five_machines [--rounds 5] [--steps 30] [--methods fedkseed,fedit,mixed] [--no-kills]

The server and two of the four devices are on a fast network; the lines of the other two have 200 ms of round-trip delay and lose
1 % of the frames.  In round 2 a device is killed, and started again; in round 3 the server is, and goes on with --resume.
The end must be the digest of the simulated run.  Prints what was typed and what was said; needs root, iproute2, /dev/net/tun.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from benchmarks.network import Machine, Network, ping, why_not

HOST: Final = "fleet.example.org"
SERVER: Final = Machine("server", "10.77.0.1")
DEVICES: Final = (
    Machine("press-1", "10.77.0.11"),
    Machine("press-2", "10.77.0.12"),
    Machine("press-3", "10.77.0.13", delay=0.1, loss=0.01),
    Machine("press-4", "10.77.0.14", delay=0.1, loss=0.01),
)
PATIENCE: Final = 900.0  # seconds for a part of the walk
RECIPE: Final = """\
model = "{model}"
data = "{rows}"
clients = 4
rounds = {rounds}
held_out = 8
eval_rows = 8
samples = 0
max_length = 128
device = "cpu"
threads = 1
{settings}
"""
SETTINGS: Final = {
    "fedkseed": 'aggregation = "norm-clip"\nmethod = "fedkseed"\nset = {{ K = 64, tau = {steps}, lr = 1e-4 }}',
    "fedit": 'aggregation = "norm-clip"\nmethod = "fedit"\nset = {{ r = 4, steps = {steps}, lr = 1e-3 }}',
    "mixed": 'aggregation = "mean:4"\nmethod = "fedkseed"\n'
    "set = {{ K = 64, tau = {steps}, lr = 1e-4, backprop = 0.5, backprop_lr = 1e-2 }}",
}


class Walk:
    """One run through the page: folders of the machines, and the processes on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        for machine in (SERVER, *DEVICES):
            (folder / machine.name).mkdir(parents=True)

    def of(self, machine: Machine) -> Path:
        """Return the folder in which one sits at a machine."""
        return self.folder / machine.name

    def do(self, machine: Machine, command: str) -> str:
        """Type a command at a machine and print what it says; SystemExit when it fails."""
        print(f"{machine.name}$ {command}", flush=True)
        done = subprocess.run(
            self._words(machine, command), cwd=self.of(machine), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        print(done.stdout, end="", flush=True)
        if done.returncode:
            raise SystemExit(f"{command!r} at {machine.name} ended with {done.returncode}")
        return done.stdout

    def begin(self, machine: Machine, command: str) -> None:
        """Type a command that stays; what it says is added to a file."""
        print(f"{machine.name}$ {command} &", flush=True)
        with self.said_file(machine).open("ab") as said:
            self.running[machine.name] = subprocess.Popen(
                self._words(machine, command), cwd=self.of(machine), stdin=subprocess.DEVNULL, stdout=said,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def kill(self, machine: Machine) -> None:
        """Kill the command that stays, as a power cut would."""
        print(f"# {machine.name}: kill -9", flush=True)
        process = self.running.pop(machine.name)
        process.kill()
        process.wait()

    def carry(self, source: Machine, file: str, target: Machine, to: str) -> None:
        """Carry a file from a machine to another."""
        print(f"# {source.name}:{file} is carried to {target.name}:{to}", flush=True)
        place = self.of(target) / to
        place.parent.mkdir(exist_ok=True)
        shutil.copy(self.of(source) / file, place)

    def wait_for(self, text: str) -> None:
        """Wait until the server has said it; SystemExit when it ends or takes too long."""
        until = time.monotonic() + PATIENCE
        while text not in self.said(SERVER):
            ended = self.running[SERVER.name].poll()
            if ended is not None or time.monotonic() > until:
                raise SystemExit(f"the server has not said {text!r}:\n{self.said(SERVER)}")
            time.sleep(0.2)

    def wait_for_the_end(self) -> None:
        """Wait for the end of all commands that stay; SystemExit when one fails."""
        for name, process in self.running.items():
            if process.wait(PATIENCE):
                raise SystemExit(f"{name} ended with {process.returncode}:\n{self.said(SERVER)}")
        self.running.clear()

    def said_file(self, machine: Machine) -> Path:
        return self.folder / f"{machine.name}.txt"

    def said(self, machine: Machine) -> str:
        """Return what the commands that stay have said at a machine."""
        file = self.said_file(machine)
        return file.read_text(errors="replace") if file.exists() else ""

    def stop(self) -> None:
        """Kill what still runs."""
        for process in self.running.values():
            process.kill()
            process.wait()

    @staticmethod
    def _words(machine: Machine, command: str) -> list[str]:
        program, *words = shlex.split(command)
        assert program == "fleetune"
        return machine.command(sys.executable, "-m", "fleetune", *words)


def prepare(walk: Walk, options: argparse.Namespace) -> None:
    """Bring model and rows to the machines, the certificate to the devices and the keys to the server."""
    if not options.model:
        _tiny_model(walk)
    walk.do(SERVER, f"fleetune fleet keys certificate certs {HOST} {SERVER.address}")
    for device in DEVICES:
        walk.do(device, f"fleetune fleet keys new {device.name}")
        walk.carry(device, f"{device.name}.pub", SERVER, f"keys/{device.name}.pub")
        walk.carry(SERVER, "certs/ca.pem", device, "ca.pem")


def _tiny_model(walk: Walk) -> None:
    from fleetune import models

    made = models.tiny_llama()
    rows = [
        {"instruction": f"count to {i}", "response": " ".join(map(str, range(1 + i % 8)))}
        for i in range(1, 49)
    ]
    (walk.of(SERVER) / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for machine in (SERVER, *DEVICES):
        models.save(made.net, made.tokenizer, walk.of(machine) / "model")


def play(walk: Walk, method: str, options: argparse.Namespace) -> bool:
    """Tune with a method in the simulator and on the machines; tell whether the digests are equal."""
    print(f"\n## {method}\n", flush=True)
    for machine in (SERVER, *DEVICES):
        walk.said_file(machine).unlink(missing_ok=True)
    recipe = RECIPE.format(
        model=options.model or "model", rows=options.rows or "rows.jsonl", rounds=options.rounds,
        settings=SETTINGS[method].format(steps=options.steps),
    )  # fmt: skip
    (walk.of(SERVER) / "recipe.toml").write_text(recipe)
    print(f"server$ cat recipe.toml\n{recipe.rstrip()}", flush=True)
    walk.do(SERVER, "fleetune tune -c recipe.toml --out simulated -q")
    walk.do(SERVER, "fleetune fleet split -c recipe.toml --to rows")
    for number, device in enumerate(DEVICES):
        walk.carry(SERVER, f"rows/client-{number:03d}.jsonl", device, "rows.jsonl")
    place = (
        "--host 0.0.0.0 --keys keys --certificate certs --grace 300"  # five machines share one's processor
    )
    began = time.monotonic()
    walk.begin(SERVER, f"fleetune fleet serve -c recipe.toml {place}")
    for number, device in enumerate(DEVICES):
        walk.begin(device, joining(device, number, options))
    if options.kills:
        kills(walk, options, place)
    walk.wait_for_the_end()
    print(f"# all have ended after {time.monotonic() - began:.0f} s; server.txt:\n{walk.said(SERVER)}")
    for device in (DEVICES[1], DEVICES[3]):
        print(f"# {device.name}.txt:\n{walk.said(device)}")
    walk.do(SERVER, "fleetune fleet devices latest")
    walk.do(SERVER, "fleetune fleet audit latest")
    found = {out: digest_of(walk.of(SERVER) / out) for out in ("simulated", "runs")}
    print("".join(f"# digest {out:10} {digest}\n" for out, digest in found.items()), flush=True)
    return found["simulated"] == found["runs"]


def joining(device: Machine, number: int, options: argparse.Namespace) -> str:
    """Return the command by which a device joins: every other one by the server's name, the rest by its address."""
    host = HOST if number % 2 else SERVER.address
    own = "--threads 1" if options.model else "--model model"
    return f"fleetune fleet join {host}:8470 --data rows.jsonl --key {device.name} --ca ca.pem {own}"


def kills(walk: Walk, options: argparse.Namespace, place: str) -> None:
    """Kill a device in round 2 and the server in round 3, and start them again."""
    walk.wait_for("round 1/")
    walk.do(SERVER, "fleetune fleet status latest")
    walk.kill(DEVICES[1])
    time.sleep(2)
    walk.begin(DEVICES[1], joining(DEVICES[1], 1, options))
    walk.wait_for("round 2/")
    time.sleep(0.5)
    walk.kill(SERVER)
    time.sleep(2)
    walk.begin(SERVER, f"fleetune fleet serve --resume latest {place}")


def digest_of(out: Path) -> str:
    """Return the digest of the newest run under a folder."""
    from fleetune.runs import rundir

    return str([e for e in rundir.events(rundir.find("latest", out)) if e["event"] == "done"][-1]["digest"])


def measure(machine: Machine) -> str:
    """Return round trip and loss between a device and the server, as pings see them."""
    words = machine.command(sys.executable, "-m", "benchmarks.five_machines", "--ping", SERVER.address)
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main(words: list[str] | None = None) -> int:
    """0 when every run ended in the digest of the simulation."""
    parser = argparse.ArgumentParser("benchmarks.five_machines", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="local steps of a device in a round")
    parser.add_argument(
        "--methods",
        default="fedkseed,fedit,mixed",
        help="mixed: fedkseed, and half the devices back-propagate",
    )
    parser.add_argument(
        "--model", default="", help="hub id or built-in name (default: a tiny random one, a copy on each)"
    )
    parser.add_argument("--rows", default="", help="rows for all, with --model: a built-in name or a path")
    parser.add_argument("--no-kills", dest="kills", action="store_false")
    parser.add_argument("--ping", metavar="ADDRESS", help=argparse.SUPPRESS)  # what a machine itself runs
    options = parser.parse_args(words)
    if options.ping:
        trip, lost = ping(options.ping, 400)
        print(f"round trip {trip * 1000:.2f} ms, {lost} of 400 lost")
        return 0
    if unknown := set(options.methods.split(",")) - SETTINGS.keys():
        parser.error(
            f"no settings for {', '.join(sorted(unknown))}; there are those of {', '.join(SETTINGS)}"
        )
    if bool(options.model) != bool(options.rows):
        parser.error("--model and --rows belong together")
    if options.kills and options.rounds < 4:
        parser.error("kills are in rounds 2 and 3: --rounds 4 or more, or --no-kills")
    if why := why_not():
        print(why, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is taken down again
    own = Path(__file__).parent.parent  # the machines' folders are elsewhere
    paths = [str(own), str(own / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory(prefix="five-machines-") as folder, Network([SERVER, *DEVICES], HOST):
        for device in DEVICES:
            print(f"# {device.name} to the server: {measure(device)}", flush=True)
        walk = Walk(Path(folder))
        try:
            prepare(walk, options)
            equal = [play(walk, method, options) for method in options.methods.split(",")]
        finally:
            walk.stop()
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
