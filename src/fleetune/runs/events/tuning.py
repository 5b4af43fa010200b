# SPDX-License-Identifier: Apache-2.0
"""Report a tuning run: its start, clients, rounds, evaluations and end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fleetune.common.settings import Value
from fleetune.runs.events.base import Event, Measures, Recorded


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

    A client that is late has a second line in the round in which its reply comes, where late replies are used.
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
    late: int | None = None  # rounds that the reply comes late; left out for one that is on time
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
