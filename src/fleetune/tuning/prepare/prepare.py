"""Check a recipe, read its data, then load its model: everything that can be wrong is found before the first step."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median_low
from typing import Final

import torch

from fleetune import models
from fleetune.common import settings
from fleetune.common.display import counted, human_time
from fleetune.common.events import RateFound, TuneChecked
from fleetune.common.ggml import SCALES
from fleetune.common.memory import release_memory
from fleetune.data import Encoded, Example, check_columns, digests, encode, partition, read, sources
from fleetune.data.columns import sentence
from fleetune.data.partition import Split
from fleetune.errors import DataError, RecipeError
from fleetune.evaluation import objectives
from fleetune.evaluation.answers import require_text_model
from fleetune.models.cache.cache import BLOCKS
from fleetune.models.checks import is_encoder
from fleetune.models.loading import MAX_LABELS
from fleetune.models.net import chat_template
from fleetune.models.net.model import Model
from fleetune.seeds import chosen_kernels, scale_view
from fleetune.tuning import methods
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.prepare import estimate, private, rates
from fleetune.tuning.prepare.data_check import about_template
from fleetune.tuning.prepare.estimate import Estimate
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.recipe.recipe import Recipe
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
        encode.check_answers(_answers(examples), trained, f"objective = {objective}", COVER)
    if given:
        every = not recipe.eval_data or _encoder(recipe, offline)
        encode.check_answers(_answers(examples if every else held), given, f"labels = {recipe.labels}", COVER)
    if objective == "accuracy" and batch_size == 1 and not _encoder(recipe, offline):
        raise RecipeError(
            ["objective 'accuracy' compares a row's answer with the others of its batch, and batch_size = 1"],
            hint="name the label words, for example accuracy:yes,no, or raise batch_size",
        )


def _answers(examples: Iterable[Example]) -> list[str]:
    return [example.response.strip() for example in examples]


def _encoder(recipe: Recipe, offline: bool) -> bool:
    return is_encoder(models.load_config(recipe.model, offline=offline))


log = logging.getLogger(__name__)

CheckMemory = Callable[[int, int], None]  # of a usual client's rows and a usual row's tokens; FitError


@dataclass(frozen=True)
class TuneJob:
    """A checked recipe with everything in memory; `prepare` makes it in stages, of which the last finds learning rates."""

    recipe: Recipe
    entry: methods.MethodEntry
    method: methods.Method
    model: Model
    split: Split
    rows: list[list[Encoded]]  # per client; of a real fleet none, since they stay on the devices
    train: list[Encoded]  # training rows that are here
    validation: list[tuple[Example, list[Encoded]]]  # all that is held out; a long text is several rows
    dropped: int  # rows of whose answer the tokenizer leaves nothing
    cut: encode.Cut  # rows that are longer than max_length
    files: dict[str, str]  # SHA-256 of the data's files, by name
    found_rates: list[RateFound] = field(default_factory=list)  # learning rates, before round 1
    estimate: Estimate | None = None  # of a run that begins, simulated

    @property
    def held(self) -> list[Encoded]:
        """Held-out rows that the run is measured on."""
        return [row for _, rows in self.validation[: self.recipe.eval_rows] for row in rows]

    @property
    def examples(self) -> list[Example]:
        """The examples of the held rows."""
        return [example for example, _ in self.validation[: self.recipe.eval_rows]]

    @property
    def prompts(self) -> list[Example]:
        """Held-out examples, for generated answers."""
        most = max(self.recipe.rouge_rows, self.recipe.samples)
        return [encode.begun(example) for example, _ in self.validation[:most]]

    @property
    def objective(self) -> str:
        """What the method minimises, by name."""
        return objective_of(self.method)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Label words that a causal model's accuracy is measured by; () where it is not.

        Those of the recipe, else those that are trained; with the objective `accuracy` alone all answers of the data, unless
        they are too many to be label words.
        """
        words = recipes.label_words(self.recipe.labels) or tuple(objectives.label_words(self.objective))
        if words or self.objective.partition(":")[0] != "accuracy":
            return words
        different = sorted(set(_answers(self.split.examples)))
        return tuple(different) if len(different) <= MAX_LABELS else ()

    @property
    def asked(self) -> int:
        """Clients that are asked in a round."""
        return _asked(self.recipe, len(self.rows))

    def about_rows(self) -> list[str]:
        """Say which rows are left out, which are cut, and which held-out ones are trained on too; [] for none, or hidden ones."""
        rows, parts = len(self.split.examples), self.split
        if self.recipe.privacy != private.NONE:  # it would tell of rows
            return []
        found = encode.cut_remarks(parts.notes, rows, self.dropped, self.cut, self.recipe.max_length)
        return [*found, *parts.about_held()]

    def about_time(self) -> list[str]:
        """Say how long the run takes, and what would make a long one shorter; [] where it was not estimated."""
        if self.estimate is None:
            return []
        return [line for line in (self.estimate.text, estimate.advice(self.estimate)) if line]


