"""Bring the result of a run to a device: the ledger or the adapter as its files are, checked by the digest in the job."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fleetune import adapters, models
from fleetune.common import sums
from fleetune.common.display import quoted
from fleetune.common.files import PRIVATE, read_text, write_atomic
from fleetune.errors import LedgerError, MessageError, UsageError
from fleetune.fleet.device_state import DeviceState
from fleetune.fleet.orders import Job, Secure, job_of
from fleetune.models.net.model import Model
from fleetune.runs import rundir
from fleetune.seeds import ledger as ledgers
from fleetune.seeds.noise import POOL
from fleetune.tuning.exchange.messages import Scalar
from fleetune.tuning.methods._zeroth import MOST_PASSES, MOST_POOLS, MOST_SWEEPS
from fleetune.tuning.prepare import private
from fleetune.tuning.result import finished

FILE: Final = "file "  # begins the name of a file's bytes in a message
LEDGER: Final = finished.RESULT["ledger"]
FOLDER: Final = "result"  # in a run's, on the device
HEADER: Final = 1 << 20  # bytes: its reader ends the process where memory for a larger one is short
FILES: Final = frozenset(
    {
        LEDGER,
        "adapter_config.json",
        "adapter_model.safetensors",
        "module.json",
        "module.safetensors",
        "README.md",
        sums.FILE,
    }
)


def job_of_run(folder: Path, run: str, task: str, steps: int = 0) -> Job:
    """Return what devices are told of a finished run whose result is measured, or calibrated in so many steps."""
    recipe, base = finished.recipe_of(folder), rundir.made_on(folder)["base"]
    least = private.least_of_run(recipe) if task == "calibrate" else 0
    secure = Secure(recipe.clients, least, 1.0, 0.0) if least else None  # sums have no clip, and no noise
    own = digest_of(finished.result_of(folder))
    return job_of(recipe, run, base, rounds=steps, task=task, result=own, secure=secure)


def digest_of(result: Path) -> str:
    """Return the SHA-256 of a ledger's file, or of an adapter's SHA256SUMS; UsageError where there is none."""
    file = result / sums.FILE if result.is_dir() else result
    if not file.is_file():
        raise UsageError(
            f"{file} is missing", hint=f"make it again: fleetune tune --resume {quoted(result.parent)}"
        )
    return sums.sha256(file)


def packed(result: Path) -> Mapping[str, Scalar]:
    """Return the files of a ledger or an adapter as scalars of a message."""
    files = sorted(result.iterdir()) if result.is_dir() else [result]
    return {FILE + file.name: file.read_bytes() for file in files if file.is_file()}


def placed(scalars: Mapping[str, Scalar], own: DeviceState, job: Job) -> Path:
    """Write the files of a message into the run's folder `result`, and return the ledger or adapter.

    MessageError, with nothing left behind, when they are not the job's result.
    """
    files = {name.removeprefix(FILE): data for name, data in scalars.items() if name.startswith(FILE)}
    if odd := sorted(files.keys() - FILES):
        raise MessageError(f"{odd[0]!r} is no file of a result")
    folder = own.renewed(own.run(job.run) / FOLDER)
    try:
        for name, data in files.items():
            if type(data) is not bytes:
                raise MessageError(f"{name!r} does not come as bytes")
            if name != LEDGER and not name.endswith(".safetensors") and len(data) > adapters.MOST_JSON:
                raise MessageError(f"{name!r} has more than {adapters.MOST_JSON:,} bytes")
            if name.endswith(".safetensors") and int.from_bytes(data[:8], "little") > HEADER:
                raise MessageError(f"{name!r} has a head of more than {HEADER:,} bytes")
            write_atomic(folder / name, data, mode=PRIVATE)
        result = folder / LEDGER if LEDGER in files else folder
        sums.check(result, remedy="the server sends it again")
        file = result / sums.FILE if result.is_dir() else result
        listed = read_text(file).split() if result.is_dir() and file.is_file() else files
        if unlisted := sorted(files.keys() - {*listed, *sums.LEFT_OUT}):
            raise MessageError(f"{unlisted[0]!r} is not in the {sums.FILE} whose digest the job states")
        found = sums.sha256(file) if file.is_file() else "none"
        if found != job.result:
            raise MessageError(f"the result has the SHA-256 {found:.16}.., the job states {job.result:.16}..")
    except Exception:
        own.remove(folder)
        raise
    return result


def put_on(model: Model, result: Path) -> None:
    """Make `model`, the base, the tuned model; its stored weights stay the base's.

    LedgerError when the ledger belongs to another base, takes more passes than a device makes to follow any run, or
    rebuilds other weights than it states.
    """
    if result.is_dir():
        adapters.load(model, result)
        return
    ledger = ledgers.load(result)
    finished.check_base(model, ledger)
    most = MOST_POOLS if ledger.head.law == POOL else MOST_PASSES
    if (count := ledger.count_passes()) > most:
        raise LedgerError(f"the ledger takes {count:,} passes over the weights, {most:,} at most on a device")
    view = finished.place_at(model, ledger, MOST_SWEEPS)
    if (stated := ledger.final_check()) is None:
        raise LedgerError("the ledger states no digest of its weights")
    finished.require_digest(models.digest(view.pieces()), stated, "the ledger")
