# SPDX-License-Identifier: Apache-2.0
"""Make a model smaller, or resume a compression."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune import subject as subjects
from fleetune.api.arguments import Rows, Setting
from fleetune.runs.listener import Listener
from fleetune.runs.progress import heard_by

if TYPE_CHECKING:
    from fleetune.compression.jobs.job import CompressResult
    from fleetune.fleet.calibration_server import Calibrators
    from fleetune.fleet.server import Served
    from fleetune.models.artefact import ArtefactHead
    from fleetune.models.net.model import Model
    from fleetune.runs.compression_folder import CompressOptions


def compress(
    model: object,
    *,
    method: object = None,
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
    bytes: float | str = 0,
    bpw: float = 0.0,
    train_scales: int = 0,
    seed: int = 42,
    dtype: str = "fp32",
    served: Served | None = None,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> CompressResult:
    """Make a model or a finished run smaller in a new folder under `out`, and return it.

    `method` is a name (`fleetune.compressors()`) or a method's own dataclass (`optq.Solver(bits=3)`); without one it is
    `qronos`, or `optq` where devices calibrate.  `settings` are the method's, by name.  A solver calibrates on `windows`
    windows of `length` tokens, of `data` (rows) or `text` (a file), of the run's held-out rows with text that its model
    writes, or of such text alone; with `calibrate="clients"` the run's clients calibrate on their training rows, with
    `calibrate="fleet"` the real devices that join at the door `served` (`fleetune.fleet.server.Served`, in its `with`
    block).  `low_memory` loads one block at a time from disk.  With `true_sequential` a layer is solved on inputs that have
    passed the already compressed layers of its own block (GPTQ's option of that name).  `bytes` (a number, or text such as
    "91.7MB") limits the GGUF file, or `bpw` the bits of a weight in it: the grid of each matrix, embedding and head included,
    is chosen so that the model changes least.  `train_scales` are steps in which the scales are trained, after solving, to
    follow the dense model.  The perplexity of the text file `eval_text` is measured before and after.
    """
    if isinstance(model, str | Path):
        subjects.open_weights(model, out)  # refused before torch is imported
    from fleetune.compression.jobs import job
    from fleetune.tuning.recipe import objects_to_files

    watching = heard_by(listener, progress)
    options: CompressOptions = {
        "data": objects_to_files.data_name(data, Path(out)),
        "text": str(text),
        "eval_text": str(eval_text),
        "windows": windows,
        "length": length,
        "calibrate": calibrate,
        "clients": clients,
        "low_memory": low_memory,
        "true_sequential": true_sequential,
        "bytes": _size(bytes),
        "bpw": bpw,
        "train_scales": train_scales,
        "seed": seed,
        "dtype": dtype,
    }
    request = job.request_for(model, method, settings or {}, options, tokenizer=tokenizer, out=Path(out))
    return job.start(
        request, watching, Path(out), offline=offline, devices=_devices(served), beside=file_size
    )


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
    from fleetune.compression.jobs import job
    from fleetune.runs import compression_folder

    found = getattr(folder, "folder", None)
    path = found if isinstance(found, Path) else compression_folder.get(str(folder), Path(out))
    return job.resume(
        path,
        heard_by(listener, progress),
        Path(out),
        offline=offline,
        devices=_devices(served),
        beside=file_size,
    )


def file_size(model: Model, quantised: Collection[str], head: ArtefactHead, name: str) -> int:
    """Return what `export.size_beside` does; that module, which imports torch, is imported once it is called."""
    from fleetune.deploy import export

    return export.size_beside(model, quantised, head, name)


def _size(size: float | str) -> int:
    """Return a size in bytes, given as a number or as people write it."""
    from fleetune.planning import plan

    return int(size) if isinstance(size, int | float) else plan.parse_bytes(size, "--bytes", least=1) or 0


def _devices(served: Served | None) -> Calibrators | None:
    """The devices at a door, as a compression asks for them."""
    if served is None:
        return None
    from fleetune.fleet.calibration_server import Calibrators

    return Calibrators(served)
