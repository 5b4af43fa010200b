# SPDX-License-Identifier: Apache-2.0
"""Every event that Fleetune reports: what `--json` prints a line each, and what a `Listener` is given.

A line is one JSON object: `"v": 1`, `"event"` (the name below), then the fields.  A field without a default is always
there; one that defaults to None is left out where it is None.  A number that is not finite is printed as null.  Events
of a tuning run are also the lines of its `metrics.jsonl`, with the time `t` (seconds since 1970).

Units: bytes, seconds, nats for losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fleetune.common.settings import Value

VERSION = 1

E = TypeVar("E", bound="Event")


@dataclass(frozen=True, kw_only=True)
class Event:
    """What all events share."""

    event: ClassVar[str] = ""


@dataclass(frozen=True, kw_only=True)
class Measures(Event):
    """Measures of quality; those that were asked for are there."""

    loss: float | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    rouge_l: float | None = None
    f1: float | None = None
    exact_match: float | None = None

    @property
    def values(self) -> dict[str, float]:
        """The measures that are there, by name."""
        names = [f.name for f in dataclasses.fields(Measures)]
        return {n: v for n in names if (v := getattr(self, n)) is not None}


@dataclass(frozen=True, kw_only=True)
class Recorded(Event):
    """An event of a tuning run, which its `metrics.jsonl` holds as well."""

    t: float | None = None  # when, in seconds since 1970
    run: str | None = None  # of a sweep: the run's name


# Tuning ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TuneChecked(Event):
    """`tune --dry-run`: the recipe, data and model can be used."""

    event: ClassVar[str] = "checked"
    clients: int
    rows: int  # of all clients
    held_out: int


@dataclass(frozen=True, kw_only=True)
class TuneStart(Recorded):
    """A run begins: who takes part with what."""

    event: ClassVar[str] = "start"
    method: str
    model: str
    digest: str  # of the base model's weights
    params: int
    trained: int  # numbers that are trained
    clients: int
    rounds: int
    partition: str
    column: str | None  # that the rows are divided by, or that is shown
    rows_per_client: Sequence[int]
    held_out: int
    counts: Mapping[str, Sequence[int]] | None = None  # rows of each client by the value of `column`


@dataclass(frozen=True, kw_only=True)
class ClientReply(Recorded):
    """What became of one client in a round."""

    event: ClassVar[str] = "client"
    round: int
    client: int
    n: Value | bytes | None  # its rows, as it says
    loss: Value | bytes | None  # its training loss, as it says
    bytes_up: int
    bytes_down: int
    seconds: float
    rss: int
    status: str  # ok, refused, failed, dropped, late
    reason: str


@dataclass(frozen=True, kw_only=True)
class RoundDone(Recorded):
    """A round has been aggregated."""

    event: ClassVar[str] = "round"
    round: int
    clients: int  # that were asked
    accepted: int
    bytes_up: int
    bytes_down: int
    bytes_total: int  # up and down, of all rounds so far
    seconds: float
    rss: int
    report: Mapping[str, float] | None = None  # the method's own figures


@dataclass(frozen=True, kw_only=True)
class RoundEvaluated(Recorded, Measures):
    """The model after a round (0: the base), on the held-out rows."""

    event: ClassVar[str] = "eval"
    round: int


def round_evaluated(round: int, measures: Mapping[str, float]) -> RoundEvaluated:
    """The event for the measures after a round."""
    values: dict[str, Any] = dict(measures)
    return RoundEvaluated(round=round, **values)


@dataclass(frozen=True, kw_only=True)
class TuneDone(Event):
    """A run is finished."""

    event: ClassVar[str] = "done"
    base: Mapping[str, float | None]
    tuned: Mapping[str, float | None]
    rows: int  # held-out rows behind the measures
    run: str  # the run's folder
    rounds: int
    bytes_up: int
    bytes_down: int
    seconds: float  # of the rounds
    wall: float  # of this process, evaluations included
    peak_rss: int
    result: str  # the ledger, or the adapter directory
    result_bytes: int
    digest: str  # of the tuned weights or the adapter
    entries: int | None = None  # of the ledger
    report: str | None = None
    t: float | None = None


# Sweeps and runs ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SweepPlanned(Event):
    """`sweep --dry-run`: a run of the grid."""

    event: ClassVar[str] = "planned"
    name: str
    values: Sequence[Value]
    seed: int


@dataclass(frozen=True, kw_only=True)
class SweepStart(Event):
    """A sweep begins."""

    event: ClassVar[str] = "sweep"
    path: str
    runs: int
    seeds: int
    axes: Mapping[str, Sequence[Value]]


@dataclass(frozen=True, kw_only=True)
class SweepRun(Event):
    """A run of a sweep is over."""

    event: ClassVar[str] = "run"
    run: str
    values: Sequence[Value]
    seed: int
    skipped: bool  # it was finished before
    failed: str  # why, "" if it did not
    base: Mapping[str, float | None]
    tuned: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class SweepDone(Event):
    """A sweep is over, with its table."""

    event: ClassVar[str] = "done"
    path: str
    page: str
    figures: Sequence[str]
    cells: Sequence[Mapping[str, Any]]
    effects: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RunListed(Event):
    """`runs`: a tuned run in a few numbers; null where its folder does not say."""

    event: ClassVar[str] = "run"
    name: str
    path: str
    method: str | None
    model: str | None
    status: str
    rounds: int
    rounds_planned: float | None
    clients: float | None
    base_loss: float | None
    tuned_loss: float | None
    bytes_up: float | None
    bytes_down: float | None
    bytes: float | None
    seconds: float | None
    peak_rss: float | None


@dataclass(frozen=True, kw_only=True)
class SweepListed(Event):
    """`runs`: the folder of a sweep."""

    event: ClassVar[str] = "sweep"
    path: str


@dataclass(frozen=True, kw_only=True)
class CompressionListed(Event):
    """`runs`: a compression."""

    event: ClassVar[str] = "compressed"
    name: str
    of: str
    method: str | None
    status: str  # done, stopped or damaged
    bytes: float | None
    folder: str | None = None  # `runs show` only, as the next two
    asked: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RunRemoved(Event):
    """`runs rm`: a folder is gone."""

    event: ClassVar[str] = "removed"
    run: str


# Compression ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CompressChecked(Event):
    """`compress --dry-run`: the request can be carried out; the texts say with what."""

    event: ClassVar[str] = "fits"
    parameters: int
    text: str | None = None
    clients: str | None = None
    memory: str | None = None
    teacher: str | None = None
    rows: str | None = None


@dataclass(frozen=True, kw_only=True)
class CompressStart(Event):
    """A compression begins: the request, and the measures before it."""

    event: ClassVar[str] = "start"
    model: str
    run: bool
    method: str
    set: Mapping[str, Value]
    data: str
    text: str
    windows: int
    length: int
    eval_text: str
    seed: int
    dtype: str
    low_memory: bool
    calibrate: str
    clients: int
    true_sequential: bool
    folder: str
    before: Mapping[str, float]
    teacher: Mapping[str, float] | None = None
    planned: int | None = None  # peak memory


@dataclass(frozen=True, kw_only=True)
class MatrixSolved:
    """A linear layer of a block."""

    name: str
    error: float  # ||WX - QX||^2 / ||WX||^2 on the calibration windows
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class BlockSolved(Event):
    """A decoder block is compressed and on the disk."""

    event: ClassVar[str] = "block"
    block: int  # from 0
    blocks: int
    seconds: float
    matrices: Sequence[MatrixSolved]


@dataclass(frozen=True, kw_only=True)
class CalibrationReply(Event):
    """What became of a client's part in the calibration of a block."""

    event: ClassVar[str] = "client"
    block: int
    client: int
    bytes_up: int
    bytes_down: int
    status: str  # ok or refused
    reason: str


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """A training step of distillation or of a pruned model's recovery."""

    event: ClassVar[str] = "step"
    step: int
    steps: int
    loss: float
    reward: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelPruned(Event):
    """Parts of a model are gone; widths of each block that is left."""

    event: ClassVar[str] = "pruned"
    parameters: int
    blocks: int
    hidden_size: int
    widths: Sequence[Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class CompressDone(Event):
    """A compression is finished."""

    event: ClassVar[str] = "done"
    folder: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    bytes: int  # of the result's folder
    seconds: float
    peak_rss: int
    digest: str  # of the artefact's file, or of the plain weights
    planned: int | None = None
    error: float | None = None  # mean over the matrices
    notes: Mapping[str, Sequence[str]] | None = None
    bytes_up: int | None = None  # where clients calibrate
    bytes_down: int | None = None
    teacher: Mapping[str, float] | None = None
    pruned: Mapping[str, float] | None = None  # before recovery
    parameters: Mapping[str, int] | None = None  # before and after


# Export and measurement -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExportDone(Event):
    """A file or folder is written and read back."""

    event: ClassVar[str] = "export"
    to: str
    path: str
    digest: str | None = None  # of a run's weights as a plain directory
    bytes: int | None = None
    files: int | None = None  # of a copied adapter
    tensors: int | None = None
    exact: int | None = None  # tensors that hold the source's values bit for bit
    types: Mapping[str, int] | None = None
    notes: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class ExportChecked(Event):
    """`export --text`: what was written, run in its runtime; `runtime` is null where none is installed."""

    event: ClassVar[str] = "check"
    path: str
    runtime: str | None
    source: float | None = None  # perplexity of the source in torch
    file: float | None = None  # ... of the file in its runtime
    tokens: int | None = None
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured(Measures):
    """A model in an engine: size, speed, memory and quality."""

    event: ClassVar[str] = "measured"
    name: str
    engine: str
    path: str
    bytes: int
    bits_linear: float  # bits a weight of the blocks' matrices, scales included
    bits: float  # ... of all weights
    peak_rss: int
    prefill: float | None  # tokens read a second
    generate: float | None  # tokens written a second


@dataclass(frozen=True, kw_only=True)
class MeasureDone(Event):
    """All models are measured."""

    event: ClassVar[str] = "done"
    folder: str | None  # of the compression, where it is written down
    rows: Sequence[Mapping[str, Any]]
    kept: Mapping[str, Mapping[str, Any]]  # the share of tuning's gain that compression keeps, by measure


@dataclass(frozen=True, kw_only=True)
class EvalDone(Measures):
    """`eval`: the measures of one model."""

    event: ClassVar[str] = "eval"
    model: str
    rows: int


def evaluated(model: str, rows: int, measures: Mapping[str, float]) -> EvalDone:
    """The event for the measures of one model on so many rows."""
    values: dict[str, Any] = dict(measures)
    return EvalDone(model=model, rows=rows, **values)


# Planning, lists, ledgers, serving -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlanRow(Event):
    """`plan`: what one method (or a comparison) takes on the device."""

    event: ClassVar[str] = "plan"
    model: str
    method: str
    note: str
    tunes: bool  # a method of ours, not a comparison
    peak: int | None  # None, as trainable and passes: the method states no footprint
    parts: Mapping[str, int]
    trainable: int | None
    bytes_up: int | None
    bytes_down: int | None
    passes: int | None
    seconds: float | None
    sending: float | None
    ram: int | None
    fits: str


@dataclass(frozen=True, kw_only=True)
class SettingListed(Event):
    """`methods NAME`: a setting."""

    event: ClassVar[str] = "setting"
    method: str
    name: str
    type: str
    default: Value
    symbol: str
    help: str


@dataclass(frozen=True, kw_only=True)
class MethodListed(Event):
    """`methods`, and `compress --list`: a method."""

    event: ClassVar[str] = "method"
    name: str
    paper: str
    kind: str | None = None  # of a tuning method: what a run leaves
    sends: str | None = None
    summary: str | None = None  # of a compression method, as the next one
    settings: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelListed(Event):
    """`models`: a built-in model."""

    event: ClassVar[str] = "model"
    name: str
    hub: str
    params: int
    licence: str
    about: str
    cached: str | None
    source: str


@dataclass(frozen=True, kw_only=True)
class ModelPulled(Event):
    """`models pull`: a model is in the cache."""

    event: ClassVar[str] = "pulled"
    name: str
    path: str


@dataclass(frozen=True, kw_only=True)
class LedgerShown(Event):
    """`ledger show`: the head of a ledger."""

    event: ClassVar[str] = "ledger"
    file: str
    bytes: int
    entries: int
    rounds: int
    base: str
    law: str
    K: int
    grid: float
    method: str
    checks: Mapping[str, str]  # round -> digest of the weights after it
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class DigestFound(Event):
    """`ledger replay` and `export`: SHA-256 of the rebuilt weights."""

    event: ClassVar[str] = "digest"
    digest: str


@dataclass(frozen=True, kw_only=True)
class LedgerVerified(Event):
    """`ledger verify`: every digest that the ledger states was found again."""

    event: ClassVar[str] = "verified"
    digest: str
    checks: int


@dataclass(frozen=True, kw_only=True)
class LedgerDifference(Event):
    """`ledger diff`: something that differs."""

    event: ClassVar[str] = "difference"
    what: str
    left: str
    right: str


@dataclass(frozen=True, kw_only=True)
class LedgerWritten(Event):
    """A new ledger file."""

    event: ClassVar[str] = "written"
    file: str
    entries: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class ThreadsChosen(Event):
    """`serve`: the number of threads, and the speed of each that was tried."""

    event: ClassVar[str] = "threads"
    chosen: int
    tokens_per_second: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Serving(Event):
    """`serve`: the endpoint answers."""

    event: ClassVar[str] = "serving"
    url: str
    model: str
    engine: str
    threads: int
    token: str | None = None  # one that was made for this session


@dataclass(frozen=True, kw_only=True)
class Answered(Event):
    """`chat` and `demo`: an answer."""

    event: ClassVar[str] = "answer"
    prompt: str
    text: str
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The command ends with an error."""

    event: ClassVar[str] = "error"
    type: str  # the error's class
    message: str
    hint: str | None
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The command was stopped by Ctrl-C; `hint` resumes it."""

    event: ClassVar[str] = "interrupted"
    type: str
    message: str
    hint: str | None
    exit_code: int


# ----------------------------------------------------------------------------------------------------


def as_dict(event: Event) -> dict[str, Any]:
    """Return an event as the object that is printed, `"event"` first; fields that are None by default are left out."""
    fields = {
        f.name: value
        for f in dataclasses.fields(event)
        if (value := getattr(event, f.name)) is not None or f.default is dataclasses.MISSING
    }
    return {"event": event.event, **{name: _plain(value) for name, value in fields.items()}}


def classes() -> list[type[Event]]:
    """Every event, in the order of this file."""
    found = [c for c in globals().values() if isinstance(c, type) and issubclass(c, Event) and c.event]
    return list(dict.fromkeys(found))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
