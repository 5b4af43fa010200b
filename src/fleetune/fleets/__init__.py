# SPDX-License-Identifier: Apache-2.0
"""Fleets: where a round's local work is done.

A fleet has the clients' row counts and one function: `ask(round, clients, message)` gives an `Answer` for
every client asked, one at a time, as they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol


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

    def memories(self) -> dict[int, dict[str, Any]]:
        """What methods keep on the clients, for the checkpoint (a real fleet keeps it on the devices: {})."""
        ...

    def restore(self, memories: dict[int, dict[str, Any]]) -> None:
        """Put such memories back after a resume."""
        ...
