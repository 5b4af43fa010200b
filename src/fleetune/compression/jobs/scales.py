# SPDX-License-Identifier: Apache-2.0
"""Train the scales of what a solver has found (`distillation/scales.py`), as a part of its job that resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from fleetune import compression
from fleetune.compression.jobs import progress
from fleetune.errors import UsageError
from fleetune.runs.compression_folder import CompressRequest
from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from torch import Tensor

    from fleetune.compression import Solver
    from fleetune.compression.distillation.scales import Scales
    from fleetune.models.artefact import Quantised
    from fleetune.models.net.model import Model

FOLDER: Final = "scales"  # in the folder of finished blocks: the state of a training
EVERY: Final = 20  # steps between two checkpoints
FLAG: Final = "--train-scales"
LITTLE: Final = 4096  # tokens of text; on 1,024 the divergence on other text rose


def check(request: CompressRequest, solver: Solver) -> None:
    """Raise UsageError when scales are to be trained that the method does not make, or on text that is not here."""
    if not request.train_scales:
        return
    if not solver.data:
        raise UsageError(
            f"{FLAG} trains on the calibration text, and {request.method} takes none",
            hint=f"--method {compression.DEFAULT}",
        )
    if not getattr(cast(Any, solver), "bits", 0):
        raise UsageError(
            f"{request.method} with bits=0 leaves no scales to train",
            hint=f"--set bits=4, or leave out {FLAG}",
        )
    if request.calibrate != "server":
        raise UsageError(
            f"{FLAG} needs the text on this machine, and --calibrate {request.calibrate} leaves it where it is",
            hint=f"leave out {FLAG}, or calibrate on --text",
        )


def warn(request: CompressRequest, windows: Tensor, listener: Listener, *, experts: bool) -> None:
    """Say that scales are trained on little text, and that those of experts are not."""
    if request.train_scales and experts:
        listener.note(
            f"{FLAG} leaves the scales of experts as they are solved, and holds their weights meanwhile"
        )
    if request.train_scales and windows.numel() < LITTLE:
        listener.note(
            f"{FLAG} has {windows.numel():,} tokens to train on: with fewer than {LITTLE:,} the model may follow that "
            "text alone; give more (--windows)"
        )


class Trained(Mapping[str, "Quantised | Tensor"]):
    """Solved weights by name, read on access, with the scales that were trained."""

    def __init__(self, solved: Mapping[str, Quantised | Tensor], scales: Mapping[str, Scales]) -> None:
        self._solved = solved
        self._scales = {f"{layer}.weight": found for layer, found in scales.items()}

    def __getitem__(self, name: str) -> Quantised | Tensor:
        weight = self._solved[name]
        scales = self._scales.get(name)
        return weight if scales is None else scales.on_grid(cast("Quantised", weight))

    def __contains__(self, name: object) -> bool:
        return name in self._solved

    def __iter__(self) -> Iterator[str]:
        return iter(self._solved)

    def __len__(self) -> int:
        return len(self._solved)


def train(
    listener: Listener,
    model: Model,
    solved: Mapping[str, Quantised | Tensor],
    windows: Tensor,
    request: CompressRequest,
    parts: Path,
    origin: str,
) -> Mapping[str, Quantised | Tensor]:
    """Return the solved weights with trained scales; resume from the checkpoint in `parts`.

    `origin` says what the weights were made of.  Interrupted, after the step is saved, on Ctrl-C.
    """
    from fleetune.compression.distillation import scales
    from fleetune.compression.training.checkpoint import fingerprint
    from fleetune.compression.training.steps import Checkpoints

    student = scales.student_of(model, solved)
    kept = Checkpoints(parts / FOLDER, fingerprint(origin, [], str(request.train_scales)), EVERY)
    report = progress.step_reporter(listener, parts.parent, "divergence")
    scales.train(model, student, windows, request.train_scales, request.seed, kept, report)
    return Trained(solved, student.scales)
