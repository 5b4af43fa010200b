# SPDX-License-Identifier: Apache-2.0
"""State the head of a ledger: the base model that it belongs to and the settings of its replay, as canonical JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from fleetune.common.ggml import PARTS
from fleetune.errors import LedgerError
from fleetune.seeds.noise import LAW_VERSION, LAWS, MOST

FORMAT = 1
AGAIN = "get it again from its origin; a run writes its own again: fleetune tune --resume RUN"
TRAINS = ("weights", *PARTS)
GRID_LIMIT = 1000.0  # the weight change of one unit: far above any learning rate


@dataclass(frozen=True)
class LedgerHead:
    """The base model that a ledger belongs to, and the settings of its replay."""

    base: str  # SHA-256 of the base model's tensors
    tokenizer: str  # SHA-256 of the tokenizer
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, dtype, in name order
    run_key: int  # 64-bit key of the directions
    law: str  # one of noise.LAWS
    K: int  # directions an epoch of a pool; else 1
    grid: float  # the weight change that coefficient 1 means (a float32)
    law_version: int = LAW_VERSION
    format: int = FORMAT
    eps: float = 0.0
    lr: str = ""  # the rule that made coefficients from scalars
    method: str = ""
    hyper: dict[str, Any] = field(default_factory=dict)
    aggregation: str = ""
    privacy: str = "none"
    checks: dict[str, str] = field(default_factory=dict)  # round -> SHA-256 of the rebuilt weights
    previous: str = ""  # fingerprint of the ledger this one was derived from

    @property
    def trains(self) -> str:
        """Return what its directions move: weights, or the scales or codes of a quantised base (`block_view.py`)."""
        return str(self.hyper.get("train", "weights"))

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, no spaces; `run_key` in hexadecimal."""
        fields = asdict(self) | {"run_key": f"{self.run_key:016x}"}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> LedgerHead:
        """Parse a head; LedgerError if a field is missing, unknown, not canonical or of another format."""
        try:
            raw = json.loads(text)
            raw["run_key"] = int(raw["run_key"], 16)
            raw["tensors"] = tuple((str(n), tuple(int(d) for d in s), str(t)) for n, s, t in raw["tensors"])
            head = LedgerHead(**raw)
            if head.to_json() != text:
                raise ValueError("it is not in canonical form")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise LedgerError(f"the ledger's head is damaged ({error})", hint=AGAIN) from error
        if head.format != FORMAT or head.law_version != LAW_VERSION:
            raise LedgerError(
                f"the ledger is of format {head.format}, law version {head.law_version}; "
                f"this program reads format {FORMAT}, law version {LAW_VERSION}",
                hint="replay it with the version of Fleetune that wrote it",
            )
        if not _sound(head):
            raise LedgerError(
                f"the ledger's head is damaged (law {head.law!r:.40}, K {head.K}, grid {head.grid})",
                hint=f"K is at most {MOST}, a grid lies above 0 and is at most {GRID_LIMIT:g}",
            )
        if head.trains not in TRAINS:
            raise LedgerError(
                f"the ledger's head is damaged (it trains {head.trains!r:.40}, not {', '.join(TRAINS)})",
                hint=AGAIN,
            )
        if strange := [r for r in head.checks if not _is_round(r)]:
            raise LedgerError(
                f"the ledger's head is damaged (it states a digest after round {short(repr(strange[0]))})",
                hint=AGAIN,
            )
        return head


def _sound(head: LedgerHead) -> bool:
    # Whether the values of a head that was read can be what `to_json` wrote.
    texts = (head.base, head.tokenizer, head.law, head.lr, head.method, head.aggregation, head.privacy)
    return (
        all(type(text) is str for text in (*texts, head.previous))
        and head.law in LAWS
        and type(head.K) is int
        and 1 <= head.K <= MOST
        and head.K & (head.K - 1) == 0
        and 0 <= head.run_key < 1 << 64
        and type(head.grid) is float
        and 0.0 < head.grid <= GRID_LIMIT
        and type(head.eps) in (float, int)
        and type(head.hyper) is type(head.checks) is dict
        and all(type(d) is str for d in head.checks.values())
    )


def _is_round(text: str) -> bool:
    # Whether this is the one way in which the number of a round is written; 10 digits hold what fits 32 bits.
    return len(text) <= 10 and text.isdecimal() and text == str(int(text)) and int(text) < 1 << 32


def short(value: Any) -> str:
    """Return a value as a text of at most 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."
