# SPDX-License-Identifier: Apache-2.0
"""Run a recipe on real devices: the same rounds as in a simulated fleet, in the same kind of folder."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleetune.errors import Interrupted, UsageError
from fleetune.fleet import keys as keyring
from fleetune.fleet.audit import Audit
from fleetune.fleet.keys import PublicKey
from fleetune.fleet.orders import Job
from fleetune.fleet.remote import Pace, RemoteFleet, check_count
from fleetune.fleet.table import Devices
from fleetune.runs import sealed
from fleetune.runs.listener import Listener
from fleetune.runs.rundir import RunDir
from fleetune.tuning.fleets import Fleet
from fleetune.tuning.recipe import label_words

if TYPE_CHECKING:
    from fleetune.tuning.prepare import TuneJob
    from fleetune.tuning.run import Step

PORT: Final = 8470
STATUS: Final = "fleet.json"
WORD: Final = 1.0  # seconds between two words to `fleet status`
LOOK: Final = 2.0  # seconds between two looks at the folder of keys
REFUSALS: Final = 60.0  # seconds between two entries of what the door refused


@dataclass(frozen=True)
class Place:
    """Where a server listens, and whom it lets in."""

    host: str = "127.0.0.1"
    port: int = PORT
    keys: Path | None = None  # folder with the devices' public keys
    certificate: Path | None = None  # folder with server.pem and server.key

    def check(self) -> list[PublicKey] | None:
        """Return the registered keys, None for any; UsageError for a place that others reach without TLS and keys."""
        keyring.check_installed()
        if not keyring.is_loopback(self.host) and not (self.keys and self.certificate):
            raise UsageError(
                f"{self.host} can be reached from other machines: a fleet there needs TLS and registered keys",
                hint=f"fleetune fleet keys certificate certs {self.host}; then: --certificate certs --keys DIR "
                "with the devices' public keys",
            )
        for name in ("server.pem", "server.key"):
            if self.certificate and not (self.certificate / name).is_file():
                raise UsageError(
                    f"{self.certificate} has no {name}",
                    hint=f"make it: fleetune fleet keys certificate {self.certificate} {self.host}",
                )
        return keyring.registered(self.keys) if self.keys else None


@dataclass
class Served:
    """Real devices, which join at `place`; use it in a `with` block, which opens and closes the door."""

    place: Place
    wait: int = 0  # devices before the first round; 0: the recipe's clients, or all whose keys are here
    pace: Pace = field(default_factory=Pace)
    simulated: bool = False
    _keys: list[PublicKey] | None = field(init=False)
    _fleet: RemoteFleet | None = field(init=False, default=None)
    _next_look: float = field(init=False, default=0.0)  # at the folder of keys
    _next_word: float = field(init=False, default=0.0)  # to `fleet status`
    _next_refusals: float = field(init=False, default=0.0)  # to the log
    _complaint: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self._keys = self.place.check()

    def __enter__(self) -> Served:
        from fleetune.fleet.flower.gate import Address, Gate

        certificate = self.place.certificate
        files = (certificate / "server.pem", certificate / "server.key") if certificate else (None, None)
        self._gate = Gate(Address(self.place.host, self.place.port, *files), self._keys)
        self._gate.open()
        return self

    def __exit__(self, *error: object) -> None:
        if self._fleet is not None and error[0] is None:
            self._fleet.end("the run is finished")
        self._gate.close()

    def count(self, job: TuneJob) -> int:
        """Return how many devices the first round waits for; FleetError when fewer can come."""
        registered = len(self._keys) if self._keys is not None else 0
        wanted = self.wait or job.recipe.clients or registered or job.entry.clients
        if self._keys is not None:
            check_count(wanted, registered)
        return wanted

    def about(self, job: TuneJob) -> str:
        """Return where, and how many are waited for."""
        way = "TLS" if self.place.certificate else "plain HTTP"
        door = "registered keys" if self._keys is not None else "any key"
        return f"{self.place.host}:{self.place.port} · {way}, {door} · {self.count(job)} devices"

    def make(self, job: TuneJob, run: RunDir, listener: Listener, step: Step) -> Fleet:
        """Return the fleet when enough devices are ready."""
        devices = Devices(run.path)
        devices.register([(k.fingerprint, k.name) for k in self._keys or []])
        listener.note(f"on each device: {self.line()}")

        audit = Audit(run.path)

        def look() -> None:
            self._read_keys_again(devices, listener)
            self._log_refusals(audit)
            self._publish(run)
            if listener.stop_requested:
                raise Interrupted("stopped while waiting for devices; finished rounds are kept")

        self._fleet = RemoteFleet(
            self._gate, devices, job_of(job, devices.run), job.recipe.seed, self.pace,
            look=look, note=listener.note, audit=audit.write,
        )  # fmt: skip
        self._fleet.wait_for(self.count(job))
        return self._fleet

    def _read_keys_again(self, devices: Devices, listener: Listener) -> None:
        """Let in devices whose keys were added to the folder, and throw out those whose keys were removed."""
        folder = self.place.keys
        if folder is None or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK
        try:
            found = keyring.registered(folder)
        except UsageError as error:
            found = self._keys or []
            if error.message != self._complaint:
                listener.note(f"the keys stay as they are: {error.message}")
            self._complaint = error.message
        if found != self._keys:
            before, now = set(self._keys or []), set(found)
            self._keys = found
            self._gate.admit(found)
            devices.register([(k.fingerprint, k.name) for k in found])
            changed = [f"{k.name} may join" for k in now - before] + [
                f"{k.name} is revoked" for k in before - now
            ]
            listener.note(f"keys: {', '.join(sorted(changed))}")

    def _log_refusals(self, audit: Audit) -> None:
        """Write down which requests the door has refused: how many of each status, path and claimed key."""
        if time.monotonic() < self._next_refusals:
            return
        self._next_refusals = time.monotonic() + REFUSALS
        names = {k.fingerprint: k.name for k in self._keys or []}
        for (status, path, key), count in sorted(self._gate.refusals.taken().items()):
            audit.write(
                "turned away", status=status, path=path, device=key, name=names.get(key, ""), requests=count
            )

    def _publish(self, run: RunDir) -> None:
        """Write down what the devices do, for `fleetune fleet status`."""
        if self._fleet is None or time.monotonic() < self._next_word:
            return
        self._next_word = time.monotonic() + WORD
        doing = [{"name": name, "client": client, "does": does} for name, client, does in self._fleet.doing()]
        content = {
            "t": round(time.time(), 1), "pid": os.getpid(), "machine": platform.node(),
            "address": f"{self.place.host}:{self.place.port}", "round": self._fleet.round, "devices": doing,
        }  # fmt: skip
        run.write(STATUS, sealed.to_text(content) + "\n", private=True)

    def line(self) -> str:
        """Return the command for a device."""
        host = self.place.host if self.place.host != "0.0.0.0" else "THIS-HOST"
        words = f"fleetune fleet join {host}:{self.place.port} --data ROWS.jsonl"
        words += " --key KEY" if self._keys is not None else ""
        return words + (" --ca ca.pem" if self.place.certificate else "")


def job_of(job: TuneJob, run: str) -> Job:
    """Return what devices are told of a run."""
    recipe, model = job.recipe, job.model
    return Job(
        run, recipe.method, dict(recipe.set), recipe.model, model.digest, recipe.dtype, recipe.max_length,
        label_words(recipe.labels), recipe.rounds,
    )  # fmt: skip
