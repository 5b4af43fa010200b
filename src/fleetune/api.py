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
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from fleetune import subject as subjects
from fleetune.common.settings import Value
from fleetune.errors import RecipeError, UsageError
from fleetune.runs import rundir
from fleetune.runs.events import TuneChecked
from fleetune.runs.listener import Listener, Silent
from fleetune.subject import Compressed, Plain, Run, Subject
from fleetune.tuning import recipe as recipes
from fleetune.tuning.recipe import Recipe, RecipeOptions

if TYPE_CHECKING:
    from fleetune.compression.jobs.contract import Job
    from fleetune.compression.jobs.job import CompressResult
    from fleetune.data import Example
    from fleetune.deploy.export_subject import ExportResult
    from fleetune.deploy.measure.job import MeasureResult
    from fleetune.deploy.serving.session import Session
    from fleetune.planning.plan import Plan
    from fleetune.runs.compression_folder import CompressOptions, CompressRequest
    from fleetune.tuning.prepare import TuneJob
    from fleetune.tuning.result import TuneResult

Setting = Value | Callable[..., Any]  # of a method; a function is an objective or a reward
Rows = str | Path | Iterable[Mapping[str, Any]]  # a file, a hub id, or rows: dicts, a datasets.Dataset


def open(name: Any, *, out: str | Path = "runs") -> Subject:
    """Return what a name means: a `Run`, a `Compressed` model or a `Plain` one.  No weights are loaded yet.

    `name` is a path, the name or number of a run or compression under `out`, `latest`, a built-in name or a hub id, or a
    result of `tune` or `compress`.  UsageError when no run or compression has that number, or there is no latest one.
    """
    if isinstance(name, Run | Compressed | Plain):
        return name
    if isinstance(name, str | Path):
        return subjects.open(name, out)
    if isinstance(path := getattr(name, "path", None), Path) and not hasattr(name, "folder"):  # of an export
        return Plain(str(path))
    if isinstance(folder := getattr(name, "folder", None), Path):  # a result
        return Run(folder) if (folder / "run.toml").is_file() else Compressed(folder)
    raise UsageError(
        f"a {type(name).__name__} is not the name of a model", hint="give a name, a path or a result"
    )


def _named(method: object, modules: Mapping[str, str]) -> tuple[str, dict[str, Value]]:
    """Return a method's name and settings, from its name or its own dataclass; `modules` is name -> module."""
    if isinstance(method, str):
        return method, {}
    cls = type(method)
    name = next((n for n, module in modules.items() if module == cls.__module__), None)
    if (
        name is None
        or isinstance(method, type)
        or not dataclasses.is_dataclass(method)
        or isinstance(method, type)
    ):
        raise UsageError(f"a {cls.__name__} is not a method", hint=f"there are: {', '.join(modules)}")
    return name, {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}


# Plan -------------------------------------------------------------------------------------------------


