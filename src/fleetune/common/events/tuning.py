# SPDX-License-Identifier: Apache-2.0
"""Report tuning: what is checked before it, runs, sweeps, the list of runs, and a fleet of devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fleetune.common.events.base import Event, Measures, Recorded
from fleetune.common.settings import Value


@dataclass(frozen=True, kw_only=True)
class TuneChecked(Event):
    """`tune --dry-run`: the recipe, data and model can be used."""

    event: ClassVar[str] = "checked"
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


@dataclass(frozen=True, kw_only=True)
class DataChecked(Event):
    """`data check`: what rows there are, how long they are, who holds them, and which repeat others."""

    event: ClassVar[str] = "data"
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


@dataclass(frozen=True, kw_only=True)
class TuneStart(Recorded):
    """A run begins: its model, its clients, their rows."""

    event: ClassVar[str] = "start"
    method: str  # tuning method
    model: str  # base model, as the recipe names it
    digest: str  # SHA-256 of the base model's weights
    params: int  # number of weights of the base model
    trained: int  # number of trained weights: all of them, or those of the adapter
    clients: int  # number of clients in the fleet
    rounds: int  # number of rounds to run
    partition: str  # rule that divides the rows among the clients
    column: str | None  # column of `counts`, or that the rows are divided by; null for none
    rows_per_client: Sequence[int]  # training rows of each client, in order
    held_out: int  # number of held-out rows
    counts: Mapping[str, Sequence[int]] | None = None  # training rows of each client, by value of `column`
    names: Sequence[str] | None = None  # names of the clients, where the data has them (column:COLUMN)
    changed: Sequence[str] | None = None  # options that are not at their defaults; set.NAME is of the method
    held_out_digest: str | None = None  # SHA-256 of the encoded held-out rows: where equal, losses compare


@dataclass(frozen=True, kw_only=True)
class RateFound(Recorded):
    """A learning rate that was found before round 1."""

    event: ClassVar[str] = "rate"
    setting: str  # its name among the method's settings
    rate: float  # the learning rate
    way: str  # slopes (along random directions) or trial (of several rates)
    why: str  # in words
    seconds: float  # that it took
    rates: Sequence[float] | None = None  # of a trial: the rates that were tried, ascending
    losses: Sequence[float] | None = None  # the loss after each of them
    slopes: Sequence[float] | None = None  # along each random direction
    curvatures: Sequence[float] | None = None  # along each random direction


@dataclass(frozen=True, kw_only=True)
class ClientReply(Recorded):
    """Outcome of one client in a round, when its reply has come.

    A reply that is refused after all have come (for going much further than the others, or because the method fails on
    it) has a second line, with status refused; the last line of a client counts.
    """

    event: ClassVar[str] = "client"
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
    steps: int | None = None  # local steps that it made; of simulated clients
    tokens: int | None = None  # tokens of the rows in these steps, prompts included; of simulated clients


@dataclass(frozen=True, kw_only=True)
class RoundDone(Recorded):
    """A round has been aggregated."""

    event: ClassVar[str] = "round"
    round: int  # from 1
    clients: int  # number of clients that were asked
    accepted: int  # number of replies that count
    bytes_up: int  # of all replies of the round
    bytes_down: int  # of all messages to clients of the round
    bytes_total: int  # up and down, of all rounds so far
    seconds: float  # of the round, without evaluation
    rss: int  # resident memory of the process now, bytes
    report: Mapping[str, float] | None = None  # the method's own figures, by name


@dataclass(frozen=True, kw_only=True)
class RoundEvaluated(Recorded, Measures):
    """The model after a round (0: the base), on the held-out rows."""

    event: ClassVar[str] = "eval"
    round: int  # 0 for the base model, with nothing attached to it
    objective: float | None = None  # mean of what the run minimises, where that is not the loss
    change_error: float | None = None  # standard error of the loss's change from the base's, taken row by row


@dataclass(frozen=True, kw_only=True)
class Diverging(Recorded):
    """A run seems to diverge: said once, as soon as it shows."""

    event: ClassVar[str] = "diverging"
    round: int  # in which it showed
    text: str  # what was seen, and what to change


def round_evaluated(round: int, measures: Mapping[str, float]) -> RoundEvaluated:
    """The event for the measures after a round."""
    values: dict[str, Any] = dict(measures)
    return RoundEvaluated(round=round, **values)


@dataclass(frozen=True, kw_only=True)
class TuneDone(Event):
    """A run is finished."""

    event: ClassVar[str] = "done"
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
    energy: float | None = None  # joules of the processors while it ran, where the machine counts them


@dataclass(frozen=True, kw_only=True)
class SweepPlanned(Event):
    """`sweep --dry-run`: a run of the grid."""

    event: ClassVar[str] = "planned"
    name: str  # folder of the run
    values: Sequence[Value]  # what varies, in the order of the axes
    seed: int  # of the run


@dataclass(frozen=True, kw_only=True)
class SweepStart(Event):
    """A sweep begins."""

    event: ClassVar[str] = "sweep"
    path: str  # folder of the sweep
    runs: int  # number of runs
    seeds: int  # number of seeds of each combination
    axes: Mapping[str, Sequence[Value]]  # what varies: its values, by name


@dataclass(frozen=True, kw_only=True)
class SweepRun(Event):
    """A run of a sweep is over."""

    event: ClassVar[str] = "run"
    run: str  # path of the run's folder
    values: Sequence[Value]  # what varies, in the order of the axes
    seed: int  # of the run
    skipped: bool  # whether it was finished before
    failed: str  # why it failed; "" if it did not
    base: Mapping[str, float | None]  # measures of the base model, by name
    tuned: Mapping[str, float | None]  # measures of the tuned model, by name


@dataclass(frozen=True, kw_only=True)
class SweepDone(Event):
    """A sweep is over, with its table."""

    event: ClassVar[str] = "done"
    path: str  # folder of the sweep
    page: str  # path of sweep.html
    table: str  # path of sweep.csv, a row a run
    cells: Sequence[Mapping[str, Any]]  # a combination: values, runs, base, tuned, bytes, seconds


@dataclass(frozen=True, kw_only=True)
class RunListed(Event):
    """`runs`: a tuned run in a few numbers; null where its folder does not say."""

    event: ClassVar[str] = "run"
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


@dataclass(frozen=True, kw_only=True)
class FleetShown(Event):
    """`fleet status`: a real fleet's run; totals are of its finished rounds."""

    event: ClassVar[str] = "fleet"
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
    states: Mapping[str, int]  # number of devices by what they do; empty while no server has the run
    replies: Mapping[str, int]  # number of replies by status
    bytes_up: int  # of all replies
    bytes_down: int  # of all messages to devices
    round_seconds: float | None  # of the last finished round
    loss: float | None  # validation loss, the latest
    devices: Sequence[DeviceShown]  # by client


