# SPDX-License-Identifier: Apache-2.0
"""Report what is checked before a run: the recipe (`tune --dry-run`) and the rows (`data check`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fleetune.runs.events.base import Event


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
