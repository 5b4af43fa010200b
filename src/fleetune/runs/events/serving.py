# SPDX-License-Identifier: Apache-2.0
"""Report an endpoint of `serve`, and the answers of `chat` and `demo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fleetune.runs.events.base import Event


@dataclass(frozen=True, kw_only=True)
class Serving(Event):
    """`serve` and `chat`: the engine answers."""

    event: ClassVar[str] = "serving"
    url: str  # address of the endpoint, and of the engine's page
    model: str  # name of the file or folder that is served
    engine: str  # name of the engine


@dataclass(frozen=True, kw_only=True)
class Answered(Event):
    """`chat` and `demo`: an answer."""

    event: ClassVar[str] = "answer"
    prompt: str  # of the user
    text: str  # of the model
    seconds: float | None = None  # to answer
