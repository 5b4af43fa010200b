"""Read and write the folder that a compression leaves.

runs/0008-optq-smollm2-135m/
  compress.json   the request, and the result once there is one, with the digest of its SHA256SUMS
  parts/          what `--resume` continues from: finished blocks, or a training state (removed at the end)
  model/          the compressed model: of a solver the artefact of codes, else a plain Hugging Face directory
  base/           the base model, compressed the same way (`fleetune measure --kept-gain`)
  measure.json    what `fleetune measure` found
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from fleetune.common.display import quoted
from fleetune.common.files import finite, json_text, read_json, write_atomic
from fleetune.errors import StorageError, UsageError
from fleetune.models.cache.names import is_master
from fleetune.runs import rundir

RECORD: Final = "compress.json"
PARTS: Final = "parts"
LOGITS: Final = ".reference.npy"  # while it runs: logits of the reference model
CLIENTS: Final = "clients"  # who calibrates: the simulated clients of a run
FLEET: Final = "fleet"  # real devices
NAMED: Final = (4, 5, 8)  # bits of a weight, whose file's size has a name: Q4_0, Q5_0, Q8_0
USUAL: Final = 4  # where neither a size nor a grid is given
PLACES: Final = ("model", "data", "text", "eval_text")  # may name files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressRequest:
    """The request of a compression, as `compress.json` holds it."""

    model: str  # a model's name, or a run's folder
    run: bool  # whether it is a run's folder
    method: str
    set: dict[str, str] = field(default_factory=dict)
    data: str = ""
    text: str = ""
    windows: int = 128
    length: int = 512
    eval_text: str = ""
    seed: int = 42
    dtype: str = "fp32"
    low_memory: bool = False  # load one block at a time from disk
    calibrate: str = "server"  # who does it: server, clients (those of the run) or fleet (devices that join)
    clients: int = 0  # how many of them, 0 for all
    bytes: int = 0  # of the GGUF file at most: grids are chosen for each matrix; 0 for no limit
    bits: int = 0  # the same, as large as a file of one grid of so many bits (`NAMED`)
    train_scales: int = 0  # steps in which the scales are trained after solving; 0 for none

    @property
    def limited(self) -> bool:
        """Whether it says how large the file may be, so that grids are chosen for each matrix."""
        return bool(self.bytes or self.bits)

    @property
    def uses_held_out(self) -> bool:
        """Whether half of the run's held-out rows were used to compress, so that only the other half measures."""
        return self.run and not (self.data or self.text or self.calibrate in (CLIENTS, FLEET))


FIELDS: Final = tuple(CompressRequest.__dataclass_fields__)
OPTIONS: Final = tuple(name for name in FIELDS if name not in ("model", "run", "method", "set"))
AGAIN: Final = "compress again: fleetune compress MODEL"


# Finding one ----------------------------------------------------------------------------------------


def find(name: str, out: Path) -> Path | None:
    """The folder of a compression: a path, a name or number under `out`, or `latest`; None if there is none."""
    if name == "latest":
        return max(listing(out), key=rundir.number, default=None)
    numbered = list(out.glob(f"{name.zfill(4)}-*")) if name.isdigit() else []
    for path in [Path(name), out / name, *numbered]:
        if (path / RECORD).is_file():
            return path
    return None


def get(name: str, out: Path) -> Path:
    """The folder of a compression, as in `find`; UsageError if there is none."""
    found = find(name, out)
    if found is None:
        raise UsageError(f"no compression '{name}' in {out}", hint="fleetune compress MODEL")
    return found


def listing(out: Path) -> list[Path]:
    """The folders of compressions under `out`, in order of number."""
    return sorted((file.parent for file in out.glob(f"*/{RECORD}")), key=rundir.number)


def create(request: CompressRequest, out: Path) -> Path:
    """Make a new folder `NNNN-method-model` under `out` with the request in it.  StorageError when it cannot be."""
    rundir.check_writable(out)
    folder = rundir.numbered(out, stem_of(request))
    write_record(folder, request, None)
    return folder


