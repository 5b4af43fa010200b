# SPDX-License-Identifier: Apache-2.0
"""Save and restore the weights and AdamW moments of a training, so that it resumes bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fleetune.common.folders import staged
from fleetune.compression.training import checksum
from fleetune.data import Encoded
from fleetune.errors import StorageError, UsageError
from fleetune.models.net.saving import disk_errors

STATE: Final = "state.safetensors"
MOMENTS: Final = ("exp_avg", "exp_avg_sq")


def fingerprint(inputs: str, rows: Sequence[Encoded], more: str = "") -> str:
    """Return the SHA-256 of everything that a result depends on: settings and weights as text, and the rows."""
    sha = hashlib.sha256(inputs.encode())
    for row in rows:
        sha.update(f"{len(row.ids)} {row.n_prompt} ".encode() + row.ids.tobytes())
    sha.update(more.encode())
    return sha.hexdigest()


def store(
    folder: Path, origin: str, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Write the state after `step` steps to `folder`, atomically.  StorageError when it cannot be written.

    `origin` is the `fingerprint` of the training.
    """
    tensors = {f"weight/{name}": p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for moment in MOMENTS if parameter in optimizer.state else ():
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    with staged(folder, replace=STATE) as new, disk_errors(folder):
        crc = checksum.of_tensors(f"{origin} {step}", tensors.items())
        head = {"format": "pt", "origin": origin, "step": str(step), "crc32": crc}
        save_file({n: t.contiguous() for n, t in tensors.items()}, new / STATE, metadata=head)


@torch.no_grad()
def restore(
    folder: Path, origin: str, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Read the state in `folder` and return the number of finished steps; 0 where there is no state.

    UsageError for the state of another training, StorageError for a damaged one.
    """
    file = folder / STATE
    if not file.is_file():
        return 0
    try:
        with safe_open(file, framework="pt") as opened:
            head, names = opened.metadata() or {}, set(opened.keys())
            if head.get("origin") != origin:
                raise UsageError(
                    f"{file} is of a training with other weights, rows or settings",
                    hint="bring back what it began with, or begin anew without --resume",
                )
            text = f"{origin} {head.get('step')}"
            crc = checksum.of_tensors(text, ((n, opened.get_tensor(n)) for n in names))
            if head.get("crc32") != crc:
                raise StorageError(
                    f"{file} is damaged (its checksum differs)", hint="remove it to begin anew"
                )
            for name, parameter in parameters.items():
                parameter.copy_(opened.get_tensor(f"weight/{name}"))
                if f"{MOMENTS[0]}/{name}" in names:
                    # copies: Windows does not replace a file that is mapped into memory
                    moments = {
                        m: opened.get_tensor(f"{m}/{name}").to(parameter.device, copy=True) for m in MOMENTS
                    }
                    optimizer.state[parameter] = {"step": torch.tensor(float(head["step"])), **moments}
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{file} is damaged ({error})", hint="remove it to begin anew") from error
    return int(head["step"])
