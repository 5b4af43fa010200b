"""Every event that Fleetune reports: what `--json` prints, and what a `Listener` is given.

A line is one JSON object: `"v": 1`, `"event"` (the name below), then the fields.  A name is unique within one command only.
An optional field that is None is left out; a number that is not finite is null.  The `metrics.jsonl` of a tuning run has the
same lines with the time `t` (seconds since 1970); its last one ends with `crc`, a checksum of the file.

Units: bytes, seconds, nats for losses.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, dataclass_transform

from fleetune.common import paired
from fleetune.common.settings import Value

VERSION = 1


@dataclass(frozen=True, kw_only=True)
@dataclass_transform(kw_only_default=True, frozen_default=True)
class Event:
    """Base class of all events, which are frozen dataclasses: `class RunRemoved(Event, event="removed")`."""

    event: ClassVar[str] = ""  # its name; "" for a class that others are derived from

    def __init_subclass__(cls, event: str = "") -> None:
        cls.event = event
        dataclass(frozen=True, kw_only=True)(cls)


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


# Tuning, sweeps, runs and fleets


class TuneChecked(Event, event="checked"):
    """`tune --dry-run`: the recipe, data and model can be used."""

    clients: int  # number of clients in the fleet
    rows: int  # training rows of all clients
    held_out: int  # number of held-out rows
    cut: int = 0  # rows that are longer than `max_length`, and lose tokens
    remarks: Sequence[str] = ()  # what to know about rows and time, in words
    steps: int | None = None  # local steps of all clients in all rounds
    seconds: float | None = None  # that the run will take here, by a measured step


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long the rows are, before any is cut."""

    unit: str  # tokens of the model's tokenizer, or words without a model
    p50: int  # half of the rows are at most as long
    p95: int  # 95 % of the rows are
    longest: int
    total: int  # of all rows


@dataclass(frozen=True, kw_only=True)
class RowShown:
    """A row as it is trained on."""

    row: int  # from 1
    client: str  # that has it: its name, else its number; "" for a held-out row
    not_trained: str  # the part that bears no loss
    trained: str  # the part that does


class DataChecked(Event, event="data"):
    """`data check`: what rows there are, how long they are, who holds them, and which repeat others."""

    data: str  # as it was given
    rows: int  # number of rows
    training: int  # rows that clients train on
    held_out: int  # number of held-out rows
    lengths: Lengths
    max_length: int  # most tokens of a row
    pieces: int | None  # rows once long texts are cut into several of max_length; null without a model
    cut: int | None  # rows that are longer, and lose tokens; null without a model
    cut_prompts: int | None  # of these, rows whose prompt is cut
    cut_answers: int | None  # of these, rows whose answer is cut
    partition: str  # rule that divides the rows among the clients
    rows_per_client: Sequence[int]  # training rows of each client, in order
    clients: Sequence[str]  # names of the clients, in order; empty where the data name none
    labels: Mapping[str, int] | None  # rows by answer, where the answers are labels; else null
    equal_training: int  # training rows that equal an earlier one
    equal_held_out: int  # held-out rows that equal a training row
    samples: Sequence[RowShown]  # three rows as they are trained on
    remarks: Sequence[str]  # what to know about the rows, in words


class TuneStart(Recorded, event="start"):
    """A run begins: its model, its clients, their rows."""

    method: str  # tuning method
    model: str  # base model, as the recipe names it
    digest: str  # SHA-256 of the base model's weights
    params: int  # number of weights of the base model
    trained: int  # number of trained weights: all of them, or those of the adapter
    clients: int  # number of clients in the fleet
    rounds: int  # number of rounds to run
    partition: str  # rule that divides the rows among the clients
    column: str | None  # column of `counts`, or that the rows are divided by; null for none
    rows_per_client: Sequence[int]  # training rows of each client, in order; empty with privacy
    held_out: int  # number of held-out rows
    counts: Mapping[str, Sequence[int]] | None = None  # the same, by value of `column`; null with privacy
    names: Sequence[str] | None = None  # names of the clients, where the data has them (column:COLUMN)
    changed: Sequence[str] | None = None  # options that are not at their defaults; set.NAME is of the method
    held_out_digest: str | None = None  # SHA-256 of the encoded held-out rows: where equal, losses compare


