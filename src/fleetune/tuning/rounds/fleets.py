"""Define what a fleet does for a round, and which kind of work each of its clients does.

A method may have several kinds (`fedkseed`: with or without back-propagation; `fedit`: ranks).  A simulated client is of the kind
that is wanted of its number, a real device of one that fits its memory (`Assignment`).
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple, get_args

from fleetune.common.events import ClientReply
from fleetune.tuning.methods import Method


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

    def heard(self, reply: ClientReply) -> str:
        """Take note of what became of a client's reply; return what is to be said of it, "" for nothing."""
        odd = reply.status in ("refused", "failed")  # others are lost as the recipe asks for
        return f"round {reply.round}: client {reply.client} {reply.status}: {reply.reason}" if odd else ""

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
    own = {method.kind_of(client) for client in range(100 * count)}
    if re.fullmatch(r" *\d{1,4} *(, *\d{1,4} *)*", listed) and own >= set(map(int, listed.split(","))):
        return ""
    return f"kinds = {listed!r} must be the kinds of these settings, as {','.join(map(str, sorted(own)))}"


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
