# SPDX-License-Identifier: Apache-2.0
"""Keep the table of a run's devices: which key is which client, and what each device brought.

    devices.json     in the run's folder, sealed with a checksum, for its owner alone

A device is its key.  One that comes back, after a restart or days later, is the client that it was, as long as it
brings the same rows: the rounds before were trained on these.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from fleetune.common.files import PRIVATE, write_atomic
from fleetune.errors import MessageError, StorageError
from fleetune.fleet.orders import Device
from fleetune.runs import sealed

FILE: Final = "devices.json"


@dataclass(frozen=True)
class Member:
    """A registered device; its place in the table is the number of its client."""

    key: str  # SHA-256 of its public key, hexadecimal
    name: str
    rows: int = 0  # 0: it has never joined
    rows_digest: str = ""


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
        found: Mapping[str, Any] = sealed.read(self.file, hint)
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
        write_atomic(self.file, sealed.to_text(content) + "\n", mode=PRIVATE)
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

    def join(self, key: str, name: str, device: Device) -> int:
        """Note what a device brings, and return its client; MessageError when it brought other rows before."""
        client = self._add(key, name)
        member = self.members[client]
        if not member.rows:
            self.members[client] = Member(key, member.name, device.rows, device.rows_digest)
            self._changed = True
        elif (member.rows, member.rows_digest) != (device.rows, device.rows_digest):
            raise MessageError(
                f"device {member.name} brings {device.rows} rows with digest {device.rows_digest[:12]}; in this run it "
                f"brought {member.rows} with {member.rows_digest[:12]}. Join with the same file"
            )
        return client
