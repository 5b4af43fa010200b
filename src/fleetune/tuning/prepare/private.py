# SPDX-License-Identifier: Apache-2.0
"""Decide how a recipe's differential privacy is kept: its noise, its clip and its delta, all before round 1.

What is decided is written into the recipe, so a resumed run has the same.  The clip, and learning rates, are found on held-out
rows: those are the server's own, and no part of the guarantee.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fleetune.common.display import counted
from fleetune.data import Encoded
from fleetune.errors import RecipeError
from fleetune.models.net.model import Model
from fleetune.tuning.exchange import accountant
from fleetune.tuning.exchange.aggregation import NOTHING, PRIVATE, Rule, parse
from fleetune.tuning.exchange.privacy import Privacy
from fleetune.tuning.methods import Method, norm
from fleetune.tuning.prepare.trial import Bench, restored
from fleetune.tuning.recipe.recipe import Recipe

if TYPE_CHECKING:
    from fleetune.tuning.prepare.prepare import TuneJob

NONE: Final = "none"  # of a recipe's `privacy`
FEWEST: Final = 10  # clients: the mean of fewer is lost in the noise that hides one of them
MOST: Final = 100.0  # epsilon: beyond it, nothing is promised
MEASURED: Final = 32  # held-out rows of the client whose reply decides the clip, at most
OPTIONS: Final = ("epsilon", "delta", "noise", "clip_norm")
PAGE: Final = "what is promised, and what it costs: docs/privacy.md"


def problems(recipe: Recipe) -> list[str]:
    """Say what is wrong with a recipe's privacy, whatever the number of its clients."""
    given = [name for name in OPTIONS if getattr(recipe, name)]
    if recipe.privacy == NONE:
        return [f"{given[0]} does nothing without privacy: add --privacy client"] if given else []
    found = []
    if not recipe.epsilon and not recipe.noise:
        found.append(
            "privacy = client needs a budget, such as --epsilon 8, or a noise multiplier, such as --noise 1"
        )
    if recipe.epsilon > MOST:
        found.append(
            f"epsilon = {recipe.epsilon:g} promises nothing: 8 is usual, 1 is strong, {MOST:g} is the most"
        )
    if recipe.aggregation != "mean":
        found.append(
            f"aggregation = {recipe.aggregation} compares single replies, which a private sum does not: leave aggregation out"
        )
    if recipe.over_selection > 1 or recipe.quorum > 1:
        found.append(
            "over_selection and quorum let replies decide whether others count, which privacy = client does not allow"
        )
    return found


def settled(recipe: Recipe, method: Method, clients: int) -> Recipe:
    """Return the recipe with the delta and the noise of so many clients; RecipeError for what cannot be kept."""
    if recipe.privacy == NONE:
        return recipe
    found = []
    if why := method.rule_problem(Rule(PRIVATE), clients):
        found.append(f"privacy = client does not fit method = {recipe.method!r}: {why}")
    if clients < FEWEST:
        found.append(
            f"privacy = client hides one of {counted(clients, 'client')}, and the mean of fewer than {FEWEST} is lost in the "
            "noise: it takes hundreds"
        )
    if clients and recipe.delta * clients >= 1:
        found.append(f"delta = {recipe.delta:g} must be below 1 / {clients:,} clients: leave it out")
    if found:
        raise RecipeError(found, hint=PAGE)
    accountant.version()
    delta = recipe.delta or float(f"{0.1 / clients:.3g}")
    try:
        noise = recipe.noise or accountant.noise_for(
            recipe.epsilon, recipe.participation, recipe.rounds, delta
        )
    except ValueError as error:
        raise RecipeError([str(error)], hint="raise --epsilon, or lower --rounds") from error
    if recipe.epsilon and accountant.epsilon(noise, recipe.participation, 1, delta) > recipe.epsilon:
        raise RecipeError(
            [f"noise = {noise:g} spends more than epsilon = {recipe.epsilon:g} in the first round"],
            hint="leave --noise out: it follows from the budget",
        )
    return replace(recipe, delta=delta, noise=noise, client_rows=0)


