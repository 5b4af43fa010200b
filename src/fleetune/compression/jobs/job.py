"""Run a compression: check the request, prepare the job of its method, run it in a folder, return the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fleetune import compression, subject
from fleetune.common import settings, sums
from fleetune.common.display import COMPARED, command, human_bytes, metric, quoted, show_with_error
from fleetune.common.events import CompressDone
from fleetune.common.files import resumable
from fleetune.common.ggml import SCALES
from fleetune.common.memory import release_memory
from fleetune.compression.jobs.progress import resume_command
from fleetune.data import readers
from fleetune.errors import Interrupted, RecipeError, UsageError
from fleetune.report.page import framed_table
from fleetune.runs import compression_folder, rundir
from fleetune.runs.compression_folder import CLIENTS, FLEET, NAMED, CompressRequest
from fleetune.runs.listener import Listener
from fleetune.tuning.recipe import objects

if TYPE_CHECKING:
    from fleetune.compression.jobs.solve import Devices, FileSize, SolveJob
    from fleetune.compression.jobs.whole import DistilJob, PruneJob
    from fleetune.models.net.model import Model

    Job: TypeAlias = SolveJob | DistilJob | PruneJob

FAST = "iq4_nl"  # the grid of --fast
GRID = {"grid", "bits", "group"}  # settings of one grid for all matrices
BESIDE = {*(f"{name}_error" for name in COMPARED), "kl_tokens"}  # these have no line of their own


@dataclass(frozen=True)
class CompressResult:
    """A finished compression; the keys of `sizes` are `before`, `after` and, where there is one, `teacher` or `pruned`."""

    request: CompressRequest
    folder: Path
    done: CompressDone
    sizes: Mapping[str, int]  # bytes of the weights: `before`, `after`, ..; {} if finished earlier

    @property
    def path(self) -> Path:
        """The artefact of codes, or the plain directory."""
        return self.folder / "model"

    @property
    def digest(self) -> str:
        """SHA-256 of the artefact's file, or of the plain weights."""
        return self.done.digest

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the headings, and a row for the weights and for each measure, as text: its name, a value for each of `sizes`."""
        measured: dict[str, Any] = asdict(self.done)
        sizes = [human_bytes(size) for size in self.sizes.values()]
        file = Path(self.request.model).expanduser()
        if sizes and file.is_file():  # whose weights were read into plain numbers
            sizes[0] += f", {human_bytes(file.stat().st_size)} in its file"
        names = dict.fromkeys(name for which in self.sizes for name in measured[which])
        rows = [
            [metric(name).label, *(_shown(measured[c], name) for c in self.sizes)]
            for name in names
            if name not in BESIDE
        ]
        return ["", *self.sizes], [["weights", *sizes], *rows]

    def _repr_html_(self) -> str:
        facts = [("result", str(self.path)), ("digest", self.digest)]
        return framed_table("Compression", facts, *self.table())

    def model(self, *, device: str = "cpu", offline: bool = False) -> Model:
        """Load the compressed model, codes as the values that they stand for."""
        return subject.Compressed(self.folder).load(device=device, offline=offline)


def _shown(values: Mapping[str, float], name: str) -> str:
    return show_with_error(name, values[name], values.get(f"{name}_error")) if name in values else ""


def request_for(
    model: object,
    method: object,
    chosen: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    tokenizer: object = None,
    out: Path,
) -> CompressRequest:
    """Return the request to compress a model (a name, a result, an object) with a method and its settings.

    `method` None is the default method.  `options` are fields of the request that are not the defaults, and `fast`: one grid
    for all matrices.  Where nothing says a method, a grid or a size, the file has that of `USUAL` bits.  UsageError when
    `model` means no plain weights.
    """
    fast, options = bool(options.get("fast")), {n: v for n, v in options.items() if n != "fast"}
    if options.get("bits") and "bits" not in chosen and GRID & chosen.keys():  # those of this grid
        chosen = {"bits": options.pop("bits"), **chosen}
    limited = options.get("bytes") or options.get("bits")
    devices = options.get("calibrate") in (CLIENTS, FLEET)
    if fast and (limited or GRID & chosen.keys()):
        raise UsageError("--fast takes one grid, and a size or a grid is given too", hint="leave out --fast")
    if fast:
        chosen = {**chosen, "grid": FAST}
    elif method is None and not (limited or devices or options.get("low_memory") or GRID & chosen.keys()):
        options["bits"] = compression_folder.USUAL
    if method is None:
        method = compression.DEFAULT_OF_DEVICES if devices else compression.DEFAULT
    modules = {name: member.module for name, member in compression.REGISTRY.members().items()}
    name, own = settings.named(method, modules)
    values = own | objects.setting_values(chosen)
    texts = {n: v if isinstance(v, str) else repr(v) for n, v in values.items()}
    if objects.is_model(model):
        model = objects.model_name(model, tokenizer, out)
    found = subject.open_weights(model, out)
    run = isinstance(found, subject.Run)
    place = str(_lasting(found.folder)) if isinstance(found, subject.Run) else found.name
    return CompressRequest(model=place, run=run, method=name.replace("_", "-"), set=texts, **options)


def _lasting(run: Path) -> Path:
    """Return a run's folder by a lasting name: `latest` may be a link, and `.` depends on the working directory."""
    if run.is_symlink():
        return run.parent / run.readlink()
    return run.resolve() if run.name in ("", "..") else run