class RateFound(Recorded, event="rate"):
    """A learning rate that was found before round 1."""

    setting: str  # its name among the method's settings
    rate: float  # the learning rate
    way: str  # slopes (along random directions) or trial (of several rates)
    why: str  # in words
    seconds: float  # that it took
    rates: Sequence[float] | None = None  # of a trial: the rates that were tried, ascending
    losses: Sequence[float] | None = None  # the loss after each of them
    slopes: Sequence[float] | None = None  # along each random direction
    curvatures: Sequence[float] | None = None  # along each random direction


class ClientReply(Recorded, event="client"):
    """Outcome of one client in a round, when its reply has come.

    A reply that is refused after all have come (for going much further than the others, or because the method fails on
    it) has a second line, with status refused; the last line of a client counts.
    """

    round: int  # from 1
    client: int  # from 0
    n: Value | bytes | None  # training rows, as the client states; null without a good reply
    loss: Value | bytes | None  # training loss, as the client states; null without a good reply
    bytes_up: int  # size of the reply; 0 for none
    bytes_down: int  # size of the message that it received
    seconds: float  # of its local work
    rss: int  # resident memory of the process now, bytes
    status: str  # ok, refused (by the check of replies), failed, dropped, declined or late
    reason: str  # of any status but ok; else ""
    steps: int | None = None  # local steps that it made; of simulated clients without privacy
    tokens: int | None = None  # tokens of the rows in these steps, prompts included; likewise


class RoundDone(Recorded, event="round"):
    """A round has been aggregated."""

    round: int  # from 1
    clients: int  # number of clients that were asked
    accepted: int  # number of replies that count
    bytes_up: int  # of all replies of the round
    bytes_down: int  # of all messages to clients of the round
    bytes_total: int  # up and down, of all rounds so far
    seconds: float  # of the round, without evaluation
    rss: int  # resident memory of the process now, bytes
    report: Mapping[str, float] | None = None  # the method's own figures, by name


class RoundEvaluated(Recorded, Measures, event="eval"):
    """The model after a round (0: the base), on the held-out rows."""

    round: int  # 0 for the base model, with nothing attached to it
    objective: float | None = None  # mean of what the run minimises, where that is not the loss
    change_error: float | None = None  # standard error of the loss's change from the base's, taken row by row


class Diverging(Recorded, event="diverging"):
    """A run seems to diverge: said once, as soon as it shows."""

    round: int  # in which it showed
    text: str  # what was seen, and what to change


def round_evaluated(round: int, measures: Mapping[str, float]) -> RoundEvaluated:
    """The event for the measures after a round."""
    values: dict[str, Any] = dict(measures)
    return RoundEvaluated(round=round, **values)


class TuneDone(Event, event="done"):
    """A run is finished."""

    base: Mapping[str, float | None]  # measures of the base model with nothing attached to it, by name
    tuned: Mapping[str, float | None]  # measures of the tuned model, by name
    rows: int  # held-out rows behind the measures
    run: str  # path of the run's folder
    rounds: int  # number of rounds
    bytes_up: int  # from all clients, all rounds
    bytes_down: int  # to all clients, all rounds
    seconds: float  # of all rounds, those before a resume included
    wall: float  # seconds of the whole run, all sittings and their evaluations included
    peak_rss: int  # peak memory of this process, bytes
    result: str  # path of the ledger, or of the adapter's directory
    result_bytes: int  # size of the result
    digest: str  # SHA-256 of the tuned weights, or of the adapter
    result_sha256: str | None = None  # SHA-256 of the ledger's file, or of the adapter's SHA256SUMS
    entries: int | None = None  # of the ledger
    report: str | None = None  # path of report.html; not in `metrics.jsonl`
    t: float | None = None  # when, seconds since 1970
    answered: int | None = None  # held-out prompts behind rouge_l
    change_errors: Mapping[str, float] | None = (
        None  # standard error of a measure's change, taken row by row, by name
    )
    best: int | None = None  # round whose model the result is, where the best is kept
    stopped_early: bool | None = None  # true: no round got better for as long as the recipe's patience
    start: Mapping[str, float] | None = None  # measures with the untrained module attached, if not the base's
    moved: bool | None = None  # false: no round has changed the model
    remarks: Sequence[str] = ()  # what to know about these figures, in words
    per_client: Mapping[str, Any] | None = (
        None  # losses of each client: `rows` (held-out or training), `n`, `base`, `tuned`
    )


