"""Estimate the time of a simulated run from measured steps before it begins, and fit a run into a stated time.

An answer counts with all the tokens that it may have.  Work that is not steps (a FedPepTAO client's curvature) is not counted.
In a mixed fleet every client counts as one of the first's kind.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from fleetune.common.display import counted, human_time
from fleetune.data import Encoded, Example
from fleetune.errors import FAULTS, FitError, FleetuneError, RecipeError, fault
from fleetune.evaluation import objectives
from fleetune.evaluation.answers import generate
from fleetune.tuning import methods
from fleetune.tuning.prepare.trial import Bench, restored
from fleetune.tuning.recipe.recipe import Recipe
from fleetune.tuning.rounds import rounds

if TYPE_CHECKING:
    from fleetune.models.net.model import Model

USUAL_CLIENT_ROWS: Final = 4  # rows of a client, unless the recipe says otherwise
LEAST_CLIENT_ROWS: Final = 2  # and that few in a short run
MOST_CLIENTS: Final = 64  # more are not measured, unless the recipe asks for more rows than usual
CLIENT_ROWS_SHARE: Final = 0.05  # of the forward passes of a run, which its usual measures may take
PASSES: Final = 3  # forward passes that a training row costs at least, its backward pass counted as two


def client_rows_of_each(recipe: Recipe, sizes: Sequence[int]) -> int:
    """Return how many rows of a client are measured at most, for clients with so many rows: usually `CLIENT_ROWS_SHARE`.

    Both measures together are two passes of a row; at least `LEAST_CLIENT_ROWS`, since one row says nothing.  0 where the recipe
    wants none, or there are no simulated clients, or too many.
    """
    usual = recipe.client_rows <= USUAL_CLIENT_ROWS
    if not recipe.client_rows or len(sizes) < 2 or (usual and len(sizes) > MOST_CLIENTS):
        return 0
    asked = len(rounds.sample(range(len(sizes)), recipe.participation, recipe.seed, 1))
    trained = recipe.rounds * asked * float(np.mean(sizes)) * PASSES
    fitting = max(LEAST_CLIENT_ROWS, int(CLIENT_ROWS_SHARE * trained / (2 * len(sizes))))
    return min(recipe.client_rows, fitting) if usual else recipe.client_rows


log = logging.getLogger(__name__)

LONG: Final = 3600.0  # seconds of a run beyond which it is said what would make it shorter
ENOUGH: Final = 0.3  # seconds of timing, after which no more is measured
REPEATS: Final = 3
SLOW: Final = 1.0  # seconds of a first call after which there is no second: a step before it has warmed up
WARMING: Final = 60.0  # the same of what nothing has warmed up: the very first step, which may compile kernels, and answers
ROWS: Final = 8  # whose loss is timed
TIMED: Final = 0.125  # of a stated time, which timing takes at most, unless one step takes longer
SPARE: Final = 0.8  # of a stated time is planned for
FEW_STEPS: Final = 4  # of a client in a round: rather than fewer, fewer rounds, clients, then rows of a step
FEW_ROUNDS: Final = 3
FEW_CLIENTS: Final = 2  # where replies are compared with each other, or noise is shared
SMALLEST_BATCH: Final = 2
HALF_BATCH: Final = 0.6  # of a step's time that one of half as many rows takes
TOO_FEW: Final = 8  # steps after each other from which nobody can tell whether a model learns
MEASURED: Final = 0.2  # of the planned time, which evaluations and what is around the rounds take at most
FEWEST_ROWS: Final = 16  # of an evaluation
SHORT: Final = 32  # tokens of an answer, below which answers become fewer
TOKENS: Final = 4  # of an answer that are timed, after the first
ANSWERED: Final = 8  # prompts at a time, as `answers.generate` has them


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The size of a run, and its time on this machine."""

    rounds: int
    clients: int  # asked in a round
    steps: float  # local steps of a client in a round, in the mean
    step: float  # seconds
    evaluations: int
    evaluation: float  # seconds
    rows: int = 1  # of an evaluation
    answers: int = 0  # prompts that are answered, before the run and after it
    answer: float = 0.0  # seconds
    client_rows: int = 0  # of all clients, whose loss is measured before the run and after it
    client_row: float = 0.0  # seconds
    search: float = 0.0  # seconds of a search for a learning rate, before the run
    twice: bool = False  # whether a step computes activations twice, for want of memory
    batch: int = 8  # rows of a step
    ends: int = 2  # how often there are answers and losses of each client: before the run and after it
    tokens: int = 96  # of an answer

    @property
    def few(self) -> tuple[int, int]:
        """Rounds, and steps of a client in each, as many after each other as in `FEW_ROUNDS` of `FEW_STEPS` where there are."""
        steps = min(FEW_STEPS, math.ceil(self.steps))
        return min(self.rounds, math.ceil(FEW_ROUNDS * FEW_STEPS / steps)), steps

    @property
    def training(self) -> float:
        """Seconds of all local steps."""
        return self.rounds * self.clients * self.steps * self.step

    @property
    def around(self) -> float:
        """Seconds of what is done once before the rounds and once after them: answers, and the losses of each client."""
        return self.ends * (self.answers * self.answer + self.client_rows * self.client_row)

    @property
    def seconds(self) -> float:
        """Seconds of the run, with the search before it."""
        return self.training + self.evaluations * self.evaluation + self.around + self.search

    @property
    def text(self) -> str:
        """Write it for the header: "about 12 min: 10 rounds x 8 clients x 10 steps of 0.4 s"."""
        number = f"{self.steps:,.3g}" if self.steps < 10 else f"{self.steps:,.0f}"
        steps = f"{number} step" + "s" * (self.steps != 1)
        more = f", {counted(self.ends * self.answers, 'answer')} of {_short(self.answer)}" * bool(
            self.answers
        )
        if rows := self.ends * self.client_rows:
            more += f", {counted(rows, 'row')} of clients of {_short(self.client_row)}"
        if self.search:
            more += f", after {human_time(self.search)} of finding a learning rate"
        step = _short(self.step) + " with activations computed twice" * self.twice
        return (
            f"about {human_time(max(self.seconds, 0.1))}: {counted(self.rounds, 'round')} × {counted(self.clients, 'client')} × "
            f"{steps} of {step}, and {counted(self.evaluations, 'evaluation')} of {_short(self.evaluation)}{more}"
        )


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def of(
    recipe: Recipe,
    method: methods.Method,
    model: Model,
    rows: Sequence[Sequence[Encoded]],
    held: Sequence[Encoded],
    prompts: Sequence[Example] = (),
    most: float = math.inf,
) -> Estimate | None:
    """Time a step, an evaluation and an answer of a run whose clients have these rows; the model is left as it was.

    `held` are the rows of an evaluation, `prompts` those that are answered before and after; `most` seconds are taken, or as
    long as one step takes: where none are left, a pass counts as half a step, and an answer as one pass a token.  None where a
    step fails: the run itself says why, and for which clients.  If the method refuses the model, that error is raised, since no
    client could begin.
    """
    asked = len(rounds.sample(range(len(rows)), recipe.participation, recipe.seed, 1, recipe.over_selection))
    steps = float(np.mean([method.local_steps(len(part)) for part in rows]))
    usual = sorted(rows, key=len)[len(rows) // 2]
    bench = Bench(model, [usual], held[:ROWS], recipe.seed)
    batch = int(getattr(method, "batch_size", 8))
    one, state, end = method.sized(1, batch), None, time.perf_counter() + most
    try:
        with restored(model):
            state = bench.begin(one)
            step = _timed(lambda: bench.round(one, state, 1), min(WARMING, most / 2))
    except FAULTS as error:
        if state is None and isinstance(error, FleetuneError):
            raise
        log.info("the time cannot be estimated: %s", fault(error))
        return None
    row = step / batch / 2 if time.perf_counter() + step / 2 > end else _timed(bench.loss) / len(held[:ROWS])
    left = end - time.perf_counter()
    answer = (
        _answer(model, prompts, recipe, left / 4)
        if left > step
        else row * (1 + recipe.answer_tokens / ANSWERED)
    )
    sizes = [len(own) for own in rows]
    of_each = client_rows_of_each(recipe, sizes)
    return Estimate(
        recipe.rounds,
        asked,
        steps,
        step,
        evaluations_of(recipe.rounds, recipe.eval_every),
        (row + _objective(method, model, held[:ROWS])) * len(held),
        len(held),
        len(prompts),
        answer,
        sum(min(of_each, size) for size in sizes),  # of all clients, before and again after the run
        row,
        twice=model.recomputes,
        batch=batch,
        tokens=recipe.answer_tokens,
    )


def _objective(method: methods.Method, model: Model, rows: Sequence[Encoded]) -> float:
    name = str(getattr(method, "objective", "loss"))
    if name.partition(":")[0] in ("loss", "accuracy"):
        return 0.0
    size = int(getattr(method, "batch_size", 8))
    return _timed(lambda: objectives.mean_value(model, rows, name, batch_size=size)) / len(rows)


def _answer(model: Model, prompts: Sequence[Example], recipe: Recipe, slow: float) -> float:
    """Return the seconds of one of the prompts' answers; 0 without prompts."""
    if not prompts:
        return 0.0
    few, length, slow = prompts[:ANSWERED], recipe.max_length, min(slow, WARMING)
    first, more = (
        _timed(lambda n=n: generate(model, few, max_new_tokens=n, max_length=length), slow)  # type: ignore[misc]
        for n in (1, 1 + TOKENS)
    )
    batch = first + (recipe.answer_tokens - 1) * max(0.0, more - first) / TOKENS
    return batch * math.ceil(len(prompts) / ANSWERED) / len(prompts)


def evaluations_of(rounds: int, every: int) -> int:
    """Return how often a run of so many rounds is evaluated: before, every so many rounds, and after the last."""
    return 1 + (math.ceil(rounds / every) if every else 1)


def made_smaller(before: Estimate, after: Estimate, within: str) -> str:
    """Say what became smaller so that a run fits, "" where it fitted."""
    pairs = (
        ("evaluations", before.evaluations, after.evaluations),
        ("rows of an evaluation", before.rows, after.rows),
        ("rounds", before.rounds, after.rounds),
        ("clients per round", before.clients, after.clients),
        ("local steps", math.ceil(before.steps), math.ceil(after.steps)),
        ("rows of a step", before.batch, after.batch),
        ("measured rows of clients", before.client_rows, after.client_rows),
        ("answers", before.answers, after.answers),
        ("tokens of an answer", before.tokens, after.tokens if after.answers else before.tokens),
    )
    changed = [f"{name} {old:,} -> {new:,}" for name, old, new in pairs if old != new]
    if not changed:
        return ""
    steps = after.rounds * math.ceil(after.steps)
    longer = "a longer --within" if steps < before.rounds * math.ceil(before.steps) else "more --rounds"
    few = (
        f".  {counted(steps, 'step')} after each other are too few to learn from: {longer}, a smaller model or shorter "
        "rows (--max-length) allow more"
    ) * (steps < TOO_FEW)
    return f"to fit into {within}: {', '.join(changed)}{few}"


def _timed(work: Callable[[], object], slow: float = SLOW) -> float:
    """Return the seconds of the fastest of a few calls: of two at least, since the first warms up, unless it is `slow`."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < (slow if len(taken) < 2 else ENOUGH):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def advice(found: Estimate) -> str:
    """Say what would make a long run shorter, "" for one of less than an hour."""
    if found.seconds <= LONG:
        return ""
    return (
        f"this run takes about {human_time(found.seconds)} on this machine. Shorter: --within 1h makes it so small that "
        f"it fits; or fewer --rounds, a lower --participation, a --limit of the rows"
        + (", fewer --eval-rows" if found.training < found.seconds / 2 else "")
    )


def fitted(
    recipe: Recipe, method: methods.Method, found: Estimate, within: float, clients: int
) -> tuple[Recipe, methods.Method, Estimate]:
    """Return the run, of a fleet of so many `clients`, made so small that it takes at most `within` seconds.

    Evaluations and the work around the rounds take at most `MEASURED` of the time, and the least where steps are missing: the
    clients' own losses are left out, answers are shorter, then fewer; evaluations are fewer, then of fewer rows.  Then local
    steps become fewer; where few would be left, rounds, then the clients that are asked, then the rows of a step: steps after
    each other teach, and the mean of single steps does not.  FitError if not even two steps of one client fit.
    """
    budget = SPARE * within
    if found.seconds <= budget:
        return recipe, method, found
    most = MEASURED * budget if found.search <= most_search(found, budget) else 0.0
    least = 2 * found.evaluation * min(1.0, FEWEST_ROWS / found.rows)
    evaluated = max(least, min(most / 2, found.evaluations * found.evaluation))
    recipe, found = _less_around(recipe, found, max(0.0, most - evaluated))
    recipe, found = _evaluated_less(recipe, found, most - found.around)
    budget -= found.around + found.search
    units = (budget - found.evaluations * found.evaluation) / found.step  # steps that there is time for
    if units < 2 or not method.has_own("sized"):
        also = f", after {human_time(found.search)} of finding a learning rate," if found.search else ""
        raise FitError(
            f"two steps of one client, the evaluations and the answers{also} take more than {human_time(within)}",
            hint="a longer --within, a smaller model, fewer --eval-rows or --rouge-rows, a shorter --max-length"
            + ", a learning rate of yours (--set lr=NUMBER)" * bool(also),
        )
    return _of_steps(recipe, method, found, units, clients)


def most_search(found: Estimate, budget: float) -> float:
    """Return the seconds of a search that leave time for steps after each other; less than 0 where they are missing anyway."""
    return (1 - MEASURED) * budget - math.prod(found.few) * found.step


def _of_steps(
    recipe: Recipe, method: methods.Method, found: Estimate, units: float, clients: int
) -> tuple[Recipe, methods.Method, Estimate]:
    count, asked, batch, step = found.rounds, found.clients, found.batch, found.step
    alone = recipe.aggregation == "mean" and recipe.privacy == "none"
    least = max(recipe.quorum, 1 if alone else FEW_CLIENTS)
    few_rounds, few = found.few
    count = min(count, max(few_rounds, int(units // (few * asked))))
    asked = min(asked, max(least, int(units // (few * count))))
    while units < few * count * asked and batch >= 2 * SMALLEST_BATCH:
        batch, step, units = batch // 2, step * HALF_BATCH, units / HALF_BATCH
    count = min(count, max(1, int(units // (few * asked))))
    steps = min(math.ceil(found.steps), max(1, int(units // (count * asked))))
    count = min(found.rounds, max(count, int(units // (steps * asked))))  # where a client has no more steps
    smaller = method.sized(steps, batch)
    share = recipe.participation if asked == found.clients else asked / clients
    recipe = dataclasses.replace(recipe, rounds=count, participation=share, set=methods.values_of(smaller))
    found = dataclasses.replace(found, evaluations=evaluations_of(count, recipe.eval_every))
    return (
        recipe,
        smaller,
        dataclasses.replace(
            found, rounds=count, clients=asked, steps=min(steps, found.steps), step=step, batch=batch
        ),
    )


def _less_around(recipe: Recipe, found: Estimate, most: float) -> tuple[Recipe, Estimate]:
    """Return a run that takes at most so many seconds before and after its rounds; answers that are scored stay whole."""
    if found.around > most:
        recipe, found = dataclasses.replace(recipe, client_rows=0), dataclasses.replace(found, client_rows=0)
    if found.around > most and not recipe.rouge_rows:
        tokens = min(found.tokens, max(SHORT, int(found.tokens * most / found.around)))
        found = dataclasses.replace(found, answer=found.answer * tokens / found.tokens, tokens=tokens)
        recipe = dataclasses.replace(recipe, answer_tokens=tokens)
    if found.around > most:
        answers = max(min(recipe.rouge_rows, found.answers), int(most / (found.ends * found.answer)))
        recipe = dataclasses.replace(recipe, samples=min(recipe.samples, answers))
        found = dataclasses.replace(found, answers=answers)
    return recipe, found


def _evaluated_less(recipe: Recipe, found: Estimate, most: float) -> tuple[Recipe, Estimate]:
    """Return a run whose evaluations take at most so many seconds, where `FEWEST_ROWS` rows before and after do."""
    if found.evaluations * found.evaluation <= most:
        return recipe, found
    every = math.ceil(found.rounds / max(1, int(most / found.evaluation) - 1))
    recipe = dataclasses.replace(recipe, eval_every=every)
    found = dataclasses.replace(found, evaluations=evaluations_of(found.rounds, every))
    share = most / (2 * found.evaluation)
    if share < 1:
        rows = max(min(FEWEST_ROWS, found.rows), int(share * found.rows))
        found = dataclasses.replace(found, evaluation=found.evaluation * rows / found.rows, rows=rows)
        recipe = dataclasses.replace(recipe, eval_rows=rows)
    return recipe, found


_TIME: Final = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(s|sec|m|min|h|d)?\s*", re.IGNORECASE)


def seconds_of(text: str) -> float:
    """Return a time as people write it (90s, 20m, 1.5h) in seconds; 0 for ""; RecipeError for anything else."""
    if not text:
        return 0.0
    found = _TIME.fullmatch(text)
    if found is None or not found[2] or float(found[1]) <= 0:
        raise RecipeError([f"within = {text!r} is not a time"], hint="write 90s, 20m or 1.5h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2][0].lower()]
