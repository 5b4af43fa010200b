# SPDX-License-Identifier: Apache-2.0
"""State what a compression job is: checked and loaded, ready to be done, whatever its method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fleetune.runs.listener import Listener

if TYPE_CHECKING:
    from fleetune.compression.jobs.inputs import Inputs


class Job(Protocol):
    """A request, checked, with everything loaded."""

    @property
    def inputs(self) -> Inputs:
        """The model and its rows."""
        ...

    def about(self) -> list[tuple[str, str]]:
        """What it works with and what that takes, as (label, text)."""
        ...

    def run(self, listener: Listener, folder: Path) -> Outcome:
        """Do it, into `folder`; what is finished there is not done again.  StorageError for a disk too full."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a job gives: the fields of `CompressDone` but the folder, and bytes of weights before and after."""

    done: Mapping[str, Any]
    sizes: Mapping[str, int]
