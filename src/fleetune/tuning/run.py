# SPDX-License-Identifier: Apache-2.0
"""From a recipe to a finished run: load, check, split, run the loop, leave the result.

Everything that can be wrong with a recipe, its data or its model is found before the first step; the data
before the model, since it is read faster.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fleetune import adapters, data, models
from fleetune.data import Encoded, Example
from fleetune.data.labelled import encode_rows
from fleetune.data.partition import check_partition_spec, hold_out, partition
from fleetune.errors import DataError, RecipeError
from fleetune.evaluation import objectives
from fleetune.evaluation.answers import generate, must_write
from fleetune.evaluation.losses import pad_id
from fleetune.evaluation.measures import measure as measured_on
from fleetune.evaluation.scores import rouge_l
from fleetune.models.model import Model
from fleetune.runs import report, rundir
from fleetune.runs.rundir import RunDir
from fleetune.seeds import kernel_choice
from fleetune.seeds.noise import derive
from fleetune.seeds.view import View
from fleetune.tuning import describe, methods, rounds
from fleetune.tuning import recipe as recipes
from fleetune.tuning.checkpoint import Totals
from fleetune.tuning.fleets.local import LocalFleet, Weather
from fleetune.tuning.fleets.memories import Memories
from fleetune.tuning.methods import Entry, Method
from fleetune.tuning.recipe import Recipe

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Whoever watches a run: the console, a test, nobody."""

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """What is about to run."""
        ...

    def event(self, event: Mapping[str, Any]) -> None:
        """Something was recorded (see `rundir`)."""
        ...

    def note(self, text: str) -> None:
        """A remark."""
        ...

    def step(self, client: int, step: int) -> None:
        """A client is about to take a local step; may raise Interrupted."""
        ...


@dataclass(frozen=True)
class Split:
    """The rows of a run: who holds what, and what nobody trains on."""

    examples: Sequence[Example]
    clients: Sequence[np.ndarray]  # indices of examples
    held: np.ndarray
    column: str | None


@dataclass
class Job:
    """A checked recipe with everything in memory."""

    recipe: Recipe
    entry: Entry
    method: Method
    model: Model
    split: Split
    rows: list[list[Encoded]]  # per client
    held: list[Encoded]
    examples: list[Example]  # of the held rows
    prompts: list[Example]  # held out, for generated answers
    dropped: int  # rows that do not fit max_length


def check(recipe: Recipe) -> tuple[Entry, Method]:
    """The method of a recipe; UsageError for anything wrong that needs neither the clients' data nor the model."""
    kernel_choice.wanted()
    entry = methods.entry(recipe.method)
    problems = []
    tests: tuple[Callable[[], object], ...] = (
        lambda: methods.make(recipe.method, recipe.set),
        lambda: check_partition_spec(recipe.partition),
        lambda: objectives.get(str(recipe.set.get("objective", "loss"))),
    )
    for test in tests:
        try:
            test()
        except RecipeError as error:
            problems += error.problems
    if recipe.stragglers and not recipe.deadline:
        problems.append(f"stragglers = {recipe.stragglers} does nothing without a deadline: add --deadline 3")
    if problems:
        raise RecipeError(problems, hint=f"settings and defaults: fleetune methods {recipe.method}")
    method = methods.make(recipe.method, recipe.set)
    if getattr(method, "start", "") == "eva":
        # `init` reads these rows, but only after the model is loaded
        data.read(getattr(method, "start_data", ""), limit=1, offline=True)
    return entry, method


def split(recipe: Recipe, entry: Entry, *, offline: bool = False) -> Split:
    """Read the data, hold rows out, and give every other row to a client."""
    examples = data.read(recipe.data, limit=recipe.limit or None, offline=offline)
    column = recipe.partition.split(":")[-1] if ":" in recipe.partition else None
    kind = recipe.partition.split(":")[0]
    if kind == "shards":
        column = recipe.partition.split(":")[1]
    aside = int(recipe.held_out) if recipe.held_out >= 1 else recipe.held_out
    if recipe.eval_data:
        train = np.arange(len(examples))
        examples = [*examples, *data.read(recipe.eval_data, offline=offline)]
        held = np.arange(len(train), len(examples))
    else:
        train, held = hold_out(examples, aside, recipe.seed, column)
    if not len(held) or not len(train):
        raise DataError(
            f"{len(examples)} rows leave {len(train)} to train on and {len(held)} held out",
            hint="use more rows, or another --held-out",
        )
    clients = recipe.clients or (None if kind == "column" else entry.clients)
    parts = partition([examples[i] for i in train], recipe.partition, clients, recipe.seed)
    return Split(examples, [train[part] for part in parts], held, column)


