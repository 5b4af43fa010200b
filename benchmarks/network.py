# SPDX-License-Identifier: Apache-2.0
"""Machines on one machine: network namespaces on a bridge, and slow, lossy lines between some of them and it (Linux, root).

A namespace has addresses, routes and ports of its own, so processes in it meet the network as those of another machine would.
A slow line is a thread of this process: it has the device's end (a TAP) and the bridge's end, and hands frames over after a
delay, or never.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

BRIDGE: Final = "fleetune-net"  # the namespace of the bridge
HOSTS: Final = Path("/etc/netns")  # `ip netns exec NAME` puts the files of /etc/netns/NAME over those of /etc
TAP: Final = struct.pack("H", 0x0002 | 0x1000)  # IFF_TAP | IFF_NO_PI
TUNSETIFF: Final = 0x400454CA
FRAME: Final = 65536


@dataclass(frozen=True)
class Machine:
    """A machine: its name, its address, and how slow and lossy its line is, each way."""

    name: str
    address: str
    delay: float = 0.0  # seconds
    loss: float = 0.0  # share of frames

    @property
    def namespace(self) -> str:
        """The name of its namespace."""
        return f"fleetune-{self.name}"

    def command(self, *words: str) -> list[str]:
        """Return the command that runs `words` on it."""
        return ["ip", "netns", "exec", self.namespace, *words]


class Line(threading.Thread):
    """Carry frames between two TAPs, both ways, late or not at all; the same seed loses the same frames of the same traffic."""

    def __init__(self, ends: tuple[int, int], delay: float, loss: float, seed: int) -> None:
        super().__init__(name="line", daemon=True)
        self.ends, self.delay, self.loss = ends, delay, loss
        self.rng, self.over = random.Random(seed), threading.Event()
        self.carried = self.lost = 0

    def run(self) -> None:
        """Carry until `over`."""
        due: list[tuple[float, int, int, bytes]] = []
        other = dict([self.ends, self.ends[::-1]])
        while not self.over.is_set():
            wait = due[0][0] - time.monotonic() if due else 0.2
            for end in select.select(self.ends, [], [], max(0.0, wait))[0]:
                frame = os.read(end, FRAME)
                self.carried += 1
                if self.rng.random() < self.loss:
                    self.lost += 1
                else:
                    heapq.heappush(due, (time.monotonic() + self.delay, self.carried, other[end], frame))
            while due and due[0][0] <= time.monotonic():
                _, _, end, frame = heapq.heappop(due)
                os.write(end, frame)


class Network:
    """Machines that reach each other, and know `host` as the first one's name; in a `with` block, which takes all down again."""

    def __init__(self, machines: list[Machine], host: str) -> None:
        self.machines, self.host = machines, host
        self.lines: list[Line] = []
        self._made: list[str] = []

    def __enter__(self) -> Network:
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in self.lines:
            line.over.set()
        for line in self.lines:
            if line.is_alive():
                line.join(2)
            for end in line.ends:
                os.close(end)
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            shutil.rmtree(HOSTS / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            HOSTS.rmdir()  # where it was made for this

    def _build(self) -> None:
        self._namespace(BRIDGE)
        ip("-n", BRIDGE, "link", "add", "name", "bridge0", "type", "bridge")
        ip("-n", BRIDGE, "link", "set", "bridge0", "up")
        for number, machine in enumerate(self.machines):
            self._namespace(machine.namespace)
            files = HOSTS / machine.namespace
            files.mkdir(parents=True, exist_ok=True)
            (files / "hosts").write_text(
                f"127.0.0.1 localhost\n{self.machines[0].address} {self.host}\n", encoding="utf-8"
            )
            port = f"port{number}"
            if machine.delay or machine.loss:
                self._slow_line(machine, port, number)
            else:
                ip(
                    "link", "add", "name", "eth0", "netns", machine.namespace, "type", "veth",
                    "peer", "name", port, "netns", BRIDGE,
                )  # fmt: skip
            ip("-n", BRIDGE, "link", "set", port, "master", "bridge0", "up")
            ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", "eth0")
            ip("-n", machine.namespace, "link", "set", "eth0", "up")
        for line in self.lines:
            line.start()

    def _namespace(self, name: str) -> None:
        ip("netns", "add", name)
        self._made.append(name)
        ip("-n", name, "link", "set", "lo", "up")

    def _slow_line(self, machine: Machine, port: str, number: int) -> None:
        ends = []
        for namespace, name in ((machine.namespace, "eth0"), (BRIDGE, port)):
            here = f"ft{os.getpid()}-{len(ends)}"
            ends.append(tap(here))
            ip("link", "set", here, "netns", namespace, "name", name)
        self.lines.append(Line((ends[0], ends[1]), machine.delay, machine.loss, seed=number))


def tap(name: str) -> int:
    """Make a TAP device that lives as long as the file descriptor that is returned."""
    handle = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(handle, TUNSETIFF, name.encode().ljust(16, b"\0") + TAP + bytes(22))
    return handle


def ip(*words: str) -> None:
    """Run `ip`; SystemExit with what it says when it fails."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(words)}: {done.stderr.strip()}")


def why_not() -> str:
    """Why machines cannot be made here, "" where they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root: run it with sudo"
    if shutil.which("ip") is None:
        return "network namespaces need the command `ip`: install iproute2"
    if not os.path.exists("/dev/net/tun"):
        return "slow lines need /dev/net/tun: modprobe tun"
    if left := list(Path("/run/netns").glob("fleetune-*")):
        names = " ".join(p.name for p in left)
        return (
            f"another walk is going on, or one was killed; then: for n in {names}; do ip netns del $n; done"
        )
    return ""


def ping(address: str, count: int, every: float = 0.02) -> tuple[float, int]:
    """Send ICMP echoes; return the mean round trip of those that came back, in seconds, and how many did not."""
    sent: dict[int, float] = {}
    trips: list[float] = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.settimeout(every)
        number = 0
        until = time.monotonic() + count * every + 2.0
        while time.monotonic() < until and len(trips) < count:
            if number < count:
                sent[number] = time.monotonic()
                raw.sendto(_echo(number), (address, 0))
                number += 1
            try:
                data = raw.recv(1024)[20:]
            except TimeoutError:
                continue
            kind, _, _, ident, back = struct.unpack("!BBHHH", data[:8])
            if kind == 0 and ident == os.getpid() & 0xFFFF and back in sent:
                trips.append(time.monotonic() - sent.pop(back))
    return sum(trips) / max(1, len(trips)), count - len(trips)


def _echo(number: int) -> bytes:
    head = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, number)
    words = sum(struct.unpack("!4H", head))
    words = (words & 0xFFFF) + (words >> 16)
    return head[:2] + struct.pack("!H", ~words & 0xFFFF) + head[4:]
