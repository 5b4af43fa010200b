# SPDX-License-Identifier: Apache-2.0
"""Report an endpoint of `serve`, and the answers of `chat` and `demo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fleetune.runs.events.base import Event


@dataclass(frozen=True, kw_only=True)
class ThreadsChosen(Event):
    """`serve`: the number of threads, and the speed of each that was tried."""

    event: ClassVar[str] = "threads"
    chosen: int  # number of threads with the highest speed
    tokens_per_second: Mapping[str, float]  # by number of threads


@dataclass(frozen=True, kw_only=True)
class Serving(Event):
    """`serve`: the endpoint answers."""

    event: ClassVar[str] = "serving"
    url: str  # address of the endpoint and the chat page
    model: str  # name of the file or folder that is served
    engine: str  # name of the engine
    threads: int  # number of threads
    token: str | None = None  # that clients must present; only one made for this session
    base: str | None = None  # name of the base model that is served beside it


@dataclass(frozen=True, kw_only=True)
class Answered(Event):
    """`chat` and `demo`: an answer."""

    event: ClassVar[str] = "answer"
    prompt: str  # of the user
    text: str  # of the model
    seconds: float | None = None  # to answer
