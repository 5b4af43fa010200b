# SPDX-License-Identifier: Apache-2.0
"""Report the devices that `fleet eval` has measured on; the events of `fleet status` are in `runs.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fleetune.runs.events.base import Event


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
