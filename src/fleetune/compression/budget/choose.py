# SPDX-License-Identifier: Apache-2.0
"""Choose an option for each matrix: the least sum of costs whose bytes keep within a budget.

Of each matrix only the options on the lower convex hull of cost over bytes are taken: each saves less for a byte than the one
before it.  All matrices start with the smallest, and the step that saves most for a byte is taken next, while it fits.  As
long as every step fits, that is optimal for the bytes that it uses (Everett 1963); the last steps fill what is left.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from fleetune.compression.budget.costs import Option


def hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of cost over bytes, by bytes."""
    found = list[Option]()
    for option in sorted(options, key=lambda o: (o.bytes, o.cost)):
        if found and option.cost >= found[-1].cost:
            continue
        while len(found) > 1 and _saved(found[-2], found[-1]) <= _saved(found[-2], option):
            found.pop()
        found.append(option)
    return found


def _saved(small: Option, large: Option) -> float:
    """Return how much cost each further byte saves."""
    return (small.cost - large.cost) / (large.bytes - small.bytes)


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """Return an option for each name, of at most `budget` bytes together; ValueError where even the smallest take more."""
    hulls = {name: hull(each) for name, each in options.items()}
    chosen = {name: each[0] for name, each in hulls.items()}
    left = budget - sum(o.bytes for o in chosen.values())
    if left < 0:
        raise ValueError(f"{budget} bytes are too few")
    steps = [(-_saved(each[0], each[1]), name, 1) for name, each in hulls.items() if len(each) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, to = heapq.heappop(steps)
        each = hulls[name]
        if (more := each[to].bytes - each[to - 1].bytes) > left:
            continue  # a smaller matrix may still fit
        left -= more
        chosen[name] = each[to]
        if to + 1 < len(each):
            heapq.heappush(steps, (-_saved(each[to], each[to + 1]), name, to + 1))
    return chosen
