"""Decide how a recipe's differential privacy is kept (noise, clip, delta), and write it into the recipe before round 1.

Client level: the server adds the noise, once a round.  Example level: a client adds it in each local step, to the sum over a
Poisson sample of its rows.  The account is then that of the client with the fewest rows, which are sampled most often; who takes
part in a round is no secret, so every round counts.  A real device chooses the noise by its own rows, so that all rounds cost it
the run's epsilon, and counts them.  The clip and learning rates are found on the server's held-out rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final, Protocol

from fleetune.common.display import check_installed, counted
from fleetune.data import Encoded
from fleetune.errors import RecipeError, UsageError
from fleetune.models.net.model import Model
from fleetune.privacy import mechanism, secagg
from fleetune.privacy.mechanism import Measuring, Privacy, Sealed
from fleetune.tuning.exchange.aggregation import PRIVATE, Rule, parse
from fleetune.tuning.methods import Method
from fleetune.tuning.prepare.trial import Bench, restored
from fleetune.tuning.recipe.recipe import Recipe

NONE: Final = "none"  # of a recipe's `privacy`
CLIENT: Final = "client"
EXAMPLE: Final = "example"
SEALED: Final = "sealed"  # secure sums; with epsilon, at client level
BY_CLIENT: Final = (CLIENT, SEALED)
FEWEST: Final = 10  # clients: the mean of fewer is lost in the noise that hides one of them
MOST: Final = 100.0  # epsilon: beyond it, nothing is promised
MEASURED: Final = 32  # held-out rows on which the clip is found, at most
DELTA: Final = 1e-5  # of real devices' rows, which nobody has counted
STEPS: Final = 100_000  # of a device in a run, at most: the account of more takes minutes
TINY: Final = 1e-30  # clip while it is found
OPTIONS: Final = ("epsilon", "delta", "noise", "clip_norm")
TOO_LOUD: Final = 3.0
LOUD: Final = ": little can be learned; take more clients or rows, fewer numbers (K, r), or a larger epsilon"
PAGE: Final = "what is promised, and what it costs: fleetune help privacy"


class PrivateJob(Protocol):
    """What is needed of a job (`prepare.TuneJob`); `rows` are those of every client, where they are here."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def method(self) -> Method: ...
    @property
    def model(self) -> Model: ...
    @property
    def rows(self) -> Sequence[Sequence[Encoded]]: ...
    @property
    def held(self) -> list[Encoded]: ...


def problems(recipe: Recipe) -> list[str]:
    """Say what is wrong with a recipe's privacy, whatever the number of its clients."""
    given = [name for name in OPTIONS if getattr(recipe, name)]
    if recipe.privacy == NONE:
        return [f"{given[0]} does nothing without privacy: add --privacy client"] if given else []
    found, level = [], f"privacy = {recipe.privacy}"
    if not recipe.epsilon and not recipe.noise and recipe.privacy != SEALED:
        found.append(f"{level} needs a budget, such as --epsilon 8, or a noise multiplier, such as --noise 1")
    if recipe.epsilon > MOST:
        found.append(
            f"epsilon = {recipe.epsilon:g} promises nothing: 8 is usual, 1 is strong, {MOST:g} is the most"
        )
    if recipe.dedupe:
        found.append(f"dedupe lets the rows of one client decide about those of others, which {level} hides")
    if recipe.privacy in BY_CLIENT and recipe.aggregation != "mean":
        found.append(
            f"aggregation = {recipe.aggregation} compares single replies, which {level} hides: leave aggregation out"
        )
    if recipe.privacy in BY_CLIENT and (recipe.over_selection > 1 or recipe.quorum > 1):
        found.append(
            f"over_selection and quorum let replies decide whether others count, which {level} does not allow"
        )
    if recipe.privacy == SEALED and recipe.clients > secagg.MOST:
        found.append(
            f"privacy = sealed adds up {secagg.MOST:,} clients at most, and there are {recipe.clients:,}"
        )
    if recipe.privacy == SEALED and recipe.participation < 1:
        found.append(
            f"participation = {recipe.participation:g} is the server's to keep, which {level} does not trust: use 1"
        )
    return found


