# SPDX-License-Identifier: Apache-2.0
"""Report the folders that `runs` lists, shows and removes, and a fleet's run for `fleet status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fleetune.runs.events.base import Event


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
    does: str  # at work, at work late, ready, declined, joining, away, has not joined, or "refused: " and why; "" if not served
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