def prepare(
    request: CompressRequest,
    listener: Listener,
    out: Path,
    *,
    offline: bool,
    devices: Devices | None = None,
    beside: FileSize | None = None,
    dry: bool = False,
) -> Job:
    """Check a request, and load its model and data.

    `devices` are those of --calibrate fleet; `beside` is needed for a budget in bytes.  A `dry` job is not to be carried out.
    """
    if not dry:
        _check_devices(request, devices)
    release_memory()  # an earlier job's, so that the peak is this one's
    check(request)
    # only now: these import torch, and a wrong request is refused without it
    from fleetune.compression.jobs import inputs, solve, whole

    method = compression.make(request.method, request.set)
    _check_grid(request, method)
    if request.run:
        _note_codes(request, listener)
    else:
        subject.open_weights(request.model, out)  # it may hold codes by now
    if isinstance(method, compression.Trainer | compression.Pruner):
        _check_whole(request)
    if isinstance(method, compression.Trainer):
        return whole.prepare_distillation(request, method, out, offline=offline)
    if isinstance(method, compression.Pruner):
        return whole.prepare_pruning(request, method, offline=offline)
    solve.check(request, method)
    loaded = inputs.load(request, offline=offline)
    return solve.prepare(request, method, loaded, listener, devices, beside)


Prepare: TypeAlias = "Callable[[CompressRequest], Job]"  # `prepare`, with all else given


def start(request: CompressRequest, listener: Listener, out: Path, made: Prepare) -> CompressResult:
    """Check a request, then run it in a new folder under `out`."""
    rundir.check_writable(out, make=False)
    job = made(request)
    folder = compression_folder.create(request, out)
    with rundir.locked(folder), _named_when_stopped(folder):
        return _carry_out(request, job, listener, folder)


def resume(folder: Path, listener: Listener, made: Prepare) -> CompressResult:
    """Resume a stopped compression as it was requested; return the result of a finished one.

    ModelError when a finished result is not what was written.
    """
    request = compression_folder.request_of(folder)
    with rundir.locked(folder), _named_when_stopped(folder):
        if (result := compression_folder.finished(folder)) is not None:
            subject.check_compressed(folder)
            done = CompressDone(folder=str(folder), **result)
            listener.event(done)
            listener.note(f"{folder} is finished: there is nothing to resume")
            return CompressResult(request, folder, done, {})
        return _carry_out(request, made(request), listener, folder)


@contextmanager
def _named_when_stopped(folder: Path) -> Iterator[None]:
    """Let what stops the job in the block (Ctrl-C, a full disk) name the command that resumes it."""
    command = resume_command(folder)
    with resumable(command):
        try:
            yield
        except Interrupted as stopped:
            stopped.hint = stopped.hint or command
            raise
        except KeyboardInterrupt as stopped:
            stopped.add_note(command)
            raise


def _carry_out(request: CompressRequest, job: Job, listener: Listener, folder: Path) -> CompressResult:
    """Run a prepared job in a folder that is locked."""
    fields: dict[str, Any] = {
        s.name: s.default for s in compression.settings_of(request.method)
    } | request.set
    # a grid may say bits and group
    fields |= {name: getattr(job.method, name) for name in ("bits", "group") if name in fields}
    if job.request.limited:
        limit = human_bytes(request.bytes) if request.bytes else f"the size of {request.bits} bits"
        fields = {n: v for n, v in fields.items() if n not in ("bits", "grid")} | {"within": limit}
    model = job.inputs.model
    listener.header(
        "fleetune compress",
        [
            ("model", f"{request.model} @ {model.digest[:8]} · {model.n_params / 1e6:.1f} M parameters"),
            ("method", f"{request.method} · " + " · ".join(f"{k} {v}" for k, v in fields.items())),
            *job.about(),
            ("folder", str(folder)),
        ],
    )
    compression_folder.write_record(folder, request, None)  # what it says of a result that is gone
    outcome = job.run(listener, folder)
    result = {**outcome.done, "result_sha256": sums.sha256(folder / "model" / sums.FILE)}
    compression_folder.finish(folder, request, result)
    done = CompressDone(folder=str(folder), **result)
    listener.event(done)
    return CompressResult(request, folder, done, outcome.sizes)


# Checks ---------------------------------------------------------------------------------------------