def is_accounted(recipe: Recipe) -> bool:
    """Tell whether a settled recipe spends a privacy budget; a secure sum without noise does not."""
    return recipe.privacy != NONE and not (recipe.privacy == SEALED and not recipe.noise)


def check(recipe: Recipe, method: Method, clients: int) -> None:
    """Raise RecipeError where so many clients cannot have the recipe's privacy."""
    if recipe.privacy == NONE:
        return
    found = []
    rule = Rule(PRIVATE) if recipe.privacy in BY_CLIENT else None
    if why := method.rule_problem(rule, clients) if rule else method.cannot_hide_rows():
        found.append(f"privacy = {recipe.privacy} does not fit method = {recipe.method!r}: {why}")
    noisy = recipe.privacy != SEALED or recipe.epsilon or recipe.noise
    if rule and noisy and clients < FEWEST:
        found.append(
            f"privacy = {recipe.privacy} hides one of {counted(clients, 'client')}, and the mean of fewer than {FEWEST} is lost "
            "in the noise: take hundreds, or --privacy example"
        )
    if recipe.privacy == SEALED and clients < secagg.FEWEST:
        found.append(
            f"privacy = sealed adds up {secagg.FEWEST} clients or more: the sum of {clients} shows each to the other"
        )
    if rule and recipe.delta * clients >= 1:
        found.append(f"delta = {recipe.delta:g} must be below 1 / {clients:,} clients: leave it out")
    if found:
        raise RecipeError(found, hint=PAGE)
    if recipe.privacy == SEALED:
        check_installed("a secure sum", "fleet", "cryptography")
    if recipe.privacy == EXAMPLE and recipe.dtype != "fp32":
        raise RecipeError(
            [
                f"dtype = {recipe.dtype} rounds a row's loss by the rows beside it, which {recipe.privacy} level does not allow"
            ],
            hint="use --dtype fp32",
        )
    if noisy:
        mechanism.accounting_version()


