"""Do one client's local work of a round, and keep what its method remembers: the same in a simulated fleet and on a device.

    memories/client-000017.round-000005.ckpt        what client 17 stored at the end of its work in round 5

A round counts with the run's checkpoint, which names every memory that it stands on (`kept`).
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.common.files import PRIVATE, read_bytes, regular, storage_error, write_atomic
from fleetune.common.hearing import hearing
from fleetune.common.memory import give_back
from fleetune.data import Batches
from fleetune.errors import MessageError
from fleetune.models.net.model import Model
from fleetune.models.net.packed import packing
from fleetune.tuning.exchange.messages import HEAD, Message, Payload, crc_of, decode, encode
from fleetune.tuning.methods import Method, Reply

Hold = Callable[[int, Mapping[str, np.ndarray]], None]  # (round, moves)


def work(
    method: Method,
    model: Model,
    batches: Batches,
    key: int,
    received: Message,
    memories: Memories,
    on_step: Callable[[int, int], None],
    hold: Hold | None = None,
) -> bytes:
    """Do what was `received`, for the client whose rows `batches` has; return its reply, and keep what it remembers.

    The method takes the message's arrays out of it, so that they need not be in memory as long as it works.
    `on_step(client, step)` is called before every local step and between the pieces of one, and may raise.  With `hold`, that
    is given how far the reply moves each number, for a secure sum, and an empty reply is returned.
    """
    sent = Payload(dict(received.payload.arrays), received.payload.scalars) if hold else Payload()
    memory = memories.of(batches.client)
    batches.on_step = on_step
    give_back()  # what was done before: an evaluation, another client's work, the message's bytes
    packs = method.packs and batches.private is None
    with hearing(batches.heard), packing(model.net, packs) as batches.packed:
        reply = method.local(model, received.payload, batches, key, memory)
    memories.keep(batches.client, received.round, memory)
    if hold:  # `local` has found what came to be of this model
        start = method.begins(sent)
        end = method.moved(sent, Reply(batches.client, key, reply))
        hold(
            received.round,
            {n: np.asarray(end[n], np.float64) - np.asarray(t, np.float64) for n, t in start.items()},
        )
        reply = Payload()
    give_back()  # what training leaves behind, so that the reply's bytes do not come on top of it
    return encode(Message(received.round, received.base, reply))


class Memories:
    """The memories of a fleet's clients, in `folder` (made when the first is stored; None: a temporary one)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="fleetune-"))
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._rounds: dict[int, list[int]] = {}  # client -> rounds in which it stored something, ascending
        self._crcs: dict[tuple[int, int], int] = {}  # (client, round) -> CRC-32 of the file's content
        for path in self.folder.glob("client-*.ckpt"):
            if match := re.fullmatch(r"client-(\d+)\.round-(\d+)\.ckpt", path.name):
                self._rounds.setdefault(int(match[1]), []).append(int(match[2]))
        for rounds in self._rounds.values():
            rounds.sort()

    def of(self, client: int) -> dict[str, Any]:
        """Load what the client stored last, {} for nothing; changes to it count when it is given to `keep`.

        MessageError when the file is damaged or gone.
        """
        if not (rounds := self._rounds.get(client)):
            return {}
        path = self._path(client, rounds[-1])
        try:
            payload = decode(read_bytes(path), any_size=True).payload
        except (OSError, MessageError) as error:
            raise MessageError(
                f"what the client kept ({path.name}) cannot be read: {error}; without that file it starts anew"
            ) from error
        return {**{name: array.copy() for name, array in payload.arrays.items()}, **payload.scalars}

    def keep(self, client: int, round: int, memory: dict[str, Any]) -> None:
        """Store what the client has at the end of its work in `round`.  StorageError when it cannot be written."""
        arrays = {name: value for name, value in memory.items() if isinstance(value, np.ndarray)}
        scalars = {name: value for name, value in memory.items() if name not in arrays}
        if not memory:
            return
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error(error, self.folder) from error
        data = encode(Message(round, b"", Payload(arrays, scalars)))
        write_atomic(self._path(client, round), data, mode=PRIVATE)
        self._crcs[client, round] = crc_of(data)
        rounds = self._rounds.setdefault(client, [])
        rounds[:] = [r for r in rounds if r < round] + [round]

    def kept(self) -> dict[int, tuple[int, int]]:
        """Return client -> (round, CRC-32) of what each stored last."""
        return {c: (rounds[-1], self._crc(c, rounds[-1])) for c, rounds in self._rounds.items() if rounds}

    def check(self, stated: Mapping[int, tuple[int, int]]) -> None:
        """Raise MessageError, which names the file, when a memory that a checkpoint stands on is not there as it was."""
        for client, (round, crc) in stated.items():
            path = self._path(client, round)
            try:
                data = read_bytes(path)
                decode(data, any_size=True)
            except FileNotFoundError as error:
                raise MessageError(f"what client {client} kept, {path}, is gone") from error
            except (OSError, MessageError) as error:
                raise MessageError(f"what client {client} kept, {path}, cannot be read: {error}") from error
            if crc_of(data) != crc:
                raise MessageError(f"what client {client} kept, {path}, is not what it stored in that round")

    def _crc(self, client: int, round: int) -> int:
        if (client, round) not in self._crcs:
            with open(self._path(client, round), "rb", opener=regular) as file:
                self._crcs[client, round] = crc_of(file.read(HEAD))
        return self._crcs[client, round]

    def rewind(self, round: int) -> None:
        """Delete what was stored after `round`, and what a kill left half written."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        for client, rounds in self._rounds.items():
            self._drop(client, [r for r in rounds if r > round])

    def forget_before(self, round: int) -> None:
        """Delete memories that a newer one, not after `round`, replaces; no resume can need them."""
        for client, rounds in self._rounds.items():
            self._drop(client, [r for r in rounds if r <= round][:-1])

    def _drop(self, client: int, gone: list[int]) -> None:
        for round in gone:
            self._path(client, round).unlink(missing_ok=True)
            self._crcs.pop((client, round), None)
        self._rounds[client] = [r for r in self._rounds[client] if r not in gone]

    def _path(self, client: int, round: int) -> Path:
        return self.folder / f"client-{client:06d}.round-{round:06d}.ckpt"