def check(recipe: Recipe) -> tuple[methods.MethodEntry, methods.Method]:
    """The method of a recipe; UsageError for anything wrong that needs neither the clients' data nor the model."""
    chosen_kernels()
    recipes.check_order(recipe.model, recipe.data)
    entry = methods.entry(recipe.method)
    problems: list[str] = []
    hint = ""  # of the first
    tests: tuple[Callable[[], object], ...] = (
        lambda: methods.make(recipe.method, recipe.set),
        lambda: check_columns(recipe.columns),
        lambda: partition.check_partition_spec(recipe.partition),
        lambda: objectives.get(str(recipe.set.get("objective", "loss"))),
        lambda: aggregation.parse(recipe.aggregation),
        lambda: estimate.seconds_of(recipe.within),
        lambda: settings.parse_bytes(recipe.ram or None),
    )
    for test in tests:
        try:
            test()
        except RecipeError as error:
            hint = hint or error.hint or ""
            problems += error.problems
        except ValueError as error:
            problems.append(str(error))
    problems += label_problems(recipe) + private.problems(recipe)
    if not problems:
        method = methods.make(recipe.method, recipe.set)
        problems += rates.problems(recipe, method)
        problems += list(filter(None, [fleets.kinds_problem(method, recipe.kinds)]))
    if recipe.stragglers and not recipe.deadline and recipe.over_selection == 1:
        problems.append(f"stragglers = {recipe.stragglers} does nothing without a deadline: add --deadline 3")
    if recipe.over_selection > 1 and recipe.participation == 1:
        problems.append(
            f"over_selection = {recipe.over_selection} does nothing where all clients are asked: lower --participation"
        )
    if recipe.keep_replies and (recipe.privacy != private.NONE or entry.kind != "ledger"):
        problems.append("keep_replies needs a method that leaves a ledger, and privacy = none")
    if not problems and recipe.train == SCALES and sentence(recipe.columns) is not None:
        problems.append("system='..' changes the chat template, which train = scales leaves as it is")
    if recipe.train == SCALES:
        of_scales, change = recipes.scales_problems(
            recipe.method, recipe.set, recipe.base, recipe.device, recipes.SCALE_METHODS
        )
        hint, problems = hint or change, problems + of_scales
    if not recipe.eval_every and (recipe.patience or recipe.keep == "best"):
        name = "patience" if recipe.patience else "keep = best"
        problems.append(
            f"{name} compares evaluated rounds, and eval_every = 0 evaluates none: set --eval-every 1"
        )
    if problems:
        raise RecipeError(problems, hint=hint or f"settings and defaults: fleetune methods {recipe.method}")
    if source := _start_rows(recipe):
        read(source, limit=1, offline=True, note=log.info)
        theirs = digests(recipe.data).values() if recipe.data and recipe.privacy != private.NONE else ()
        if not set(digests(source).values()).isdisjoint(theirs):
            raise RecipeError([f"start_data = {source!r} is what privacy hides: use rows that may be seen"])
    return entry, methods.make(recipe.method, recipe.set)


def check_aggregation(recipe: Recipe, method: methods.Method, clients: int) -> None:
    """Raise RecipeError where the replies of so many clients cannot be combined by the recipe's rule."""
    asked = len(rounds.sample(range(clients), recipe.participation, recipe.seed, 1))
    if why := method.rule_problem(aggregation.parse(recipe.aggregation), asked):
        raise RecipeError(
            [f"aggregation = {recipe.aggregation!r} does not fit method = {recipe.method!r}: {why}"],
            hint="rules, and what each withstands: fleetune help safety",
        )


