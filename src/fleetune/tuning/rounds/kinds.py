# SPDX-License-Identifier: Apache-2.0
"""Say of which kind each client of a fleet is: one that back-propagates, or one that only runs the model forward.

A recipe wants kinds by the clients' numbers: as the method spreads them, or as its option `kinds` lists them.  A simulated
client is of the kind that is wanted.  A real device is of a kind that fits its memory (`Assignment`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from fleetune.tuning.methods import Method


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


def problem(method: Method, listed: str) -> str:
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