def stem_of(request: CompressRequest) -> str:
    """Return the name of a request's folder behind its number."""
    name = name_of(request.model)
    name = name.removeprefix(f"{rundir.number(Path(name)):04d}-")  # of a run: without its number
    return f"{request.method}-{rundir.of_model(name)}"


def name_of(model: str) -> str:
    """Return the short name of a model or a run; a compression's plain model has its folder's name."""
    path = Path(model)
    return (path.parent if path.name == "model" and rundir.number(path.parent) else path).name


# What it holds --------------------------------------------------------------------------------------


def record(folder: Path) -> dict[str, Any]:
    """The content of `compress.json`.  StorageError when it is damaged."""
    content = read_json(folder / RECORD, AGAIN)
    if not isinstance(content.get("model"), str) or not isinstance(content.get("result", {}), dict):
        raise StorageError(f"{folder / RECORD} is damaged (a field has a wrong type)", hint=AGAIN)
    return content


def request_of(folder: Path) -> CompressRequest:
    """The request of a folder, its files named as they are found from here.  StorageError for a record that holds none."""
    raw = record(folder)
    start = rundir.start_of(folder, raw)
    try:
        request = CompressRequest(**{name: raw[name] for name in FIELDS if name in raw})
        places: dict[str, Any] = {n: rundir.find_from(getattr(request, n), start) for n in PLACES}
        return replace(request, **places)
    except TypeError as error:
        raise StorageError(f"{folder / RECORD} is damaged ({error})", hint=AGAIN) from error


def write_record(folder: Path, request: CompressRequest, result: Mapping[str, Any] | None) -> None:
    """Write `compress.json`, with the result once there is one; files keep the names that they had at the start."""
    earlier = record(folder) if is_one(folder) else {}
    named: dict[str, Any] = {name: earlier[name] for name in PLACES if name in earlier}
    content: dict[str, Any] = {"v": 1, **asdict(request), **named, **rundir.note_start(folder, earlier)}
    if result is not None:
        content["result"] = finite(result)
    write_atomic(folder / RECORD, json_text(content))


def is_one(folder: Path) -> bool:
    """Whether a folder is that of a compression."""
    return (folder / RECORD).is_file()


def is_complete(folder: Path) -> bool:
    """Whether the compressed model is there, as an artefact of codes or as plain weights."""
    return is_master(folder / "model") or any((folder / "model").glob("model*.safetensors"))


def model_in(folder: Path) -> Path:
    """The compressed model of a folder; UsageError when it is not finished."""
    if not is_complete(folder):
        raise UsageError(f"{folder} is not finished", hint=f"fleetune compress --resume {quoted(folder)}")
    return folder / "model"


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())


def weights_size(folder: Path) -> int:
    """Bytes of the weights in a model's folder, without its tokenizer and configuration."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# Cleaning up ----------------------------------------------------------------------------------------


def drop_parts(parts: Path) -> None:
    """Remove the parts of a finished compression.

    They are renamed first, so that a kill leaves none that would be taken for parts to resume from.
    """
    gone = parts.with_name(f".{parts.name}.tmp")
    shutil.rmtree(gone, ignore_errors=True)  # what a kill left
    try:
        parts.rename(gone)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s is not needed any more, but cannot be removed: %s", parts, error)
    shutil.rmtree(gone, ignore_errors=True)


def drop_half_written(folder: Path) -> None:
    """Remove what a kill left: models half-written, and the logits of the reference model."""
    (folder / LOGITS).unlink(missing_ok=True)
    for half in folder.glob(".model.*.tmp"):
        shutil.rmtree(half, ignore_errors=True)


def finish(folder: Path, request: CompressRequest, result: Mapping[str, Any]) -> None:
    """Write the result, then remove the parts.

    In this order: a kill before the record is written leaves all that `--resume` needs, one after it a finished folder.
    """
    write_record(folder, request, result)
    drop_parts(folder / PARTS)


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a finished folder, from which what a kill left is removed; None when it is not finished."""
    done: dict[str, Any] | None = record(folder).get("result")
    drop_half_written(folder)
    if done is None or not is_complete(folder):
        return None
    drop_parts(folder / PARTS)
    return done
