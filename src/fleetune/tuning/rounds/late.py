# SPDX-License-Identifier: Apache-2.0
"""Hold the replies of simulated clients that come late until their round, on disk.

    late/client-000017.round-000005.due-000007      what client 17 replies to round 5; it comes in round 7

A late client works when it is asked, on the model of that round, and its reply is held here.  Until it comes the client is
busy.  As with memories, a round counts with the run's checkpoint: `rewind` deletes what a kill left beyond it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from fleetune.common.files import PRIVATE, read_bytes, storage_error, write_atomic


class LateReplies:
    """The late replies of a run, in `folder` (made when the first is held)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._due: dict[tuple[int, int], int] = {}  # (client, round) -> the round in which its reply comes
        self._waiting: set[tuple[int, int]] = set()  # those that have not come
        for path in folder.glob("client-*.due-*"):
            if match := re.fullmatch(r"client-(\d+)\.round-(\d+)\.due-(\d+)", path.name):
                self._due[int(match[1]), int(match[2])] = int(match[3])
        self._waiting |= self._due.keys()

    @property
    def busy(self) -> Collection[int]:
        """Clients whose replies have not come yet."""
        return {client for client, _ in self._waiting}

    def hold(self, client: int, round: int, due: int, data: bytes) -> None:
        """Hold a client's reply to `round` until round `due`.  StorageError when it cannot be written."""
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error(error, self.folder) from error
        self._due[client, round] = due
        self._waiting.add((client, round))
        write_atomic(self._path(client, round), data, mode=PRIVATE)

    def come(self, round: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield (client, round, reply) of those that come in `round`, in the clients' order."""
        for client, asked in sorted(self._waiting):
            if self._due[client, asked] <= round:
                self._waiting.discard((client, asked))
                try:
                    yield client, asked, read_bytes(self._path(client, asked))
                except OSError as error:
                    raise storage_error(error, self.folder) from error

    def rewind(self, round: int) -> None:
        """Delete the replies to rounds after `round`; those that came after it are to come again."""
        self._delete([which for which in self._due if which[1] > round])
        self._waiting = {which for which, due in self._due.items() if due > round}

    def forget_before(self, round: int) -> None:
        """Delete the replies that have come by `round`; no resume can need them."""
        self._delete([which for which, due in self._due.items() if due <= round])

    def _delete(self, gone: list[tuple[int, int]]) -> None:
        for which in gone:
            self._path(*which).unlink(missing_ok=True)
            del self._due[which]
            self._waiting.discard(which)

    def _path(self, client: int, round: int) -> Path:
        due = self._due[client, round]
        return self.folder / f"client-{client:06d}.round-{round:06d}.due-{due:06d}"