@dataclass(frozen=True, kw_only=True)
class SweepListed(Event):
    """`runs`: the folder of a sweep."""

    event: ClassVar[str] = "sweep"
    path: str  # of the folder


@dataclass(frozen=True, kw_only=True)
class CompressionListed(Event):
    """`runs`: a compression."""

    event: ClassVar[str] = "compressed"
    name: str  # of the folder
    of: str  # name of the model or run that is compressed
    method: str | None  # compression method
    status: str  # done, stopped or damaged
    bytes: float | None  # size of the result; null without one
    folder: str | None = None  # path; `runs show` only, as the next two
    asked: Mapping[str, Any] | None = None  # the request, with the fields of `CompressStart`
    result: Mapping[str, Any] | None = None  # what `CompressDone` has, without `folder`


@dataclass(frozen=True, kw_only=True)
class RunRemoved(Event):
    """`runs rm`: a folder is removed."""

    event: ClassVar[str] = "removed"
    run: str  # path of the folder


@dataclass(frozen=True, kw_only=True)
class DeviceEvaluated(Event):
    """`fleet eval`: a device has measured base and tuned model on its own held-out rows."""

    event: ClassVar[str] = "device"
    client: int  # from 0
    name: str  # of the device: its key's file, or the begin of its key's hash
    rows: int  # held-out rows that it measured; 0 for none
    tokens: int  # of their answers
    base: float | None  # loss of the base model, nats a token; null without a measure, as the next one
    tuned: float | None  # loss of the tuned model; of a plain model, as `base`
    digest: str  # SHA-256 of its encoded held-out rows, as it declared
    status: str  # ok, refused, failed, dropped or late
    reason: str  # of any status but ok; else ""


@dataclass(frozen=True, kw_only=True)
class FleetEvaluated(Event):
    """`fleet eval`: the means over the devices, by tokens and plain, with standard errors, and the medians."""

    event: ClassVar[str] = "evaluated"
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
