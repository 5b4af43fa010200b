# SPDX-License-Identifier: Apache-2.0
"""Check a recipe, read its data, load its model: everything that can be wrong is found before the first step.

The data are read before the model, since that is faster.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Final

import torch

from fleetune import data, models
from fleetune.common import settings
from fleetune.common.display import counted
from fleetune.common.events import TuneChecked
from fleetune.common.ggml import SCALES
from fleetune.common.memory import release_memory
from fleetune.common.settings import parse_bytes
from fleetune.data import Encoded, Example, check_columns, encode, partition, sources
from fleetune.data.encode import Cut, begun, check_answers, encode_rows
from fleetune.data.partition import Split as Split
from fleetune.data.partition import check_partition_spec
from fleetune.errors import DataError, RecipeError
from fleetune.evaluation import objectives
from fleetune.evaluation.answers import require_text_model
from fleetune.models.cache.cache import BLOCKS
from fleetune.models.checks import is_encoder
from fleetune.models.encoders import MAX_LABELS
from fleetune.models.net.model import Model
from fleetune.seeds import chosen_kernels, scale_view
from fleetune.tuning import methods
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.methods import Method, MethodEntry
from fleetune.tuning.prepare import estimate, rates
from fleetune.tuning.prepare.estimate import Estimate
from fleetune.tuning.prepare.rates import Found, Search
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe
from fleetune.tuning.recipe.settled import settled
from fleetune.tuning.rounds import fleets, rounds

COVER: Final = "name every label word as the data has it (a comma in a word: \\,), or leave the option out"


def label_problems(recipe: Recipe) -> list[str]:
    """List what is wrong with the recipe's label words, whatever the data."""
    given = settings.split_words(recipe.labels) if recipe.labels else []
    trained = objectives.label_words(str(recipe.set.get("objective", "loss")))
    found = []
    if given and not 2 <= len(given) <= MAX_LABELS:
        found.append(
            f"labels = {recipe.labels!r} has {counted(len(given), 'word')}: 2 to {MAX_LABELS} are possible"
        )
    if "" in given:
        found.append(f"labels = {recipe.labels!r} has an empty word")
    if twice := [word for i, word in enumerate(given) if word and word in given[:i]]:
        found.append(f"labels = {recipe.labels!r} has {twice[0]!r} twice")
    if given and trained and set(given) != set(trained):
        found.append(f"labels = {recipe.labels!r} and objective = {recipe.set['objective']!r} differ")
    return found


def check_label_rows(
    recipe: Recipe,
    objective: str,
    batch_size: int,
    examples: Sequence[Example],
    held: Sequence[Example],
    *,
    offline: bool,
) -> None:
    """Raise DataError for an answer that is none of the label words; RecipeError for an accuracy that needs them named.

    Rows that are given for validation alone are the only ones that `labels` must cover, unless an encoder is trained.
    """
    given, trained = recipes.label_words(recipe.labels), objectives.label_words(objective)
    if trained:
        check_answers(_answers(examples), trained, f"objective = {objective}", COVER)
    if given:
        every = not recipe.eval_data or _encoder(recipe, offline)
        check_answers(_answers(examples if every else held), given, f"labels = {recipe.labels}", COVER)
    if objective == "accuracy" and batch_size == 1 and not _encoder(recipe, offline):
        raise RecipeError(
            ["objective 'accuracy' compares a row's answer with the others of its batch, and batch_size = 1"],
            hint="name the label words, for example accuracy:yes,no, or raise batch_size",
        )


