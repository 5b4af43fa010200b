"""Store a full-parameter fine-tune as a seed ledger: a short list of (direction id, integer coefficient, round).

With the base model a ledger *is* the tuned model: `w[i] = round(w0[i] + grid * sum_k c_k z_k[i])`, the sum in integers, so every
device rebuilds the same bytes (`z_k` is the direction of id k).  docs/ledger.md defines the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from fleetune.common.display import counted
from fleetune.common.files import write_atomic
from fleetune.common.ggml import SCALES
from fleetune.errors import LedgerError, UsageError, VersionError
from fleetune.seeds import noise

FORMAT = 1
NAME = "fleetune-ledger"
ARRAYS = {"id": "U64", "coefficient": "I32", "round": "U32"}
SIGNS = {"signs": "U8"}  # beside these, where the law is `outer`
AGAIN = "get it again from its origin; a run writes its own again: fleetune tune --resume RUN"
TRAINS = ("weights", SCALES)
LARGEST = (1 << 31) - 1  # a coefficient, of either sign
GRID_LIMIT = 1000.0  # the weight change of one unit: far above any learning rate


@dataclass(frozen=True)
class LedgerHead:
    """The base model that a ledger belongs to, and the settings of its replay."""

    base: str  # SHA-256 of the base model's tensors
    tokenizer: str  # SHA-256 of the tokenizer
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, dtype, in name order
    run_key: int  # 64-bit key of the directions
    law: str  # one of noise.LAWS, or outer
    K: int  # directions an epoch of a pool; else 1
    grid: float  # the weight change that coefficient 1 means (a float32)
    law_version: int = noise.LAW_VERSION
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
        """Return what its directions move: weights, or the scales of a quantised base (`scale_view.py`)."""
        return str(self.hyper.get("train", "weights"))

    @property
    def arrays(self) -> dict[str, str]:
        """Return the arrays of a file of this law, and their types in safetensors."""
        return ARRAYS | SIGNS if self.law == noise.OUTER else ARRAYS

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, no spaces; `run_key` in hexadecimal."""
        fields = asdict(self) | {"run_key": f"{self.run_key:016x}"}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> LedgerHead:
        """Parse a head; LedgerError if a field is missing, unknown or not canonical, VersionError for another format."""
        try:
            raw = json.loads(text)
            raw["run_key"] = int(raw["run_key"], 16)
            raw["tensors"] = tuple((str(n), tuple(int(d) for d in s), str(t)) for n, s, t in raw["tensors"])
            head = LedgerHead(**raw)
            if head.to_json() != text:
                raise ValueError("it is not in canonical form")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise LedgerError(f"the ledger's head is damaged ({error})", hint=AGAIN) from error
        if head.format != FORMAT or head.law_version != noise.LAW_VERSION:
            raise VersionError("the ledger")
        if not _sound(head):
            raise LedgerError(
                f"the ledger's head is damaged (law {head.law!r:.40}, K {head.K!r:.40}, grid {head.grid!r:.40})",
                hint=f"K is at most {noise.MOST}, a grid lies above 0 and is at most {GRID_LIMIT:g}; {AGAIN}",
            )
        return head


def _sound(head: LedgerHead) -> bool:
    # Whether the values of a head that was read can be what `to_json` wrote.
    texts = (head.base, head.tokenizer, head.law, head.lr, head.method, head.aggregation, head.privacy)
    return (
        all(type(text) is str for text in (*texts, head.previous))
        and head.law in (*noise.LAWS, noise.OUTER)
        and type(head.K) is int
        and 1 <= head.K <= noise.MOST
        and head.K & (head.K - 1) == 0
        and 0 <= head.run_key < 1 << 64
        and type(head.grid) is float
        and 0.0 < head.grid <= GRID_LIMIT
        and type(head.hyper) is type(head.checks) is dict
        and type(head.eps) in (float, int)
        and all(_is_plain(value) for value in (head.eps, *head.hyper.values()))
        and all(type(d) is str and _is_round(r) for r, d in head.checks.items())
        and head.trains in TRAINS
        and all(min(shape, default=0) >= 0 and math.prod(shape) < 1 << 62 for _, shape, _ in head.tensors)
    )


