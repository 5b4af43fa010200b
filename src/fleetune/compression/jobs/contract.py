# SPDX-License-Identifier: Apache-2.0
"""Define the contract of a compression job: a checked request with its model and data, ready to run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from fleetune.compression.jobs.inputs import Inputs
    from fleetune.compression.layerwise.activations import HessianSource
    from fleetune.compression.layerwise.sums import HessianReply
    from fleetune.models.artefact import ArtefactHead
    from fleetune.models.net.model import Model
    from fleetune.runs.compression_folder import CompressRequest


class Job(Protocol):
    """A checked request with its model and data loaded."""

    @property
    def inputs(self) -> Inputs:
        """The model and its rows."""
        ...

    def about(self) -> list[tuple[str, str]]:
        """Return rows of the header as (label, text): calibration text, clients, teacher, rows, planned memory."""
        ...

    def run(self, listener: Listener, folder: Path) -> Outcome:
        """Write the result into `folder`; finished parts there are not done again.  StorageError when the disk is too full."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The result of a job.

    `done` has all fields of `CompressDone` except `folder`; `sizes` has the bytes of the weights, under the keys `before`,
    `after` and, where there is one, `teacher` or `pruned`.
    """

    done: Mapping[str, Any]
    sizes: Mapping[str, int]


class FileSize(Protocol):
    """The size of a file before it is written (`deploy/export.py`, which lies above this layer)."""

    def __call__(self, model: Model, quantised: Collection[str], head: ArtefactHead, name: str) -> int:
        """Return the bytes of the file `name` beside the matrices `quantised`.

        UsageError when it has no place for the model.
        """
        ...


class Devices(Protocol):
    """Real devices that calibrate."""

    def about(self, request: CompressRequest) -> str:
        """Return where they join, for the header."""
        ...

    def source(
        self,
        request: CompressRequest,
        model: Model,
        folder: Path,
        without: frozenset[int],
        on_reply: Callable[[HessianReply], None],
        listener: Listener,
    ) -> tuple[HessianSource, Mapping[int, int]]:
        """Return the Hessians of devices that join, and how many windows each has; those `without` take no part any more.

        `folder` is the compression's.  DataError when no device has text for a window.
        """
        ...
