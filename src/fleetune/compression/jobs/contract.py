# SPDX-License-Identifier: Apache-2.0
"""Define the contract of a compression job: a checked request with its model and data, ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from fleetune.compression.jobs.inputs import Inputs


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
