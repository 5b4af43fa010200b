# SPDX-License-Identifier: Apache-2.0
"""Report that a command failed or was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fleetune.runs.events.base import Event


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The command ends with an error."""

    event: ClassVar[str] = "error"
    type: str  # class of the error
    message: str  # what failed
    hint: str | None  # what to do next
    exit_code: int  # of the command


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The command was stopped by Ctrl-C; `hint` resumes it."""

    event: ClassVar[str] = "interrupted"
    type: str  # Interrupted
    message: str  # where it stopped
    hint: str | None  # command that resumes
    exit_code: int  # of the command: 130
