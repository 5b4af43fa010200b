"""Malformed answers of a device, by name: how each is made of an honest one, and what the server says of it.

They are made for any method: `Honest.payload` is its reply.
"""

import dataclasses
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fleetune.fleet.orders import Device, Order, Reply
from fleetune.tuning.exchange.messages import Message, Payload, decode, encode


@dataclass(frozen=True)
class Honest:
    """What a device was asked, and what it would answer honestly."""

    order: Order
    base: bytes
    payload: Payload
    device: Device
    rows: int
    others: Order  # the order of another device, in the same round
    earlier: Order  # this device's order of the round before

    @property
    def first(self) -> str:
        """The name of an array."""
        return next(iter(self.payload.arrays))

    def body(self, payload: Payload | None = None, **changes: Any) -> bytes:
        """Return the method's reply, with another payload, round or base."""
        message = Message(self.order.round, self.base, payload or self.payload)
        return encode(dataclasses.replace(message, **changes))

    def reply(self, body: bytes | None = None, **changes: Any) -> bytes:
        """Return the answer that holds a reply."""
        body = self.body() if body is None else body
        whole = Reply("done", self.order.nonce, self.order.round, body, (-1, 0), 0.1, 9)
        return dataclasses.replace(whole, **changes).encode()

    def scalars(self, **changes: Any) -> bytes:
        """Return the answer with other scalars; None takes one away."""
        scalars = {n: v for n, v in {**self.payload.scalars, **changes}.items() if v is not None}
        return self.reply(self.body(Payload(self.payload.arrays, scalars)))

    def arrays(self, change: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]) -> bytes:
        """Return the answer with other arrays."""
        return self.reply(self.body(Payload(change(dict(self.payload.arrays)), self.payload.scalars)))

    def array(self, change: Callable[[np.ndarray], np.ndarray], name: str = "") -> bytes:
        """Return the answer with one array changed, the first unless it is named."""
        name = name or self.first
        return self.arrays(lambda arrays: {**arrays, name: change(arrays[name].copy())})

    def outer(self, **changes: Any) -> bytes:
        """Return an answer of which a part is of another kind or size, though its checksum is right."""
        whole = decode(self.reply())
        round, nonce = changes.pop("round", whole.round), changes.pop("nonce", whole.base)
        return encode(Message(round, nonce, Payload({}, {**whole.payload.scalars, **changes})))

    def told(self, **changes: Any) -> bytes:
        """Return what the device says of itself when it gets the job, with some of it changed; None takes it away."""
        known = {**dataclasses.asdict(self.device), **changes}
        return self.ready(json.dumps({n: v for n, v in known.items() if v is not None}).encode())

    def ready(self, body: bytes, what: str = "ready") -> bytes:
        """Return an answer to the job."""
        return self.outer(what=what, body=body)


def put(array: np.ndarray, value: float) -> np.ndarray:
    """Return the array with another last value; it is of real numbers then."""
    real = array if array.dtype.kind == "f" else array.astype(np.float32)
    real.reshape(-1)[-1] = value
    return real


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


Make = Callable[[Honest], bytes]


def later(how: Callable[..., bytes], *given: Any, **changes: Any) -> Make:
    """Return what makes an answer of an honest one: a method of it with these arguments."""
    return lambda h: how(h, *given, **changes)


array, arrays, scalars, reply = (
    partial(later, how) for how in (Honest.array, Honest.arrays, Honest.scalars, Honest.reply)
)
outer, told, ready = (partial(later, how) for how in (Honest.outer, Honest.told, Honest.ready))

