"""Take a model to the device: export, measure, serve, chat."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fleetune import subject as subjects
from fleetune.api.names import CompressorName, Dtype, Engine, Rows, Setting, TargetName
from fleetune.common.events import LinkVerified, Released, Serving
from fleetune.common.settings import parse_bytes
from fleetune.compression.jobs import job
from fleetune.deploy import serve as serving
from fleetune.deploy import targets
from fleetune.errors import UsageError
from fleetune.runs import compression_folder
from fleetune.runs.listener import Listener, heard_by
from fleetune.tuning.recipe import objects

if TYPE_CHECKING:
    from fleetune.compression import Compressor
    from fleetune.compression.jobs.job import CompressResult
    from fleetune.deploy.export import ExportResult
    from fleetune.deploy.measure import MeasureResult
    from fleetune.deploy.serve import Conversation, Session
    from fleetune.fleet.server import Served
    from fleetune.models.artefact import ArtefactHead
    from fleetune.models.net.model import Model


def compress(
    model: object,
    *,
    method: CompressorName | Compressor | None = None,
    settings: Mapping[str, Setting] | None = None,
    tokenizer: object = None,
    data: Rows | None = None,
    text: str | Path = "",
    eval_text: str | Path = "",
    windows: int = 128,
    length: int = 512,
    calibrate: Literal["server", "clients", "fleet"] = "server",
    clients: int = 0,
    low_memory: bool = False,
    bytes: float | str = 0,
    bits: int = 0,
    fast: bool = False,
    train_scales: int = 0,
    seed: int = 42,
    dtype: Dtype = "fp32",
    served: Served | None = None,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> CompressResult:
    """Make a model or a finished run smaller in a new folder under `out`, and return it.

    `method` is a name (`fleetune.compressors()`) or a method's own dataclass (`optq.Solver(bits=3)`); without one it is
    `qronos`, or `optq` where devices calibrate.  `settings` are the method's, by name.  A solver calibrates on `windows`
    windows of `length` tokens, of `data` (rows) or `text` (a file), of the run's held-out rows with text that comes with
    Fleetune, or of such text alone; with `calibrate="clients"` the run's clients calibrate on their training rows, with
    `calibrate="fleet"` the real devices that join at the door `served` (`fleetune.fleet.server.Served`, in its `with`
    block).  `low_memory` loads one block at a time from disk.  `bytes` (a number, or text such as "91.7MB") limits the
    GGUF file, or `bits` (4, 5 or 8: as large as Q4_0, Q5_0 or Q8_0): the grid of each matrix, embedding and head included, is
    chosen so that the model changes least.  Without a method, a grid and a size `bits` is 4; `fast` takes one grid for all
    matrices, which takes less time.  `train_scales` are steps in which the scales are trained, after solving, to follow the
    dense model.  The perplexity of the text file `eval_text` is measured before and after.
    """
    if isinstance(model, str | Path):
        subjects.open_weights(model, out)  # refused before torch is imported

    watching = heard_by(listener, progress)
    options = {
        "data": objects.data_name(data, Path(out)),
        "text": str(text),
        "eval_text": str(eval_text),
        "windows": windows,
        "length": length,
        "calibrate": calibrate,
        "clients": clients,
        "low_memory": low_memory,
        "bytes": _size(bytes),
        "bits": bits,
        "fast": fast,
        "train_scales": train_scales,
        "seed": seed,
        "dtype": dtype,
    }
    request = job.request_for(model, method, settings or {}, options, tokenizer=tokenizer, out=Path(out))
    return job.start(request, watching, Path(out), _prepare(watching, out, offline, served))


def resume_compression(
    folder: object,
    *,
    served: Served | None = None,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> CompressResult:
    """Resume a stopped compression as it was requested; return a finished one as it is.

    `folder` is a name, number, path or result; `served` is the door for devices, where these calibrate.
    """
    found = getattr(folder, "folder", None)
    path = found if isinstance(found, Path) else compression_folder.get(str(folder), Path(out))
    watching = heard_by(listener, progress)
    return job.resume(path, watching, _prepare(watching, out, offline, served))


def _prepare(listener: Listener, out: str | Path, offline: bool, served: Served | None) -> job.Prepare:
    devices = None
    if served is not None:
        from fleetune.fleet import calibration_server

        devices = calibration_server.Calibrators(served)
    return functools.partial(
        job.prepare, listener=listener, out=Path(out), offline=offline, devices=devices, beside=file_size
    )


def file_size(model: Model, quantised: Collection[str], head: ArtefactHead, name: str) -> int:
    """Return what `export.size_beside` does; that module, which imports torch, is imported once it is called."""
    from fleetune.deploy import export

    return export.size_beside(model, quantised, head, name)


def _size(size: float | str) -> int:
    return int(size) if isinstance(size, int | float) else parse_bytes(size, "--bytes", least=1) or 0


def export(
    model: object,
    *,
    to: TargetName | None = None,
    path: str | Path | None = None,
    text: str | Path | None = None,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> ExportResult:
    """Write a model for a runtime, and read it back.

    `to` is a target (`fleetune.targets()`; default `gguf`; for a run `hf`), `path` a new file or folder (default: in the
    folder of the run or compression; of a plain model here).  With a text file `text`, the perplexity of the source in
    torch and of the written file in its runtime are compared.
    """
    place, file = Path(path) if path else None, str(text) if text else None
    targets.check(to, place, file)  # before torch is imported
    subject = subjects.open(model, out=out)
    from fleetune.deploy import export as exporting

    return exporting.export(subject, to, place, file, heard_by(listener, progress), offline=offline)


def verify(
    name: object,
    *sources: object,
    signer: str = "",
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
) -> list[LinkVerified]:
    """Return what is proven, and what only declared, of a run, compression, model, release, file or folder.

    What can be made again exactly is made again and compared.  `sources` are what it was made from, where that lies elsewhere:
    a base model, a run, a compression.  `signer` (a fingerprint, a public key or its file) is whose release it must be.
    FleetuneError, which names the place, at the first thing that differs; UsageError where nothing can be verified.
    """
    from fleetune.deploy import verify as verifying

    parents = verifying.Parents.of(sources, Path(out), heard_by(listener, None), offline=offline)
    return list(verifying.told(subjects.text_of(name), parents, signer=signer))


def release(
    run: object, *, to: str | Path | None = None, key: str | Path | None = None, out: str | Path = "runs"
) -> Released:
    """Write a finished run as one signed folder `to` (default: `release` in the run), ready to upload.

    `key` is an ed25519 key as `ssh-keygen` makes it, without a password; by default one of your own, made once.
    """
    from fleetune.deploy import release as releasing

    found = subjects.open(run, out=out)
    if not isinstance(found, subjects.Run):
        raise UsageError(f"{found.argument} is not a run, and runs are released", hint="fleetune runs")
    return releasing.write(found, Path(to) if to else None, Path(key).expanduser() if key else None)


def measure(
    *models: object,
    text: str | Path | None = None,
    windows: int = 16,
    length: int = 512,
    data: Rows | None = None,
    limit: int = 200,
    threads: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    kept_gain: bool = False,
    reference: object | None = None,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> MeasureResult:
    """Measure size, speed, memory and quality of models side by side, each in a process of its own.

    For a compression, three models are measured: base, tuned, compressed (without tuned if it was never tuned).  Models
    are run in torch, exported .gguf files in llama.cpp, a model that is a .gguf file in both.  With several models, only
    the last stage of each is measured, in torch and as its exported files.  `kept_gain` also compresses the base in the
    same way, to find what share of the improvement from tuning survives.  With a model `reference`, every model is compared
    with it: KL divergence of the next-token distributions (nats a token) and same top token (percent), on the windows of
    `text`, else on the rows' answers; a compressed model is compared with what it was made from without being asked.
    """
    from fleetune.deploy import measure as measuring

    # what is no model is refused before torch is imported
    found = [subjects.open(model, out=out) for model in models]
    if kept_gain and found:
        measuring.check_kept(found)

    options = measuring.MeasureOptions(
        text=str(text) if text else None,
        windows=windows,
        length=length,
        data=objects.data_name(data, Path(out)) or None,
        limit=limit,
        threads=threads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        kept_gain=kept_gain,
    )
    if not models:
        raise UsageError("measure needs a model", hint="give one or more names, paths or results")
    dense = subjects.open(reference, out=out) if reference is not None else None
    return measuring.measure(found, options, heard_by(listener, progress), reference=dense, offline=offline)


@contextmanager
def serve(
    model: object,
    *,
    engine: Engine = "auto",
    threads: int | None = None,
    context: int = 4096,
    host: str = "127.0.0.1",
    port: int = 8080,
    key: str = "",
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> Iterator[Session]:
    """Run an engine with a model while the block runs: OpenAI's HTTP interface, and llama.cpp's chat page, at `.url`.

    `engine` is llama-server, xllamacpp or auto (the first installed), which chooses its number of threads
    unless `threads` is given; `port` 0 takes any free one.  A client must present `key` if one is given (or is in the
    environment's LLAMA_API_KEY); on a `host` beyond this machine one is always needed, and made where none is given.
    UsageError for options that cannot be, FleetuneError for an engine that ends or does not load the model.
    """
    watching = heard_by(listener, progress)
    options = serving.Options(engine, threads, context, host, port, key)
    with serving.opened(subjects.open(model, out=out), options, watching, offline=offline) as served:
        watching.event(Serving(url=served.url, model=served.model.name, engine=served.options.engine))
        yield served


@contextmanager
def chat(
    model: object,
    *,
    system: str = "",
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 42,
    engine: Engine = "auto",
    threads: int | None = None,
    context: int = 4096,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> Iterator[Conversation]:
    """Talk to a model in an engine of its own: `.say(text)` returns the answer, `.turns` has all that was said.

    Temperature 0 gives the likeliest answer, the same each time; above it an answer is drawn with `seed`.  It has at most
    `max_tokens` tokens.  The engine's arguments and the errors are those of `serve`; `generate` needs no engine.
    """
    options = serving.Options(engine, threads, context, key=None)
    sampling = serving.Sampling(temperature, max_tokens, seed)
    sampling.check()
    found = subjects.open(model, out=out)
    with serving.opened(found, options, heard_by(listener, progress), offline=offline) as opened:
        yield serving.Conversation(opened, sampling, system)