def plan(
    model: str | Path,
    *,
    ram: str | int | None = None,
    uplink: str | float | None = None,
    batch: int = 1,
    length: int = 256,
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

    config = models.load_config(str(model), offline=offline)
    work = planning.Workload(batch=batch, length=length, steps=steps, dtype=dtype)
    return planning.make(
        config, str(model), work,
        ram=planning.parse_bytes(str(ram)) if ram is not None else None,
        uplink=planning.parse_rate(f"{uplink} B/s" if isinstance(uplink, int | float) else uplink),
    )  # fmt: skip


# Tune -------------------------------------------------------------------------------------------------


def tune(
    model: object,
    data: Rows | None = None,
    *,
    method: object = "fedkseed",
    settings: Mapping[str, Setting] | None = None,
    tokenizer: object = None,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    **options: Unpack[RecipeOptions],
) -> TuneResult:
    """Tune a model over a simulated fleet in a new folder under `out`, and return the run.

    `model` is a name or path, a `fleetune.Model`, a transformers or PEFT model (with its `tokenizer`), or a whole
    `Recipe`, which then holds all options.  `data` is a file, a hub id, `"demo"`, or rows as dicts.  `method` is a name
    or a method's own dataclass (`fedkseed.Method(K=1024)`); `settings` are the method's, by name.  `options` are those
    of `fleetune.Recipe`.  A model or rows given as Python objects are saved under `OUT/objects`, so that the run can be
    resumed.
    """
    recipe = model if isinstance(model, Recipe) else None
    if recipe is None:
        recipe = _recipe(model, data, method, settings or {}, tokenizer, Path(out), options)
    elif data is not None or settings or options or tokenizer is not None or method != "fedkseed":
        raise UsageError(
            "a recipe says everything; nothing is given beside it", hint="dataclasses.replace it"
        )
    return run_recipe(recipe, out=out, offline=offline, listener=listener)


# A job seeds torch's generator and sets its threads, so two at a time in a process would disturb each other.
_ONE_AT_A_TIME = threading.RLock()


def run_recipe(
    recipe: Recipe, *, out: str | Path = "runs", offline: bool = False, listener: Listener | None = None
) -> TuneResult:
    """Tune by a recipe, in a new folder under `out`."""
    from fleetune.tuning import prepare, run
    from fleetune.tuning.result import TuneResult

    watching = _listener(listener)
    prepare.check(recipe)
    rundir.check_writable(Path(out))
    with _ONE_AT_A_TIME:
        job = prepare.prepare(recipe, offline=offline)
        with rundir.create(Path(out), recipe.method, recipe.model) as folder:
            return TuneResult(folder.path.absolute(), run.tune(job, folder, watching))


def resume_run(
    run: str | Path, *, out: str | Path = "runs", offline: bool = False, listener: Listener | None = None
) -> TuneResult:
    """Resume a stopped run by its own recipe, to the same bits as without the stop; return a finished run as it is."""
    from fleetune.tuning import prepare, result
    from fleetune.tuning import run as running

    watching, path = _listener(listener), _run_folder(run, Path(out))
    recipe = recipes.make(recipes.read(path / "run.toml"))
    prepare.check(recipe)
    if rundir.status_of(path) == "done":
        found = result.read(path)
        watching.note(f"{path} is finished already")
        watching.event(found.done)
        return found
    with _ONE_AT_A_TIME, rundir.RunDir(path) as folder:
        rundir.check_writable(path)
        job = prepare.prepare(recipe, offline=offline)
        return result.TuneResult(path.absolute(), running.tune(job, folder, watching))


def check_recipe(recipe: Recipe, *, offline: bool = False) -> TuneChecked:
    """Load the model and data of a recipe and check it; write nothing."""
    from fleetune.tuning import prepare

    prepare.check(recipe)
    job: TuneJob = prepare.prepare(recipe, offline=offline)
    return TuneChecked(clients=len(job.rows), rows=sum(map(len, job.rows)), held_out=len(job.held))


def _listener(given: Listener | None) -> Listener:
    """The listener to call; UsageError, before any work, for an object that is none."""
    found = Silent() if given is None else given
    if missing := [n for n in vars(Silent) if not n.startswith("_") and not hasattr(found, n)]:
        raise UsageError(
            f"a {type(found).__name__} is no listener: it has no {', '.join(missing)}",
            hint="inherit from fleetune.Silent, and override what you want to hear",
        )
    return found


def _run_folder(run: object, out: Path) -> Path:
    """The folder of a run by its name, number, path or result."""
    folder = getattr(run, "folder", None)
    return folder if isinstance(folder, Path) else rundir.find(str(run), out)


def _words(given: str | Sequence[str]) -> list[str]:
    """Names as a list; a text may have several, with commas."""
    return [w.strip() for w in given.split(",") if w.strip()] if isinstance(given, str) else list(given)


def _recipe(
    model: object,
    data: Rows | None,
    method: object,
    settings: Mapping[str, Setting],
    tokenizer: object,
    out: Path,
    options: RecipeOptions,
) -> Recipe:
    from fleetune.tuning import methods, objects_to_files

    if data is None:
        raise RecipeError(["data is missing"], hint='give a file, rows, or "demo"')
    name, chosen = _named(method, {n: e.module for n, e in methods.entries().items()})
    return recipes.make({
        **options, "model": objects_to_files.model_name(model, tokenizer, out), "data": objects_to_files.data_name(data, out),
        "method": name, "set": chosen | objects_to_files.setting_values(settings),
    })  # fmt: skip


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
    dtype: str | None = None,
    device: str = "auto",
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> dict[str, float]:
    """Measure a model on rows and return task -> value; a run or a compressed run has held-out rows of its own.

    `tasks` are loss, rouge_l, f1, exact_match, accuracy (by the words in `labels`) and perplexity (of the file `text`);
    the default is loss and rouge_l; for an encoder, loss and accuracy.  At most `limit` rows are measured.  Losses are
    in nats a token (of an encoder: a row); perplexity has no unit; the others are in percent.
    """
    from fleetune import data as reading
    from fleetune.evaluation import measures
    from fleetune.runs.events import evaluated

    tasks, labels = _words(tasks), _words(labels)
    wanted = _checked_tasks(tasks, limit, answer_tokens, text)
    found = open(model, out=out)
    given = _rows(data, Path(out), offline=offline)
    loaded, examples = subjects.load_with_rows(
        found, given, labels=labels, dtype=dtype, device=device, needs_rows=not text, offline=offline
    )
    values = measures.evaluate(
        loaded, examples[:limit], wanted, max_new_tokens=answer_tokens, labels=labels,
        texts=reading.read_text(str(text)) if text else (),
    )  # fmt: skip
    (_listener(listener)).event(evaluated(found.argument, len(examples[:limit]), values))
    return values


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


def _rows(data: Rows | None, out: Path, *, offline: bool) -> list[Example]:
    from fleetune import data as reading
    from fleetune.tuning import objects_to_files

    return reading.read(objects_to_files.data_name(data, out), offline=offline) if data is not None else []


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
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> CompressResult:
    """Make a model or a finished run smaller in a new folder under `out`, and return it.

    `method` is a name (`fleetune.compressors()`) or a method's own dataclass (`optq.Solver(bits=3)`); `settings` are the
    method's, by name.  A solver calibrates on `windows` windows of `length` tokens, of `data` (rows) or `text` (a file),
    of the run's held-out rows, or of text that the model writes; with `calibrate="clients"` the run's clients calibrate
    on their training rows.  `low_memory` loads one block at a time from disk.  With `true_sequential` a layer is solved
    on inputs that have passed the already compressed layers of its own block (GPTQ's option of that name).  The
    perplexity of the text file `eval_text` is measured before and after.
    """
    from fleetune.tuning import objects_to_files

    options: CompressOptions = {
        "data": objects_to_files.data_name(data, Path(out)) if data is not None else "", "text": str(text),
        "eval_text": str(eval_text), "windows": windows, "length": length, "calibrate": calibrate, "clients": clients,
        "low_memory": low_memory, "true_sequential": true_sequential, "seed": seed, "dtype": dtype,
    }  # fmt: skip
    request = request_for(model, method, settings or {}, options, tokenizer=tokenizer, out=out)
    return start_compression(request, out=out, offline=offline, listener=listener)


def start_compression(
    request: CompressRequest,
    *,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> CompressResult:
    """Compress as requested, in a new folder under `out`."""
    from fleetune.compression.jobs import job

    return job.start(request, _listener(listener), Path(out), offline=offline)


def check_request(
    request: CompressRequest,
    *,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> Job:
    """Load the model and data and check the request; write nothing.  Return the prepared job."""
    from fleetune.compression.jobs import job

    return job.prepare(request, _listener(listener), Path(out), offline=offline)


def request_for(
    model: object,
    method: object,
    settings: Mapping[str, Setting],
    options: CompressOptions,
    *,
    tokenizer: object = None,
    out: str | Path = "runs",
) -> CompressRequest:
    """Return the request that `compress` would carry out; UsageError for a model that has no plain weights."""
    from fleetune import compression
    from fleetune.compression.jobs import job
    from fleetune.tuning import objects_to_files

    if isinstance(model, Run | Compressed | Plain):
        model = model.argument
    elif isinstance(folder := getattr(model, "folder", None), Path):
        model = str(folder)
    name, chosen = _named(method, {n: m.module for n, m in compression.REGISTRY.members().items()})
    values = chosen | objects_to_files.setting_values(settings)
    texts = {n: v if isinstance(v, str) else repr(v) for n, v in values.items()}
    model_name = objects_to_files.model_name(model, tokenizer, Path(out))
    return job.request_for(model_name, Path(out), name, texts, options)


def resume_compression(
    folder: str | Path, *, out: str | Path = "runs", offline: bool = False, listener: Listener | None = None
) -> CompressResult:
    """Resume a stopped compression as it was requested; return a finished one as it is."""
    from fleetune.compression.jobs import job
    from fleetune.runs import compression_folder

    found = compression_folder.find(str(folder), Path(out))
    if found is None:
        raise UsageError(f"no compression '{folder}' in {out}", hint="fleetune compress MODEL")
    return job.resume(found, _listener(listener), Path(out), offline=offline)


# Export, measure, serve -------------------------------------------------------------------------------


def export(
    model: object,
    *,
    to: str | None = None,
    path: str | Path | None = None,
    text: str | Path | None = None,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> ExportResult:
    """Write a model for a runtime, and read it back.

    `to` is a target (`fleetune.targets()`; default `gguf`; for a run `hf`), `path` a new file or folder (default: in the
    folder of the run or compression; of a plain model here).  With a text file `text`, the perplexity of the source in
    torch and of the written file in its runtime are compared.
    """
    from fleetune.deploy import export_subject

    place, words = Path(path) if path else None, str(text) if text else None
    export_subject.check(to, place, words)
    found = open(model, out=out)
    return export_subject.export(found, to, place, words, _listener(listener), offline=offline)


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
    from fleetune.deploy.measure import job
    from fleetune.tuning import objects_to_files

    options = job.MeasureOptions(
        text=str(text) if text else None, windows=windows, length=length,
        data=objects_to_files.data_name(data, Path(out)) if data is not None else None, limit=limit, tasks=tuple(_words(tasks)),
        answer_tokens=answer_tokens, labels=tuple(_words(labels)), threads=threads, prompt_tokens=prompt_tokens,
        new_tokens=new_tokens, repeats=repeats, kept_gain=kept_gain,
    )  # fmt: skip
    if not models:
        raise UsageError("measure needs a model", hint="give one or more names, paths or results")
    job.check(len(models), options)
    found = [open(model, out=out) for model in models]
    return job.measure(found, options, _listener(listener), offline=offline)


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
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> Iterator[Session]:
    """Serve a model over an OpenAI-compatible endpoint and a chat page while the block runs.

    `engine` is a name or auto (the first installed); without `threads`, several counts are tried and the fastest is
    used; `port` 0 takes any free one.  A client must present `token` if one is given; on a `host` beyond this machine one
    is always needed, and made where none is given.
    """
    from fleetune.deploy.serving import session

    with session.served(
        open(model, out=out), session.EngineOptions(engine, threads, context),
        session.FrontOptions(host, port, token), _listener(listener), offline=offline,
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