class SweepPlanned(Event, event="planned"):
    """`sweep --dry-run`: a run of the grid."""

    name: str  # folder of the run
    values: Sequence[Value]  # what varies, in the order of the axes
    seed: int  # of the run


class SweepStart(Event, event="sweep"):
    """A sweep begins."""

    path: str  # folder of the sweep
    runs: int  # number of runs
    seeds: int  # number of seeds of each combination
    axes: Mapping[str, Sequence[Value]]  # what varies: its values, by name


class SweepRun(Event, event="run"):
    """A run of a sweep is over."""

    run: str  # path of the run's folder
    values: Sequence[Value]  # what varies, in the order of the axes
    seed: int  # of the run
    skipped: bool  # whether it was finished before
    failed: str  # why it failed; "" if it did not
    base: Mapping[str, float | None]  # measures of the base model, by name
    tuned: Mapping[str, float | None]  # measures of the tuned model, by name


class SweepDone(Event, event="done"):
    """A sweep is over, with its table."""

    path: str  # folder of the sweep
    page: str  # path of sweep.html
    table: str  # path of sweep.csv, a row a run
    cells: Sequence[Mapping[str, Any]]  # a combination: values, runs, lr, base, tuned, bytes, seconds


class RunListed(Event, event="run"):
    """`runs`: a tuned run in a few numbers; null where its folder does not say."""

    name: str  # of the folder
    path: str  # of the folder
    method: str | None  # tuning method
    model: str | None  # base model
    status: str  # running, done, interrupted, failed (and why) or unknown
    rounds: int  # finished rounds
    rounds_planned: float | None  # rounds of the recipe
    clients: float | None  # number of clients in the fleet
    base_loss: float | None  # nats, before tuning
    tuned_loss: float | None  # nats, after tuning or at the latest evaluation
    bytes_up: float | None  # from all clients, all rounds
    bytes_down: float | None  # to all clients, all rounds
    bytes: float | None  # up and down together
    seconds: float | None  # wall time of a finished run, with all sittings; of another, time in rounds so far
    peak_rss: float | None  # peak memory, bytes
    intact: bool  # false: the metrics.jsonl of a finished run was changed since it ended
    change_error: float | None = None  # standard error of the loss's change, taken row by row


@dataclass(frozen=True, kw_only=True)
class DeviceShown:
    """A device of a real fleet, and what became of its last reply."""

    client: int  # from 0
    name: str  # of its key's file, or the begin of its key's hash
    does: str  # at work, ready, declined, joining, away, has not joined, or "refused: " and why; "" if not served
    round: int | None = None  # of its last reply; null before the first, as the next six
    status: str | None = None  # of that reply, as in `ClientReply`
    reason: str | None = None  # of any status but ok
    loss: float | None = None  # training loss, as the device states
    bytes_up: int | None = None  # size of the reply
    bytes_down: int | None = None  # size of the message that it answers
    seconds: float | None = None  # of its local work
    lost: int = 0  # its replies that did not count, of all rounds


class FleetShown(Event, event="fleet"):
    """`fleet status`: a real fleet's run; totals are of its finished rounds."""

    run: str  # path of the run's folder
    status: str  # running, done, interrupted, failed (and why) or unknown
    served: bool  # whether a server has the run now
    t: float  # of the server's last word, seconds since 1970
    heard: float  # seconds since that word
    address: str  # where devices reach the server
    machine: str  # on which the server runs
    pid: int  # its process
    rss: int  # resident memory of the server, bytes
    round: int  # that is in progress; 0 before the first
    rounds: int  # number of rounds to run
    waits: str  # for which devices the first round waits, and what helps; "" for none
    states: Mapping[str, int]  # number of devices by what they do; empty while no server has the run
    replies: Mapping[str, int]  # number of replies by status
    bytes_up: int  # of all replies
    bytes_down: int  # of all messages to devices
    round_seconds: float | None  # of the last finished round
    loss: float | None  # validation loss, the latest
    devices: Sequence[DeviceShown]  # by client


class SweepListed(Event, event="sweep"):
    """`runs`: the folder of a sweep."""

    path: str  # of the folder


