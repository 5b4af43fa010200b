# SPDX-License-Identifier: Apache-2.0
"""Give what the tokens of a job's windows count, by layer, and keep it for a job that is resumed.

They are kept beside the finished blocks: 4 bytes a token and tensor that layers read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleetune.common.files import write_atomic
from fleetune.compression.jobs.calibrating import Calibrated, weighs
from fleetune.compression.training import checksum
from fleetune.errors import Interrupted
from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from torch import Tensor

FILE: Final = "weights.safetensors"  # in the folder of finished blocks


def weights(listener: Listener, job: Calibrated, parts: Path, origin: str) -> Mapping[str, Tensor] | None:
    """Return what the tokens of a job's windows count, by layer; None where they count alike.  Interrupted on Ctrl-C.

    They are those in `parts`, or are measured and kept there; `origin` is what the blocks there are made of.
    """
    if job.calibration is None or not weighs(job.solver):
        return None
    from fleetune.compression.budget import token_weights
    from fleetune.compression.layerwise import driver

    def on_window(number: int, count: int) -> None:
        listener.progress("gradients", number, count, "")
        if listener.stop_requested:
            raise Interrupted("stopped before a block; finished blocks are kept")

    if driver.solves_experts(job.inputs.model):
        listener.note("tokens count by the gradient in all layers but the experts, where they count alike")
    about = f"{origin} seed {job.request.seed}"
    if (found := _saved(parts / FILE, about)) is None:
        found = token_weights.measure(job.inputs.model, job.calibration, job.request.seed, on_window)
        _save(parts / FILE, about, found)
    return found


def _save(file: Path, origin: str, found: Mapping[str, Tensor]) -> None:
    """Write the weights, those of layers that share them once.  StorageError when they cannot be."""
    from safetensors.torch import save as to_bytes

    first = dict[int, str]()
    names = {name: first.setdefault(id(of), name) for name, of in found.items()}
    tensors = {name: found[name] for name in set(names.values())}
    head = json.dumps({"names": names, "origin": origin})
    about = {"weights": head, "crc32": checksum.of_tensors(head, tensors.items())}
    write_atomic(file, to_bytes(tensors, metadata=about))


def _saved(file: Path, origin: str) -> dict[str, Tensor] | None:
    """Read the weights of each layer; None where they are not there, damaged, or of another origin."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in set(opened.keys())}
        if checksum.of_tensors(about["weights"], tensors.items()) != about["crc32"]:
            return None
        head = json.loads(about["weights"])
        return {n: tensors[of] for n, of in head["names"].items()} if head["origin"] == origin else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
