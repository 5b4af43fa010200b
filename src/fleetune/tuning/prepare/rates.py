"""Find a learning rate before round 1 (`lr=auto`; docs/learning_rate.md).

    rate_from        two-point descent along random directions: slope, noise and curvature give the rate (`seeds/slopes`)
    rate_at_server   the server steps by it: devices work once, the server's step is tried at many rates (`trial`)
    any other        one round of a few clients at each of some rates (`trial`)

A rate is rounded to 1, 1.5, 2, 3, 5 or 7 times a power of ten, so that machines with different float noise find the same.
"""

import dataclasses
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence, Set
from typing import Any, Final, NamedTuple

from fleetune.common.display import counted, human_time
from fleetune.common.events import RateFound
from fleetune.common.settings import AUTO, Setting
from fleetune.data import Encoded, keyed_order
from fleetune.errors import FAULTS, FleetuneError, RecipeError, fault
from fleetune.models.net.model import Model
from fleetune.seeds import slopes
from fleetune.seeds.noise import derive
from fleetune.tuning import methods
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.methods import Method
from fleetune.tuning.prepare import trial
from fleetune.tuning.prepare.estimate import Estimate
from fleetune.tuning.recipe.recipe import Recipe

log = logging.getLogger(__name__)

COARSE: Final = {"bf16": 2e-3}  # least perturbation: below, a second difference of losses is rounding
SERIES: Final = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)

Progress = Callable[..., None]  # as `Listener.progress`, while a rate is sought


def wanted(recipe: Recipe) -> list[str]:
    """Return the settings whose value is to be found: those that say auto, and those that are found unless given."""
    method = methods.make(recipe.method, recipe.set)
    return [
        s.name
        for s in methods.settings(recipe.method)
        if s.auto and s.has_effect(method) and recipe.set.get(s.name, AUTO if s.found else None) == AUTO
    ]


def problems(recipe: Recipe, method: Method) -> list[str]:
    """Say why a rate that is asked for by name cannot be found."""
    asked = [s for s in methods.settings(recipe.method) if recipe.set.get(s.name) == AUTO]
    idle = [s for s in asked if not s.has_effect(method)]
    if idle:
        return [f"{s.name}=auto does nothing: it is used only with {s.only_if}" for s in idle]
    objective = str(getattr(method, "objective", "loss"))
    if asked and objective != "loss" and method.has_own("rate_from"):
        name = asked[0].name
        return [
            f"{name}=auto is found from slopes of the loss, and the objective is {objective!r}: give a number"
        ]
    return []


def find(
    recipe: Recipe,
    names: Sequence[str],
    model: Model,
    rows: Sequence[Encoded],
    clients: int,
    progress: Progress = lambda *_: None,
    size: trial.Size = trial.WHOLE,
) -> tuple[Recipe, list[RateFound]]:
    """Return the recipe with the rates of these names (`wanted`), and how each was found.

    `rows` are training rows that the server has, `clients` is the number of those asked in a round.  `progress` is told
    how many losses of rows, or losses after trials, there were (of how many is not known of trials: 0).  `size` is how far
    trials on devices go.
    """
    found = []
    for name in names:
        try:
            done = _find(recipe, name, model, few(rows, recipe.seed), clients, progress, size)
        except FleetuneError:
            raise
        except FAULTS as error:
            log.warning("no %s could be found (%s): the published one is taken", name, fault(error))
            done = None
        if done is not None:
            recipe = dataclasses.replace(recipe, set={**recipe.set, name: done.rate})
            found.append(done)
    return recipe, found


def few(rows: Sequence[Encoded], seed: int) -> list[Encoded]:
    """Return some of the rows, in an order keyed by the seed."""
    order = keyed_order(derive(seed, "rate rows"), 0, len(rows))
    return [rows[i] for i in order[: slopes.DIRECTIONS * slopes.ROWS].tolist()]


def _find(
    recipe: Recipe,
    name: str,
    model: Model,
    rows: Sequence[Encoded],
    clients: int,
    progress: Progress,
    size: trial.Size,
) -> RateFound | None:
    began = time.perf_counter()
    switch = next(s.switch for s in methods.settings(recipe.method) if s.name == name)
    beside = {switch: 1} if switch else {}  # the rate of devices of one kind: all are of it in a trial

    def make(rate: float) -> Method:
        return methods.make(recipe.method, {**recipe.set, **beside, name: rate})

    method = methods.make(recipe.method, recipe.set)
    if method.has_own("rate_from") and not switch:
        if getattr(method, "objective", "loss") != "loss":
            return None
        found = from_slopes(method, name, model, rows, recipe.seed, clients, progress)
    else:
        found = from_trial(method, make, name, model, rows, recipe, clients, progress, size)
    return dataclasses.replace(found, seconds=round(time.perf_counter() - began, 3))


def from_slopes(
    method: Method,
    name: str,
    model: Model,
    rows: Sequence[Encoded],
    seed: int,
    clients: int,
    progress: Progress,
) -> RateFound:
    """Return the rate that slopes, noise and curvature along random directions give."""
    m: Any = method
    eps = max(m.eps, COARSE.get(model.dtype, 0.0))
    how = slopes.Probe(m.law, m.K, eps, derive(seed, "rate"), m.batch_size)
    points = slopes.measure(
        model,
        rows,
        how,
        lambda point: method.rate_from([point], clients),
        lambda done, total: progress(f"finding {name}", done, total, "losses of rows"),
    )
    rate = method.rate_from(points, clients)
    seen = max(points, key=lambda point: point.curvature)
    return RateFound(
        setting=name,
        rate=rounded(rate) if rate else float(m.lr),
        way="slopes",
        why=f"curvature {seen.curvature:,.0f} along a direction, {100 * seen.signal(m.batch_size):.0f} % of a squared slope "
        f"on {counted(m.batch_size, 'row')} is signal"
        if rate
        else "no slope beyond the noise of the rows: the published rate",
        seconds=0.0,
        slopes=[s for point in points for s in point.slopes] or None,
        curvatures=[c for point in points for c in point.curvatures] or None,
    )