class CompressionListed(Event, event="compressed"):
    """`runs`: a compression."""

    name: str  # of the folder
    of: str  # name of the model or run that is compressed
    method: str | None  # compression method
    status: str  # done, stopped or damaged
    bytes: float | None  # size of the result; null without one
    folder: str | None = None  # path; `runs show` only, as the next two
    asked: Mapping[str, Any] | None = None  # the request, with the fields of `CompressStart`
    result: Mapping[str, Any] | None = None  # what `CompressDone` has, without `folder`


class RunRemoved(Event, event="removed"):
    """`runs rm`: a folder is removed."""

    run: str  # path of the folder


class DeviceEvaluated(Event, event="device"):
    """`fleet eval`: a device has measured base and tuned model on its own held-out rows."""

    client: int  # from 0
    name: str  # of the device: its key's file, or the begin of its key's hash
    rows: int  # held-out rows that it measured; 0 for none
    tokens: int  # of their answers
    base: float | None  # loss of the base model, nats a token; null without a measure, as the next one
    tuned: float | None  # loss of the tuned model; of a plain model, as `base`
    digest: str  # SHA-256 of its encoded held-out rows, as it declared
    status: str  # ok, refused, failed, dropped or late
    reason: str  # of any status but ok; else ""


class FleetEvaluated(Event, event="evaluated"):
    """`fleet eval`: the means over the devices, by tokens and plain, with standard errors, and the medians."""

    model: str  # as a command takes it
    devices: int  # number of devices that have measured
    asked: int  # number of devices that were asked
    rows: int  # of all devices
    tokens: int  # of all devices
    largest_share: float  # of these tokens, that one device says it has
    base: float  # loss of the base model, nats a token, by tokens; no device counts more than four times the median one
    tuned: float  # loss of the tuned model
    change: float  # `tuned` less `base`
    base_error: float | None  # standard error over the devices; null for one device, as the next two
    tuned_error: float | None  # standard error of `tuned`
    change_error: float | None  # standard error of `change`, which is taken device by device
    base_perplexity: float  # exponential of `base`
    tuned_perplexity: float  # exponential of `tuned`
    base_plain: float  # mean of the devices' base losses, each counted once
    tuned_plain: float  # mean of their tuned losses, each counted once
    base_median: float  # of the devices' base losses, which one device cannot move far, as the next two
    median: float  # of the devices' tuned losses
    change_median: float  # of the devices' changes
    improved: int  # number of devices whose loss is lower than the base's
    path: str | None = None  # of eval-fleet.json; null for a plain model


# Compression, export and measurement


class CompressChecked(Event, event="fits"):
    """`compress --dry-run`: the request is valid.

    The text fields say which calibration text, clients, memory, teacher and rows would be used.
    """

    parameters: int  # number of weights of the model
    text: str | None = None  # calibration text: source, windows, tokens
    clients: str | None = None  # number of clients that would calibrate
    memory: str | None = None  # planned peak memory
    budget: str | None = None  # with a size: bytes, the least and the most that can be had
    teacher: str | None = None  # name and size
    rows: str | None = None  # training rows: source, number, longest


class CompressStart(Event, event="start"):
    """A compression begins: the request, and the measures before it."""

    model: str  # name of the model, or path of the run's folder
    run: bool  # whether `model` is a run
    method: str  # compression method
    set: Mapping[str, Value]  # the method's settings that were given
    data: str  # rows: a file or hub id; "" for none
    text: str  # plain text file; "" for none
    windows: int  # calibration windows at most
    length: int  # tokens of a window, or of a row at most
    eval_text: str  # plain text file for the perplexity; "" for none
    seed: int  # of sampled text, and of the order of rows
    dtype: str  # type that the model is loaded in
    low_memory: bool  # whether one block at a time is loaded from disk
    calibrate: str  # who calibrates: server, clients or fleet
    clients: int  # number of clients that calibrate; 0 for all
    bytes: int  # of the GGUF file at most; 0 for no limit
    bits: int  # as large as a file of one grid of so many bits at most; 0 for no limit
    train_scales: int  # steps in which the scales are trained after solving; 0 for none
    folder: str  # path of the compression's folder
    before: Mapping[str, float]  # measures before compression, by name
    teacher: Mapping[str, float] | None = None  # measures of the teacher, by name
    planned: int | None = None  # peak memory, bytes


