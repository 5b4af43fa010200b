# SPDX-License-Identifier: Apache-2.0
"""The pipeline as functions: plan, tune, evaluate, compress, export, measure, serve; and `open`, which looks a name up.

    plan = fleetune.plan("smollm2-135m", ram="2GB", uplink="1Mbps")
    run = fleetune.tune("smollm2-135m", "demo", method="fedkseed", rounds=2)
    small = fleetune.compress(run, method="optq", settings={"bits": 4})
    file = fleetune.export(small, to="gguf")
    table = fleetune.measure(small, kept_gain=True)

The commands of the same names call these.  A model may be a name, a path, the number of a run or compression, `latest`,
or a result of `tune` or `compress`; `plan` and `tune` start from a plain model.
Every function raises a class of `fleetune.errors` whose message says what failed and whose hint says what to do.
`listener` is called with events, remarks and progress (`runs/listener.py`); with `offline` the network is never used;
`out` is the folder of the runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from fleetune import subject as subjects
from fleetune.common.settings import Value
from fleetune.errors import RecipeError, UsageError
from fleetune.runs import rundir, tracking
from fleetune.runs.listener import Listener, checked
from fleetune.subject import Subject
from fleetune.tuning import recipe as recipes
from fleetune.tuning.recipe import Recipe, RecipeOptions

if TYPE_CHECKING:
    from fleetune.compression.jobs.job import CompressResult
    from fleetune.deploy.export_subject import ExportResult
    from fleetune.deploy.measure.job import MeasureResult
    from fleetune.deploy.serving.session import Session
    from fleetune.fleet.calibration_server import Calibrators
    from fleetune.fleet.server import Served
    from fleetune.planning.plan import Plan
    from fleetune.runs.compression_folder import CompressOptions
    from fleetune.tuning.result import TuneResult

Setting = Value | Callable[..., Any]  # of a method; a function is an objective or a reward
Rows = str | Path | Iterable[Mapping[str, Any]]  # a file, a hub id, or rows: dicts, a datasets.Dataset


def open(name: object, *, out: str | Path = "runs") -> Subject:
    """Return what a name means: a `Run`, a `Compressed` model or a `Plain` one.  No weights are loaded yet.

    `name` is a path, the name or number of a run or compression under `out`, `latest`, a built-in name or a hub id, or a
    result of `tune` or `compress`.  UsageError when no run or compression has that number, or there is no latest one.
    """
    return subjects.open(name, out)


# Plan -------------------------------------------------------------------------------------------------


def plan(
    model: str | Path,
    *,
    ram: str | int | None = None,
    uplink: str | float | None = None,
    batch: int = 8,
    length: int = 512,
    steps: int = 200,
    dtype: str = "fp32",
    offline: bool = False,
) -> Plan:
    """Return memory, traffic and time of every method for one device and one round, before any work.

    `ram` is the device's memory (4GB, or bytes), `uplink` its upload speed (1Mbps, or bytes a second); without them
    the plan does not say what fits, or how long sending takes.  A round is `steps` local steps of `batch` rows of
    `length` tokens, with weights in `dtype`.
    """
    from fleetune import models
    from fleetune.planning import plan as planning

    model = model if isinstance(model, str | Path) else open(model).argument
    config = models.load_config(str(model), offline=offline)
    work = planning.Workload(batch=batch, length=length, steps=steps, dtype=dtype)
    return planning.make(
        config, str(model), work,
        ram=planning.parse_bytes(f"{ram} B" if isinstance(ram, int) else ram),
        uplink=planning.parse_rate(f"{uplink} B/s" if isinstance(uplink, int | float) else uplink),
    )  # fmt: skip


# Tune -------------------------------------------------------------------------------------------------


def tune(
    model: object,
    data: Rows | None = None,
    *,
    method: object = "auto",
    settings: Mapping[str, Setting] | None = None,
    tokenizer: object = None,
    tracker: str | Sequence[str] = (),
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    **options: Unpack[RecipeOptions],
) -> TuneResult:
    """Tune a model over a simulated fleet in a new folder under `out`, and return the run.

    `model` is a name or path, a `fleetune.Model`, a transformers or PEFT model (with its `tokenizer`), or a whole
    `Recipe`, which then holds all options.  `data` is a file, a hub id, `"demo"`, or rows as dicts.  `method` is a name
    or a method's own dataclass (`fedkseed.Method(K=1024)`), `auto` the one that `plan` recommends; `settings` are the
    method's, by name.  `options` are those of `fleetune.Recipe`.  A model or rows given as Python objects are saved under
    `OUT/objects`, so that the run can be resumed.  A PEFT model's adapters are merged into the copy that is saved and
    tuned: they are not trained on.
    `tracker` names trackers that get the figures as well: tensorboard, wandb, mlflow, trackio.
    """
    watching, trackers = checked(listener), tracking.check(_words(tracker))
    from fleetune.planning import choose
    from fleetune.tuning import run

    if not isinstance(model, Recipe):
        recipe = _recipe(model, data, method, settings or {}, tokenizer, Path(out), options, watching)
    elif data is None and tokenizer is None and not (settings or options) and method == recipes.AUTO_METHOD:
        recipe = model
    else:
        raise UsageError(
            "a recipe says everything; nothing is given beside it", hint="dataclasses.replace it"
        )
    recipe = choose.settled_method(recipe, watching.note, offline=offline)
    with tracking.tracked(watching, trackers, offline=offline) as heard:
        return run.start(recipe, Path(out), heard, offline=offline)


def resume_run(
    run: object,
    *,
    tracker: str | Sequence[str] = (),
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> TuneResult:
    """Resume a stopped run by its own recipe, to the same bits as without the stop; return a finished run as it is.

    `run` is a name, number, path or result; `tracker` as in `tune`, which a run does not remember.
    """
    from fleetune.tuning import run as running

    folder = getattr(run, "folder", None)
    path = folder if isinstance(folder, Path) else rundir.find(str(run), Path(out))
    with tracking.tracked(checked(listener), _words(tracker), offline=offline) as heard:
        return running.resume(path, heard, offline=offline)


def _recipe(
    model: object,
    data: Rows | None,
    method: object,
    settings: Mapping[str, Setting],
    tokenizer: object,
    out: Path,
    options: RecipeOptions,
    listener: Listener,
) -> Recipe:
    """The recipe for what a caller handed over; the options are checked before any object is saved."""
    from fleetune.common.settings import named
    from fleetune.tuning import methods, objects_to_files

    if data is None:
        raise RecipeError(["data is missing"], hint='give a file, rows, or "demo"')
    if objects_to_files.is_adapted(model):
        listener.note(
            "the model's adapters are merged into a copy of its base, and that is tuned: rank, alpha and targets are the "
            "method's settings"
        )
    modules = {n: e.module for n, e in methods.entries().items()}
    name, chosen = (recipes.AUTO_METHOD, {}) if method == recipes.AUTO_METHOD else named(method, modules)
    known = set() if name == recipes.AUTO_METHOD else {s.name for s in methods.settings(name)}
    if misplaced := [word for word in options if word in known and word not in recipes.fields()]:
        raise RecipeError(
            [f"'{word}' is a setting of {name}, not an option" for word in misplaced],
            hint=f'give it as settings={{"{misplaced[0]}": ..}}',
        )
    values = chosen | objects_to_files.setting_values(settings)
    named_rows = str(data) if isinstance(data, str | Path) else "data"
    recipe = recipes.make({**options, "model": "model", "data": named_rows, "method": name, "set": values})
    return dataclasses.replace(
        recipe,
        model=objects_to_files.model_name(model, tokenizer, out),
        data=objects_to_files.data_name(data, out),
    )


def _words(given: str | Sequence[str]) -> list[str]:
    """Names as a list; a text may have several, with commas."""
    return [w.strip() for w in given.split(",") if w.strip()] if isinstance(given, str) else list(given)


# Evaluate ---------------------------------------------------------------------------------------------


def evaluate(
    model: object,
    data: Rows | None = None,
    *,
    tasks: Sequence[str] = (),
    limit: int = 200,
    answer_tokens: int = 96,
    text: str | Path | None = None,
    labels: Sequence[str] = (),
    task_files: str | Path | None = None,
    dtype: str | None = None,
    device: str = "auto",
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> dict[str, float]:
    """Measure a model on rows and return task -> value; a run or a compressed run has held-out rows of its own.

    `tasks` are loss, rouge_l, f1, exact_match, accuracy (by the words in `labels`) and perplexity (of the file `text`);
    the default is loss and rouge_l; for an encoder, loss and accuracy.  At most `limit` rows are measured, cut to the
    `max_length` of the run that the model comes from (512 tokens for others).  The event of a run has the loss of its base
    model on the same rows as well, and how sure the change is.  Losses are in nats per token (of an
    encoder: per row); perplexity has no unit; the others are in percent.  Any other name is a task of
    lm-evaluation-harness, of which at most `limit` questions are asked; `task_files` is a folder of tasks of one's own.  Its
    values are named TASK.METRIC and have the harness's unit; the event has their standard errors.
    """
    found = open(model, out=out)  # before torch is imported
    from fleetune import data as reading
    from fleetune.data.labelled import check_answers
    from fleetune.evaluation import harness_tasks, measures
    from fleetune.runs.events import evaluated
    from fleetune.tuning import objects_to_files

    watching, labels = checked(listener), _words(labels)
    own, others = harness_tasks.divided(_words(tasks))
    wanted = _checked_tasks(own, limit, answer_tokens, text)
    of_harness = harness_tasks.HarnessTasks(others, task_files) if others else None
    if of_harness is not None and not own:
        scores = of_harness.evaluate(
            subjects.load_alone(found, dtype=dtype, device=device, offline=offline), limit=limit
        )
        watching.event(evaluated(
            found.argument, 0, {}, of=0, max_length=found.max_length, harness=scores
        ))  # fmt: skip
        return harness_tasks.by_name(scores)
    file = objects_to_files.data_name(data, Path(out))
    given = reading.read(file, offline=offline) if file else []
    if labels and "accuracy" in wanted:
        answers = [example.response.strip() for example in given[:limit]]
        check_answers(answers, labels, f"labels = {', '.join(labels)}", "name all label words of the data")
    loaded, examples = subjects.load_with_rows(
        found, given, labels=labels, dtype=dtype, device=device, needs_rows=not text, offline=offline
    )
    values, rows = measures.evaluate_rows(
        loaded, examples[:limit], wanted, max_length=found.max_length, max_new_tokens=answer_tokens, labels=labels,
        texts=reading.read_text(str(text)) if text else (),
    )  # fmt: skip
    scores = of_harness.evaluate(loaded, limit=limit) if of_harness is not None else []
    base = (
        subjects.base_losses(found, loaded, examples[:limit]) if rows else None
    )  # the model is the base from here on
    watching.event(evaluated(
        found.argument, len(examples[:limit]), values, of=len(examples), max_length=found.max_length, rows_of=(base, rows),
        harness=scores,
    ))  # fmt: skip
    return values | harness_tasks.by_name(scores)


def _checked_tasks(
    tasks: Sequence[str], limit: int, answer_tokens: int, text: str | Path | None
) -> tuple[str, ...]:
    """Return the tasks; RecipeError for bad options, before anything is loaded."""
    from fleetune.evaluation import measures

    numbers: dict[str, object] = {"limit": limit, "answer_tokens": answer_tokens}
    problems = [f"{n} = {v!r} is not an integer" for n, v in numbers.items() if not isinstance(v, int)]
    problems += [f"{n} = {v} is below 1" for n, v in numbers.items() if isinstance(v, int) and v < 1]
    if text and not Path(text).is_file():
        problems.append(f"no text file at {text}")
    if problems:
        raise RecipeError(problems, hint="fleetune eval --help")
    return measures.check_tasks(list(tasks))


# Compress ---------------------------------------------------------------------------------------------


def compress(
    model: object,
    *,
    method: object = "optq",
    settings: Mapping[str, Setting] | None = None,
    tokenizer: object = None,
    data: Rows | None = None,
    text: str | Path = "",
    eval_text: str | Path = "",
    windows: int = 128,
    length: int = 512,
    calibrate: str = "server",
    clients: int = 0,
    low_memory: bool = False,
    true_sequential: bool = False,
    seed: int = 42,
    dtype: str = "fp32",
    served: Served | None = None,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> CompressResult:
    """Make a model or a finished run smaller in a new folder under `out`, and return it.

    `method` is a name (`fleetune.compressors()`) or a method's own dataclass (`optq.Solver(bits=3)`); `settings` are the
    method's, by name.  A solver calibrates on `windows` windows of `length` tokens, of `data` (rows) or `text` (a file),
    of the run's held-out rows with text that its model writes, or of such text alone; with `calibrate="clients"` the run's
    clients calibrate on their training rows, with `calibrate="fleet"` the real devices that join at the door `served`
    (`fleetune.fleet.server.Served`, in its `with` block).  `low_memory` loads one block at a time from disk.  With
    `true_sequential` a layer is solved on inputs that have passed the already compressed layers of its own block (GPTQ's
    option of that name).  The perplexity of the text file `eval_text` is measured before and after.
    """
    if isinstance(model, str | Path):
        subjects.open_weights(model, out)  # refused before torch is imported
    from fleetune.compression.jobs import job
    from fleetune.tuning import objects_to_files

    watching = checked(listener)
    options: CompressOptions = {
        "data": objects_to_files.data_name(data, Path(out)), "text": str(text),
        "eval_text": str(eval_text), "windows": windows, "length": length, "calibrate": calibrate, "clients": clients,
        "low_memory": low_memory, "true_sequential": true_sequential, "seed": seed, "dtype": dtype,
    }  # fmt: skip
    request = job.request_for(model, method, settings or {}, options, tokenizer=tokenizer, out=Path(out))
    return job.start(request, watching, Path(out), offline=offline, devices=_devices(served))


def resume_compression(
    folder: object,
    *,
    served: Served | None = None,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> CompressResult:
    """Resume a stopped compression as it was requested; return a finished one as it is.

    `folder` is a name, number, path or result; `served` is the door for devices, where these calibrate.
    """
    from fleetune.compression.jobs import job
    from fleetune.runs import compression_folder

    found = getattr(folder, "folder", None)
    path = found if isinstance(found, Path) else compression_folder.get(str(folder), Path(out))
    return job.resume(path, checked(listener), Path(out), offline=offline, devices=_devices(served))


def _devices(served: Served | None) -> Calibrators | None:
    """The devices at a door, as a compression asks for them."""
    if served is None:
        return None
    from fleetune.fleet.calibration_server import Calibrators

    return Calibrators(served)


# Export, measure, serve -------------------------------------------------------------------------------


def export(
    model: object,
    *,
    to: str | None = None,
    path: str | Path | None = None,
    text: str | Path | None = None,
    push: str | None = None,
    private: bool = False,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> ExportResult:
    """Write a model for a runtime, and read it back.

    `to` is a target (`fleetune.targets()`; default `gguf`; for a run `hf`), `path` a new file or folder (default: in the
    folder of the run or compression; of a plain model here).  With a text file `text`, the perplexity of the source in
    torch and of the written file in its runtime are compared.  With `push`, OWNER/NAME, what was written goes to that
    model repository on the Hub, which is made (`private` or not) if it is not there.
    """
    from fleetune.deploy import export_subject

    place, words, watching = Path(path) if path else None, str(text) if text else None, checked(listener)
    export_subject.check(to, place, words)
    to_hub = export_subject.destination(push, private=private, offline=offline)
    found = open(model, out=out)
    done = export_subject.export(found, to, place, words, watching, offline=offline)
    return export_subject.pushed(done, to_hub, watching) if to_hub else done


def measure(
    *models: object,
    text: str | Path | None = None,
    windows: int = 16,
    length: int = 512,
    data: Rows | None = None,
    limit: int = 200,
    tasks: Sequence[str] = (),
    answer_tokens: int = 96,
    labels: Sequence[str] = (),
    threads: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    kept_gain: bool = False,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> MeasureResult:
    """Measure size, speed, memory and quality of models side by side, each in a process of its own.

    For a compression, three models are measured: base, tuned, compressed (without tuned if it was never tuned).  Models
    are run in torch, exported .gguf files in llama.cpp, a model that is a .gguf file in both.  With several models, only
    the last stage of each is measured, in torch and as its exported files.  `kept_gain` also compresses the base in the
    same way, to find what share of the improvement from tuning survives.
    """
    from fleetune.deploy.measure import kept_gain as kept_gains

    found = [open(model, out=out) for model in models]  # what is no model is refused before torch is imported
    if kept_gain and found:
        kept_gains.check(found)
    from fleetune.deploy.measure import job
    from fleetune.tuning import objects_to_files

    options = job.MeasureOptions(
        text=str(text) if text else None, windows=windows, length=length,
        data=objects_to_files.data_name(data, Path(out)) or None, limit=limit, tasks=tuple(_words(tasks)),
        answer_tokens=answer_tokens, labels=tuple(_words(labels)), threads=threads, prompt_tokens=prompt_tokens,
        new_tokens=new_tokens, repeats=repeats, kept_gain=kept_gain,
    )  # fmt: skip
    if not models:
        raise UsageError("measure needs a model", hint="give one or more names, paths or results")
    job.check(len(models), options)
    return job.measure(found, options, checked(listener), offline=offline)


@contextmanager
def serve(
    model: object,
    *,
    engine: str = "auto",
    threads: int | None = None,
    context: int = 4096,
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
    beside_base: bool = False,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> Iterator[Session]:
    """Serve a model over an OpenAI-compatible endpoint and a chat page while the block runs.

    `engine` is a name or auto (the first installed); without `threads`, several counts are tried and the fastest is
    used; `port` 0 takes any free one.  A client must present `token` if one is given; on a `host` beyond this machine one
    is always needed, and made where none is given.  With `beside_base` the base model is served as well, in a second
    engine with memory of its own: a request goes to the one that it names.
    """
    from fleetune.deploy.serving import session

    with session.served(
        open(model, out=out), session.EngineOptions(engine, threads, context),
        session.FrontOptions(host, port, token), checked(listener), offline=offline, beside_base=beside_base,
    ) as opened:  # fmt: skip
        yield opened


# What there is ----------------------------------------------------------------------------------------


def methods() -> list[str]:
    """Return the names of all tuning methods, those of other packages included."""
    from fleetune.tuning import methods as found

    return list(found.entries())


def compressors() -> list[str]:
    """Return the names of all compression methods, those of other packages included."""
    from fleetune import compression

    return list(compression.entries())


def targets() -> list[str]:
    """Return the names of all export targets, those of other packages included."""
    from fleetune.deploy import targets as found

    return list(found.every())