def prepare(recipe: Recipe, *, offline: bool = False) -> Job:
    """Check a recipe and load what it names."""
    rounds.release_memory()  # an earlier job's, so that the peak is this one's
    entry, method = check(recipe)
    parts = split(recipe, entry, offline=offline)
    model = models.load(
        recipe.model, dtype=recipe.dtype, device=recipe.device, offline=offline, labels=_labels(recipe, parts)
    )
    recipe = _for_encoder(recipe, method, model) if model.labels else recipe
    torch.set_num_threads(recipe.threads or _usual_threads(model.n_params))
    encoded, kept = encode_rows(model, parts.examples, recipe.max_length)
    place = {int(i): row for row, i in enumerate(kept)}
    rows = [[encoded[place[i]] for i in part.tolist() if i in place] for part in parts.clients]
    empty = [c for c, part in enumerate(rows) if not part]
    if empty:
        raise DataError(
            f"client {empty[0]} has no rows that fit {recipe.max_length} tokens ({len(empty)} such clients)",
            hint="raise --max-length or lower --clients",
        )
    held = [i for i in parts.held.tolist() if i in place]
    if not held:
        raise DataError(f"no held-out row fits {recipe.max_length} tokens", hint="raise --max-length")
    return Job(
        recipe, entry, method, model, parts, rows,
        held=[encoded[place[i]] for i in held[: recipe.eval_rows]],
        examples=[parts.examples[i] for i in held[: recipe.eval_rows]],
        prompts=[parts.examples[i] for i in held[: max(recipe.rouge_rows, recipe.samples)]],
        dropped=len(parts.examples) - len(kept),
    )  # fmt: skip


def _labels(recipe: Recipe, parts: Split) -> Sequence[str]:
    """The label words that an encoder would choose among: the recipe's, else all different answers."""
    return recipes.label_words(recipe.labels) or sorted({e.response.strip() for e in parts.examples})


def _for_encoder(recipe: Recipe, method: Method, model: Model) -> Recipe:
    """The recipe with the label words written out; RecipeError for what an encoder cannot do."""
    if recipe.rouge_rows:
        must_write(model, f"rouge_rows = {recipe.rouge_rows}")
    if (objective := str(getattr(method, "objective", "loss"))).partition(":")[0] in ("rouge_l", "f1"):
        must_write(model, f"objective {objective!r}")
    if odd := [word for word in model.labels if "," in word]:
        raise RecipeError([f"the label word {odd[0]!r} has a comma"], hint="rename it in the data")
    return dataclasses.replace(recipe, labels=",".join(model.labels))


