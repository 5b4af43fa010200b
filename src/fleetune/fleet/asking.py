# SPDX-License-Identifier: Apache-2.0
"""Keep the state of a round that real devices are asked for: who is waited for, who is at work, who has declined.

A client is in one of these at a time, until the round has its answer or goes on without:

    waiting      not asked yet: it is away, or takes in the job
    sent         it has its order, by the order's number
    declined     it has said that it cannot work now; held until some device has worked, since where all decline they are
                 asked again
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from fleetune.fleet.orders import Order

WORD: Final = 30.0  # seconds of waiting, after which it is said for whom
SHOWN: Final = 5  # names in that word


class Declined(NamedTuple):
    """When a device has declined, and why."""

    since: float
    reason: str


@dataclass
class Asking:
    """A round in progress; `goal` is the number of replies that end it, 0: all."""

    round: int
    orders: Mapping[int, Order]  # by client
    goal: int = 0
    at_once: int = 0  # how many may be at work, 0 for any number
    room: int = 0  # bytes that an answer may have, 0: the usual
    replies: int = 0  # that have come
    heard: int = 0  # devices that have worked for this round, well or not
    over: bool = False  # its time is up
    began: float = field(default_factory=time.monotonic)
    waiting: dict[int, float] = field(init=False)  # client -> since when it is waited for
    sent: dict[str, int] = field(init=False, default_factory=dict)  # number of an order -> client
    times: dict[int, int] = field(init=False, default_factory=dict)  # client -> how often it was asked
    declined: dict[int, Declined] = field(init=False, default_factory=dict)
    next_word: float = field(init=False)  # when to say who is waited for

    def __post_init__(self) -> None:
        self.waiting = dict.fromkeys(self.orders, self.began)
        self.next_word = self.began + WORD

    def goes_on(self) -> bool:
        """Tell whether the round is to be waited for."""
        if self.over or (self.goal and self.replies >= self.goal):
            return False
        return bool(self.waiting or self.sent or self.declined)

    def given(self, client: int, number: str) -> None:
        """Note that a client was given its order."""
        del self.waiting[client]
        self.sent[number] = client
        self.times[client] = self.times.get(client, 0) + 1

    def lost(self, numbers: Iterable[str]) -> None:
        """Note that the devices of these orders have gone, or come in anew, so that they are asked again."""
        for number in numbers:
            self.waiting[self.sent.pop(number)] = time.monotonic()

    def answered(self, number: str, *, lost: bool) -> int | None:
        """Note that an order is answered, or that its answer was lost; its client, None for an order of no client."""
        client = self.sent.pop(number, None)
        if client is not None and lost:
            self.waiting[client] = time.monotonic()
        return client

    def decline(self, client: int, reason: str) -> None:
        """Note that a client that had its order has declined."""
        self.declined[client] = Declined(time.monotonic(), reason)

    def ask_again(self, seconds: float) -> None:
        """Let those that declined so long ago be asked again."""
        for client, found in list(self.declined.items()):
            if time.monotonic() - found.since > seconds:
                del self.declined[client]
                self.waiting[client] = time.monotonic()

    def word(self, name: Callable[[int], str]) -> Iterator[str]:
        """Yield, when it is time, for whom the round waits; `name` gives a client's name."""
        if time.monotonic() <= self.next_word:
            return
        self.next_word += WORD
        does = dict.fromkeys(self.waiting, "away") | dict.fromkeys(self.sent.values(), "at work")
        does |= {client: f"declined: {found.reason}" for client, found in self.declined.items()}
        shown = [f"{name(c)} ({does[c]})" for c in sorted(does)[:SHOWN]]
        more = f" and {len(does) - SHOWN} more" if len(does) > SHOWN else ""
        few = f"{self.goal - self.replies} of " if self.goal else ""
        yield f"round {self.round}: waiting for {few}{', '.join(shown)}{more}"
