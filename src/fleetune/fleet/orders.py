# SPDX-License-Identifier: Apache-2.0
"""Encode what a real fleet's server orders of a device, and what the device answers.

An order and its answer are messages of the usual codec (`tuning/messages.py`) with scalars only; the bytes that a
method sends travel inside, as they would in a simulated fleet, so that traffic is counted alike.

    server -> device    job      all that the device needs to know of the run, once a session
                        work     a round's message, for this client
                        eval     the run's result, to be measured on the device's held-out rows
                        begin    the run's result, to be calibrated on the device's training rows
                        block    the compressed block before this one: the sums of this one are wanted
                        end      the run is over, or (body: `refused`) the device cannot take part: why
    device -> server    ready    what the device is: rows, memory, threads, speed, the kinds of work that fit it
                        done     the reply of the method, the measures or the sums
                        failed   why there is none; refused: why the device will not take part
                        declined why it does not work now; it is asked again

Each order holds a number of its own that its answer repeats: an answer is bound to one order, and that to one device,
run and round.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from fleetune.common.settings import Value
from fleetune.errors import MessageError, cut_reason
from fleetune.seeds.ledger_head import TRAINS
from fleetune.tuning.messages import Message, Payload, Scalar, decode, encode
from fleetune.tuning.recipe import label_words

if TYPE_CHECKING:
    from fleetune.tuning.prepare import TuneJob

T = TypeVar("T")

ORDERS: Final = ("job", "work", "eval", "begin", "block", "end")
ANSWERS: Final = ("ready", "done", "failed", "declined", "refused")
TASKS: Final = ("tune", "eval", "calibrate")
REFUSED: Final = b"refused"  # body of an "end" for a device that cannot take part
NOTHING_KEPT: Final = (-1, 0)  # round and CRC-32 of a memory that is not there
MAX_JOB: Final = 1 << 20  # characters
MOST_KINDS: Final = 1000  # of work, that a device can do
FOREVER: Final = 1e9  # seconds
DIGEST: Final = re.compile("[0-9a-f]{64}")
MAX_VERSION: Final = 64  # characters


@dataclass(frozen=True)
class Job:
    """What a device needs to know of a run.  All of it is data: a device runs only what is installed on it."""

    run: str  # names the run, 32 hexadecimal digits
    method: str
    set: Mapping[str, Value]  # the method's settings
    model: str  # as the server's recipe names it
    base: str  # digest of the base model
    dtype: str
    max_length: int
    labels: tuple[str, ...]
    rounds: int
    task: str = "tune"  # or eval, or calibrate
    result: str = ""  # SHA-256 of the result that is measured or calibrated: of the ledger, or of the adapter's SHA256SUMS
    train: str = "weights"  # or scales or codes, of a GGUF file
    format: int = 1

    def to_json(self) -> str:
        """Return the job as one text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read a job; MessageError for a text that is none."""
        try:
            found = json.loads(text) if len(text) <= MAX_JOB else None
        except (ValueError, RecursionError) as error:
            raise MessageError(f"the job is not JSON ({error})") from error
        if not isinstance(found, dict) or set(found) != {f.name for f in fields(cls)}:
            raise MessageError("the job has other fields than this version of Fleetune knows; update it")
        kinds = {"set": dict, "labels": list, "max_length": int, "rounds": int, "format": int}
        for name, value in found.items():
            if type(value) is not kinds.get(name, str):
                raise MessageError(f"the job's {name} is a {type(value).__name__}")
        if found["format"] != cls.format:
            raise MessageError(f"the job has format {found['format']}, this version reads {cls.format}")
        if found["task"] not in TASKS:
            raise MessageError(f"the job's task {found['task']!r} is none of {', '.join(TASKS)}")
        if found["train"] not in TRAINS:
            raise MessageError(f"the job trains {found['train']!r:.40}, which is none of {', '.join(TRAINS)}")
        plain = all(type(v) in (bool, int, float, str) for v in found["set"].values())
        if not plain or not all(type(word) is str for word in found["labels"]):
            raise MessageError("the job's settings or labels are not plain values")
        return cls(**{**found, "labels": tuple(found["labels"])})


def is_path(model: str) -> bool:
    """Whether a job's model is a path on the server, which a device cannot fetch by that name."""
    return Path(model).is_absolute() or model.count("/") > 1 or model.startswith(".")


def job_of(job: TuneJob, run: str) -> Job:
    """Return what devices are told of a run."""
    recipe, model = job.recipe, job.model
    return Job(
        run, recipe.method, dict(recipe.set), recipe.model, model.digest, recipe.dtype, recipe.max_length,
        label_words(recipe.labels), recipe.rounds, train=recipe.train,
    )  # fmt: skip


