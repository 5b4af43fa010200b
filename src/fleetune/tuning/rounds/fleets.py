"""Define what a fleet does for a round, and which kind of work each of its clients does.

A method may have several kinds (`fedkseed`: with or without back-propagation; `fedit`: ranks).  A simulated client is of the kind
that is wanted of its number, a real device of one that fits its memory (`Assignment`).

`work` is one client's local work, the same in a simulated fleet and on a device; `Memories` keep what its method remembers:

    memories/client-000017.round-000005.ckpt        what client 17 stored at the end of its work in round 5

A round counts with the run's checkpoint, which names every memory that it stands on (`kept`).
"""

import re
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np

from fleetune.common.events import ClientReply
from fleetune.common.files import PRIVATE, read_bytes, regular, storage_error, write_atomic
from fleetune.common.hearing import hearing
from fleetune.common.memory import give_back
from fleetune.data import Batches
from fleetune.errors import MessageError
from fleetune.models.net.model import Model
from fleetune.models.net.packed import packing
from fleetune.tuning.exchange.messages import HEAD, Message, Payload, crc_of, decode, encode
from fleetune.tuning.methods import Method, Reply


def outrun(goal: int) -> str:
    """Return why a client is late whose round was over when `goal` others had replied."""
    return "another was faster" if goal == 1 else f"{goal} others were faster"


Step = Literal["keys", "shares", "masked", "reveal"]  # of a secure sum
STEPS: Final = get_args(Step)


class Answer(NamedTuple):
    """The answer of one client: bytes, or why there are none."""

    client: int
    key: int
    data: bytes | None
    status: str  # ok | dropped | declined | late | failed
    reason: str
    seconds: float
    sent: int  # bytes that went down to it
    steps: int | None = None  # local steps that it made, where that is known
    tokens: int | None = None  # of the rows in these steps


class Fleet(ABC):
    """Anything that can run `Method.local` for its clients."""

    @property
    def run(self) -> str:
        """Return the number of the run, as its clients know it; "" where they know none."""
        return ""

    @property
    @abstractmethod
    def rows(self) -> Sequence[int]:
        """Rows of every client."""

    @abstractmethod
    def present(self) -> Sequence[int]:
        """Return the numbers of the clients that may be asked in the coming round, ascending."""

    @abstractmethod
    def ask(
        self, round: int, clients: Sequence[int], message: bytes | Mapping[int, bytes], goal: int = 0
    ) -> Iterator[Answer]:
        """Send `message`, or each client its own, to these clients and yield their answers.

        With a `goal` the round is over when so many have replied, and the others are late.
        """

    def exchange(
        self, round: int, step: Step, bodies: Mapping[int, bytes], room: int = 0
    ) -> Iterator[Answer]:
        """Send each client its own message in a step of a secure sum (`sealed.py`); answers have `room` bytes at least."""
        raise NotImplementedError("this fleet has no secure sums")

    def kind(self, client: int) -> int:
        """Return the kind of a client that may be asked, of those that the method has."""
        return 0

    def heard(self, reply: ClientReply) -> None:  # noqa: B027  # a simulation has nothing to add
        """Take note of what became of a client's reply."""

    # What clients remember between rounds

    def kept(self) -> Mapping[int, tuple[int, int]]:
        """Return client -> (round, CRC-32) of what each client stored last."""
        return {}

    def check_kept(self, stated: Mapping[int, tuple[int, int]]) -> None:  # noqa: B027
        """Raise MessageError when what a checkpoint states of the clients' memories is not there."""

    def rewind(self, round: int) -> None:  # noqa: B027
        """Delete what clients stored after `round`; called before anything is asked (a resume)."""

    def forget_before(self, round: int) -> None:  # noqa: B027
        """Delete client memories that a newer one, not after `round`, replaces; no resume can need them."""


class Wanted(NamedTuple):
    """The kinds that a recipe wants."""

    names: Sequence[str]  # what each kind does
    of: Callable[[int], int]  # the kind of a client, by its number


ONE = Wanted(("",), lambda client: 0)  # of a method whose clients are all alike


def wanted(method: Method, listed: str) -> Wanted:
    """Return the kinds that `listed` gives, as "0,1,1" for the clients in turn; "" for the method's own."""
    names = method.kind_names
    if not listed:
        return Wanted(names, lambda client: method.kind_of(client))
    kinds = [int(kind) for kind in listed.split(",")]
    return Wanted(names, lambda client: kinds[client % len(kinds)])


def kinds_problem(method: Method, listed: str) -> str:
    """Say what is wrong with a list of kinds, "" for nothing."""
    count = len(method.kind_names)
    if not listed:
        return ""
    if count == 1:
        return f"kinds = {listed!r} does nothing: with these settings all clients are of one kind"
    if not re.fullmatch(r" *\d{1,4} *(, *\d{1,4} *)*", listed) or max(map(int, listed.split(","))) >= count:
        return f"kinds = {listed!r} must be numbers from 0 to {count - 1}, as 0,{count - 1}"
    return ""


class Assignment:
    """Gives kinds to devices one after another, each one that it can be of, as near as that allows to what is wanted.

    Where every device can be of any kind, each is of the kind that is wanted of its place.  A kind that a device cannot be
    of is owed, and goes to the next that can.
    """

    def __init__(self, wanted: Wanted, given: Iterable[int] = ()) -> None:
        self.wanted, self.place, self.owed = wanted, 0, Counter[int]()
        for kind in given:
            self._count(kind)

    def next(self, able: Collection[int]) -> int:
        """Return the kind of the next device, one of those that it can be of."""
        now = self.wanted.of(self.place)
        kind = max(able, key=lambda kind: (self.owed[kind] + (kind == now), kind))
        self._count(kind)
        return kind

    def _count(self, kind: int) -> None:
        self.owed[self.wanted.of(self.place)] += 1
        self.owed[kind] -= 1
        self.place += 1


Hold = Callable[[int, Mapping[str, np.ndarray]], None]  # (round, moves)


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
    start = method.begins(received.payload) if hold else {}
    memory = memories.of(batches.client)
    batches.on_step = on_step
    give_back()  # what was done before: an evaluation, another client's work, the message's bytes
    packs = method.packs and batches.private is None
    with hearing(batches.heard), packing(model.net, packs) as batches.packed:
        reply = method.local(model, received.payload, batches, key, memory)
    memories.keep(batches.client, received.round, memory)
    if hold:
        end = method.moved(received.payload, Reply(batches.client, key, reply))
        hold(
            received.round,
            {n: np.asarray(end[n], np.float64) - np.asarray(t, np.float64) for n, t in start.items()},
        )
        reply = Payload()
    give_back()  # what training leaves behind, so that the reply's bytes do not come on top of it
    return encode(Message(received.round, received.base, reply))