@dataclass(frozen=True, kw_only=True)
class MatrixSolved:
    """A linear layer of a block."""

    name: str  # of the layer in the model
    error: float  # ||WX - QX||^2 / ||WX||^2 on the calibration windows; null without windows
    notes: Sequence[str] = ()  # what the solver had to do differently


class BlockSolved(Event, event="block"):
    """A decoder block is compressed and written to disk; with a size the embedding and the head are the last one."""

    block: int  # from 0
    blocks: int  # number of blocks in the model, and one more with a size
    seconds: float  # of this block
    matrices: Sequence[MatrixSolved]  # its linear layers: name, relative error of the outputs, notes


class BudgetMeasured(Event, event="choosing"):
    """A part of what `--bytes` or `--bits` chooses by begins to be measured."""

    phase: str  # sensitivity (of the outputs of each matrix, a window at a time) or grids (of a block, a block at a time)
    done: int  # windows, or blocks, that are measured; the last block is embedding and head
    total: int  # number of windows, or of blocks without the last


class BudgetSpent(Event, event="budget"):
    """The grid of each matrix is chosen for `--bytes` or `--bits`."""

    kinds: Mapping[str, int]  # type of llama.cpp -> number of matrices
    bytes: int  # size of the GGUF file to come
    kl_divergence: float  # a rough estimate, from the dense model, nats a token: to compare budgets by


class CalibrationReply(Event, event="client"):
    """Outcome of one client in the calibration of a block."""

    block: int  # from 0
    client: int  # from 0
    bytes_up: int  # size of the sums that it sent
    bytes_down: int  # size of the compressed block that it received
    status: str  # ok or refused
    reason: str  # why it is left out from now on; else ""


class StepDone(Event, event="step"):
    """A training step of distillation, of a pruned model's recovery or of a quantised model's scales."""

    step: int  # from 1
    steps: int  # number of steps
    loss: float  # of this step; in distillation and of scales the divergence from the teacher


class ModelPruned(Event, event="pruned"):
    """Parts of a model are removed."""

    parameters: int  # number of weights that are left
    blocks: int  # number of blocks that are left
    hidden_size: int  # numbers of a hidden state
    widths: Sequence[Mapping[str, int]]  # of each block: its numbers of heads and channels


class CompressDone(Event, event="done"):
    """A compression is finished."""

    folder: str  # path of the compression's folder
    before: Mapping[str, float]  # before compression: loss, perplexity, other_perplexity
    after: Mapping[
        str, float
    ]  # measures of the result, by name; kl_divergence and same_top from the dense model or teacher
    bytes: int  # size of the result's folder
    seconds: float  # of the work in this process
    peak_rss: int  # peak memory of this process, bytes
    digest: str  # SHA-256 of the artefact's file, or of the plain weights
    result_sha256: str | None = None  # SHA-256 of the result's SHA256SUMS
    planned: int | None = None  # peak memory as planned, bytes
    error: float | None = None  # mean over the matrices
    notes: Mapping[str, Sequence[str]] | None = None  # of the solver, by matrix
    bytes_up: int | None = None  # from all clients, where clients calibrate
    bytes_down: int | None = None  # to all clients, where clients calibrate
    teacher: Mapping[str, float] | None = None  # measures of the teacher, by name
    pruned: Mapping[str, float] | None = None  # measures before recovery, by name
    parameters: Mapping[str, int] | None = None  # number of weights `before` and `after`


class ExportDone(Event, event="export"):
    """A file or folder is written and read back."""

    to: str  # export target
    path: str  # of the new file or folder
    digest: str | None = None  # SHA-256 of a run's weights; only of a run as `hf`
    bytes: int | None = None  # of all files
    tensors: int | None = None  # number of tensors
    exact: int | None = None  # tensors that hold the source's values bit for bit
    types: Mapping[str, int] | None = None  # number of tensors by their type in the file
    notes: Sequence[str] | None = None  # fallbacks and warnings


class PatchMade(Event, event="patch"):
    """`patch make`: a patch is written."""

    path: str  # of the patch
    bytes: int  # of the patch
    base: str  # SHA-256 of the file that it is for
    result: str  # SHA-256 of the file that it makes


class PatchApplied(Event, event="patched"):
    """`patch apply`: a file has other scales now."""

    path: str  # of the new file
    result: str  # its SHA-256


