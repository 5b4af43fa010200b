"""Fill in the defaults that a recipe leaves open: settings of its method, and on real devices the rule."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Final

from fleetune.errors import FleetuneError, RecipeError
from fleetune.tuning import methods
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe
from fleetune.tuning.rounds.rounds import share_of

# The first that fits (docs/safety.md).  Adapters: median first, because under clipping one liar in three still leads.
# Ledgers: norm-clip first, because the median of noisy slopes learns less.
DEFAULT_RULES: Final = {"adapter": ("median", "norm-clip"), "ledger": ("norm-clip", "sign-vote")}
FOUND: Final = ("iid", "column:client")  # what `partition = auto` becomes


def for_devices(recipe: Recipe, devices: int, named: Collection[str]) -> Recipe:
    """Return the recipe as so many real devices run it, some of which may lie; the user gave the options `named`.

    Without a rule, the recipe gets one of `DEFAULT_RULES`; a plain mean gets bounded weights, since devices state their own
    rows.  Without `keep`, the best round is kept, so no liar makes the result worse than the start.
    """
    keep = recipe.keep if "keep" in named or not recipe.eval_every else "best"
    if recipe.privacy == "example":
        if recipe.noise or not recipe.epsilon:
            raise RecipeError(
                ["real devices choose the noise for their rows themselves, from a budget"],
                hint="--privacy example --epsilon 8, without --noise",
            )
        recipe = dataclasses.replace(recipe, clients=devices)
    elif recipe.privacy != "none":  # every device counts once; N is what the recipe says from now on
        return dataclasses.replace(recipe, clients=devices, keep=keep)
    rule = (
        aggregation.parse(recipe.aggregation) if "aggregation" in named else default_rule(recipe, devices)[0]
    )
    rule = aggregation.Rule(times=aggregation.ONCE) if rule == aggregation.MEAN else rule
    return dataclasses.replace(recipe, aggregation=rule.text, keep=keep)


def default_rule(recipe: Recipe, devices: int) -> tuple[aggregation.Rule, str]:
    """Return the first of `DEFAULT_RULES` that fits the method and so many devices; or the mean, and why none fits."""
    method, asked = methods.make(recipe.method, recipe.set), share_of(devices, recipe.participation)
    names = DEFAULT_RULES[methods.entry(recipe.method).kind]
    why = [method.rule_problem(aggregation.Rule(name), asked) for name in names]
    fitting = [name for name, problem in zip(names, why, strict=True) if not problem]
    return (aggregation.Rule(fitting[0]), "") if fitting else (aggregation.MEAN, why[0])


def about_rule(recipe: Recipe, count: int) -> str:
    """Return the mode of a run with so many devices: which rule combines replies; for a mean, why none against liars does."""
    if recipe.privacy == "sealed":
        return (
            "mode sealed: this server sees sums of replies and never one; every device counts once, and proves nothing "
            "(fleetune help privacy)"
        )
    if recipe.privacy == "client":
        return (
            "mode private: replies are summed with noise, so that what is published hides each device; every one counts once, "
            "within its clip (fleetune help privacy)"
        )
    rule = aggregation.parse(recipe.aggregation)
    if rule.name != aggregation.MEAN.name:
        return (
            f"mode robust: replies are combined by {rule.text}; every device counts once, whatever rows it claims; "
            "--aggregation mean weighs by rows (fleetune help safety)"
        )
    bound = "of any number" if rule == aggregation.MEAN else f"at most {rule.times:g} times the median's"
    other, why = default_rule(recipe, count)
    more = f"no rule against liars fits: {why}" if why else f"where some may lie: --aggregation {other.text}"
    if len(methods.make(recipe.method, recipe.set).kind_names) > 1:
        more += "; a device that alone could back-propagate takes two-point steps"
    return f"mode open: replies are combined by {rule.text} (weighted by rows, {bound}); {more} (fleetune help safety)"


def options_of(recipe: Recipe) -> dict[str, Any]:
    """Return all options by name, those of the method as `set.NAME`."""
    plain = dataclasses.asdict(recipe)
    chosen: Mapping[str, Any] = plain.pop("set")
    return plain | {f"set.{name}": value for name, value in chosen.items()}


def settled_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options, named as by `options_of`, with what they leave open written out; those that no method takes stay."""
    found = dict(options)
    given = {name.removeprefix("set."): v for name, v in found.items() if name.startswith("set.")}
    try:
        method = methods.make(str(found.get("method")), given).written_out()
        usual = _usual_clients(str(found.get("method")), str(found.get("partition")))
    except FleetuneError:
        return found
    found |= {"clients": found["clients"] or usual} if "clients" in found else {}
    return found | {f"set.{name}": value for name, value in methods.values_of(method).items()}


def given(recipe: Recipe) -> list[str]:
    """Return the options whose values are not the defaults of this version, by name."""
    usual = {name: default for name, (_, default, _) in recipes.fields().items() if name != "set"}
    method = methods.make(recipe.method, {}).written_out()
    usual |= {f"set.{name}": value for name, value in methods.values_of(method).items()}
    # 0 where one follows
    written = usual | {f"set.{s.name}": s.default for s in methods.settings(recipe.method)}
    clients = _usual_clients(recipe.method, recipe.partition)
    return [
        name
        for name, value in options_of(recipe).items()
        if value not in (usual.get(name), written.get(name))
        and not (name == "clients" and value == clients)
        and not (name == "partition" and value in FOUND)
    ]


def _usual_clients(method: str, partition: str) -> int:
    return 0 if partition.startswith("column") else methods.entry(method).clients
