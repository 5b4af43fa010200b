# SPDX-License-Identifier: Apache-2.0
"""Count what a search for learning rates takes, and fit one that nobody asked for to its run.

A rate that is asked for (`lr=auto`), and one whose published value moves no small model (`rate_from`, `rate_at_server`), is
searched for however long that takes.  The published rate of a method whose devices back-propagate learns something: a
search for a better one takes at most half as long as the run: with one client, and for a single round, where more do not fit.
What is counted is steps, so that the same recipe is searched for everywhere; with `within`, its time counts too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence, Set
from typing import Final, NamedTuple

from fleetune.common.display import human_time
from fleetune.common.settings import Setting
from fleetune.seeds import slopes
from fleetune.tuning import methods
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.methods import Method
from fleetune.tuning.prepare.estimate import Estimate
from fleetune.tuning.prepare.rates import trial
from fleetune.tuning.prepare.rates.trial import Size
from fleetune.tuning.recipe.recipe import Recipe

LONG: Final = 20.0  # seconds of a search, from which on it is said how long it takes
SHARE: Final = 0.5  # of a run, that a search which nobody asked for takes at most
TRIED: Final = 6  # rates in a trial, as a rule
HELD: Final = 3  # of them that are held, as a rule
SIZES: Final = (trial.WHOLE, Size(1), Size(1, 1))


class Search(NamedTuple):
    """A search for learning rates before round 1."""

    names: tuple[str, ...]
    size: Size
    due: bool  # however long it takes
    steps: int  # local steps that it takes, about
    losses: int  # of rows

    def seconds(self, run: Estimate) -> float:
        """Return about how long it takes before a run whose step and evaluation take so long."""
        return self.steps * run.step + self.losses * run.evaluation / run.rows


def searches(
    recipe: Recipe,
    method: Method,
    names: Sequence[str],
    asked_for: Collection[str],
    rows: int,
    clients: int,
    asked: int,
) -> list[Search]:
    """Return the searches for these rates that may be made, the most thorough first; [] where the published are to be taken.

    `rows` are training rows in all, `clients` those of the fleet, `asked` those of a round.
    """
    if not names:
        return []
    due = bool(set(names) & set(asked_for)) or method.has_own("rate_from") or method.rate_at_server
    known = {s.name: s for s in methods.settings(recipe.method)}
    found = []
    for size in SIZES[: 1 if due else None]:
        parts = [_taken(recipe, method, known[name], size, rows, asked) for name in names]
        found.append(Search(tuple(names), size, due, *(sum(part) for part in zip(*parts, strict=True))))
    run = recipe.rounds * asked * method.local_steps(rows // max(1, clients))
    return [search for search in found if due or search.steps <= SHARE * run]


def _taken(
    recipe: Recipe, method: Method, setting: Setting, size: Size, rows: int, asked: int
) -> tuple[int, int]:
    """Return how many local steps, and losses of rows, the search for one rate takes, about."""
    few = min(rows, slopes.DIRECTIONS * slopes.ROWS)
    if method.has_own("rate_from") and not setting.only_if:
        measured = 2 * 3 * slopes.DIRECTIONS * min(slopes.ROWS, few)
        return 0, measured + 2 * slopes.STEPS * min(getattr(method, "batch_size", 1), slopes.ROWS, few)
    at_server, aside = method.rate_at_server, trial.aside(few)
    count = min(asked, trial.AT_SERVER if at_server else size.clients, max(1, few - aside))
    moves = min(size.moves, recipe.rounds)
    held = HELD * moves * (moves > 1)
    steps = method.local_steps((few - aside) // count)
    if at_server:
        return count * steps * (1 + held), aside * (2 + trial.FINE_TRIALS + held)
    return count * min(trial.STEPS, steps) * (TRIED + held), aside * (1 + TRIED + held)


def told(names: Sequence[str], method: Method, search: Search | None, run: Estimate | None) -> str:
    """Say that these rates are sought, how long that takes where it is long, or that the published ones are taken."""
    sought = " and ".join(names)
    if search is None:
        published = ", ".join(f"{name} = {trial.first_rate(method, name):g}" for name in names)
        return (
            f"{published} as published, not searched for: a search is long beside a run as short as this one; "
            f"--set {names[0]}=auto searches, --set {names[0]}=NUMBER is yours"
        )
    words = f"finding {sought} on training rows"
    if run is None or run.search < LONG:
        return f"{words} .."
    words += f": about {human_time(run.search)}"
    if run.search < (run.seconds - run.search) / 10:
        return words
    return (
        f"{words}, where the run takes about {human_time(run.seconds - run.search)}; "
        f"--set {names[0]}=NUMBER leaves the search out"
    )


def for_clients(recipe: Recipe, method: Method, given: Set[str], clients: int) -> tuple[Recipe, Method]:
    """Return the run with the server's step for the mean of so many clients, unless that is given or is not their mean."""
    mean = aggregation.parse(recipe.aggregation).name in ("mean", "norm-clip")
    if not (mean and method.server_setting) or method.server_setting in given:
        return recipe, method
    method = method.for_clients(clients)
    return dataclasses.replace(recipe, set=methods.values_of(method)), method
