# SPDX-License-Identifier: Apache-2.0
"""Report what tuning needs on a device, for `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fleetune.runs.events.base import Event


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
