# SPDX-License-Identifier: Apache-2.0
"""Define the base classes of all events, and the object that an event is printed as."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base class of all events."""

    event: ClassVar[str] = ""


@dataclass(frozen=True, kw_only=True)
class Measures(Event):
    """Measures of quality; those that were not asked for are None."""

    loss: float | None = None  # mean cross-entropy, nats a token of the answers (an encoder: nats a row)
    perplexity: float | None = None  # exponential of the mean loss per token of a text
    accuracy: float | None = None  # % of the rows whose label word is right
    rouge_l: float | None = None  # Rouge-L of generated answers, %
    f1: float | None = None  # token F1 of generated answers, %
    exact_match: float | None = None  # % of generated answers equal to the reference

    @property
    def values(self) -> dict[str, float]:
        """The measures that are not None, by name."""
        names = [f.name for f in dataclasses.fields(Measures)]
        return {n: v for n in names if (v := getattr(self, n)) is not None}


@dataclass(frozen=True, kw_only=True)
class Compared(Measures):
    """Measures of quality, and how far a model is from a reference model; None without one."""

    kl_divergence: float | None = None  # of next-token distributions from the reference's: mean, nats a token
    kl_divergence_error: float | None = None  # standard error of `kl_divergence`, over the tokens
    same_top: float | None = None  # % of the tokens at which the likeliest next token is the reference's
    same_top_error: float | None = None  # standard error of `same_top`, over the tokens
    kl_tokens: int | None = None  # number of tokens compared

    @property
    def values(self) -> dict[str, float]:
        """The measures that are not None, by name."""
        own = {"kl_divergence": self.kl_divergence, "same_top": self.same_top}
        return super().values | {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Recorded(Event):
    """An event of a tuning run, which its `metrics.jsonl` holds as well."""

    t: float | None = None  # when, seconds since 1970
    run: str | None = None  # in a sweep: the folder's name of the run


def as_dict(event: Event) -> dict[str, Any]:
    """Return an event as the object that is printed, `"event"` first; optional fields that are None are left out."""
    fields = {
        f.name: value
        for f in dataclasses.fields(event)
        if (value := getattr(event, f.name)) is not None or f.default is dataclasses.MISSING
    }
    return {"event": event.event, **{name: _plain(value) for name, value in fields.items()}}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
