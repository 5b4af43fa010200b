# SPDX-License-Identifier: Apache-2.0
"""Report what the other commands show, plans, lists, ledgers and answers, and that a command failed or was stopped.

`fleetune.common.events` takes every class of this file (`import *`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fleetune.common.events.base import Event
from fleetune.common.settings import Value


@dataclass(frozen=True, kw_only=True)
class PlanRow(Event):
    """`plan`: what one method (or a comparison) needs on the device."""

    event: ClassVar[str] = "plan"
    model: str  # name of the model
    method: str  # tuning method, or name of the comparison
    note: str  # size of what is trained, such as r=8; "" for all weights
    tunes: bool  # False for a row shown only for comparison, such as inference
    peak: int | None  # peak memory, bytes; null where the method has no `footprint`
    parts: Mapping[str, int]  # bytes of the peak, by part: weights, activations, ..
    trainable: int | None  # number of trained weights; 0 for inference, null as `peak`
    bytes_up: int | None  # from the device, in a round
    bytes_down: int | None  # to the device, in a round
    passes: int | None  # times that a step goes through all weights; null as `peak`
    seconds: float | None  # computing of a round, on this machine; null for inference
    sending: float | None  # seconds to send `bytes_up` at the stated uplink
    ram: int | None  # stated memory of the device, bytes
    fits: str  # yes; yes, tight (over 90 % full); no: SIZE short; "" if not known


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Event):
    """`plan`: the method to begin with, and the settings under which it fits the device."""

    event: ClassVar[str] = "plan_settings"
    model: str  # name of the model
    method: str  # tuning method
    batch_size: int  # rows of a step
    max_length: int  # tokens of a row at most
    dtype: str  # type of the weights
    base: str  # memory, or mapped: the base's weights stay in their file
    peak: int  # peak memory of `tune` with them, bytes
    ram: int | None  # stated memory of the device, bytes
    command: str  # `fleetune tune` with these settings; DATA stands for the rows


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
class FilesVerified(Event):
    """`verify`: files were compared with the digests that were written with them."""

    event: ClassVar[str] = "verified"
    folder: str  # path
    files: int  # how many are listed
    faults: Sequence[str]  # what is wrong with each that is not as it was written


@dataclass(frozen=True, kw_only=True)
class LedgerShown(Event):
    """`ledger show`: the head of a ledger."""

    event: ClassVar[str] = "ledger"
    file: str  # path
    bytes: int  # size of the file
    entries: int  # number of entries
    rounds: int  # last round that has an entry or a digest
    base: str  # SHA-256 of the base model's weights
    law: str  # how an id becomes a direction: hashed, rademacher or gaussian
    K: int  # directions of a pool; 1 for a law without pools
    grid: float  # change of a weight that the coefficient 1 means
    method: str  # that made it
    checks: Mapping[str, str]  # by round: SHA-256 of the weights after it
    fingerprint: str  # SHA-256 of the head and all entries
    trains: str  # what its directions move: weights, or the scales of a GGUF file


@dataclass(frozen=True, kw_only=True)
class DigestFound(Event):
    """`ledger replay` and `ledger export`: SHA-256 of the rebuilt weights."""

    event: ClassVar[str] = "digest"
    digest: str  # SHA-256, hexadecimal


@dataclass(frozen=True, kw_only=True)
class LedgerVerified(Event):
    """`ledger verify`: every digest that the ledger states was found again."""

    event: ClassVar[str] = "verified"
    digest: str  # SHA-256 of the rebuilt weights
    checks: int  # number of digests that the ledger states


@dataclass(frozen=True, kw_only=True)
class LedgerDifference(Event):
    """`ledger diff`: something that differs."""

    event: ClassVar[str] = "difference"
    what: str  # field of the head, a round, or the cosine of both changes
    left: str  # value in the first ledger
    right: str  # value in the second ledger


@dataclass(frozen=True, kw_only=True)
class LedgerWritten(Event):
    """A new ledger file."""

    event: ClassVar[str] = "written"
    file: str  # path
    entries: int  # number of entries
    fingerprint: str  # SHA-256 of the head and all entries


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
