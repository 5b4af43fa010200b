# SPDX-License-Identifier: Apache-2.0
"""Fleets: where a round's local work is done.

A fleet has the clients' row counts and one function: `ask(round, clients, message)` gives an `Answer` for
every client asked, one at a time, as they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol


class Answer(NamedTuple):
    """What came back from one client: bytes, or why not."""

    client: int
    key: int
    data: bytes | None
    status: str  # ok | dropped | late | failed
    reason: str
    seconds: float
    sent: int  # bytes that went down to it


class Fleet(Protocol):
    """Anything that can run `Method.local` for its clients."""

    @property
    def rows(self) -> Sequence[int]:
        """Rows of every client."""
        ...

    def ask(
        self, round: int, clients: Sequence[int], message: bytes | Mapping[int, bytes]
    ) -> Iterator[Answer]:
        """Send `message`, or each client its own, to these clients and yield their answers."""
        ...

    def rewind(self, round: int) -> None:
        """Before anything is asked: what clients kept after `round` is to be forgotten (a resume)."""
        ...

    def forget_before(self, round: int) -> None:
        """No run will go back further than `round`: what clients kept before may go where it was replaced."""
        ...
