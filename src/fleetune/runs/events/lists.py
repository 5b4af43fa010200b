# SPDX-License-Identifier: Apache-2.0
"""Report methods, recipes, models, texts and this installation: what a command lists or shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fleetune.common.settings import Value
from fleetune.runs.events.base import Event


@dataclass(frozen=True, kw_only=True)
class SettingListed(Event):
    """`methods NAME`: a setting."""

    event: ClassVar[str] = "setting"
    method: str  # whose setting it is
    name: str  # as in `--set NAME=VALUE`
    type: str  # int, float, str or bool
    default: Value  # value unless it is set
    symbol: str  # letter of the paper
    help: str  # meaning


@dataclass(frozen=True, kw_only=True)
class MethodListed(Event):
    """`methods`, and `compress --list`: a method."""

    event: ClassVar[str] = "method"
    name: str  # of the method
    paper: str  # authors, place, year
    kind: str | None = None  # of a tuning method: what a run leaves, ledger or adapter
    sends: str | None = None  # of a tuning method: what travels
    summary: str | None = None  # of a compression method, as the next one
    settings: Sequence[Mapping[str, Any]] | None = None  # each with name, type, default, symbol, help


@dataclass(frozen=True, kw_only=True)
class RecipeListed(Event):
    """`recipes`: a recipe that comes with Fleetune; `recipes show` adds its text, `recipes copy` the new file."""

    event: ClassVar[str] = "recipe"
    name: str  # as in recipe:NAME
    about: str  # one line
    method: str  # tuning method
    model: str  # base model
    data: str  # data set
    sweeps: bool  # whether it is a grid of runs, for `sweep`
    expected: str | None = None  # outcome that it states
    text: str | None = None  # the whole recipe, TOML
    file: str | None = None  # path of the copy


@dataclass(frozen=True, kw_only=True)
class ModelListed(Event):
    """`models`: a built-in model."""

    event: ClassVar[str] = "model"
    name: str  # built-in name
    hub: str  # hub id
    params: int  # number of weights
    licence: str  # of the weights
    about: str  # one line
    cached: str | None  # path of its directory; null if it is not in the cache
    source: str  # where that copy came from: hub or index; "" without one
    bytes: int | None = None  # size of that copy; absent without one
    download: int | None = None  # bytes that fetching it takes, about


@dataclass(frozen=True, kw_only=True)
class ModelPulled(Event):
    """`models pull`: a model is in the cache."""

    event: ClassVar[str] = "pulled"
    name: str  # built-in name
    path: str  # of its directory


@dataclass(frozen=True, kw_only=True)
class ModelCached(Event):
    """`models`: a model in the cache that is not built in, such as a GGUF file that was read."""

    event: ClassVar[str] = "cached_model"
    name: str  # hub id, name of the file, or of the folder
    path: str  # of its directory
    bytes: int  # on the disk
    source: str  # where it came from
    licence: str  # of the weights; "" where nothing states it


@dataclass(frozen=True, kw_only=True)
class ModelRemoved(Event):
    """`models rm`: a copy of a model was removed from the cache."""

    event: ClassVar[str] = "model_removed"
    name: str  # as `models` lists it
    path: str  # where it was
    bytes: int  # that are free now


@dataclass(frozen=True, kw_only=True)
class TextShown(Event):
    """`help`, `version` and `completion`: the text that they print."""

    event: ClassVar[str] = "text"
    text: str  # in lines


@dataclass(frozen=True, kw_only=True)
class DoctorReport(Event):
    """`doctor`: this installation."""

    event: ClassVar[str] = "doctor"
    versions: Mapping[str, str]  # by package; "" for one that is not installed
    python: str  # version of Python
    program: str  # path of the interpreter
    system: str  # operating system and machine
    processors: int  # that this process may use
    threads: str  # OMP_NUM_THREADS; "" where it is not set
    memory: int  # bytes of the machine; 0 where the system does not tell
    gpu: str  # path of the driver's program; "" for none
    cache: str  # folder of fetched models
    cache_bytes: int  # size of its files
    cache_free: int  # bytes free on its disk
    cache_writable: bool  # whether a file can be written there
    offline: bool  # whether the environment forbids the network
    engines: Mapping[str, bool]  # by name: whether it is installed
    extras: Sequence[Mapping[str, Any]]  # each with name, serves, missing (packages), install (a command)
    problems: Sequence[str]  # what stops work, with what to do


@dataclass(frozen=True, kw_only=True)
class FilesVerified(Event):
    """`verify`: files were compared with the digests that were written with them."""

    event: ClassVar[str] = "verified"
    folder: str  # path
    files: int  # how many are listed
    faults: Sequence[str]  # what is wrong with each that is not as it was written
