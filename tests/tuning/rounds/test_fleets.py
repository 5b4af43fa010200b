# SPDX-License-Identifier: Apache-2.0
"""Which client does which kind of work: what a recipe wants, and what devices that cannot do all are given."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.errors import RecipeError
from fleetune.tuning import methods
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.rounds.fleets import Assignment, Wanted, wanted


def mixed(percent: int) -> Wanted:
    return wanted(methods.make("fedkseed", {"backprop": percent / 100}), "")


@settings(max_examples=30)
@given(st.integers(1, 100), st.integers(1, 60))
def test_where_all_can_do_all_each_does_what_is_wanted(percent: int, count: int) -> None:
    kinds = mixed(percent)
    assignment = Assignment(kinds)
    assert [assignment.next((0, 1)) for _ in range(count)] == [kinds.of(c) for c in range(count)]


@settings(max_examples=40)
@given(st.integers(1, 99), st.lists(st.booleans(), max_size=40), st.integers(0, 40))
def test_the_share_is_not_passed_and_is_reached_as_soon_as_devices_can(
    percent: int, able: list[bool], restart: int
) -> None:
    """An assignment that goes on from what was given, as after a restart of the server, gives the same."""
    kinds, given = mixed(percent), list[int]()
    assignment = Assignment(kinds)
    for place, both in enumerate(able):
        if place == restart:
            assignment = Assignment(kinds, given)
        given.append(assignment.next((0, 1) if both else (0,)))
        most = sum(kinds.of(c) for c in range(place + 1))
        assert sum(given) <= most
        assert given[-1] <= both
        assert sum(given) == most or not both or given[-1] == 1


def test_a_list_is_repeated_over_the_clients() -> None:
    method = methods.make("fedkseed", {"backprop": 0.5})
    assert [wanted(method, "0, 1,1").of(c) for c in range(7)] == [0, 1, 1, 0, 1, 1, 0]
    assert [wanted(method, "").of(c) for c in range(4)] == [0, 1, 0, 1]
    assert wanted(method, "").names == ("two-point steps", "back-propagation")
    ranks = methods.make("fedit", {"average": "product", "ranks": "2,8"})
    assert wanted(ranks, "").names == ["rank 2", "rank 8"]
    assert [wanted(ranks, "").of(c) for c in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("method", "values", "kinds", "problem"),
    [
        ("mezo", {}, "0", "all clients are of one kind"),
        ("fedkseed", {}, "0,1", "all clients are of one kind"),
        ("fedkseed", {"backprop": 0.5}, "0,2", "numbers from 0 to 1"),
        ("fedkseed", {"backprop": 0.5}, "0,,1", "numbers from 0 to 1"),
        ("fedkseed", {"backprop": 0.5}, "two", "numbers from 0 to 1"),
        ("fedkseed", {"backprop": 0.5}, "0, 1,1", ""),
    ],
)
def test_a_list_that_cannot_be_is_refused(
    method: str, values: dict[str, Any], kinds: str, problem: str
) -> None:
    recipe = recipes.make({"model": "m", "data": "d", "method": method, "set": values, "kinds": kinds})
    if not problem:
        prepare.check(recipe)
        return
    with pytest.raises(RecipeError, match=problem):
        prepare.check(recipe)