def mechanism(recipe: Recipe, clients: int) -> Privacy | None:
    """Return the mechanism of a settled recipe; None for none."""
    if recipe.privacy == NONE:
        return None
    return Privacy(
        recipe.clip_norm, recipe.noise, recipe.participation, clients, recipe.delta, recipe.epsilon or np.inf
    )


def rule_of(recipe: Recipe, clients: int) -> Rule:
    """Return how the replies of a settled recipe are combined."""
    privacy = mechanism(recipe, clients)
    return parse(recipe.aggregation) if privacy is None else Rule(PRIVATE, privacy=privacy)


def spent(privacy: Privacy, rounds: int) -> float:
    """Return epsilon after so many rounds."""
    return accountant.epsilon(privacy.noise, privacy.q, rounds, privacy.delta)


def rounds_within(privacy: Privacy, rounds: int) -> int:
    """Return how many of the rounds the budget allows."""
    return accountant.releases_within(privacy.epsilon, privacy.noise, privacy.q, rounds, privacy.delta)


def statement(privacy: Privacy, rounds: int) -> str:
    """Return what is guaranteed after so many rounds, for the console, the cards and the ledger's head."""
    return (
        f"differential privacy: epsilon {spent(privacy, rounds):.3g} at delta {privacy.delta:g} after "
        f"{counted(rounds, 'round')}, {privacy.text} ({accountant.version()}); held-out rows and settings are outside"
    )


def planned(job: TuneJob) -> str:
    """Return what a run is about to promise, and how loud its noise is, for its header."""
    recipe, privacy = job.recipe, mechanism(job.recipe, clients_of(job))
    assert privacy is not None
    rounds = rounds_within(privacy, recipe.rounds)
    how = f"sampled at {privacy.q:g}" if privacy.q < 1 else "all take part, so no amplification by sampling"
    last = "" if rounds == recipe.rounds else f", after which the budget of {privacy.epsilon:g} is spent"
    return (
        f"client level, epsilon {spent(privacy, rounds):.3g} at delta {privacy.delta:g} after {counted(rounds, 'round')}{last} · "
        f"{counted(privacy.clients, 'client')}, {how} · clip {privacy.clip:.3g}, noise multiplier {privacy.noise:.3g}"
    )


def clients_of(job: TuneJob) -> int:
    """Return N, the public number of clients."""
    return len(job.rows) or job.recipe.clients


def with_clip(recipe: Recipe, method: Method, model: Model, held: Sequence[Encoded]) -> Recipe:
    """Return the recipe with a clip: the norm of the reply of a client that has some held-out rows."""
    if recipe.privacy == NONE or recipe.clip_norm:
        return recipe
    bench, norms = Bench(model, [held[:MEASURED]], (), recipe.seed), Norms()
    with restored(model):
        state = bench.begin(method)
        method.aggregate(state, iter(bench.round(method, state, 1)), norms)
    if not norms.seen or not norms.seen[0]:
        raise RecipeError(
            ["no clip could be found: a client with held-out rows does not move the model"],
            hint="give one, --clip-norm, or raise the learning rate",
        )
    return dataclasses.replace(recipe, clip_norm=float(f"{norms.seen[0]:.3g}"))


@dataclass(frozen=True)
class Norms(Rule):
    """A rule that combines nothing: it writes down how far each reply goes, as `PrivateSum` measures it."""

    name: str = PRIVATE
    seen: list[float] = field(default_factory=list)

    def combining(
        self, start: Mapping[str, np.ndarray] = NOTHING, sums: Mapping[str, np.ndarray] = NOTHING
    ) -> Any:
        """Return a combination that stays at `start`."""
        return _Norm(self.seen, start)


@dataclass
class _Norm:
    seen: list[float]
    start: Mapping[str, np.ndarray]
    total = 1.0

    def add(self, n: float, tensors: Mapping[str, np.ndarray]) -> None:
        self.seen.append(norm(tensors[name] - np.asarray(t, np.float64) for name, t in self.start.items()))

    def tensors(self) -> Mapping[str, np.ndarray]:
        return self.start