class Silent:
    """A listener that says nothing."""

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Nothing."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """To the log."""
        log.info("%s", text)

    def step(self, client: int, step: int) -> None:
        """Nothing."""


def run(
    *, out: str | Path = "runs", offline: bool = False, listener: Listener | None = None, **options: Any
) -> dict[str, Any]:
    """Run a recipe given as keyword arguments (the names of `Recipe`'s fields) in a new folder under `out`.

    Returns the "done" event: base and tuned measures, bytes, the run's folder and its result.
    """
    recipe = recipes.make(options)
    check(recipe)
    rundir.check_writable(Path(out))
    job = prepare(recipe, offline=offline)
    with rundir.create(Path(out), recipe.method, recipe.model) as folder:
        return tune(job, folder, listener or Silent())


def _usual_threads(params: int) -> int:
    """All processors, or one for a model so small that handing work out costs more than it saves."""
    return 1 if params < SMALL else torch.get_num_threads()


SMALL = 5_000_000  # parameters


def tune(job: Job, run: RunDir, listener: Listener) -> dict[str, Any]:
    """Run (or resume) the job in its folder; the "done" event, which holds the final table."""
    run.status("running")
    try:
        return _tune(job, run, listener)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Interrupted"
        try:
            run.log(f"stopped: {type(error).__name__}: {error}")
            run.status("interrupted" if stopped else f"failed: {error}")
        except Exception as second:
            log.warning("the status could not be written: %s", second)
        raise


def _tune(job: Job, run: RunDir, listener: Listener) -> dict[str, Any]:
    recipe, model, method = job.recipe, job.model, job.method
    began = time.monotonic()
    run.write("run.toml", recipes.to_toml(recipe))
    run.write("env.json", json.dumps(rundir.environment(describe.of_model(job)), indent=1) + "\n")
    listener.header(f"fleetune tune · {job.entry.name}", describe.header(job, run))
    if job.dropped:
        listener.note(
            f"{job.dropped} rows have answers that do not fit {recipe.max_length} tokens and are left out"
        )
    state = method.init(model, derive(recipe.seed, "init"))
    fleet = LocalFleet(
        model, method, job.rows, recipe.seed, pad_id(model),
        Weather(recipe.drop, recipe.stragglers, recipe.deadline), listener.step, Memories(run.path / "memories"),
    )  # fmt: skip

    def measure(state: Any) -> dict[str, float]:
        method.apply(model, state)
        return measured_on(
            model, job.held, job.examples, recipes.label_words(recipe.labels), recipe.max_length
        )

    def begin() -> None:
        listener.event(run.record({"event": "start", **describe.start(job)}))
        base = answers(job, state, run, "base", measure(state))
        listener.event(run.record({"event": "eval", "round": 0, **base}))

    plan = rounds.Plan(
        recipe.rounds, recipe.participation, recipe.quorum, recipe.seed, recipe.eval_every,
        bytes.fromhex(model.digest)[:8],
    )  # fmt: skip
    hooks = rounds.Hooks(begin, measure, listener.event)
    state, totals = rounds.run(method, fleet, state, run, plan, hooks)
    return _finish(job, run, state, totals, listener, time.monotonic() - began)


def _finish(
    job: Job, run: RunDir, state: Any, totals: Totals, listener: Listener, wall: float
) -> dict[str, Any]:
    job.method.apply(job.model, state)
    tuned = answers(job, state, run, "tuned", _last_measures(run))
    result = ARTEFACTS[job.entry.kind](job, run, state)
    evaluation = json.loads((run.path / "eval.json").read_text())
    run.write("samples.md", describe.samples_page(evaluation))
    done = {
        "event": "done", "base": evaluation["base"], "tuned": tuned, "rows": len(job.held), "run": str(run.path),
        "rounds": job.recipe.rounds, "bytes_up": totals.bytes_up, "bytes_down": totals.bytes_down,
        "seconds": round(totals.seconds, 3), "wall": round(wall, 3), "peak_rss": rounds.peak_rss(), **result,
    }  # fmt: skip
    event = run.record(done)
    report.write(run.path)
    run.status("done")
    event["report"] = str(run.path / "report.html")
    listener.event(event)
    return event


def _last_measures(run: RunDir) -> dict[str, float]:
    last = [e for e in rundir.events(run.path) if e["event"] == "eval"][-1]
    return {name: last[name] for name in ("loss", "accuracy") if name in last}


def answers(job: Job, state: Any, run: RunDir, which: str, measured: dict[str, float]) -> dict[str, float]:
    """Answer the fixed prompts at `state` (`which` is base or tuned) and put answers and measures into eval.json.

    Gives the measures, with Rouge-L if the recipe asks for it.
    """
    job.method.apply(job.model, state)
    recipe = job.recipe
    prompts = job.prompts
    made = generate(job.model, prompts, max_new_tokens=recipe.answer_tokens) if prompts else []
    if recipe.rouge_rows:
        references = [e.response for e in prompts[: recipe.rouge_rows]]
        measured = measured | {"rouge_l": rouge_l(made[: recipe.rouge_rows], references)}
    file = run.path / "eval.json"
    content: dict[str, Any] = {"rows": len(job.held), "samples": _prompts(job)}
    if which == "tuned":
        content = json.loads(file.read_text(encoding="utf-8"))
    for sample, answer in zip(content["samples"], made, strict=False):
        sample[which] = answer
    content[which] = measured
    run.write("eval.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return measured


def _prompts(job: Job) -> list[dict[str, str]]:
    return [
        {"prompt": e.messages[-1][1], "reference": e.response, "client": e.meta.get("client", "")}
        for e in job.prompts[: job.recipe.samples]
    ]


# What a run leaves behind, by the method's kind -----------------------------------------------------


def _ledger(job: Job, run: RunDir, state: Any) -> dict[str, Any]:
    view = job.model.attachment
    assert isinstance(view, View)
    digest = models.digest(view.tensors())
    path = run.path / "ledger.safetensors"
    state.ledger.with_check(job.recipe.rounds, digest).save(path)
    return {
        "result": str(path),
        "result_bytes": path.stat().st_size,
        "digest": digest,
        "entries": len(state.ledger),
    }


def _adapter(job: Job, run: RunDir, state: Any) -> dict[str, Any]:
    path = run.path / "adapter"
    adapters.save(job.model, path)
    size = sum(p.stat().st_size for p in path.iterdir())
    return {"result": str(path), "result_bytes": size, "digest": adapters.digest(state.tensors)}


ARTEFACTS: dict[str, Callable[[Job, RunDir, Any], dict[str, Any]]] = {"ledger": _ledger, "adapter": _adapter}