def check(request: CompressRequest) -> None:
    """Raise RecipeError with every contradiction in a request, before anything is loaded."""
    if request.run and not (Path(request.model) / "run.toml").is_file():
        raise UsageError(f"the run {request.model} is gone", hint="fleetune runs   lists what there is")
    integers = ("windows", "length", "clients", "seed", "bytes", "bits", "train_scales")
    numbers: dict[str, object] = {n: getattr(request, n) for n in integers}
    problems = [f"{n} = {v!r} is not an integer" for n, v in numbers.items() if type(v) is not int]
    if problems:
        raise RecipeError(problems, hint="fleetune compress --help")
    least = {"windows": 1, "length": 1, "clients": 0, "bytes": 0, "train_scales": 0}
    problems = [
        f"{n} = {getattr(request, n)} is below {low}" for n, low in least.items() if getattr(request, n) < low
    ]
    devices = request.calibrate in (CLIENTS, FLEET)
    rows = request.data or request.text
    for wrong, problem in (
        (
            request.calibrate not in ("server", CLIENTS, FLEET),
            f"calibrate = {request.calibrate!r} is not one of server, clients, fleet",
        ),
        (request.data and request.text, "data and text are both given"),
        (
            request.clients > 0 and not devices,
            f"clients = {request.clients} needs --calibrate clients or fleet",
        ),
        (devices and not request.run, "only a run has clients to calibrate on"),
        (devices and rows, "the clients calibrate on rows of their own: no data, no text"),
        (
            request.bits not in (0, *NAMED),
            f"bits = {request.bits} is not one of {', '.join(map(str, NAMED))}: bytes takes any size, --set bits=3 is one grid",
        ),
        (request.run and request.dtype != "fp32", "a run has a dtype of its own"),
        (
            request.run and request.low_memory,
            "a run's weights are made in memory, not in its files: "
            f"fleetune export {quoted(request.model)} --to hf, then that",
        ),
    ):
        if wrong:
            problems.append(problem)
    if problems:
        raise RecipeError(problems, hint="fleetune compress --help")
    for name in (request.text, request.eval_text):
        if name and not Path(name).is_file():
            raise UsageError(f"no text file at {name}", hint="check the path")
    if request.text:
        readers.require_text(request.text, hint=f"--data {quoted(request.text)}")
    if request.eval_text:
        after = f"leave it out, and measure on rows once it is compressed: {command('eval', 'latest', request.eval_text)}"
        readers.require_text(request.eval_text, hint=after, flag="--eval-text")


def _note_codes(request: CompressRequest, listener: Listener) -> None:
    """Say that the weights of a run which tuned a file of codes are rounded once more, and how the file is to be had."""
    run = subject.Run(Path(request.model))
    if (part := run.recipe.train) == SCALES:
        listener.note(
            f"{run.folder} tuned the {part} of a file that is compressed already; here its weights are rounded once more. For "
            f"that file with nothing rounded: fleetune export {quoted(run.folder)} --to gguf"
        )


def _check_grid(request: CompressRequest, method: object) -> None:
    """Raise RecipeError for bits or a group that were given beside a grid which has others of its own."""
    problems = [
        f"grid = {request.set['grid']!r} has {name} = {own}, and {name} = {given} is given as well"
        for name in ("bits", "group")
        if "grid" in request.set
        and (given := request.set.get(name)) is not None
        and float(given) != (own := getattr(method, name, float(given)))
    ]
    if problems:
        raise RecipeError(problems, hint=f"leave out --set grid={request.set['grid']}, or the other")


def _check_devices(request: CompressRequest, devices: Devices | None) -> None:
    """Raise UsageError where real devices are asked for and there is no door for them, or the other way round."""
    if request.calibrate == FLEET and devices is None:
        raise UsageError(
            "calibrate = fleet needs a place where devices join",
            hint="fleetune compress RUN --calibrate fleet",
        )
    if request.calibrate != FLEET and devices is not None:
        raise UsageError(
            f"calibrate = {request.calibrate} asks no devices: --host, --port, --keys, --certificate, --wait, --grace and "
            "--round-deadline do nothing",
            hint="leave them out, or: --calibrate fleet",
        )


def _check_whole(request: CompressRequest) -> None:
    """Raise RecipeError for options that only the layer-by-layer methods have."""
    limited = request.limited
    problems = [
        f"{request.method} {why}"
        for wrong, why in (
            (request.low_memory, "trains the whole model, which must be in memory"),
            (request.calibrate in (CLIENTS, FLEET), "is not calibrated by clients"),
            (request.train_scales, "leaves no scales to train"),
            (limited, "leaves floats, which no budget of bytes is spent on"),
        )
        if wrong
    ]
    if problems:
        solvers = [name for name in compression.entries() if compression.kind_of(name) == "solver"]
        if limited or request.train_scales:
            solvers = [compression.DEFAULT, compression.DEFAULT_OF_DEVICES]
        raise RecipeError(problems, hint=f"--method {', '.join(solvers)}")
