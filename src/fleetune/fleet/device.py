"""Join a fleet as a device, and stay until its run is over; decline work while the machine runs on its battery or is busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleetune.common.files import lock
from fleetune.common.memory import usable_memory
from fleetune.errors import FleetError, Interrupted, UsageError
from fleetune.fleet import keys as keyring
from fleetune.fleet.brings import Brings
from fleetune.fleet.line import FIRST, Server, stay
from fleetune.fleet.link import Sparing
from fleetune.runs.listener import LogFile

if TYPE_CHECKING:
    from fleetune.fleet.worker import Worker

MEMORY: Final = 1 << 33  # bytes, where the system does not tell
SUPPLIES: Final = Path("/sys/class/power_supply")
LOAD: Final = Path("/proc/stat")
LOOK: Final = 0.5  # seconds between two readings of how busy the processors are


@dataclass(frozen=True)
class Conditions:
    """When a device declines."""

    only_on_power: bool = False  # while it runs on its battery
    max_load: float = 0.0  # while other programs keep more than this share of the processors busy; 0: never
    supplies: Path = SUPPLIES
    load: Path = LOAD
    pause: Callable[[float], None] = time.sleep

    def check(self) -> None:
        """Raise UsageError where it cannot be told on this machine, or for a share that is none."""
        if not 0 <= self.max_load < 1:
            raise UsageError(
                f"--max-load {self.max_load:g} is no share of the processors",
                hint="0.5 declines while other programs keep more than half of them busy",
            )
        if self.only_on_power and not self.supplies.is_dir():
            raise UsageError(f"--only-on-power: this machine has no {self.supplies} to tell by")
        if self.max_load and not self.load.is_file():
            raise UsageError(f"--max-load: this machine has no {self.load} to tell by")

    def reason(self) -> str:
        """Return why the device declines now, by its code (`WORDS`); "" where it does not."""
        if self.only_on_power and self.on_battery():
            return "battery"
        if self.max_load and (busy := self.busy()) > self.max_load:
            return f"busy {100 * busy:.0f}"
        return ""

    def on_battery(self) -> bool:
        """Tell whether a battery of this machine (not of a mouse) is being drained."""
        for supply in self.supplies.iterdir():
            own = _word(supply / "scope") != "Device"
            if own and (_word(supply / "type"), _word(supply / "status")) == ("Battery", "Discharging"):
                return True
        return False

    def busy(self) -> float:
        """Return the share of the processors that is busy, over half a second in which this process does nothing."""
        before = self._ticks()
        self.pause(LOOK)
        busy, total = (now - then for now, then in zip(self._ticks(), before, strict=True))
        return busy / max(1, total)

    def _ticks(self) -> tuple[int, int]:
        """Return the processors' clock ticks so far: busy ones, and all."""
        first = self.load.read_text(encoding="ascii").splitlines()[0].split()
        ticks = [int(word) for word in first[1:9]]  # user nice system idle iowait irq softirq steal
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _word(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # the file is not there, or the supply was just unplugged
        return ""


ALWAYS: Final = Conditions()  # it never declines


@dataclass(frozen=True)
class Home:
    """What a device keeps on its disk, and whom it trusts."""

    state: Path
    key: Path | None = None  # default: a key in `state`, made when it is not there
    ca: Path | None = None  # checks the server's certificate; None: plain HTTP, on this machine alone
    poll: float = 0.2  # seconds between two looks whether to leave
    heartbeat: float = 10.0  # seconds
    peers: Path | None = None  # folder of the public keys that it adds up with in a secure sum; None: any


def join(
    address: str,
    brings: Brings,
    home: Home,
    *,
    stop: Callable[[], bool],
    note: Callable[[str], None],
    conditions: Conditions = ALWAYS,
) -> str:
    """Be a device of the fleet at HOST:PORT until its run is over; return why it is.

    It reconnects whatever happens, and declines a round that comes while `conditions` have a reason to.
    FleetuneError when this device cannot take part; what is wrong with its rows is found before it connects.
    """
    keyring.check_installed()
    conditions.check()
    host = keyring.host_in(address)
    if not keyring.is_loopback(host) and home.ca is None:
        raise UsageError(
            f"{host} is another machine: a device talks to it with TLS alone",
            hint="bring the server's ca.pem here and give it: --ca ca.pem",
        )
    if home.ca is None and host == "localhost":  # its other address may be that of somebody else's server
        address = address.replace(host, "127.0.0.1")
    _, held_out = brings.divided(note)
    with _alone(home.state), closing(LogFile(home.state)) as log, log.warned():
        spare = Sparing()

        def told(text: str) -> None:
            if line := spare.line(text):
                note(line)
                log.write(line)

        told(f"connecting to {address}; this device {brings.part(len(held_out))}")
        key = keyring.read(home.key) if home.key else _own_key(home.state)

        def step(client: int, number: int) -> None:
            if stop():
                raise Interrupted("stopped between two steps; the device can join again at any time")

        who = keyring.identity(key, home.peers)
        made: list[Worker] = []

        def answer(order: bytearray) -> bytes:
            """Answer an order; torch is loaded for the first: the server knows of this device by then, and waits for it."""
            if not made:
                told("the server has a job: loading torch, the model and the rows")
                from fleetune.fleet.worker import Worker

                new = Worker(
                    brings, home.state, note=told, on_step=step, declines=conditions.reason, identity=who
                )
                made.append(new)
            return made[0].answer(order)

        def ended() -> str:
            return made[0].ended if made else ""

        def room() -> int:
            """Half of the memory that the work may take, once there is work."""
            has_job = made and made[0].loaded is not None
            return (brings.memory or usable_memory() or MEMORY) // 2 if has_job else FIRST

        stay(
            Server(address, home.ca, home.poll, home.heartbeat, room),
            key,
            home.state,
            answer,
            over=lambda: bool(ended()) or stop(),
            note=told,
        )
        log.write(ended() or "stopped")
    if made and made[0].error is not None:
        raise made[0].error
    if stop() and not ended():
        raise Interrupted("stopped; the device can join again at any time")
    return ended()


def _own_key(state: Path) -> keyring.PrivateKey:
    path = state / "key"
    return keyring.read(path) if path.exists() else keyring.make(path)


def _alone(state: Path) -> AbstractContextManager[object]:
    """Keep other processes from being the same device; FleetError where one is."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = (state / ".lock").open("a")
    if not lock(file.fileno()):
        file.close()
        raise FleetError(
            f"another process is the device of {state}",
            hint="give each device on a machine its own --state DIR",
        )
    return file
