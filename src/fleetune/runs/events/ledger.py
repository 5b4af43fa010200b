# SPDX-License-Identifier: Apache-2.0
"""Report ledgers: what `ledger` shows, verifies, compares and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fleetune.runs.events.base import Event


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
