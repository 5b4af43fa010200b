"""Malformed answers of a device, by name: how each is made of an honest one, and what the server says of it.

They are made for any method: `Honest.payload` is its reply.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import numpy as np

from fleetune.fleet.orders import Device, Order, Reply
from fleetune.tuning.exchange.messages import MAGIC, Message, Payload, encode


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
        whole = Reply(
            "done", self.order.nonce, self.order.round, self.body() if body is None else body, (-1, 0), 0.1, 9
        )
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

    def packed(self, scalars: Any = None, arrays: Any = None) -> bytes:
        """Return the answer with parts that the codec itself would not write."""
        parts = [self.order.round, self.base, scalars or {}, arrays or {}]
        return self.reply(sealed(msgpack.packb(parts)))

    def outer(self, **changes: Any) -> bytes:
        """Return an answer of which a part is of another kind or size, though its checksum is right."""
        scalars = {
            "what": "done",
            "body": self.body(),
            "kept_round": -1,
            "kept_crc": 0,
            "seconds": 0.1,
            "rss": 9,
            "code": "",
        }
        round, nonce = changes.pop("round", self.order.round), changes.pop("nonce", self.order.nonce)
        return encode(Message(round, nonce, Payload({}, {**scalars, **changes})))

    def told(self, **changes: Any) -> bytes:
        """Return what the device says of itself when it gets the job, with some of it changed; None takes it away."""
        known = {**dataclasses.asdict(self.device), **changes}
        return self.ready(json.dumps({n: v for n, v in known.items() if v is not None}).encode())

    def ready(self, body: bytes, what: str = "ready") -> bytes:
        """Return an answer to the job."""
        return self.outer(what=what, body=body)


def sealed(body: bytes) -> bytes:
    """Return a message with a good checksum, whatever its body is."""
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def put(array: np.ndarray, value: float) -> np.ndarray:
    """Return the array with another last value; it is of real numbers then."""
    real = array if array.dtype.kind == "f" else array.astype(np.float32)
    real.reshape(-1)[-1] = value
    return real


def twice(h: Honest, place: int) -> bytes:
    """A map in which one name is there two times: of scalars (2) or arrays (3)."""
    pair = b"\xa1a" + (b"\x01" if place == 2 else msgpack.packb([0, [1], b"x"]))
    maps = [b"\x80", b"\x80"]
    maps[place - 2] = b"\x82" + pair + pair
    return h.reply(sealed(b"\x94" + msgpack.packb(h.order.round) + msgpack.packb(h.base) + b"".join(maps)))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


class Case(NamedTuple):
    """How an answer is made, and words of the reason for which it is refused."""

    make: Callable[[Honest], bytes]
    reason: str


MILLION = 1_000_000
WORK: dict[str, Case] = {
    # arrays
    "float64 for float32": Case(lambda h: h.array(lambda a: a.astype(np.float64)), "is float64, agreed was"),
    "float16 for float32": Case(lambda h: h.array(lambda a: a.astype(np.float16)), "is float16, agreed was"),
    "int32 for float32": Case(lambda h: h.array(lambda a: a.astype(np.int32)), "is int32, agreed was"),
    "a NaN in the first array": Case(lambda h: h.array(lambda a: put(a, np.nan)), "not finite"),
    "a NaN in the last array": Case(
        lambda h: h.array(lambda a: put(a, np.nan), list(h.payload.arrays)[-1]), "not finite"
    ),
    "only NaN": Case(
        lambda h: h.arrays(lambda x: {n: np.full_like(a, np.nan) for n, a in x.items()}), "not finite"
    ),
    "an infinity": Case(lambda h: h.array(lambda a: put(a, np.inf)), "holds 1 values that are not finite"),
    "minus infinity": Case(
        lambda h: h.array(lambda a: put(a, -np.inf)), "holds 1 values that are not finite"
    ),
    "1e30": Case(lambda h: h.array(lambda a: put(a, 1e30)), "holds 1e+30"),
    "-2e9": Case(lambda h: h.array(lambda a: put(a, -2e9)), "holds 2e+09"),
    "a shape that broadcasts": Case(lambda h: h.array(lambda a: a.reshape(-1)[:1]), "has shape (1,)"),
    "a shape of one in every dim": Case(
        lambda h: h.array(lambda a: a.reshape(-1)[:1].reshape((1,) * (a.ndim + 1))), "has shape (1, 1"
    ),
    "one row more": Case(lambda h: h.array(lambda a: np.concatenate([a, a[:1]])), "has shape"),
    "one row less": Case(lambda h: h.array(lambda a: a[1:]), "has shape"),
    "another dim": Case(lambda h: h.array(lambda a: a[..., None]), "has shape"),
    "doubled": Case(lambda h: h.array(lambda a: np.concatenate([a, a], axis=-1)), "has shape"),
    "no dims": Case(lambda h: h.array(lambda a: a.reshape(-1)[0]), "has shape ()"),
    "no values": Case(lambda h: h.array(lambda a: a[:0]), "has shape (0"),
    "a million values": Case(lambda h: h.array(lambda a: np.zeros(MILLION, a.dtype)), "has shape (1000000,)"),
    "an array more": Case(lambda h: h.arrays(lambda a: {**a, "more": np.zeros(3)}), "differ from the agreed"),
    "an array missing": Case(
        lambda h: h.arrays(lambda a: {n: v for n, v in a.items() if n != h.first}), "differ from the agreed"
    ),
    "no arrays": Case(lambda h: h.arrays(lambda a: {}), "arrays differ from the agreed: [] more"),
    "another name": Case(
        lambda h: h.arrays(lambda a: {("../" + n if n == h.first else n): v for n, v in a.items()}), "['../"
    ),
    # scalars
    "no n": Case(lambda h: h.scalars(n=None), "scalars differ from the agreed: [] more, ['n'] missing"),
    "a scalar more": Case(lambda h: h.scalars(zeal=9), "['zeal'] more, [] missing"),
    "n = -69": Case(lambda h: h.scalars(n=-69), "scalar 'n' is -69"),
    "n = 0": Case(lambda h: h.scalars(n=0), "scalar 'n' is 0"),
    "n = 1e12": Case(lambda h: h.scalars(n=10**12), "scalar 'n' is 1000000000000"),
    "n beyond its rows": Case(lambda h: h.scalars(n=h.rows + 1), "rows, the client has"),
    "n = 5.0": Case(lambda h: h.scalars(n=5.0), "scalar 'n' is float"),
    "n = NaN": Case(lambda h: h.scalars(n=float("nan")), "scalar 'n' is float"),
    "n = true": Case(lambda h: h.scalars(n=True), "scalar 'n' is bool"),
    "n = '5'": Case(lambda h: h.scalars(n="5"), "scalar 'n' is str"),
    "n = a book": Case(lambda h: h.scalars(n="9" * MILLION), "scalar 'n' is str"),
    "loss = NaN": Case(lambda h: h.scalars(loss=float("nan")), "scalar 'loss' is nan"),
    "loss = -infinity": Case(lambda h: h.scalars(loss=float("-inf")), "scalar 'loss' is -inf"),
    "loss = 1e12": Case(lambda h: h.scalars(loss=1e12), "scalar 'loss' is 1000000000000.0"),
    "loss = 1": Case(lambda h: h.scalars(loss=1), "scalar 'loss' is int"),
    "loss = b'1'": Case(lambda h: h.scalars(loss=b"1"), "scalar 'loss' is bytes"),
    # the reply's message
    "the round before": Case(lambda h: h.reply(h.body(round=h.order.round - 1)), "reply is for round 1"),
    "the round after": Case(lambda h: h.reply(h.body(round=h.order.round + 1)), "reply is for round 3"),
    "round -1": Case(lambda h: h.reply(h.body(round=-1)), "reply is for round -1"),
    "another base": Case(
        lambda h: h.reply(h.body(base=b"\xff" * 8)), "reply was made on base ffffffffffffffff"
    ),
    "half a base": Case(lambda h: h.reply(h.body(base=h.base[:4])), "reply was made on base"),
    "no reply": Case(lambda h: h.reply(b""), "not a Fleetune message (0 bytes"),
    "cut in half": Case(lambda h: h.reply(h.body()[: len(h.body()) // 2]), "is damaged"),
    "without its last byte": Case(lambda h: h.reply(h.body()[:-1]), "is damaged"),
    "a bit flipped": Case(lambda h: h.reply(flipped(h.body(), 20)), "is damaged"),
    "two replies": Case(lambda h: h.reply(sealed(h.body()[7:] * 2)), "is malformed"),
    "a zip file": Case(lambda h: h.reply(b"PK\x03\x04" + bytes(99)), "starts with b'PK"),
    "a pickle": Case(lambda h: h.reply(pickle.dumps({"n": 1})), "starts with b'\\x80"),
    "JSON": Case(lambda h: h.reply(b'{"n": 5}'), "starts with b'{\"n'"),
    "a scalar's name twice": Case(lambda h: twice(h, 2), "a name is there twice"),
    "an array's name twice": Case(lambda h: twice(h, 3), "a name is there twice"),
    "a list for a scalar": Case(lambda h: h.packed({"n": [1]}), "scalar 'n' has type list"),
    "a map for a scalar": Case(lambda h: h.packed({"n": {"m": 1}}), "more maps or lists than a message"),
    "nothing for a scalar": Case(lambda h: h.packed({"n": None}), "scalar 'n' has type NoneType"),
    "100,000 lists in each other": Case(lambda h: h.reply(sealed(b"\x91" * 100_000)), "is malformed"),
    "a million entries": Case(
        lambda h: h.reply(
            sealed(b"\x94\x02\xc4\x00\xdf" + MILLION.to_bytes(4, "big") + b"\xa1a\x01" * MILLION)
        ),
        "1000000 exceeds max_map_len",
    ),
    "a list that claims 4 billion": Case(
        lambda h: h.reply(sealed(b"\x94\x02\xc4\x00\x80\xdd\xff\xff\xff\xff")), "exceeds max_array_len"
    ),
    "bytes that claim 4 GB": Case(lambda h: h.reply(sealed(b"\x94\x02\xc6\xff\xff\xff\xff")), "is malformed"),
    "an array that claims 2^60 values": Case(
        lambda h: h.packed(arrays={"a": [9, [1 << 60], b"x"]}), "for 1 bytes"
    ),
    "an array of nothing, 2^62 wide": Case(
        lambda h: h.packed(arrays={"a": [9, [1 << 62, 0], b""]}), "for 0 bytes"
    ),
    "a negative dim": Case(lambda h: h.packed(arrays={"a": [9, [-1], bytes(4)]}), "has shape [-1]"),
    "a type that is none": Case(lambda h: h.packed(arrays={"a": [99, [1], b"x"]}), "has an unknown type"),
    "a name of a megabyte": Case(lambda h: h.packed({"n" * MILLION: 1}), "not text of at most"),
    "a name that is a number": Case(lambda h: h.packed({7: 1}), "is malformed"),
    "a name that is not UTF-8": Case(
        lambda h: h.reply(sealed(b"\x94\x02\xc4\x00\x81\xa2\xff\xfe\x01\x80")), "can't decode byte 0xff"
    ),
    "an extension": Case(lambda h: h.packed({"n": msgpack.ExtType(5, b"x")}), "exceeds max_ext_len"),
    # the answer around it
    "an empty answer": Case(lambda h: b"", "could not be read"),
    "no answer": Case(lambda h: b"hello", "not a Fleetune message"),
    "an answer cut in half": Case(lambda h: h.reply()[: len(h.reply()) // 2], "is damaged"),
    "an answer with a bit flipped": Case(lambda h: flipped(h.reply(), 11), "is damaged"),
    "another nonce": Case(lambda h: h.reply(nonce=bytes(16)), "belongs to another order"),
    "another device's nonce": Case(lambda h: h.reply(nonce=h.others.nonce), "belongs to another order"),
    "the answer of the round before": Case(
        lambda h: h.reply(nonce=h.earlier.nonce, round=h.earlier.round), "belongs to another order"
    ),
    "the right nonce, another round": Case(
        lambda h: h.reply(round=h.order.round + 1), "belongs to another order"
    ),
    "a nonce of a megabyte": Case(lambda h: h.outer(nonce=bytes(MILLION)), "nonce = "),
    "ready for work": Case(lambda h: h.reply(what="ready"), "'work' was answered with 'ready'"),
    "failed for no reason": Case(lambda h: h.outer(what="failed"), "the reason '' is none"),
    "failed, at length": Case(lambda h: h.outer(what="failed", code="\x1b[2J" + "why " * 900), "at most 60"),
    "failed, in a book": Case(lambda h: h.outer(what="failed", code="why " * MILLION), "exceeds max_str_len"),
    "refused": Case(lambda h: h.outer(what="refused", code="fault"), "answered with 'refused'"),
    "an order": Case(
        lambda h: Order("work", h.order.round, nonce=h.order.nonce).encode(), "a device's reason is a code"
    ),
    "a word that is none": Case(lambda h: h.outer(what="paid"), "what = 'paid'"),
    "a word that is a number": Case(lambda h: h.outer(what=7), "what = 7"),
    "a body that is text": Case(lambda h: h.outer(body="text"), "body = 'text'"),
    "a memory of a later round": Case(lambda h: h.outer(kept_round=h.order.round + 1), "to remember round 3"),
    "a memory of round -9": Case(lambda h: h.outer(kept_round=-9), "kept.0 = -9"),
    "a checksum of 64 bits": Case(lambda h: h.outer(kept_crc=1 << 63), "kept.1 = 9223372036854775808"),
    "a checksum that is text": Case(lambda h: h.outer(kept_crc="5"), "kept.1 = 5"),
    "NaN seconds": Case(lambda h: h.outer(seconds=float("nan")), "seconds = nan"),
    "-1 seconds": Case(lambda h: h.outer(seconds=-1.0), "seconds = -1.0"),
    "infinite seconds": Case(lambda h: h.outer(seconds=float("inf")), "seconds = inf"),
    "seconds that are text": Case(lambda h: h.outer(seconds="soon"), "seconds = 'soon'"),
    "-1 bytes of memory": Case(lambda h: h.outer(rss=-1), "rss = -1"),
    "real bytes of memory": Case(lambda h: h.outer(rss=1.5), "rss = 1.5"),
    "a reason that is a number": Case(lambda h: h.outer(code=5), "code = 5"),
}
JOB: dict[str, Case] = {
    "done for the job": Case(lambda h: h.ready(b"", "done"), "'job' was answered with 'done'"),
    "refused for no reason": Case(lambda h: h.ready(b"", "refused"), "the reason '' is none"),
    "nothing": Case(lambda h: h.ready(b""), "Invalid JSON"),
    "not UTF-8": Case(lambda h: h.ready(b'{"rows": "\xff"}'), "Invalid JSON"),
    "100,000 lists": Case(lambda h: h.ready(b"[" * 100_000), "Invalid JSON"),
    "a list": Case(lambda h: h.ready(b"[]"), "not as agreed"),
    "2 MB of blanks": Case(lambda h: h.ready(b" " * (2 << 20)), "2,097,152 characters"),
    "a field more": Case(lambda h: h.told(more=1), "more = 1"),
    "a field less": Case(lambda h: h.told(threads=None), "threads is missing"),
    "NaN rows": Case(lambda h: h.told(rows=float("nan")), "rows = nan"),
    "true rows": Case(lambda h: h.told(rows=True), "rows = True"),
    "rows as text": Case(lambda h: h.told(rows="9"), "rows = 9"),
    "0 rows": Case(lambda h: h.told(rows=0), "rows = 0: must be at least 1"),
    "-5 rows": Case(lambda h: h.told(rows=-5), "rows = -5"),
    "1e12 rows": Case(lambda h: h.told(rows=10**12), "rows = 1000000000000"),
    "other rows than before": Case(lambda h: h.told(rows=h.device.rows + 1), "it brought"),
    "a digest of a megabyte": Case(lambda h: h.told(rows_digest="a" * MILLION), "rows_digest = "),
    "a digest that is none": Case(lambda h: h.told(rows_digest="../../etc"), "rows_digest = "),
    "-1 bytes": Case(lambda h: h.told(memory=-1), "memory = -1"),
    "2^70 threads": Case(lambda h: h.told(threads=1 << 70), "threads = 1180591620717411303424"),
    "a version of a megabyte": Case(lambda h: h.told(version="v" * MILLION), "version = "),
    "escapes in the version of torch": Case(lambda h: h.told(torch="2.0\x1b[2J"), "torch = '2.0"),
    "a processor of a megabyte": Case(lambda h: h.told(processor="v" * MILLION), "processor = "),
}
