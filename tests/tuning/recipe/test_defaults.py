"""Which rule combines the replies of real devices, and what is said of it."""

from typing import Any

import pytest

from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.defaults import about_rule, for_devices


def served(devices: int, method: str, *, ruled: bool = False, **values: Any) -> tuple[str, str]:
    """The rule of a recipe on so many devices, and the line at the start."""
    given = {name: values.pop(name) for name in ("aggregation", "participation") if name in values}
    recipe = recipes.make({"model": "m", "data": "d", "method": method, "set": values, **given})
    found = for_devices(recipe, devices, given if ruled else ())
    return found.aggregation, about_rule(found, devices)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        *dict.fromkeys(["fedit", "fedpetuning", "fedpeptao"], "median").items(),
        *dict.fromkeys(["mezo", "zosgd", "fedkseed", "onebyte", "fwdllm"], "norm-clip").items(),
    ],
)
def test_from_three_devices_on_a_recipe_without_a_rule_gets_one_against_liars(method, expected):
    rule, said = served(3, method)
    assert rule == expected
    counted = "every device counts once, whatever rows it claims; --aggr"
    assert said.startswith(f"mode robust: replies are combined by {rule}; {counted}")


@pytest.mark.parametrize(("wire", "expected"), [("byte", "norm-clip"), ("sign", "sign-vote")])
def test_votes_are_combined_by_a_rule_too(wire, expected):
    assert served(3, "onebyte", wire=wire)[0] == expected


@pytest.mark.parametrize(
    ("given", "named", "kept"),
    [({}, (), "best"), ({"keep": "last"}, ("keep",), "last"), ({"eval_every": 0}, (), "last")],
)
def test_devices_keep_the_best_round_unless_told_otherwise(given, named, kept):
    recipe = recipes.make({"model": "m", "data": "d", "method": "fedit", **given})
    assert for_devices(recipe, 3, named).keep == kept


@pytest.mark.parametrize(
    ("devices", "values", "why"),
    [
        (2, {"method": "fedit"}, "2 clients are asked in a round"),
        (8, {"method": "fedit", "participation": 0.25}, "2 clients are asked in a round"),
        (8, {"method": "fedit", "average": "product"}, "average=product has no coordinates"),
        (8, {"method": "fedkseed", "backprop": 0.5}, "a mixed fleet"),
    ],
)
def test_where_none_fits_the_mean_bounds_the_rows_and_says_why(devices, values, why):
    rule, said = served(devices, **values)
    assert rule == "mean:1"
    assert said.startswith(
        "mode open: replies are combined by mean:1 (weighted by rows, at most 1 times the "
    )
    assert f"no rule against liars fits: {why}" in said
    assert ("alone could back-propagate" in said) == ("backprop" in values)


def test_a_rule_that_is_given_stays_and_a_mean_is_bounded():
    assert served(8, "fedit", aggregation="median", ruled=True)[0] == "median"
    assert served(8, "fedit", aggregation="mean:9", ruled=True)[0] == "mean:9"
    rule, said = served(8, "fedit", aggregation="mean", ruled=True)
    assert rule == "mean:1"
    assert "where some may lie: --aggregation median" in said