class ExportChecked(Event, event="check"):
    """`export --text`: perplexity of the written file, run in its runtime; `runtime` is null where none is installed."""

    path: str  # of the file or folder
    runtime: str | None  # name of the program that ran it
    source: float | None = None  # perplexity of the source in torch
    file: float | None = None  # perplexity of the file in its runtime
    tokens: int | None = None  # predicted tokens
    ratio: float | None = None  # `file` / `source`; 1 for the same


class Measured(Compared, event="measured"):
    """A model in an engine: size, speed, memory and quality."""

    name: str  # base, tuned, compressed, or the model's own
    engine: str  # torch or llama.cpp
    path: str  # of the model, or its name
    bytes: int  # size on disk
    bits_linear: float  # bits a weight of the blocks' matrices, scales included
    bits: float  # bits a weight, of all weights
    peak_rss: int  # peak memory of the process, bytes
    prefill: float | None  # tokens read a second
    generate: float | None  # tokens written a second
    loss_error: float | None = None  # standard error of the loss, over the rows
    change: float | None = None  # loss less that of the first line, on the same rows; None for the first
    change_error: float | None = None  # standard error of `change`, taken row by row


class MeasureDone(Event, event="done"):
    """All models are measured."""

    folder: str | None  # of the compression that has the table as measure.json; else null
    rows: Sequence[Mapping[str, Any]]  # all `measured` events, without their name
    kept: Mapping[str, Mapping[str, Any]]  # by measure: gain of tuning; value, the share that is left


class EvalDone(Measures, event="eval"):
    """`eval`: the measures of one model."""

    model: str  # as a command takes it
    rows: int  # number of rows measured
    of: int  # number of rows there are; more than `rows` where a limit left some out
    max_length: int  # tokens of a row at most: those of the run that the model comes from
    loss_error: float | None = None  # standard error of the loss, over the rows
    base_loss: float | None = None  # of a run: loss of its base model on the same rows
    change_error: float | None = None  # standard error of `loss` less `base_loss`, taken row by row


def evaluated(
    model: str,
    rows: int,
    measures: Mapping[str, float],
    *,
    of: int,
    max_length: int,
    rows_of: tuple[paired.RowLosses | None, paired.RowLosses | None] = (None, None),
) -> EvalDone:
    """The event for the measures of one model on the first `rows` of so many rows.

    `rows_of` are the losses of the rows under the base model and under this one, where they were measured.
    """
    values: dict[str, Any] = dict(measures)
    base, own = rows_of
    if own is not None:
        values["loss_error"] = paired.ratio(own.sums, own.counts)[1]
    if base is not None and own is not None:
        change = paired.difference(base, own)
        values |= {
            "base_loss": paired.ratio(base.sums, base.counts)[0],
            "change_error": change and change.error,
        }
    return EvalDone(model=model, rows=rows, of=of, max_length=max_length, **values)


# Planning, lists, ledgers, serving


class PlanRow(Event, event="plan"):
    """`plan`: what one method (or a comparison) needs on the device."""

    model: str  # name of the model
    method: str  # tuning method, or name of the comparison
    note: str  # size of what is trained, such as r=8, and "keeps activations" where there is room for them
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


class PlanSettings(Event, event="plan_settings"):
    """`plan`: the method to begin with, and the settings under which it fits the device."""

    model: str  # name of the model
    method: str  # tuning method
    batch_size: int  # rows of a step
    max_length: int  # tokens of a row at most
    dtype: str  # type of the weights
    base: str  # memory, or mapped: the base's weights stay in their file
    peak: int  # peak memory of `tune` with them, bytes
    ram: int | None  # stated memory of the device, bytes
    command: str  # `fleetune tune` with these settings; DATA stands for the rows


class SettingListed(Event, event="setting"):
    """`methods NAME`: a setting."""

    method: str  # whose setting it is
    name: str  # as in `--set NAME=VALUE`
    type: str  # int, float, str or bool
    default: Value  # value unless it is set
    symbol: str  # letter of the paper
    help: str  # meaning


class MethodListed(Event, event="method"):
    """`methods`, and `compress --list`: a method."""

    name: str  # of the method
    paper: str  # authors, place, year
    kind: str | None = None  # of a tuning method: what a run leaves, ledger or adapter
    sends: str | None = None  # of a tuning method: what travels
    summary: str | None = None  # of a compression method, as the next one
    settings: Sequence[Mapping[str, Any]] | None = None  # each with name, type, default, symbol, help