MILLION = 1_000_000
WORK: dict[str, tuple[Make, str]] = {  # how it is made, and words of the reason for which it is refused
    # arrays
    "float64 for float32": (array(lambda a: a.astype(np.float64)), "is float64, agreed was"),
    "float16 for float32": (array(lambda a: a.astype(np.float16)), "is float16, agreed was"),
    "int32 for float32": (array(lambda a: a.astype(np.int32)), "is int32, agreed was"),
    "a NaN in the first array": (array(lambda a: put(a, np.nan)), "not finite"),
    "a NaN in the last array": (
        lambda h: h.array(lambda a: put(a, np.nan), list(h.payload.arrays)[-1]),
        "not finite",
    ),
    "only NaN": (arrays(lambda x: {n: np.full_like(a, np.nan) for n, a in x.items()}), "not finite"),
    "an infinity": (array(lambda a: put(a, np.inf)), "holds 1 values that are not finite"),
    "minus infinity": (array(lambda a: put(a, -np.inf)), "holds 1 values that are not finite"),
    "1e30": (array(lambda a: put(a, 1e30)), "holds 1e+30"),
    "-2e9": (array(lambda a: put(a, -2e9)), "holds 2e+09"),
    "a shape that broadcasts": (array(lambda a: a.reshape(-1)[:1]), "has shape (1,)"),
    "a shape of one in every dim": (
        array(lambda a: a.reshape(-1)[:1].reshape((1,) * (a.ndim + 1))),
        "has shape (1, 1",
    ),
    "one row more": (array(lambda a: np.concatenate([a, a[:1]])), "has shape"),
    "one row less": (array(lambda a: a[1:]), "has shape"),
    "another dim": (array(lambda a: a[..., None]), "has shape"),
    "doubled": (array(lambda a: np.concatenate([a, a], axis=-1)), "has shape"),
    "no dims": (array(lambda a: a.reshape(-1)[0]), "has shape ()"),
    "no values": (array(lambda a: a[:0]), "has shape (0"),
    "a million values": (array(lambda a: np.zeros(MILLION, a.dtype)), "has shape (1000000,)"),
    "an array more": (arrays(lambda a: {**a, "more": np.zeros(3)}), "differ from the agreed"),
    "an array missing": (arrays(lambda a: dict([*a.items()][1:])), "differ from the agreed"),
    "no arrays": (arrays(lambda a: {}), "arrays differ from the agreed: [] more"),
    "another name": (arrays(lambda a: {f"../{n}": v for n, v in a.items()}), "['../"),
    # scalars
    "no n": (scalars(n=None), "scalars differ from the agreed: [] more, ['n'] missing"),
    "a scalar more": (scalars(zeal=9), "['zeal'] more, [] missing"),
    "n = -69": (scalars(n=-69), "scalar 'n' is -69"),
    "n = 0": (scalars(n=0), "scalar 'n' is 0"),
    "n = 1e12": (scalars(n=10**12), "scalar 'n' is 1000000000000"),
    "n beyond its rows": (lambda h: h.scalars(n=h.rows + 1), "rows, the client has"),
    "n = 5.0": (scalars(n=5.0), "scalar 'n' is float"),
    "n = NaN": (scalars(n=float("nan")), "scalar 'n' is float"),
    "n = true": (scalars(n=True), "scalar 'n' is bool"),
    "n = '5'": (scalars(n="5"), "scalar 'n' is str"),
    "n = a book": (scalars(n="9" * MILLION), "scalar 'n' is str"),
    "loss = NaN": (scalars(loss=float("nan")), "scalar 'loss' is nan"),
    "loss = -infinity": (scalars(loss=float("-inf")), "scalar 'loss' is -inf"),
    "loss = 1e12": (scalars(loss=1e12), "scalar 'loss' is 1000000000000.0"),
    "loss = 1": (scalars(loss=1), "scalar 'loss' is int"),
    "loss = b'1'": (scalars(loss=b"1"), "scalar 'loss' is bytes"),
    # the reply's message; what else may be wrong in one: tests/hostile/test_hostile_messages.py
    "the round before": (lambda h: h.reply(h.body(round=h.order.round - 1)), "reply is for round 1"),
    "the round after": (lambda h: h.reply(h.body(round=h.order.round + 1)), "reply is for round 3"),
    "round -1": (lambda h: h.reply(h.body(round=-1)), "reply is for round -1"),
    "another base": (lambda h: h.reply(h.body(base=b"\xff" * 8)), "reply was made on base ffffffffffffffff"),
    "half a base": (lambda h: h.reply(h.body(base=h.base[:4])), "reply was made on base"),
    "no reply": (reply(b""), "not a Fleetune message (0 bytes"),
    "cut in half": (lambda h: h.reply(h.body()[: len(h.body()) // 2]), "is damaged"),
    "without its last byte": (lambda h: h.reply(h.body()[:-1]), "is damaged"),
    "a bit flipped": (lambda h: h.reply(flipped(h.body(), 20)), "is damaged"),
    "a zip file": (reply(b"PK\x03\x04" + bytes(99)), "starts with b'PK"),
    "a pickle": (reply(pickle.dumps({"n": 1})), "starts with b'\\x80"),
    "JSON": (reply(b'{"n": 5}'), "starts with b'{\"n'"),
    # the answer around it
    "an empty answer": (lambda h: b"", "could not be read"),
    "no answer": (lambda h: b"hello", "not a Fleetune message"),
    "an answer cut in half": (lambda h: h.reply()[: len(h.reply()) // 2], "is damaged"),
    "an answer with a bit flipped": (lambda h: flipped(h.reply(), 11), "is damaged"),
    "another nonce": (reply(nonce=bytes(16)), "belongs to another order"),
    "another device's nonce": (lambda h: h.reply(nonce=h.others.nonce), "belongs to another order"),
    "the answer of the round before": (
        lambda h: h.reply(nonce=h.earlier.nonce, round=h.earlier.round),
        "belongs to another order",
    ),
    "the right nonce, a later round": (
        lambda h: h.reply(round=h.order.round + 1),
        "belongs to another order",
    ),
    "a nonce of a megabyte": (outer(nonce=bytes(MILLION)), "nonce = "),
    "ready for work": (reply(what="ready"), "'work' was answered with 'ready'"),
    "failed for no reason": (outer(what="failed"), "the reason '' is none"),
    "failed, at length": (outer(what="failed", code="\x1b[2J" + "why " * 900), "at most 60"),
    "failed, in a book": (outer(what="failed", code="why " * MILLION), "exceeds max_str_len"),
    "refused": (outer(what="refused", code="fault"), "answered with 'refused'"),
    "an order": (lambda h: h.order.encode(), "a device's reason is a code"),
    "a word that is none": (outer(what="paid"), "what = 'paid'"),
    "a word that is a number": (outer(what=7), "what = 7"),
    "a body that is text": (outer(body="text"), "body = 'text'"),
    "a memory of a later round": (lambda h: h.outer(kept_round=h.order.round + 1), "to remember round 3"),
    "a memory of round -9": (outer(kept_round=-9), "kept.0 = -9"),
    "a checksum of 64 bits": (outer(kept_crc=1 << 63), "kept.1 = 9223372036854775808"),
    "a checksum that is text": (outer(kept_crc="5"), "kept.1 = 5"),
    "NaN seconds": (outer(seconds=float("nan")), "seconds = nan"),
    "-1 seconds": (outer(seconds=-1.0), "seconds = -1.0"),
    "infinite seconds": (outer(seconds=float("inf")), "seconds = inf"),
    "seconds that are text": (outer(seconds="soon"), "seconds = 'soon'"),
    "-1 bytes of memory": (outer(rss=-1), "rss = -1"),
    "real bytes of memory": (outer(rss=1.5), "rss = 1.5"),
    "a reason that is a number": (outer(code=5), "code = 5"),
}
JOB: dict[str, tuple[Make, str]] = {
    "done for the job": (ready(b"", "done"), "'job' was answered with 'done'"),
    "refused for no reason": (ready(b"", "refused"), "the reason '' is none"),
    "nothing": (ready(b""), "Invalid JSON"),
    "not UTF-8": (ready(b'{"rows": "\xff"}'), "Invalid JSON"),
    "100,000 lists": (ready(b"[" * 100_000), "Invalid JSON"),
    "a list": (ready(b"[]"), "not as agreed"),
    "2 MB of blanks": (ready(b" " * (2 << 20)), "2,097,152 characters"),
    "a field more": (told(more=1), "more = 1"),
    "a field less": (told(threads=None), "threads is missing"),
    "NaN rows": (told(rows=float("nan")), "rows = nan"),
    "true rows": (told(rows=True), "rows = True"),
    "rows as text": (told(rows="9"), "rows = 9"),
    "0 rows": (told(rows=0), "rows = 0: must be at least 1"),
    "-5 rows": (told(rows=-5), "rows = -5"),
    "1e12 rows": (told(rows=10**12), "rows = 1000000000000"),
    "other rows than before": (lambda h: h.told(rows=h.device.rows + 1), "it brought"),
    "a digest of a megabyte": (told(rows_digest="a" * MILLION), "rows_digest = "),
    "a digest that is none": (told(rows_digest="../../etc"), "rows_digest = "),
    "-1 bytes": (told(memory=-1), "memory = -1"),
    "2^70 threads": (told(threads=1 << 70), "threads = 1180591620717411303424"),
    "a version of a megabyte": (told(version="v" * MILLION), "version = "),
    "escapes in the version of torch": (told(torch="2.0\x1b[2J"), "torch = '2.0"),
    "a processor of a megabyte": (told(processor="v" * MILLION), "processor = "),
}