def measured_labels(recipe: Recipe, objective: str, examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the label words that a causal model's accuracy is measured by; () where it is not.

    Those of the recipe, else those that are trained; with the objective `accuracy` alone all answers of the data, unless
    they are too many to be label words.
    """
    words = recipes.label_words(recipe.labels) or tuple(objectives.label_words(objective))
    if words or objective.partition(":")[0] != "accuracy":
        return words
    different = sorted(set(_answers(examples)))
    return tuple(different) if len(different) <= MAX_LABELS else ()


def _answers(examples: Iterable[Example]) -> list[str]:
    return [example.response.strip() for example in examples]


def _encoder(recipe: Recipe, offline: bool) -> bool:
    return is_encoder(models.load_config(recipe.model, offline=offline))


log = logging.getLogger(__name__)

CheckMemory = Callable[
    [int, int], None
]  # of the rows of a usual client, and the tokens of a usual row; FitError


@dataclass
class TuneJob:
    """A checked recipe with everything in memory."""

    recipe: Recipe
    entry: MethodEntry
    method: Method
    model: Model
    split: Split
    rows: list[list[Encoded]]  # per client; of a real fleet none, since they stay on the devices
    held: list[Encoded]
    examples: list[Example]  # of the held rows
    prompts: list[Example]  # held out, for generated answers
    dropped: int  # rows of whose answer the tokenizer leaves nothing
    cut: Cut  # rows that are longer than max_length
    objective: str  # what the method minimises, by name
    found: list[Found]  # learning rates that were found before round 1
    estimate: Estimate | None  # of a run that begins, simulated
    words: tuple[str, ...]  # label words that a causal model's accuracy is measured by; none: it is not
    files: dict[str, str]  # SHA-256 of the data's files, by name

    def about_rows(self) -> list[str]:
        """Say which rows are left out, and which are cut; [] where all are whole."""
        rows = len(self.split.examples)
        return encode.cut_remarks(self.split.notes, rows, self.dropped, self.cut, self.recipe.max_length)

    def about_time(self) -> list[str]:
        """Say how long the run takes, and what would make a long one shorter; [] where it was not estimated."""
        if self.estimate is None:
            return []
        return [line for line in (self.estimate.text, estimate.advice(self.estimate)) if line]


def check(recipe: Recipe) -> tuple[MethodEntry, Method]:
    """The method of a recipe; UsageError for anything wrong that needs neither the clients' data nor the model."""
    chosen_kernels()
    recipes.check_order(recipe.model, recipe.data)
    entry = methods.entry(recipe.method)
    problems: list[str] = []
    hint = ""  # of the first
    tests: tuple[Callable[[], object], ...] = (
        lambda: methods.make(recipe.method, recipe.set),
        lambda: check_columns(recipe.columns),
        lambda: check_partition_spec(recipe.partition),
        lambda: objectives.get(str(recipe.set.get("objective", "loss"))),
        lambda: aggregation.parse(recipe.aggregation),
        lambda: estimate.seconds_of(recipe.within),
        lambda: parse_bytes(recipe.ram or None),
    )
    for test in tests:
        try:
            test()
        except RecipeError as error:
            hint = hint or (error.hint or "" if not problems else "")
            problems += error.problems
        except ValueError as error:
            problems.append(str(error))
    problems += label_problems(recipe)
    if not problems:
        problems += rates.problems(recipe, methods.make(recipe.method, recipe.set))
    if not problems:
        problem = fleets.kinds_problem(methods.make(recipe.method, recipe.set), recipe.kinds)
        problems += [problem] if problem else []
    if recipe.stragglers and not recipe.deadline and recipe.over_selection == 1:
        problems.append(f"stragglers = {recipe.stragglers} does nothing without a deadline: add --deadline 3")
    if recipe.over_selection > 1 and recipe.participation == 1:
        problems.append(
            f"over_selection = {recipe.over_selection} does nothing where all clients are asked: lower --participation"
        )
    if recipe.train == SCALES:
        of_scales, change = recipes.scales_problems(
            recipe.method, recipe.set, recipe.base, recipe.device, recipes.SCALE_METHODS
        )
        hint, problems = hint if problems else change, problems + of_scales
    problems += _of_course(recipe)
    if problems:
        raise RecipeError(problems, hint=hint or f"settings and defaults: fleetune methods {recipe.method}")
    return entry, methods.make(recipe.method, recipe.set)


def check_aggregation(recipe: Recipe, method: Method, clients: int) -> None:
    """Raise RecipeError where the replies of so many clients cannot be combined by the recipe's rule."""
    asked = len(rounds.sample(range(clients), recipe.participation, recipe.seed, 1))
    if why := method.rule_problem(aggregation.parse(recipe.aggregation), asked):
        raise RecipeError(
            [f"aggregation = {recipe.aggregation!r} does not fit method = {recipe.method!r}: {why}"],
            hint="rules, and what each withstands: docs/safety.md",
        )


def _of_course(recipe: Recipe) -> list[str]:
    """Say what patience and keep cannot do."""
    if not recipe.eval_every and (recipe.patience or recipe.keep == "best"):
        name = "patience" if recipe.patience else "keep = best"
        return [f"{name} compares evaluated rounds, and eval_every = 0 evaluates none: set --eval-every 1"]
    return []


def split(recipe: Recipe, entry: MethodEntry, *, offline: bool = False) -> Split:
    """Read the data, hold rows out, and give every other row to a client."""
    return partition.split(recipes.rows_of(recipe), entry.clients, offline=offline)


def prepare(
    recipe: Recipe,
    *,
    offline: bool = False,
    simulated: bool = True,
    find: bool = True,
    measure: bool = True,
    note: Callable[[str], None] = log.info,
    progress: rates.Progress = rates.unheard,
    check_memory: CheckMemory = lambda rows, tokens: None,
) -> TuneJob:
    """Check a recipe and load what it names; for a fleet that is not simulated, the held-out rows alone.

    With `find`, learning rates that are to be found are found, which takes some steps; `note` is told before, `progress`
    how far it is.  `check_memory` is told how long the rows are, once they are known.  With `measure`, the time is estimated
    from a measured step, and the run made to fit into `recipe.within`.
    """
    release_memory()  # an earlier job's, so that the peak is this one's
    entry, method = check(recipe)
    method = method.written_out()
    names, given = rates.wanted(recipe), set(recipe.set)
    asked_for = [name for name in names if name in given]
    recipe, parts = _divided(recipe, entry, method, offline=offline, simulated=simulated)
    objective, held_out = objective_of(method), [parts.examples[i] for i in parts.held.tolist()]
    check_label_rows(recipe, objective, batch_size_of(method), parts.examples, held_out, offline=offline)
    recipe, model = _loaded(recipe, method, parts, offline=offline)
    place = _tokens(model, parts, recipe.max_length)
    rows = [[row for i in part.tolist() for row in place.get(i, ())] for part in parts.clients]
    held = [i for i in parts.held.tolist() if i in place]
    _check_rows(rows, held)
    if rows:
        check_memory(median_low(map(len, rows)), median_low(len(row.ids) for part in rows for row in part))
    aside = set(parts.held.tolist())
    train = [row for i, pieces in place.items() if i not in aside for row in pieces]
    new = find or measure  # not one that is resumed
    if new and method.steps_setting and method.steps_setting not in given:
        method = method.for_rows(len(train) // max(1, len(rows) or recipe.clients))
        recipe = dataclasses.replace(recipe, set=methods.values_of(method))
    prompts = [begun(parts.examples[i]) for i in held[: max(recipe.rouge_rows, recipe.samples)]]
    estimated: Estimate | None = None
    found: list[Found] = []
    clients = len(rows) or recipe.clients or entry.clients
    searches = rates.searches(recipe, method, names, asked_for, len(train), clients, _asked(recipe, rows))
    search = next(iter(searches), None)
    if measure and rows:
        measured = [row for i in held[: recipe.eval_rows] for row in place[i]]
        recipe, method, estimated, search = _timed(
            recipe, method, model, rows, measured, prompts, searches, note
        )
    recipe = dataclasses.replace(recipe, within="")
    if names and (find or search is None):
        note(rates.told(names, method, search, estimated))
    if find and search:
        asked = _asked(recipe, rows)
        if "lr" in names:
            recipe, method = rates.for_clients(recipe, method, given, asked)
        recipe, found = rates.find(recipe, names, model, train, asked, progress, search.size)
        method = methods.make(recipe.method, recipe.set)
    return TuneJob(
        recipe,
        entry,
        method,
        model,
        parts,
        rows,
        held=[row for i in held[: recipe.eval_rows] for row in place[i]],
        examples=[parts.examples[i] for i in held[: recipe.eval_rows]],
        prompts=prompts[: max(recipe.rouge_rows, recipe.samples)],
        dropped=len(parts.examples) - len(place),
        cut=encode.count_cut([row for pieces in place.values() for row in pieces]),
        objective=objective,
        found=found,
        estimate=estimated,
        words=measured_labels(recipe, objective, parts.examples),
        files=_digests(recipe, offline),
    )


def _divided(
    recipe: Recipe, entry: MethodEntry, method: Method, *, offline: bool, simulated: bool
) -> tuple[Recipe, Split]:
    """Return the settled recipe, and its rows in parts: of a fleet that is not simulated the held-out ones alone."""
    parts = split(recipe, entry, offline=offline)
    recipe = dataclasses.replace(recipe, partition=parts.partition)
    if not simulated:
        parts = dataclasses.replace(parts, clients=[])
    recipe = settled(recipe) if simulated else dataclasses.replace(settled(recipe), clients=recipe.clients)
    if clients := len(parts.clients) or recipe.clients:
        check_aggregation(recipe, method, clients)
        _check_quorum(recipe, clients)
    return recipe, parts


def _loaded(recipe: Recipe, method: Method, parts: Split, *, offline: bool) -> tuple[Recipe, Model]:
    """Return the recipe, of an encoder with its label words, and its model; the threads are set for it."""
    model = models.load(
        recipe.model,
        dtype=recipe.dtype,
        device=recipe.device,
        offline=offline,
        labels=_labels(recipe, parts),
        base=BLOCKS if recipe.train == SCALES else recipe.base,
        ram=parse_bytes(recipe.ram or None) or 0,
    )
    model.trains = recipe.train
    scale_view.moved_tensors(model)  # refuses a base that has no blocks where these are trained
    recipe = _for_encoder(recipe, method, model) if model.labels else recipe
    torch.set_num_threads(recipe.threads or usual_threads(model.n_params))
    return recipe, model


def _tokens(model: Model, parts: Split, max_length: int) -> dict[int, list[Encoded]]:
    """Return the encoded rows of every example that has any, by its number; a long text has several."""
    encoded, kept = encode_rows(model, parts.examples, max_length)
    place: dict[int, list[Encoded]] = {}
    for i, row in zip(kept.tolist(), encoded, strict=True):
        place.setdefault(i, []).append(row)
    return place


def _asked(recipe: Recipe, rows: Sequence[object]) -> int:
    """Return how many clients are asked in a round."""
    clients = len(rows) or recipe.clients or methods.entry(recipe.method).clients
    return len(rounds.sample(range(clients), recipe.participation, recipe.seed, 1))


def _check_quorum(recipe: Recipe, clients: int) -> None:
    """Raise RecipeError for a quorum that no round can have."""
    asked = _asked(recipe, range(clients))
    if recipe.quorum > asked:
        raise RecipeError(
            [
                f"quorum = {recipe.quorum}, but {counted(asked, 'client')} {'is' if asked == 1 else 'are'} asked in a round: "
                "no round would ever count"
            ],
            hint="lower --quorum, or raise --participation",
        )


def _check_rows(rows: Sequence[Sequence[Encoded]], held: Sequence[int]) -> None:
    """Raise DataError where a client or the validation has no row left."""
    empty = [c for c, part in enumerate(rows) if not part]
    if empty:
        raise DataError(
            f"client {empty[0]} has no rows with an answer that the model's tokenizer knows ({len(empty)} such clients)",
            hint="lower --clients, or use another model",
        )
    if not held:
        raise DataError(
            "no held-out row has an answer that the model's tokenizer knows",
            hint="hold out more rows, or use another model",
        )


def timed(job: TuneJob) -> TuneJob:
    """Return a job with its estimated time; as it is where the rows of its clients are not here."""
    if not job.rows:
        return job
    found = estimate.of(job.recipe, job.method, job.model, job.rows, job.held, job.prompts)
    return dataclasses.replace(job, estimate=found)


def _timed(
    recipe: Recipe,
    method: Method,
    model: Model,
    rows: Sequence[Sequence[Encoded]],
    held: Sequence[Encoded],
    prompts: Sequence[Example],
    searches: Sequence[Search],
    note: Callable[[str], None],
) -> tuple[Recipe, Method, Estimate | None, Search | None]:
    """Return the run with its estimated time, and the search before it; both fit into `within`, and `note` is told how."""
    whole = estimate.of(recipe, method, model, rows, held, prompts)
    within = estimate.seconds_of(recipe.within)
    if whole is None:
        return recipe, method, None, next(iter(searches), None)
    most = rates.SHARE * estimate.SPARE * within if within else math.inf
    search = next((s for s in searches if s.due or s.seconds(whole) <= most), None)
    whole = dataclasses.replace(whole, search=search.seconds(whole) if search else 0.0)
    if not within:
        return recipe, method, whole, search
    smaller, method, estimated = estimate.fitted(recipe, method, whole, within, len(rows))
    if words := estimate.made_smaller(whole, estimated, recipe.within):
        note(words)
    return smaller, method, estimated, search


def _digests(recipe: Recipe, offline: bool) -> dict[str, str]:
    """SHA-256 of the files of the data, by name."""
    sources = [source for source in (recipe.data, recipe.eval_data) if source]
    found: dict[str, str] = {}
    for source in sources:
        found |= data.digests(source, offline=offline)
    return found


def objective_of(method: Method) -> str:
    """What a method minimises, by name."""
    return str(getattr(method, "objective", "loss"))


def batch_size_of(method: Method) -> int:
    """How many rows a method takes at a time."""
    return int(getattr(method, "batch_size", 8))


def _labels(recipe: Recipe, parts: Split) -> Sequence[str]:
    """The label words that an encoder would choose among: the recipe's, else all different answers."""
    return recipes.label_words(recipe.labels) or sorted({e.response.strip() for e in parts.examples})


def _for_encoder(recipe: Recipe, method: Method, model: Model) -> Recipe:
    """The recipe with the label words written out; RecipeError for what an encoder cannot do."""
    if recipe.rouge_rows:
        require_text_model(model, f"rouge_rows = {recipe.rouge_rows}")
    if (objective := objective_of(method)).partition(":")[0] in ("rouge_l", "f1"):
        require_text_model(model, f"objective {objective!r}")
    if odd := [word for word in model.labels if word.endswith("\\")]:
        raise RecipeError([f"the label word {odd[0]!r} ends with a backslash"], hint="rename it in the data")
    return dataclasses.replace(recipe, labels=settings.join_words(model.labels))


def usual_threads(params: int) -> int:
    """Return all processors, or one for a model so small that handing work out costs more than it saves."""
    return 1 if params < SMALL else torch.get_num_threads()


SMALL = 5_000_000  # parameters


def dry_run(
    recipe: Recipe, *, offline: bool, check_memory: CheckMemory = lambda rows, tokens: None
) -> TuneChecked:
    """Load the data and model of a recipe and check it; write nothing."""
    check(recipe)
    told: list[str] = []
    with sources.borrowed(recipe.data) as source:
        job = prepare(
            dataclasses.replace(recipe, data=source),
            offline=offline,
            find=False,
            note=told.append,
            check_memory=check_memory,
        )
    return checked(job, [*job.about_rows(), *told, *job.about_time()])


def checked(job: TuneJob, remarks: Sequence[str]) -> TuneChecked:
    """Return what is said of a job that can be run."""
    found, share = job.estimate, map("trains {}".format, scale_view.scales_share(job.model))
    return TuneChecked(
        clients=len(job.rows),
        rows=sum(map(len, job.rows)),
        held_out=len(job.held),
        cut=job.cut.longer,
        seconds=None if found is None else round(found.seconds, 3),
        remarks=[*share, *remarks],
        steps=None if found is None else round(found.rounds * found.clients * found.steps),
    )
