"""Encode what a real fleet's server orders of a device, and what the device answers.

Both are messages of the usual codec (`tuning/exchange/messages.py`) with scalars only, the bytes that a method sends among them.
An order has a number that its answer repeats: so an answer is bound to one order, and that to one device, run and round.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, field
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from fleetune import errors
from fleetune.common.display import one_line
from fleetune.common.memory import is_out_of_memory
from fleetune.models.cache import names
from fleetune.privacy import secagg
from fleetune.privacy.mechanism import Sealed
from fleetune.tuning.exchange.messages import Message, Payload, Scalar, decode, encode
from fleetune.tuning.recipe.recipe import Recipe, label_words, problem_text
from fleetune.tuning.rounds.fleets import STEPS, Step

T = TypeVar("T")

TASKS: Final[Mapping[str, tuple[str, ...]]] = {  # and the orders that belong to each
    "tune": ("work", *STEPS),
    "eval": ("eval",),
    "calibrate": ("begin", "block", *STEPS),
}
REFUSED: Final = b"refused"  # body of an "end" for a device that cannot take part
NOTHING_KEPT: Final = (-1, 0)  # round and CRC-32 of a memory that is not there
MAX_JOB: Final = 1 << 20  # characters
MAX_NAMES: Final = 16  # of an order's or an answer's parts
MAX_TEXT: Final = 1000  # characters of one, but for bodies


def _in_a_line(text: str) -> str:
    """Return a text that can stand in a line of a console; ValueError for one that could end the line or turn its direction."""
    if one_line(text) != text:
        raise ValueError("it is no printable line")
    return text


Printable = AfterValidator(_in_a_line)

Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Bytes = Annotated[int, Field(ge=0, lt=1 << 63)]
Key = Annotated[int, Field(ge=0, lt=1 << 64)]
Crc = Annotated[int, Field(ge=0, lt=1 << 32)]
Id = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]  # it names a folder on the device
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
OptionalDigest = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
Name = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{0,64}$")]  # of a method or a setting
Label = Annotated[str, Field(min_length=1, max_length=200), Printable]
Text = Annotated[str, Field(max_length=MAX_TEXT), Printable]
ODD: Final = "[^A-Za-z0-9()@._+-]"  # what no word of a `Line` has
_WORD: Final = f"[{ODD[2:]}+"
# shown among the server's words
Line = Annotated[str, Field(max_length=64, pattern=f"^({_WORD}( {_WORD})*)?$")]
Number = Annotated[float, Field(ge=-1e15, le=1e15)]
Setting = bool | Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | Number | Text
Kinds = Annotated[tuple[Annotated[int, Field(ge=0, lt=1000)], ...], Field(min_length=1, max_length=1000)]
# smaller ones would be rounded in denormal numbers, and bound nothing
Clip = Annotated[float, Field(ge=1e-30, le=1e15)]
Speed = Annotated[float, Field(ge=0, le=1e12)]
Dtype = Annotated[str, Field(pattern="^(fp32|bf16|fp16)$")]
Task = Annotated[str, Field(pattern="^(tune|eval|calibrate)$")]
Trained = Annotated[str, Field(pattern="^(weights|scales)$")]
Nonce = Annotated[bytes, Field(min_length=16, max_length=16)]
Kept = tuple[Annotated[int, Field(ge=-1, lt=1 << 31)], Crc]

What = Literal["job", "work", Step, "eval", "begin", "block", "end"]

EXACT: Final = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, config=EXACT)
class Secure:
    """How the replies of a run are added up without being seen: what each device does to its own."""

    clients: Annotated[int, Field(ge=secagg.FEWEST, le=secagg.MOST)]  # N
    least: Annotated[int, Field(ge=secagg.FEWEST, le=secagg.MOST)]  # vectors of a sum
    clip: Clip  # C, L2
    noise: Annotated[float, Field(ge=0, le=1e6)]  # z, multiplier of the sum's noise; 0: none

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if not self.least <= self.clients <= 1.5 * self.least or 0 < self.noise < 1e-3:
            raise errors.MessageError("the job's secure sum is none that keeps single replies hidden")
        return self


@dataclass(frozen=True, config=EXACT)
class Hidden:
    """How each row of a device is hidden: it makes the noise by which all rounds cost it this epsilon at most."""

    epsilon: Annotated[float, Field(gt=0, le=100)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    clip: Clip  # C, L2, of what a row adds to a step


@dataclass(frozen=True, config=EXACT)
class Job:
    """What a device needs to know of a run.  All of it is data: a device runs only what is installed on it."""

    run: Id
    method: Name  # "" where a plain model is measured
    set: Annotated[dict[Name, Setting], Field(max_length=100)]  # the method's settings
    model: Text  # as the server's recipe names it
    base: Digest  # of the base model
    dtype: Dtype
    max_length: Annotated[int, Field(ge=1, le=1 << 20)]  # tokens of a row
    labels: Annotated[tuple[Label, ...], Field(max_length=1000)]
    rounds: Annotated[int, Field(ge=0, le=1_000_000)]
    task: Task = "tune"
    result: OptionalDigest = ""  # SHA-256 of the ledger, or the adapter's SHA256SUMS, to measure or calibrate
    train: Trained = "weights"  # of a GGUF file
    secure: Secure | None = None  # where the server sees sums of replies alone
    hidden: Hidden | None = None  # where the server sees replies with the device's noise in them alone
    format: Literal[1] = 1

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        if self.hidden and (self.secure or self.task != "tune" or self.dtype != "fp32"):
            raise errors.MessageError("the job's noise is none that hides rows")
        if not self.method and self.task != "eval":
            raise errors.MessageError(f"the job is not as agreed: one to {self.task} names no method")
        return self

    @property
    def sealed(self) -> Sealed | None:
        """Return how a device's replies are added up; None where the server sees each."""
        if (s := self.secure) is None:
            return None
        return Sealed(s.clip, s.noise, 1.0, s.clients, s.least)

    def to_json(self) -> str:
        """Return the job as one text."""
        return json.dumps(asdict(self))

    @property
    def reading(self) -> str:
        """The choices of the server, the same throughout a run, that decide how rows become tokens and targets."""
        return json.dumps([self.base, self.dtype, self.max_length, self.labels])

    @property
    def measurement(self) -> str:
        """The choices of the server that decide what a measurement tells of the rows: all but names and counts."""
        return json.dumps([self.reading, self.result, self.method, self.set, self.train], sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Job:
        """Read a job; MessageError for a text that is none."""
        return _read(_JOB, text, "the job")


def terms_of(recipe: Recipe, sealed: Sealed | None) -> dict[str, Secure | Hidden | None]:
    """Return what devices are told of how a run hides their replies, or their rows."""
    by_row = recipe.privacy == "example"
    return {
        "secure": Secure(sealed.N, sealed.least, sealed.clip, sealed.noise) if sealed else None,
        "hidden": Hidden(recipe.epsilon, recipe.delta, recipe.clip_norm) if by_row else None,
    }


def is_path(model: str) -> bool:
    """Whether a job's model is no name that a device could fetch: a path on the server."""
    return not names.can_be_fetched(model)


def job_of(recipe: Recipe, run: str, base: str, **other: Any) -> Job:
    """Return what devices are told of a run with this recipe; MessageError where it has words that no device would take."""
    same = ("method", "model", "dtype", "max_length", "rounds", "train")
    told = {name: getattr(recipe, name) for name in same} | {"set": dict(recipe.set)} | other
    return _made(Job, {**told, "run": run, "base": base, "labels": label_words(recipe.labels)}, "the job")


@dataclass(frozen=True, config=EXACT)
class Order:
    """What the server wants of a device.

    job      all that the device needs to know of the run, once a session
    work     a round's message, for this client
    keys, shares, masked, reveal    the steps of a secure sum (`tuning/rounds/sealed.py`)
    eval     the run's result, to be measured on the device's held-out rows
    begin    the run's result, to be calibrated on the device's training rows
    block    the compressed block before this one: the sums of this one are wanted
    end      the run is over, or (body: `refused`) the device cannot take part: why
    """

    what: What
    round: Count = 0
    client: Count = 0
    key: Key = 0  # of the client's work in this round
    body: bytes = b""  # the job, or the method's message
    kept: Kept = NOTHING_KEPT  # round and CRC-32 of the memory that the work stands on
    oldest: Count = 0  # memories before this round are needed no longer where a newer one is there
    reason: Text = ""
    nonce: Nonce = field(default_factory=lambda: secrets.token_bytes(16))

    def encode(self) -> bytes:
        """Return the order as bytes; they end with the body, which the orders of a round may have in common."""
        return _encode(
            self.round,
            self.nonce,
            {
                "what": self.what,
                "client": self.client,
                "key": self.key,
                "kept_round": self.kept[0],
                "kept_crc": self.kept[1],
                "oldest": self.oldest,
                "reason": self.reason,
                "body": self.body,
            },
        )

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
        return _made(cls, _decode(data), "the order")


@dataclass(frozen=True, config=EXACT)
class DeviceReply:
    """What a device answers to an order.

    ready    what the device is: rows, memory, threads, speed, the kinds of work that fit it
    done     the reply of the method, the measures or the sums
    failed   why there is none; refused: why the device will not take part
    declined why it does not work now; it is asked again
    """

    what: Literal["ready", "done", "failed", "declined", "refused"]
    nonce: Nonce
    round: Count = 0
    body: bytes = b""  # the method's reply, or a `Device` as JSON
    kept: Kept = NOTHING_KEPT  # round and CRC-32 of what the device remembers now
    seconds: Annotated[float, Field(ge=0, lt=1e7)] = 0.0
    rss: Bytes = 0
    code: Annotated[str, Field(max_length=60)] = ""  # why it is not done: one of `WORDS`, with its numbers
    reason: Text = ""  # the same in words; it is not sent

    @model_validator(mode="after")
    def _explain(self) -> Self:
        if not -1 <= self.kept[0] <= self.round:
            raise errors.MessageError(
                f"the device claims to remember round {self.kept[0]} after round {self.round}"
            )
        if self.what not in ("ready", "done") and not self.reason:
            object.__setattr__(self, "reason", in_words(self.code))
        return self

    def encode(self) -> bytes:
        """Return the answer as bytes."""
        return _encode(
            self.round,
            self.nonce,
            {
                "what": self.what,
                "body": self.body,
                "kept_round": self.kept[0],
                "kept_crc": self.kept[1],
                "seconds": self.seconds,
                "rss": self.rss,
                "code": self.code,
            },
        )

    @classmethod
    def decode(cls, data: bytes) -> DeviceReply:
        """Read an answer; MessageError for bytes that are none."""
        found = _decode(data)
        if "reason" in found:
            raise errors.MessageError("a device's reason is a code, not words")
        return _made(cls, found, "the answer")

    @classmethod
    def unusable(cls, order: Order, reason: str) -> DeviceReply:
        """Return what stands for an answer that the server cannot use, and says why."""
        return cls("failed", order.nonce, order.round, reason=errors.cut_reason(reason))


@dataclass(frozen=True, config=EXACT)
class Device:
    """What a device says of itself when it is ready."""

    rows: Annotated[int, Field(ge=1, lt=1 << 22)]  # the server counts the steps that so many rows make
    rows_digest: Digest  # of the encoded rows, keyed with a secret of the device: it tells whether they are those of before
    memory: Bytes  # that its work may take
    threads: Count
    version: Line
    speed: Speed = 0.0  # tokens a second of a forward pass
    kinds: Kinds = (0,)  # of the method's work, those that fit it
    held_out: Count = 0  # rows that it never trains on, to measure on
    held_out_digest: OptionalDigest = ""
    torch: Line = ""  # its version
    processor: Line = ""  # its kind, with the instructions that torch uses

    def to_json(self) -> bytes:
        """Return it as one text, in UTF-8."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Device:
        """Read it; MessageError for bytes that are none, or for rows that cannot be."""
        return _read(_DEVICE, data, "what the device says of itself")


_JOB: Final = TypeAdapter(Job)
_DEVICE: Final = TypeAdapter(Device)


def _read(form: TypeAdapter[T], text: str | bytes, what: str) -> T:
    if len(text) > MAX_JOB:
        raise errors.MessageError(f"{what} has {len(text):,} characters, {MAX_JOB:,} at most")
    try:
        return form.validate_json(text)
    except ValidationError as error:
        raise errors.MessageError(f"{what} is not as agreed: {problem_text(error.errors()[0])}") from error


def _encode(round: int, nonce: bytes, scalars: Mapping[str, Scalar]) -> bytes:
    return encode(Message(round, nonce, Payload({}, scalars)))


def _decode(data: bytes | bytearray) -> dict[str, Any]:
    """Return the parts of an order or an answer, by the names of its fields."""
    message = decode(data, names=MAX_NAMES, text=4 * MAX_TEXT)
    if message.payload.arrays:
        raise errors.MessageError("an order or an answer holds no arrays of its own")
    found: dict[str, Any] = {**message.payload.scalars, "round": message.round, "nonce": message.base}
    found["kept"] = found.pop("kept_round", None), found.pop("kept_crc", None)
    return found


def _made(cls: type[T], found: Mapping[str, Any], what: str) -> T:
    try:
        return cls(**found)
    except (ValidationError, TypeError) as error:
        why = problem_text(error.errors()[0]) if isinstance(error, ValidationError) else str(error)
        raise errors.MessageError(f"{what} is not as agreed: {why}") from error


WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "battery": "it runs on its battery",
        "busy": "other programs take {} % of its processors",
        "budget": "the run costs more privacy than it states, or than its own budget allows",
        "calibrated": "it has calibrated one compression on {} windows of {} tokens, and gives no other sums",
        "fault": "its work ended in an error; its console says which",
        "few-tokens": "sums over so few tokens could give its rows away; it makes none over fewer than {}",
        "measured": "it has made {} measurements, and makes no other",
        "measured-at": "it has measured its held-out rows at {} tokens, and does so at no other length and with no other labels",
        "memory": "the work does not fit the {} MB that it may use",
        "model": "it has not the run's model in this revision; its console says more",
        "no-calibration": "it takes no part in calibrations: fleetune fleet join .. --calibrate",
        "no-data": "it was not told which rows it has: start the SuperNode with --node-config \"data='FILE'\"",
        "no-evaluation": "it takes no part in evaluations: join with the --held-out that it trained with, or --eval-data FILE",
        "no-sum": "it takes part in secure sums alone, of {} devices or more",
        "no-noise": "it takes part in runs with its own noise alone: serve --privacy sealed or example with --epsilon",
        "no-job": "it has no job yet; does another process use its key?",
        "order": "it was sent something that it does not obey; its console says more",
        "remembers": "it no longer has what it kept in round {}; its console says more",
        "rows": "its rows cannot be used for this run; its console says more",
        "settings": "it cannot do this work with these settings; its console says more",
        "storage": "its disk takes no more",
        "unit": "its privacy budget counts rows, or replies as a whole, and this run needs the other",
        "work": "it was asked for {} rows' work in a round, and does {} at most",
    }
)
OF_ERRORS: Final = (
    (errors.MessageError, "order"),
    (errors.LedgerError, "order"),
    (errors.DataError, "rows"),
    (errors.ModelError, "model"),
    (errors.StorageError, "storage"),
    (errors.UsageError, "settings"),
)
LARGEST: Final = 1 << 63  # of a number


class Declined(errors.FleetError):
    """A device does not do what it is asked: `WORDS[code]` with these numbers, and for its own console a hint."""

    def __init__(self, code: str, *numbers: int, hint: str | None = None) -> None:
        super().__init__(WORDS[code].format(*(f"{n:,}" for n in numbers)), hint=hint)
        self.reason = " ".join([code, *(str(min(n, LARGEST - 1)) for n in numbers)])

    @property
    def page(self) -> str:
        """The section of the docs on errors of the fleet."""
        return errors.FleetError("").page


def reason_of(error: BaseException, memory: int) -> str:
    """Return what a server is told of an error, on a device that may use so many bytes of memory."""
    if isinstance(error, Declined):
        return error.reason
    if isinstance(error, errors.FitError) or is_out_of_memory(error):
        return f"memory {memory // 10**6}"
    return next((code for kind, code in OF_ERRORS if isinstance(error, kind)), "fault")


def in_words(reason: str) -> str:
    """Return a device's reason as a sentence; MessageError for one that is none of the list."""
    code, *numbers = reason.split(" ")
    plain = all(n.isascii() and n.isdigit() and len(n) < 20 and int(n) < LARGEST for n in numbers)
    if code not in WORDS or not plain or WORDS[code].count("{}") != len(numbers):
        raise errors.MessageError(f"the reason {reason!r:.60} is none that a device can have")
    return WORDS[code].format(*(f"{int(n):,}" for n in numbers))