class RecipeListed(Event, event="recipe"):
    """`recipes`: a recipe that comes with Fleetune; `recipes NAME` adds its text."""

    name: str  # as in recipe:NAME
    about: str  # one line
    method: str  # tuning method
    model: str  # base model
    data: str  # data set
    sweeps: bool  # whether it is a grid of runs, for `sweep`
    expected: str | None = None  # outcome that it states
    text: str | None = None  # the whole recipe, TOML


class ModelListed(Event, event="model"):
    """`models`: a built-in model."""

    name: str  # built-in name
    hub: str  # hub id
    params: int  # number of weights
    licence: str  # of the weights
    about: str  # one line
    cached: str | None  # path of its directory; null if it is not in the cache
    source: str  # where that copy came from: hub or index; "" without one
    bytes: int | None = None  # size of that copy; absent without one
    download: int | None = None  # bytes that fetching it takes, about


class ModelPulled(Event, event="pulled"):
    """`models pull`: a model is in the cache."""

    name: str  # built-in name
    path: str  # of its directory


class ModelCached(Event, event="cached_model"):
    """`models`: a model in the cache that is not built in, such as a GGUF file that was read."""

    name: str  # hub id, name of the file, or of the folder
    path: str  # of its directory
    bytes: int  # on the disk
    source: str  # where it came from
    licence: str  # of the weights; "" where nothing states it


class ModelRemoved(Event, event="model_removed"):
    """`models rm`: a copy of a model was removed from the cache."""

    name: str  # as `models` lists it
    path: str  # where it was
    bytes: int  # that are free now


class LinkVerified(Event, event="link"):
    """`verify`: one statement on what a model was made from."""

    state: str  # proven (rebuilt or compared byte for byte) or declared (its maker says so)
    what: str  # that the statement is on
    words: str  # the statement


class Verified(Event, event="verified"):
    """`verify`: nothing differs."""

    subject: str  # name or path
    proven: int  # number of statements
    declared: int  # number of statements


class Released(Event, event="released"):
    """`release`: a signed folder was written."""

    folder: str  # path
    bytes: int  # of all files
    signer: str  # fingerprint of the key that signed it, as ssh-keygen prints it
    key: str  # path of the private key


class LedgerShown(Event, event="ledger"):
    """`ledger show`: the head of a ledger."""

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


class DigestFound(Event, event="digest"):
    """`ledger replay` and `ledger export`: SHA-256 of the rebuilt weights."""

    digest: str  # SHA-256, hexadecimal


class LedgerDifference(Event, event="difference"):
    """`ledger diff`: something that differs."""

    what: str  # field of the head, a round, or the cosine of both changes
    left: str  # value in the first ledger
    right: str  # value in the second ledger


class LedgerWritten(Event, event="written"):
    """A new ledger file."""

    file: str  # path
    entries: int  # number of entries
    fingerprint: str  # SHA-256 of the head and all entries


class Serving(Event, event="serving"):
    """`serve` and `chat`: the engine answers."""

    url: str  # address of the endpoint, and of the engine's page
    model: str  # name of the file or folder that is served
    engine: str  # name of the engine


class Answered(Event, event="answer"):
    """`chat` and `demo`: an answer."""

    prompt: str  # of the user
    text: str  # of the model
    seconds: float | None = None  # to answer


class Failed(Event, event="error"):
    """The command ends with an error."""

    type: str  # class of the error
    message: str  # what failed
    hint: str | None  # what to do next
    exit_code: int  # of the command


class Stopped(Failed, event="interrupted"):
    """The command was stopped by Ctrl-C: `type` is Interrupted, `message` says where, `hint` resumes it."""


# The headings of docs/events.md, and the first event under each.
SECTIONS: Final[Mapping[str, type[Event]]] = {
    "Tuning, sweeps, runs and fleets": TuneChecked,
    "Compression, export and measurement": CompressChecked,
    "Planning, lists, ledgers, serving": PlanRow,
}


def classes() -> list[type[Event]]:
    """Every event, in the order of this file."""
    return [c for c in list(globals().values()) if isinstance(c, type) and issubclass(c, Event) and c.event]