def least_of(clients: int) -> int:
    """Return how many of so many clients a secure sum has at least: two thirds."""
    return max(secagg.FEWEST, -(-2 * clients // 3))


def least_of_run(recipe: Recipe) -> int:
    """Return how many clients are in every sum that the server of a run sees; 0 where it sees each reply."""
    return least_of(recipe.clients) if recipe.privacy == SEALED else 0


@dataclass(frozen=True)
class Account:
    """The mechanism of a run, and how often it releases: of the client with the fewest rows where rows are hidden."""

    level: str
    privacy: Privacy
    per_round: int  # releases
    delta: float
    budget: float  # epsilon; infinity where only the noise was given
    own: int = 0  # rounds that cost real devices, which account for their rows themselves, the budget

    def spent(self, released: int) -> float:
        """Return epsilon after so many rounds were released, or one of them again."""
        if self.own:
            return self.budget if released else 0.0
        return mechanism.epsilon(self.privacy.noise, self.privacy.q, released * self.per_round, self.delta)

    def rounds_within(self, rounds: int, released: int = 0) -> int:
        """Return how many of the rounds the budget allows after so many that were released."""
        if self.own:
            return max(0, min(rounds, self.own - released))
        p, most = self.privacy, (released + rounds) * self.per_round
        allowed = mechanism.releases_within(self.budget, p.noise, p.q, most, self.delta) // self.per_round
        return max(0, allowed - released)

    def promise(self, rounds: int, released: int) -> str:
        """Return what is guaranteed after so many rounds, and so many releases of them."""
        what = {CLIENT: "client", SEALED: "client's reply"}.get(self.level, "row")
        each = "" if self.per_round == 1 else f" of {counted(self.per_round, 'step')}"
        return (
            f"epsilon {self.spent(released):.3g} at delta {self.delta:g} for adding or removing one {what}, after "
            f"{counted(rounds, 'round')}{each}"
            + (f" ({released} releases: a resume made some again)" if released > rounds else "")
        )

    def statement(self, rounds: int, released: int) -> str:
        """Return the whole guarantee, for the console, the cards and the ledger's head."""
        rows = "rows of a device" if self.own else "rows of the client with the fewest"
        what = "clients" if self.level in BY_CLIENT else rows
        return (
            f"differential privacy: {self.promise(rounds, released)}; {what}: {self.privacy.text} "
            f"({mechanism.accounting_version()}); held-out rows, numbers of rows and settings are outside"
        )


def account(job: PrivateJob, recipe: Recipe | None = None) -> Account | None:
    """Return the account of a settled job, or of it with another recipe; None where it has no privacy."""
    recipe, method, sizes = recipe or job.recipe, job.method, [len(rows) for rows in job.rows]
    if not is_accounted(recipe):
        return None
    budget = recipe.epsilon or float("inf")
    if recipe.privacy in BY_CLIENT:
        return Account(recipe.privacy, by_client(recipe, clients_of(job)), 1, recipe.delta, budget)
    if not sizes:
        theirs = Privacy(recipe.clip_norm, 0.0, 0.0, 0)
        return Account(recipe.privacy, theirs, 1, recipe.delta, budget, recipe.rounds)
    # rows of the fewest are sampled most: with the most steps, no client's account is more
    steps = max(map(method.local_steps, sizes))
    return Account(recipe.privacy, of_rows(recipe, method, min(sizes)), steps, recipe.delta, budget)


def by_client(recipe: Recipe, clients: int) -> Privacy:
    """Return the mechanism of a round of so many clients."""
    if recipe.privacy == SEALED:
        return Sealed(recipe.clip_norm, recipe.noise, 1.0, clients, least_of(clients))
    return Privacy(recipe.clip_norm, recipe.noise, recipe.participation, clients)


def of_rows(recipe: Recipe, method: Method, n: int) -> Privacy:
    """Return the mechanism of a local step of a client with n rows."""
    return Privacy(recipe.clip_norm, recipe.noise, sampled(method, n), n)


def sampled(method: Method, n: int) -> float:
    """Return q, with which each of n rows is in a step."""
    return min(1.0, getattr(method, "batch_size", 8) / n)


def own_of(method: Method, n: int, clip: float, epsilon: float, delta: float, rounds: int) -> Privacy:
    """Return the mechanism by which a device with n rows spends at most epsilon in so many rounds; UsageError for none."""
    steps, why = rounds * method.local_steps(n), method.cannot_hide_rows()
    if why or delta * n >= 1 or not 0 < steps <= STEPS:
        why = why or f"delta is {delta:g} for {n:,} rows, and {steps:,} steps of {STEPS:,} at most"
        raise UsageError(f"the run cannot hide each of this device's rows: {why}", hint=PAGE)
    return Privacy(clip, mechanism.noise_for(epsilon, q := sampled(method, n), steps, delta), q, n)


def rule_of(job: PrivateJob) -> Rule:
    """Return how the replies of a settled job are combined."""
    if job.recipe.privacy not in BY_CLIENT:
        return parse(job.recipe.aggregation)
    return Rule(PRIVATE, privacy=by_client(job.recipe, clients_of(job)))


def sealed_of(job: PrivateJob) -> Sealed | None:
    """Return how the replies of a settled job are added up; None where that is by no secure sum."""
    privacy = rule_of(job).privacy
    return privacy if isinstance(privacy, Sealed) else None


def settled(job: PrivateJob, *, find: bool, note: Callable[[str], None]) -> Recipe:
    """Return the recipe with its delta, its noise and, where it is to be found, its clip; RecipeError for what cannot be kept.

    `note` is told how loud the noise is.
    """
    recipe = job.recipe
    if recipe.privacy == NONE:
        return recipe
    hidden = clients_of(job) if recipe.privacy in BY_CLIENT else sum(map(len, job.rows))
    if not hidden:  # no rows are here: each device finds its own noise
        recipe = replace(recipe, delta=recipe.delta or DELTA)
    elif recipe.epsilon or recipe.noise:
        recipe = replace(recipe, delta=recipe.delta or float(f"{0.1 / hidden:.3g}"))
        recipe = _with_noise(job, recipe, hidden)
        if job.recipe.noise and job.recipe.clip_norm and not find:  # as of a run that is resumed
            return recipe
    if recipe.clip_norm and not recipe.noise:
        return recipe
    measured = _measured(job)
    if recipe.noise and (found := account(job, recipe)) is not None:
        numbers, privacy = measured.sizes[0], found.privacy
        loud = privacy.noise * math.sqrt(numbers) / (privacy.q * privacy.N)
        note(
            f"privacy: noise of multiplier {privacy.noise:g} on {counted(numbers, 'number')}, {loud:.2g} times as long as "
            "the clip" + (LOUD if loud > TOO_LOUD else "")
        )
    if not find or recipe.clip_norm:
        return recipe
    return replace(recipe, clip_norm=float(f"{median(filter(None, measured.seen)):.3g}"))


def _with_noise(job: PrivateJob, recipe: Recipe, hidden: int) -> Recipe:
    """Return the recipe with its noise; RecipeError where its budget and its delta cannot be kept."""
    if recipe.delta * hidden >= 1:
        raise RecipeError(
            [f"delta = {recipe.delta:g} must be below 1 / {hidden:,} rows: leave it out"], hint=PAGE
        )
    plain = account(job, replace(recipe, noise=1.0))
    assert plain is not None
    q, releases = plain.privacy.q, recipe.rounds * plain.per_round
    try:
        noise = recipe.noise or mechanism.noise_for(recipe.epsilon, q, releases, recipe.delta)
    except ValueError as error:
        raise RecipeError([str(error)], hint="raise --epsilon, or lower --rounds") from error
    given = recipe.noise and recipe.epsilon
    if given and mechanism.epsilon(noise, q, plain.per_round, recipe.delta) > recipe.epsilon:
        raise RecipeError(
            [f"noise = {noise:g} spends more than epsilon = {recipe.epsilon:g} in the first round"],
            hint="leave --noise out: it follows from the budget",
        )
    return replace(recipe, noise=noise)


def _measured(job: PrivateJob) -> Measuring:
    """Return what is seen of the reply of a client that has some held-out rows, or of each of these rows in its first step."""
    recipe, held = job.recipe, job.held[:MEASURED]
    measured = Measuring(TINY, 1.0, 1.0, len(held))
    bench, by_client = Bench(job.model, [held], (), recipe.seed), recipe.privacy in BY_CLIENT
    with restored(job.model):
        state = bench.begin(job.method)
        replies = bench.round(job.method, state, 1, None if by_client else measured)
        if by_client:
            job.method.aggregate(state, iter(replies), Rule(PRIVATE, privacy=measured))
    if not any(measured.seen):
        raise RecipeError(
            ["no clip could be found: held-out rows do not move the model"],
            hint="give one, --clip-norm, or raise the learning rate",
        )
    return measured


def planned(job: PrivateJob, done: int, released: int) -> str:
    """Return what a run is about to promise, for its header: so many rounds are done, in so many releases."""
    found, rounds = account(job), job.recipe.rounds
    assert found is not None
    left = found.rounds_within(rounds - done, released)
    last = "" if done + left == rounds else f", after which the budget of {found.budget:g} is spent"
    plain = "" if found.privacy.q < 1 else "; no amplification by sampling"
    return f"{found.promise(done + left, released + left)}{last} · {found.privacy.text}{plain}"


def clients_of(job: PrivateJob) -> int:
    """Return N, the public number of clients."""
    return len(job.rows) or job.recipe.clients
