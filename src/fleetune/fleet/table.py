"""Keep the table of a run's devices (`devices.json`): which key is which client, and what each device brought.

A device is its key.  One that comes back is the client that it was, as long as it brings the same rows.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from fleetune.common import __version__
from fleetune.common.files import PRIVATE, json_text, read_json, write_atomic
from fleetune.errors import MessageError, StorageError
from fleetune.fleet.orders import Device
from fleetune.tuning.rounds.fleets import Assignment, Wanted

FILE: Final = "devices.json"
LATE: Final = "came after the end"


@dataclass(frozen=True)
class Member:
    """A registered device; its place in the table is the number of its client."""

    key: str  # SHA-256 of its public key, hexadecimal
    name: str
    rows: int = 0  # 0: it has never joined
    rows_digest: str = ""
    memory: int = 0  # bytes that its work may take
    threads: int = 0
    speed: float = 0.0  # tokens a second of a forward pass, when it first joined
    able: Sequence[int] = ()  # kinds of work that fit it
    kind: int = -1  # of its work, among the kinds of the method; -1: not given yet
    version: str = ""  # of Fleetune
    torch: str = ""
    processor: str = ""
    late: bool = False  # it came when the run was over


class Devices:
    """The table of a run; `save` brings it to the disk."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self.run, self.members = secrets.token_hex(16), list[Member]()
        self._clients: dict[str, int] = {}  # by key: its place in `members`
        self._changed = False
        if self.file.exists():
            self._read()

    def _read(self) -> None:
        hint = "bring it back from a copy: without it nobody knows which device is which client"
        found: Mapping[str, Any] = read_json(self.file, hint)
        try:
            self.run = str(found["run"])
            self.members = [Member(**row) for row in found["devices"]]
        except (KeyError, TypeError) as error:
            raise StorageError(f"{self.file} is not a table of devices ({error})", hint=hint) from error
        self._clients = {m.key: c for c, m in enumerate(self.members)}

    def save(self) -> None:
        """Write the table where it has changed; StorageError when it cannot be written."""
        if not self._changed:
            return
        content = {"run": self.run, "devices": [asdict(m) for m in self.members]}
        write_atomic(self.file, json_text(content), mode=PRIVATE)
        self._changed = False

    def __len__(self) -> int:
        return len(self.members)

    @property
    def rows(self) -> list[int]:
        """Rows of every client, 0 for one that has never joined."""
        return [m.rows for m in self.members]

    def client(self, key: str) -> int | None:
        """Return the number of the client with this key, None where it is not in the table."""
        return self._clients.get(key)

    def register(self, known: Sequence[tuple[str, str]]) -> None:
        """Give every (key, name) that is not in the table yet the next number, in this order; save the table."""
        for key, name in known:
            self._add(key, name)
        self._changed |= not self.file.exists()
        self.save()

    def _add(self, key: str, name: str) -> int:
        if (client := self._clients.get(key)) is None:
            client = self._clients[key] = len(self.members)
            self.members.append(Member(key, name))
            self._changed = True
        return client

    def take_from(self, run: Path) -> None:
        """Begin a new table with the devices of a run's, where it has one: a device stays the client that it was."""
        if not self.file.exists() and (run / FILE).exists():
            self.members = list(Devices(run).members)
            self._clients = {m.key: c for c, m in enumerate(self.members)}
            self._changed = True
            self.save()

    def came_late(self, key: str, name: str) -> bool:
        """Note that a device which has never joined has come after the end; tell whether that is new."""
        client = self._add(key, name)
        member = self.members[client]
        if new := not (member.rows or member.late):
            self.members[client], self._changed = replace(member, late=True), True
            self.save()
        return new

    def join(self, key: str, name: str, device: Device, able: Sequence[int] | None) -> int:
        """Note what a device brings, and the kinds of work that it can do; return its client.

        MessageError when it brought other rows before.  A device that can no longer do what it did has no kind again.
        With None, where nothing is trained, kinds stay as they were.
        """
        client = self._add(key, name)
        member = self.members[client]
        if member.rows and (member.rows, member.rows_digest) != (device.rows, device.rows_digest):
            raise MessageError(
                f"it brings {device.rows} rows to train on (digest {device.rows_digest[:12]}); in this run it brought "
                f"{member.rows} ({member.rows_digest[:12]}). Join with the same --data and --held-out; rows to measure on "
                "alone come from --eval-data"
            )
        if able is None:
            able, kind = member.able, member.kind
        else:
            kind = member.kind if member.kind in able else -1
        now = replace(
            member,
            late=False,
            rows=device.rows,
            rows_digest=device.rows_digest,
            memory=device.memory,
            threads=device.threads,
            speed=member.speed or device.speed,
            able=list(able),
            kind=kind,
            version=device.version,
            torch=device.torch,
            processor=device.processor,
        )
        if now != member:
            self.members[client] = now
            self._changed = True
        return client

    def give_kinds(self, wanted: Wanted) -> None:
        """Give every device that has joined, and has no kind yet, one that fits it; in the order of the clients."""
        new = [c for c, m in enumerate(self.members) if m.rows and m.kind < 0]
        if not new:
            return
        assignment = Assignment(wanted, (m.kind for m in self.members if m.kind >= 0))
        for client in new:
            member = self.members[client]
            self.members[client] = replace(member, kind=assignment.next(member.able))
        self._changed = True
        self.save()


def apart(device: Device) -> str:
    """Say which versions of a device are not this server's, and what to do; "" where they are."""
    stated = {"fleetune": device.version, "torch": device.torch}
    ours = {"fleetune": __version__, "torch": version("torch").partition("+")[0]}
    other = {name: own for name, own in ours.items() if stated[name].partition("+")[0] != own}
    if not other:
        return ""
    has = " and ".join(f"{name} {stated[name] or 'of another version'}" for name in other)
    wanted = " ".join(f"{name}=={own}" for name, own in other.items())
    return f"it has {has}: the digest need not be that of the simulation; for the same there: pip install {wanted}"