def _is_plain(value: Any) -> bool:
    # Whether this is one value, not values in values, and a number that a float holds.
    return isinstance(value, str | float | None) or (isinstance(value, int) and abs(value) < 1 << 1000)


def _is_round(text: str) -> bool:
    # Whether this is the one way in which the number of a round is written; 10 digits hold what fits 32 bits.
    return len(text) <= 10 and text.isdecimal() and text == str(int(text)) and int(text) < 1 << 32


def short(value: Any) -> str:
    """Return a value as a text of at most 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."


class Change(NamedTuple):
    """One difference between two ledgers: its name, and the value in each."""

    what: str
    left: str
    right: str


@dataclass(frozen=True, repr=False)
class Ledger:
    """A head and its entries; every operation returns a new ledger."""

    head: LedgerHead
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    coefficients: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    rounds: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    signs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))  # bits of all entries; law outer

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        entries, rounds = counted(len(self), "entry", "entries"), counted(self.last_round(), "round")
        return f"<Ledger of {self.head.method}: {entries}, {rounds}, law {self.head.law}, base {self.head.base[:8]}>"

    def final_check(self) -> str | None:
        """Return the digest that the ledger states of the weights it rebuilds as a whole; None when it states none."""
        last = max(map(int, self.head.checks), default=-1)
        return self.head.checks[str(last)] if last >= int(self.rounds.max(initial=0)) else None

    def append(
        self, ids: np.ndarray, coefficients: np.ndarray, round: int, signs: np.ndarray | None = None
    ) -> Ledger:
        """Return this ledger with the entries of one more round; zeros are left out.  `signs`: uint8, their bits (law outer).

        LedgerError if a coefficient does not fit 32 bits.
        """
        keep = np.flatnonzero(coefficients)
        if len(keep) and max(int(coefficients.max()), -int(coefficients.min())) >= 1 << 31:
            raise LedgerError(
                "a coefficient does not fit 32 bits", hint="lower the learning rate or set clip"
            )
        bits = self.signs[:0] if signs is None else signs
        new = Ledger(self.head, ids, coefficients, np.full(len(ids), round, np.uint32), bits)._taken(keep)
        return Ledger(
            self.head, *(np.concatenate(pair) for pair in zip(self._all(), new._all(), strict=True))
        )

    def _all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return ids, coefficients, rounds and signs in the types of the file."""
        return self.ids.astype("<u8"), self.coefficients.astype("<i4"), self.rounds.astype("<u4"), self.signs

    def _taken(self, which: np.ndarray) -> Ledger:
        """Return the entries that a mask or an array of places chooses, in its order, under the same head."""
        ids, coefficients, rounds = (array[which] for array in self._all()[:3])
        ends = np.cumsum(self.sign_bytes())
        starts = ends - self.sign_bytes()
        places = zip(starts[which].tolist(), ends[which].tolist(), strict=True)
        signs = np.concatenate([self.signs[:0], *(self.signs[a:b] for a, b in places)])
        return Ledger(self.head, ids, coefficients, rounds, signs)

    def since(self, round: int) -> Ledger:
        """Return the entries of `round` and of later ones alone, under the same head."""
        return self._taken(self.rounds >= round)

    def sign_bytes(self) -> np.ndarray:
        """Return how many bytes of `signs` each entry has: int64 [n]."""
        if self.head.law != noise.OUTER:
            return np.zeros(len(self), np.int64)
        rows = np.array(noise.rows_of([shape for _, shape, _ in self.head.tensors]), np.int64)
        return -(-rows // 8)[(self.ids & np.uint64(noise.LOW)).astype(np.int64)]

    def passes(self) -> noise.Passes:
        """Return the entries as replay passes (one a direction, or one an epoch for a pool)."""
        if self.head.law == noise.OUTER:
            shapes = [shape for _, shape, _ in self.head.tensors]
            return noise.outer_passes(shapes, self.ids, self.coefficients, self.signs)
        return noise.passes(self.head.law, self.head.K, self.ids, self.coefficients)

    def count_passes(self) -> int:
        """Return the number of replay passes, without their tables."""
        if self.head.law == noise.OUTER:
            return len(np.unique(self.ids >> np.uint64(32)))
        return noise.count_passes(self.head.law, self.ids, self.coefficients)

    def with_check(self, round: int, digest: str) -> Ledger:
        """Return this ledger with the digest that the weights have after `round`."""
        return replace(self, head=replace(self.head, checks={**self.head.checks, str(round): digest}))

    def fingerprint(self) -> str:
        """Return the SHA-256 over the canonical head and the entries."""
        h = hashlib.sha256(self.head.to_json().encode())
        for array in self._all():
            h.update(array.tobytes())
        return h.hexdigest()

    # Operations ---------------------------------------------------------------------------------

    def _derived(self, keep: np.ndarray, checks: dict[str, str]) -> Ledger:
        head = replace(self.head, previous=self.fingerprint(), checks=checks)
        return replace(self._taken(keep), head=head)

    def last_round(self) -> int:
        """Return the last round of which the ledger has an entry or states a digest; 0 for none."""
        return max(int(self.rounds.max(initial=0)), *map(int, self.head.checks), 0)

    def _require_round(self, round: int, first: int) -> None:
        last = self.last_round()
        if not first <= round <= last:
            hint = f"name a round from {first} to {last:,}{'; 0 is its base' * (not first)}" if last else None
            raise UsageError(
                f"the ledger has {counted(last, 'round')}, none {round:,}",
                hint=hint or "fleetune ledger show FILE",
            )

    def truncate(self, round: int) -> Ledger:
        """Return the ledger up to and including `round`, 0 for none of them; UsageError for a round that it does not have."""
        self._require_round(round, 0)
        checks = {r: d for r, d in self.head.checks.items() if int(r) <= round}
        return self._derived(self.rounds <= round, checks)

    def drop(self, round: int) -> Ledger:
        """Return the ledger without the entries of `round`, and without the checks from there on.

        UsageError for a round that it does not have; one in which nobody replied has no entries, and counts.
        """
        self._require_round(round, 1)
        checks = {r: d for r, d in self.head.checks.items() if int(r) < round}
        return self._derived(self.rounds != round, checks)

    def scale(self, factor: float) -> Ledger:
        """Return the fine-tune `factor` times as long (task arithmetic): the grid is scaled, checks are dropped.

        The coefficients are negated for a negative factor.  LedgerError when the grid or a coefficient would not fit.
        """
        with np.errstate(over="ignore"):
            grid = float(np.float32(self.head.grid * abs(factor)))
        if not 0.0 < grid <= GRID_LIMIT:  # also when it is no number
            raise LedgerError(
                f"cannot scale by {factor}: the grid would become {grid}",
                hint=f"a grid lies between 0 and {GRID_LIMIT:g}",
            )
        head = replace(self.head, previous=self.fingerprint(), checks={}, grid=grid)
        if factor > 0:
            return replace(self, head=head)
        if self.coefficients.min(initial=0) == -(1 << 31):
            raise LedgerError(
                f"cannot scale by {factor}: -2^31 has no negative in 32 bits", hint="compact it first"
            )
        return replace(self, head=head, coefficients=-self.coefficients)

    def compact(self) -> Ledger:
        """Return one entry a direction (its sum), sorted by id: the same weights, without the history of rounds.

        A sum beyond 32 bits takes as many entries as it needs, one after another.  Entries of the law outer stay.
        """
        if self.head.law == noise.OUTER:
            return self
        ids, left = noise.merged(self.ids, self.coefficients.astype(np.int64))
        parts = []
        while left.any():
            parts.append(np.clip(left, -LARGEST, LARGEST))
            left = left - parts[-1]
        ids, sums = np.tile(ids, len(parts)), np.concatenate([*parts, np.zeros(0, np.int64)])
        order = np.argsort(ids, kind="stable")
        last = int(self.rounds.max(initial=0))
        checks = {r: d for r, d in self.head.checks.items() if int(r) >= last}
        head = replace(self.head, previous=self.fingerprint(), checks=checks)
        return Ledger(head).append(ids[order], sums[order], last)

    def merge(self, other: Ledger) -> Ledger:
        """Return both fine-tunes together: coefficients add.  LedgerError unless base, key, law and grid agree."""
        differ = [c for c in self.head_changes(other) if c.what in MUST_AGREE]
        if differ:
            raise LedgerError(
                "these ledgers cannot be merged: "
                + "; ".join(f"{c.what} is {c.left} and {c.right}" for c in differ),
                hint="merge needs the same base model, run key, law, K and grid",
            )
        order = np.argsort(np.concatenate([self.rounds, other.rounds]), kind="stable")
        both = Ledger(
            self.head, *(np.concatenate(pair) for pair in zip(self._all(), other._all(), strict=True))
        )
        parents = "".join(sorted([self.fingerprint(), other.fingerprint()])).encode()
        head = replace(self.head, previous=hashlib.sha256(parents).hexdigest(), checks={})
        return replace(both._taken(order), head=head)

    def head_changes(self, other: Ledger) -> list[Change]:
        """Return the fields of the head that differ."""
        left, right = json.loads(self.head.to_json()), json.loads(other.head.to_json())
        return [Change(k, short(left[k]), short(right[k])) for k in sorted(left) if left[k] != right[k]]

    def diff(self, other: Ledger) -> list[Change]:
        """Return the differences of the heads, of the entries by round, and of the fine-tunes as vectors."""
        changes = self.head_changes(other)
        every = np.union1d(self.rounds, other.rounds)
        for r, a, b in zip(every, *(x._split(x.rounds, every) for x in (self, other)), strict=True):
            if [x.tobytes() for x in a] != [x.tobytes() for x in b]:
                changes.append(Change(f"round {r}", f"{len(a[0])} entries", f"{len(b[0])} entries"))
        if all(c.what not in MUST_AGREE for c in changes) and (cosine := _cosine(self, other)) < 1.0:
            what = "cosine of the two fine-tunes"
            changes.append(Change(what, f"{cosine:.6f}", "1.000000 = same direction"))
        return changes

    def _split(self, keys: np.ndarray, values: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Yield the arrays of the entries of each key, [n]; `values`, ascending, are all keys and perhaps others."""
        order = np.argsort(keys, kind="stable")
        *arrays, signs = (found := self._taken(order))._all()
        ends = np.append(0, np.cumsum(found.sign_bytes()))
        for a, b in pairwise([*np.searchsorted(keys[order], values).tolist(), len(keys)]):
            yield [*(array[a:b] for array in arrays), signs[ends[a] : ends[b]]]

    # Files --------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Return the file's bytes: equal ledgers give equal bytes (safetensors' own writer shuffles metadata)."""
        metadata = {"format": NAME, "head": self.head.to_json(), "fingerprint": self.fingerprint()}
        header: dict[str, Any] = {"__metadata__": metadata}
        data = b""
        for (name, kind), values in zip(self.head.arrays.items(), self._all(), strict=False):
            place = [len(data), len(data) + values.nbytes]
            header[name] = {"data_offsets": place, "dtype": kind, "shape": [len(values)]}
            data += values.tobytes()
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data

    def save(self, path: Path) -> None:
        """Write the ledger atomically, readable by its owner alone."""
        write_atomic(path, self.to_bytes(), mode=0o600)


MUST_AGREE = ("base", "tokenizer", "tensors", "run_key", "law", "law_version", "K", "grid")


def load(path: str | os.PathLike[str]) -> Ledger:
    """Read a ledger file.  LedgerError when it is missing, damaged, of another format, or asks for too much (`check_size`)."""
    path = Path(path)
    if not path.is_file():
        raise LedgerError(
            f"no ledger at {path}", hint="give a ledger.safetensors file or a run folder that has one"
        )
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            ours = metadata.get("format") == NAME and set(metadata) == {"format", "head", "fingerprint"}
            if not ours or set(file.keys()) - set(SIGNS) != set(ARRAYS):
                raise LedgerError(f"{path} is a safetensors file, but not a ledger", hint=AGAIN)
            arrays = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last two: types numpy lacks
        raise LedgerError(f"{path} is damaged or not a ledger ({error})", hint=AGAIN) from error
    try:
        head = LedgerHead.from_json(metadata["head"])
    except LedgerError as error:
        raise LedgerError(f"{path}: {error.message}", hint=error.hint) from error
    kinds = {n: (a.dtype.name, a.ndim) for n, a in arrays.items()}
    wanted = {n: ({"U": "uint", "I": "int"}[kind[0]] + kind[1:], 1) for n, kind in head.arrays.items()}
    if kinds != wanted or len({len(arrays[n]) for n in ARRAYS}) != 1:
        raise LedgerError(f"{path} is damaged: its arrays are {kinds}", hint=AGAIN)
    most = {noise.POOL: head.K, noise.OUTER: len(head.tensors)}.get(head.law, 1 << 32)
    if int((arrays["id"] & np.uint64(noise.LOW)).max(initial=0)) >= most:
        raise LedgerError(f"{path} is damaged: it names directions outside its pool of {most}", hint=AGAIN)
    found = Ledger(head, *(arrays[n] for n in head.arrays))
    if len(found.signs) != found.sign_bytes().sum():
        raise LedgerError(f"{path} is damaged: it has signs for other entries", hint=AGAIN)
    if (stated := metadata["fingerprint"]) != found.fingerprint():
        raise LedgerError(
            f"{path} is not what was written: its fingerprint is {found.fingerprint()[:16]}.., it states {stated[:16]}..",
            hint=AGAIN,
        )
    try:
        noise.check_size(head.law, head.K, found.count_passes())
    except UsageError as error:
        raise LedgerError(f"{path} asks for more than a run makes: {error.message}", hint=AGAIN) from error
    return found


def require_base(
    head: LedgerHead, base: str, tokenizer: str, tensors: Iterable[tuple[str, tuple[int, ...], str]]
) -> None:
    """Raise LedgerError with what differs, unless the ledger was made on this very base model."""
    tensors = tuple(tensors)
    differ = {
        "tensors": head.tensors != tensors,
        "base digest": head.base != base,
        "tokenizer digest": head.tokenizer != tokenizer,
    }
    if any(differ.values()):
        apart = sorted(set(head.tensors) ^ set(tensors))
        shown = f", e.g. {apart[0][0]} {list(apart[0][1])} {apart[0][2]}" if apart else ""
        raise LedgerError(
            f"this ledger belongs to another base model: the {', '.join(k for k, v in differ.items() if v)} differ{shown}",
            hint=f"load the base it was made on, in the same dtype ({head.tensors[0][2] if head.tensors else '?'})",
        )


def _cosine(one: Ledger, other: Ledger) -> float:
    # The directions of a law are orthogonal or nearly so, so the coefficients' cosine is the moves'.
    product, *squares = sum(
        (np.stack([a * b, a * a, b * b]).sum(axis=1) for a, b in _moves(one, other)), np.zeros(3)
    )
    length = math.sqrt(squares[0] * squares[1])
    return float(product) / length if length else float(squares[0] == squares[1])


def _moves(*pair: Ledger) -> Iterator[Iterable[np.ndarray]]:
    """Yield how far two ledgers move along the same directions, float64 [n] each: all of these, or an id's (law outer)."""
    every, head = np.unique(np.concatenate([one.ids for one in pair])), pair[0].head
    if head.law != noise.OUTER:
        yield [np.bincount(np.searchsorted(every, x.ids), x.coefficients, len(every)) for x in pair]
        return
    rows = noise.rows_of([shape for _, shape, _ in head.tensors])  # each has a direction of its own
    for id, *sides in zip(every.tolist(), *(x._split(x.ids, every) for x in pair), strict=True):
        totals = np.zeros((2, rows[m := id & noise.LOW]))
        for total, (_, coefficients, _, signs) in zip(totals, sides, strict=True):
            bits = signs.reshape(len(coefficients), -(-rows[m] // 8))
            for c, own in zip(coefficients.tolist(), bits, strict=True):
                total += c * noise.unpacked(own, rows[m])
        yield totals