def from_trial(
    method: Method,
    make: Callable[[float], Method],
    name: str,
    model: Model,
    rows: Sequence[Encoded],
    recipe: Recipe,
    clients: int,
    progress: Progress,
    size: trial.Size,
) -> RateFound:
    """Return the rate after which the loss on rows that were not trained on is lowest."""
    at_server = method.rate_at_server
    measured = itertools.count()
    bench = dataclasses.replace(
        bench_of(model, rows, recipe.seed, min(clients, trial.AT_SERVER if at_server else size.clients)),
        on_loss=lambda: progress(f"finding {name}", next(measured), 0, "losses after trials"),
    )
    first = trial.first_rate(method, name)

    def short(rate: float) -> Method:
        return make(rate) if at_server else shortened(make(rate), len(bench.clients[0]))

    trials = (trial.try_on_server if at_server else trial.try_on_devices)(bench, short, first)
    tried = trials.tried
    if not any(math.isfinite(t.loss) for t in tried):
        raise RecipeError(
            [f"no learning rate was found for {recipe.method}: after each of {len(tried)} the model is lost"],
            hint=f"give one: --set {name}=1e-4",
        )
    rate = rounded(trials.best())
    why = f"tried {len(tried)} rates for a round, from {tried[0].rate:.2g} to {tried[-1].rate:.2g}"
    if (moves := min(size.moves, recipe.rounds)) > 1:
        held = trial.hold(functools.partial(trial.loss_after, bench, short, moves, trials.start), rate)
        rate = rounded(trial.Trials(trials.start, sorted(held)).best())
        why += f"; {len(held)} for {moves}, from {held[-1].rate:.2g} to {held[0].rate:.2g}"
    elif recipe.rounds > 1:
        rate = rounded(rate / trial.FACTOR)
        why += "; a third of the best, which was not held for more rounds"
    rates, losses = [t.rate for t in tried], [t.loss for t in tried]
    return RateFound(setting=name, rate=rate, way="trial", why=why, seconds=0.0, rates=rates, losses=losses)


def bench_of(model: Model, rows: Sequence[Encoded], seed: int, clients: int) -> trial.Bench:
    """Return the bench of a trial on these rows: some are measured, the others shared out to so many clients."""
    measured = trial.aside(len(rows))
    parts = rows[measured:] or rows
    count = min(clients, len(parts))
    return trial.Bench(model, [parts[i::count] for i in range(count)], rows[:measured], seed)


def shortened(method: Method, rows: int) -> Method:
    """Return the method with at most `trial.STEPS` local steps."""
    if method.local_steps(rows) <= trial.STEPS:
        return method
    return method.sized(trial.STEPS, getattr(method, "batch_size", 8))


def rounded(rate: float) -> float:
    """Return the nearest of `SERIES` times a power of ten, by ratio."""
    if not 0 < rate < math.inf:
        return rate
    power = 10.0 ** math.floor(math.log10(rate))
    nearest = min(SERIES, key=lambda s: abs(math.log(rate / power / s)))
    return float(f"{nearest * power:.2g}")


LONG: Final = 20.0  # seconds of a search, from which on it is said how long it takes
SHARE: Final = 0.5  # of a run, that a search which nobody asked for takes at most
TRIED: Final = 6  # rates in a trial, as a rule
HELD: Final = 3  # of them that are held, as a rule
SIZES: Final = (trial.WHOLE, trial.Size(1), trial.Size(1, 1))


class Search(NamedTuple):
    """A search for learning rates before round 1."""

    names: tuple[str, ...]
    size: trial.Size
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
    recipe: Recipe, method: Method, setting: Setting, size: trial.Size, rows: int, asked: int
) -> tuple[int, int]:
    """Return how many local steps, and losses of rows, the search for one rate takes, about."""
    few = min(rows, slopes.DIRECTIONS * slopes.ROWS)
    if method.has_own("rate_from") and not setting.switch:
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


def told(
    names: Sequence[str], method: Method, search: Search | None, seconds: float, rows: str = "training"
) -> str:
    """Say that these rates are sought, how long that takes where it is long, or that the published ones are taken."""
    sought = " and ".join(names)
    if search is None:
        published = ", ".join(f"{name} = {trial.first_rate(method, name):g}" for name in names)
        return (
            f"{published} as published, not searched for: a search is long beside a run as short as this one; "
            f"--set {names[0]}=auto searches, --set {names[0]}=NUMBER is yours"
        )
    words = f"finding {sought} on {rows} rows"
    if seconds < LONG:
        return f"{words} .."
    return f"{words}: about {human_time(seconds)}; --set {names[0]}=NUMBER leaves the search out"


def for_clients(recipe: Recipe, method: Method, given: Set[str], clients: int) -> tuple[Recipe, Method]:
    """Return the run with the server's step for the mean of so many clients, unless that is given or is not their mean."""
    mean = aggregation.parse(recipe.aggregation).name in ("mean", "norm-clip")
    noisy = recipe.epsilon or recipe.noise  # the step would make the noise as many times as loud
    if noisy or not (mean and method.server_setting) or method.server_setting in given:
        return recipe, method
    method = method.for_clients(clients)
    return dataclasses.replace(recipe, set=methods.values_of(method)), method