@dataclass(frozen=True)
class Order:
    """What the server wants of a device."""

    what: str
    round: int = 0
    client: int = 0
    key: int = 0  # of the client's work in this round
    body: bytes = b""  # the job, or the method's message
    kept: tuple[int, int] = NOTHING_KEPT  # round and CRC-32 of the memory that the work stands on
    oldest: int = 0  # memories before this round are needed no longer where a newer one is there
    reason: str = ""
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def encode(self) -> bytes:
        """Return the order as bytes; they end with the body, which the orders of a round may have in common."""
        return _encode(self.what, self.round, self.nonce, {
            "client": self.client, "key": self.key, "kept_round": self.kept[0], "kept_crc": self.kept[1],
            "oldest": self.oldest, "reason": self.reason, "body": self.body,
        })  # fmt: skip

    def take(self) -> bytes:
        """Return the body and forget it, so that it is gone from memory when the caller has done with it."""
        body = self.body
        object.__setattr__(self, "body", b"")
        return body

    @property
    def common(self) -> int:
        """Return how many bytes at the end of `encode()` are those of any order with this body."""
        return len(self.body) + 1  # and the empty map of arrays

    @classmethod
    def decode(cls, data: bytes | bytearray) -> Order:
        """Read an order; MessageError for bytes that are none."""
        what, round, nonce, payload = _decode(data, ORDERS)
        return cls(
            what, round, payload.int("client"), payload.int("key"), _bytes(payload, "body"),
            (payload.int("kept_round"), payload.int("kept_crc")), payload.int("oldest"), _text(payload, "reason"), nonce,
        )  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """What a device answers to an order."""

    what: str
    nonce: bytes
    round: int = 0
    body: bytes = b""  # the method's reply, or a `Device` as JSON
    kept: tuple[int, int] = NOTHING_KEPT  # round and CRC-32 of what the device remembers now
    seconds: float = 0.0
    rss: int = 0
    reason: str = ""

    def encode(self) -> bytes:
        """Return the answer as bytes."""
        return _encode(self.what, self.round, self.nonce, {
            "body": self.body, "kept_round": self.kept[0], "kept_crc": self.kept[1], "seconds": self.seconds,
            "rss": self.rss, "reason": cut_reason(self.reason),
        })  # fmt: skip

    @classmethod
    def decode(cls, data: bytes) -> Reply:
        """Read an answer; MessageError for bytes that are none."""
        what, round, nonce, payload = _decode(data, ANSWERS)
        kept, seconds, rss = (
            (payload.int("kept_round"), payload.int("kept_crc")),
            payload.float("seconds"),
            payload.int("rss"),
        )
        if kept != NOTHING_KEPT and not (0 <= kept[0] <= round and 0 <= kept[1] < 1 << 32):
            raise MessageError(f"the device claims to remember {kept} after round {round}")
        if not 0 <= seconds < FOREVER or not 0 <= rss < 1 << 63:
            raise MessageError(f"the device claims to have worked {seconds} s in {rss} bytes of memory")
        reason = cut_reason(_text(payload, "reason")) or (
            "" if what in ("ready", "done") else "it gives no reason"
        )
        return cls(what, nonce, round, _bytes(payload, "body"), kept, seconds, rss, reason)


@dataclass(frozen=True)
class Device:
    """What a device says of itself when it is ready."""

    rows: int
    rows_digest: str
    memory: int  # bytes of it, free and used
    threads: int
    version: str
    speed: float = 0.0  # tokens a second of a forward pass, measured once
    kinds: tuple[int, ...] = (0,)  # those of the method's kinds of work that fit its memory
    held_out: int = 0  # rows that it never trains on, to measure on
    held_out_digest: str = ""
    torch: str = ""  # its version
    processor: str = ""  # its kind

    def to_json(self) -> bytes:
        """Return it as one text, in UTF-8."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Device:
        """Read it; MessageError for bytes that are none, or for rows that cannot be."""
        try:
            found = json.loads(data) if len(data) <= MAX_JOB else None
        except (ValueError, RecursionError) as error:
            raise MessageError(f"what the device says of itself is not JSON ({error})") from error
        types = {"rows_digest": str, "held_out_digest": str, "speed": float, "kinds": list}
        types |= dict.fromkeys(texts := ("version", "torch", "processor"), str)
        agreed = {f.name: types.get(f.name, int) for f in fields(cls)}
        if not isinstance(found, dict) or {n: type(v) for n, v in found.items()} != agreed:
            raise MessageError("what the device says of itself has other fields than agreed")
        if not 1 <= found["rows"] < 1 << 31:
            raise MessageError(f"the device says that it has {found['rows']} rows")
        if not 0 <= found["held_out"] < 1 << 31:
            raise MessageError(f"the device says that it holds out {found['held_out']} rows")
        if not 0 <= found["speed"] < math.inf:
            raise MessageError(f"the device says that it does {found['speed']} tokens a second")
        if not 1 <= len(found["kinds"]) <= MOST_KINDS or not all(type(k) is int for k in found["kinds"]):
            raise MessageError("the device does not say which kinds of work it can do")
        if not DIGEST.fullmatch(found["rows_digest"]):
            raise MessageError("the digest of the device's rows is not SHA-256 in hexadecimal")
        if not 0 <= found["memory"] < 1 << 63 or not 0 <= found["threads"] < 1 << 31:
            raise MessageError(
                f"the device says that it has {found['memory']} bytes of memory and {found['threads']} threads"
            )
        for name in texts:
            if len(found[name]) > MAX_VERSION or not found[name].isprintable():
                raise MessageError(
                    f"the device's {name} has {len(found[name])} characters, or one that is not printable"
                )
        return cls(**{**found, "kinds": tuple(found["kinds"])})


def _encode(what: str, round: int, nonce: bytes, scalars: Mapping[str, Scalar]) -> bytes:
    return encode(Message(round, nonce, Payload({}, {"what": what, **scalars})))


def _decode(data: bytes | bytearray, known: tuple[str, ...]) -> tuple[str, int, bytes, Payload]:
    message = decode(data)
    what = message.payload.scalars.get("what")
    if what not in known or message.payload.arrays:
        raise MessageError(f"{what!r} is none of {', '.join(known)}")
    return str(what), message.round, message.base, message.payload


def _bytes(payload: Payload, name: str) -> bytes:
    return _of(payload, name, bytes)


def _text(payload: Payload, name: str) -> str:
    return _of(payload, name, str)


def _of(payload: Payload, name: str, kind: type[T]) -> T:
    value = payload.scalars.get(name)
    if type(value) is not kind:
        raise MessageError(f"scalar '{name}' is a {type(value).__name__}, not {kind.__name__}")
    return value
