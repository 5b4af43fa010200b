# SPDX-License-Identifier: Apache-2.0
"""Do a round's local work on devices: what every fleet can do.

A fleet has the clients' row counts and one function: `ask(round, clients, message)` gives an `Answer` for
every client asked, one at a time, as they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from fleetune.common.events import ClientReply

OLDEST: Final = 8  # rounds that a reply may come late, where late ones are used


def outrun(goal: int) -> str:
    """Return why a client is late whose round was over when `goal` others had replied."""
    return "another was faster" if goal == 1 else f"{goal} others were faster"


class Answer(NamedTuple):
    """The answer of one client: bytes, or why there are none."""

    client: int
    key: int
    data: bytes | None
    status: str  # ok | dropped | declined | late | failed
    reason: str
    seconds: float
    sent: int  # bytes that went down to it
    late: int = 0  # rounds that it comes late: it answers the message of an earlier round
    steps: int | None = None  # local steps that it made, where that is known
    tokens: int | None = None  # of the rows in these steps


class Fleet(Protocol):
    """Anything that can run `Method.local` for its clients."""

    @property
    def rows(self) -> Sequence[int]:
        """Rows of every client."""
        ...

    def present(self) -> Sequence[int]:
        """Return the numbers of the clients that may be asked in the coming round, ascending."""
        ...

    @property
    def busy(self) -> int:
        """Number of clients that are there, and still at work for an earlier round."""
        ...

    def kind(self, client: int) -> int:
        """Return the kind of a client that may be asked, of those that the method has."""
        ...

    def ask(
        self, round: int, clients: Sequence[int], message: bytes | Mapping[int, bytes], goal: int = 0
    ) -> Iterator[Answer]:
        """Send `message`, or each client its own, to these clients and yield their answers.

        With a `goal` the round is over when so many have replied, and the others are late.  A fleet that takes late
        replies also yields those to earlier rounds that have come by now.
        """
        ...

    def kept(self) -> Mapping[int, tuple[int, int]]:
        """Return client -> (round, CRC-32) of what each client stored last."""
        ...

    def check_kept(self, stated: Mapping[int, tuple[int, int]]) -> None:
        """Raise MessageError when what a checkpoint states of the clients' memories is not there."""
        ...

    def heard(self, reply: ClientReply) -> None:
        """Take note of what became of a client's reply."""
        ...

    def rewind(self, round: int) -> None:
        """Delete what clients stored after `round`; called before anything is asked (a resume)."""
        ...

    def forget_before(self, round: int) -> None:
        """Delete client memories that a newer one, not after `round`, replaces; no resume can need them."""
        ...