def split(recipe: Recipe, entry: methods.MethodEntry, *, offline: bool = False) -> Split:
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
    progress: rates.Progress = lambda *_: None,
    check_memory: CheckMemory = lambda rows, tokens: None,
) -> TuneJob:
    """Check a recipe and load what it names; for a fleet that is not simulated, the held-out rows alone.

    With `find`, learning rates that are to be found are found, which takes some steps; `note` is told before, `progress`
    how far it is.  `check_memory` is told how long the rows are, once they are known.  With `measure`, the time is estimated
    from a measured step, and the run made to fit into `recipe.within`.
    """
    release_memory()  # an earlier job's, so that the peak is this one's
    entry, method = check(recipe)
    names, given, free = (
        rates.wanted(recipe),
        set(recipe.set),
        method.learns_alone and _asks_for_no_fleet(recipe),
    )
    progress("reading rows", 0, 0, "")
    recipe, parts = _divided(recipe, entry, method, offline=offline, simulated=simulated)
    job = _loaded(recipe, entry, method.written_out(), parts, progress, offline=offline)
    if job.rows:
        tokens = median_low(len(row.ids) for part in job.rows for row in part)
        check_memory(median_low(map(len, job.rows)), tokens)
    own_steps = job.method.steps_setting
    if (find or measure) and own_steps and own_steps not in given:  # of one that is resumed they are written
        method = job.method.for_rows(len(job.train) // max(1, len(job.rows) or job.recipe.clients))
        job = replace(job, method=method, recipe=replace(job.recipe, set=methods.values_of(method)))
    asked_for = [name for name in names if name in given]

    def searches(job: TuneJob) -> list[rates.Search]:
        clients = len(job.rows) or job.recipe.clients or entry.clients
        return rates.searches(job.recipe, job.method, names, asked_for, len(job.train), clients, job.asked)

    search = next(iter(searches(job)), None)
    if measure and job.rows:
        progress("timing a step, an evaluation and an answer", 0, 0, "")
        job, search = _timed(job, searches, note, lambda job: _alone(job, offline) if free else job)
    seconds = job.estimate.search if job.estimate else _search_time(job, search) if measure else 0.0
    job = replace(job, recipe=replace(job.recipe, within=""))
    if names and (find or search is None or (not simulated and seconds >= rates.LONG)):
        rows = "training" if recipe.privacy == private.NONE else "held-out"
        note(rates.told(names, job.method, search, seconds, rows))
    job = _with_rates(job, names, given, search, progress) if find and search else job
    if recipe.privacy != private.NONE:
        progress("finding the noise and the clip", 0, 0, "")
    few = job if find else replace(job, validation=job.validation[: batch_size_of(job.method)])
    return replace(job, recipe=private.settled(few, find=find, note=note))


def _divided(
    recipe: Recipe, entry: methods.MethodEntry, method: methods.Method, *, offline: bool, simulated: bool
) -> tuple[Recipe, Split]:
    """Return the settled recipe, and its rows in parts: of a fleet that is not simulated the held-out ones alone."""
    here = recipe if simulated or recipe.partition.startswith("column") else replace(recipe, clients=1)
    parts = split(here, entry, offline=offline)  # the rows of real devices are there: these are for one
    simulates = simulated and not parts.partition.startswith("column")
    count = recipe.clients or simulates * len(parts.clients)
    own_set = methods.values_of(method.written_out())
    recipe = replace(recipe, set=own_set, partition=parts.partition, clients=count)
    if not simulated:
        parts = replace(parts, clients=[])
    if recipe.privacy != private.NONE:  # single clients are not measured
        recipe = replace(recipe, client_rows=0)
    if clients := len(parts.clients) or recipe.clients:
        private.check(recipe, method, clients)
        check_aggregation(recipe, method, clients)
        _check_quorum(recipe, clients)
    return recipe, parts


def _loaded(
    recipe: Recipe,
    entry: methods.MethodEntry,
    method: methods.Method,
    parts: Split,
    progress: rates.Progress,
    *,
    offline: bool,
    model: Model | None = None,
) -> TuneJob:
    """Return the job with its model and the rows as tokens; torch's threads are set for it."""
    held_out = [parts.examples[i] for i in parts.held.tolist()]
    check_label_rows(
        recipe, objective_of(method), batch_size_of(method), parts.examples, held_out, offline=offline
    )
    progress("loading the model", 0, 0, "")
    model = model or models.load(
        recipe.model,
        dtype=recipe.dtype,
        device=recipe.device,
        offline=offline,
        progress=progress,
        labels=recipes.label_words(recipe.labels) or sorted(set(_answers(parts.examples))),
        base=BLOCKS if recipe.train == SCALES else recipe.base,
        ram=settings.parse_bytes(recipe.ram or None) or 0,
    )
    chat_template.begin_with(model.tokenizer, sentence(recipe.columns))
    model.trains, model.columns = recipe.train, recipe.columns
    scale_view.moved_tensors(model)  # refuses a base that has no blocks where these are trained
    if model.labels and recipe.privacy != private.NONE and not recipe.labels:
        raise RecipeError(
            ["the label words would come from the rows, which privacy hides"],
            hint="give them: --labels yes,no",
        )
    recipe = _for_encoder(recipe, method, model) if model.labels else recipe
    torch.set_num_threads(recipe.threads or usual_threads(model.n_params))
    encoded, kept = encode.encode_rows(model, parts.examples, recipe.max_length)
    place: dict[int, list[Encoded]] = {}  # an example's rows, by its number
    for i, row in zip(kept.tolist(), encoded, strict=True):
        place.setdefault(i, []).append(row)
    held = set(parts.held.tolist())
    job = TuneJob(
        recipe,
        entry,
        method,
        model,
        parts,
        [[row for i in part.tolist() for row in place.get(i, ())] for part in parts.clients],
        [row for i, rows in place.items() if i not in held for row in rows],
        [(parts.examples[i], place[i]) for i in parts.held.tolist() if i in place],
        len(parts.examples) - len(place),
        encode.count_cut(encoded),
        _digests(recipe, offline),
    )
    _check_rows(job)
    return job


def _asked(recipe: Recipe, clients: int) -> int:
    clients = clients or recipe.clients or methods.entry(recipe.method).clients
    return len(rounds.sample(range(clients), recipe.participation, recipe.seed, 1))


def _check_quorum(recipe: Recipe, clients: int) -> None:
    asked = _asked(recipe, clients)
    if recipe.quorum > asked:
        who = f"{counted(asked, 'client')} {'is' if asked == 1 else 'are'}"
        why = f"quorum = {recipe.quorum}, but {who} asked in a round: no round would ever count"
        raise RecipeError([why], hint="lower --quorum, or raise --participation")


def _check_rows(job: TuneJob) -> None:
    empty = [c for c, part in enumerate(job.rows) if not part]
    if empty:
        raise DataError(
            f"client {empty[0]} has no rows with an answer that the model's tokenizer knows ({len(empty)} such clients)",
            hint="lower --clients, or use another model",
        )
    if not job.validation:
        raise DataError(
            "no held-out row has an answer that the model's tokenizer knows",
            hint="hold out more rows, or use another model",
        )


def timed(job: TuneJob, most: float = math.inf) -> Estimate | None:
    """Return the time of a job, found in so many seconds at most; None where the rows of its clients are not here."""
    told = (job.recipe, job.method, job.model, job.rows, job.held, job.prompts)
    return estimate.of(*told, most) if job.rows else None


def _timed(
    job: TuneJob,
    searches: Callable[[TuneJob], list[rates.Search]],
    note: Callable[[str], None],
    alone: Callable[[TuneJob], TuneJob],
) -> tuple[TuneJob, rates.Search | None]:
    """Return the job with its estimated time, and the search before it; both fit into `within`, and `note` is told how."""
    within, began = estimate.seconds_of(job.recipe.within), time.perf_counter()
    if (whole := timed(job, estimate.TIMED * within or math.inf)) is None:
        return job, next(iter(searches(job)), None)
    took = time.perf_counter() - began
    budget = estimate.SPARE * (within - took)
    if within and whole.seconds > budget and len((job := alone(job)).rows) == 1:
        whole = replace(whole, clients=1, steps=job.method.local_steps(len(job.rows[0])), client_rows=0)
    most = min(rates.SHARE * budget, estimate.most_search(whole, budget)) if within else math.inf
    search = next((s for s in searches(job) if s.due or s.seconds(whole) <= most), None)
    whole = smaller = replace(whole, search=search.seconds(whole) if search else 0.0)
    recipe, method = job.recipe, job.method
    if within:
        recipe, method, smaller = estimate.fitted(recipe, method, whole, within - took, len(job.rows))
        timing = f"{recipe.within}, {human_time(took)} of it for timing"
        if words := estimate.made_smaller(whole, smaller, timing):
            note(words)
    return replace(job, recipe=recipe, method=method, estimate=smaller), search


ALONE: Final = "all rows are one client's, since steps after each other learn most (--clients 8: a fleet)"
OF_FLEETS: Final = "clients participation aggregation privacy kinds drop stragglers over_selection quorum"


def _asks_for_no_fleet(recipe: Recipe) -> bool:
    """Whether clients are many by the method's default alone."""
    known = recipes.fields()
    return recipe.partition == "iid" and all(getattr(recipe, n) == known[n][1] for n in OF_FLEETS.split())


def _alone(job: TuneJob, offline: bool) -> TuneJob:
    """Return the job with all rows as one client's."""
    recipe = replace(job.recipe, clients=1)
    parts = split(recipe, job.entry, offline=offline)
    parts = replace(parts, notes=(ALONE, *parts.notes))
    return _loaded(recipe, job.entry, job.method, parts, lambda *_: None, offline=offline, model=job.model)


def _search_time(job: TuneJob, search: rates.Search | None) -> float:
    """Return the seconds of a search on the rows that the server of real devices has."""
    if search is None or job.rows or not job.train:
        return 0.0
    alone = estimate.of(job.recipe, job.method, job.model, [job.train], job.held)
    return search.seconds(alone) if alone else 0.0


def _with_rates(
    job: TuneJob, names: Sequence[str], given: Set[str], search: rates.Search, progress: rates.Progress
) -> TuneJob:
    """Return the job with the learning rates that are found on training rows: from here on none changes."""
    recipe = rates.for_clients(job.recipe, job.method, given, job.asked)[0] if "lr" in names else job.recipe
    rows = job.train if recipe.privacy == private.NONE else job.held
    recipe, found = rates.find(recipe, names, job.model, rows, job.asked, progress, search.size)
    took = job.estimate and replace(job.estimate, search=sum(rate.seconds for rate in found))
    method = methods.make(recipe.method, recipe.set)
    return replace(job, recipe=recipe, method=method, found_rates=found, estimate=took)


def _digests(recipe: Recipe, offline: bool) -> dict[str, str]:
    sources = [source for source in (recipe.data, recipe.eval_data, _start_rows(recipe)) if source]
    return {name: sha for source in sources for name, sha in digests(source, offline=offline).items()}


def _start_rows(recipe: Recipe) -> str:
    """Return the source of rows that a start of A and B looks at; "" where it looks at none, or at the demo's."""
    method = methods.make(recipe.method, recipe.set)
    looks = any(s.name == "start_data" and s.has_effect(method) for s in methods.settings(recipe.method))
    source = str(getattr(method, "start_data", "demo"))
    return source if looks and source != "demo" else ""


def objective_of(method: methods.Method) -> str:
    """What a method minimises, by name."""
    return str(getattr(method, "objective", "loss"))


def batch_size_of(method: methods.Method) -> int:
    """How many rows a method takes at a time."""
    return int(getattr(method, "batch_size", 8))


def _for_encoder(recipe: Recipe, method: methods.Method, model: Model) -> Recipe:
    """The recipe with the label words written out; RecipeError for what an encoder cannot do."""
    if recipe.rouge_rows:
        require_text_model(model, f"rouge_rows = {recipe.rouge_rows}")
    if (objective := objective_of(method)).partition(":")[0] in ("rouge_l", "f1"):
        require_text_model(model, f"objective {objective!r}")
    if odd := [word for word in model.labels if word.endswith("\\")]:
        raise RecipeError([f"the label word {odd[0]!r} ends with a backslash"], hint="rename it in the data")
    return replace(recipe, labels=settings.join_words(model.labels))


def usual_threads(params: int) -> int:
    """Return all processors, or one for a model so small that handing work out costs more than it saves."""
    return 1 if params < SMALL else torch.get_num_threads()


SMALL = 5_000_000  # parameters


def dry_run(
    recipe: Recipe,
    *,
    offline: bool,
    check_memory: CheckMemory = lambda rows, tokens: None,
    progress: rates.Progress = lambda *_: None,
) -> TuneChecked:
    """Load the data and model of a recipe and check it; write nothing."""
    check(recipe)
    told: list[str] = []
    with sources.borrowed(recipe.data) as source:
        job = prepare(
            replace(recipe, data=source),
            offline=offline,
            find=False,
            note=told.append,
            progress=progress,
            check_memory=check_memory,
        )
    template = about_template(job.model.tokenizer, job.split.examples)
    return checked(job, [*template, *job.about_rows(), *told, *job.about_time()])


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
