"""Hostile messages: what costs the server time or memory, and what would go into its records."""

import random
import time
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hostile
from fleetune.errors import REASON, MessageError, cut_reason
from fleetune.fleet.orders import Order
from fleetune.tuning.exchange import messages
from fleetune.tuning.exchange.messages import MAX_DIMS, Message, Payload, ReplySpec, check, decode, encode

BASE = bytes(8)
MANY = 200_000
SPEC = ReplySpec({"a": ("float32", (4, 2))}, {"n": (int, 0, 9)})
HONEST = Message(1, BASE, Payload({"a": np.zeros((4, 2), np.float32)}, {"n": 3}))


def wrap(body: bytes) -> bytes:
    return messages.MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def packed(scalars: Any, arrays: Any = None) -> bytes:
    return wrap(msgpack.packb([1, BASE, scalars, arrays or {}]))


def shaped(shape: Any, raw: bytes = b"") -> bytes:
    return packed({}, {"a": [9, shape, raw]})


def twice(kind: str) -> bytes:
    """A map that MessagePack writes but Python cannot hold: the name "a" two times."""
    value = msgpack.packb([0, [1], b"x"]) if kind == "arrays" else b"\x01"
    pair = b"\xa1a" + value
    maps = [b"\x80", b"\x80"]
    maps[kind == "arrays"] = b"\x82" + pair + pair
    return wrap(b"\x94\x01\xc4\x08" + BASE + b"".join(maps))


CASES: dict[str, tuple[str, Callable[[], bytes]]] = {  # what is said of it, and how it is made
    "1,600,000 dims (14 MB)": ("1600000 exceeds max_array_len", lambda: shaped([2**63 - 1] * 1_600_000)),
    "a dim beyond memory, and none": ("for 0 bytes", lambda: shaped([2**64 - 1, 0])),
    "more dims than agreed": ("exceeds max_array_len", lambda: shaped([1] * (MAX_DIMS + 1), bytes(4))),
    "a shape that is a map": ("more maps or lists than a message", lambda: shaped({"a": 1})),
    "a negative dim": ("has shape [-1]", lambda: shaped([-1], bytes(4))),
    "200,000 names": ("200000 exceeds max_map_len", lambda: packed({f"n{i}": 0 for i in range(MANY)})),
    "a name of 14 MB": ("exceeds max_str_len", lambda: packed({"n" * 14_000_000: 0})),
    "a name of 1 MB": ("not text of at most", lambda: packed({"n" * 1_000_000: 0})),
    "a name that is a number": ("int is not allowed", lambda: packed({5: 0})),
    "a name twice among the scalars": ("a name is there twice", lambda: twice("scalars")),
    "a name twice among the arrays": ("a name is there twice", lambda: twice("arrays")),
    "a list as a scalar": ("scalar 'n' has type list", lambda: packed({"n": [1]})),
    "a map as a scalar": ("more maps or lists than a message", lambda: packed({"n": {"m": 1}})),
    "nothing as a scalar": ("scalar 'n' has type NoneType", lambda: packed({"n": None})),
    "an extension": ("exceeds max_ext_len", lambda: packed({"n": msgpack.ExtType(5, b"x")})),
    "100,000 brackets": ("is malformed", lambda: wrap(b"\x91" * 100_000)),
    "a list that claims 4 GB": ("exceeds max_array_len", lambda: wrap(b"\xdd\xff\xff\xff\xff")),
    "a map that claims 4 GB": ("exceeds max_map_len", lambda: wrap(b"\xdf\xff\xff\xff\xff")),
    "bytes that claim 4 GB": ("is malformed", lambda: wrap(b"\x94\x01\xc6\xff\xff\xff\xff")),
    "nothing": ("is malformed", lambda: wrap(b"")),
    "five parts": ("too many values", lambda: wrap(msgpack.packb([1, BASE, {}, {}, 0]))),
    "a round that is text": ("wrong types", lambda: wrap(msgpack.packb(["1", BASE, {}, {}]))),
    "a round that is a truth": ("wrong types", lambda: wrap(msgpack.packb([True, BASE, {}, {}]))),
    "a base that is text": ("wrong types", lambda: wrap(msgpack.packb([1, "", {}, {}]))),
    "scalars that are a list": ("wrong types", lambda: packed([])),
    "arrays that are pairs": ("wrong types", lambda: packed({}, [["a", [9, [1], bytes(4)]]])),
    "an array of two parts": ("not enough values", lambda: packed({}, {"a": [9, [1]]})),
    "a type that is a truth": ("unknown type", lambda: packed({}, {"a": [True, [4], bytes(4)]})),
    "a type that is negative": ("unknown type", lambda: packed({}, {"a": [-1, [1], bytes(4)]})),
    "another type": ("unknown type", lambda: packed({}, {"a": [99, [1], b"x"]})),
    "values that are text": ("unknown type", lambda: packed({}, {"a": [9, [1], "abcd"]})),
    "too few values": ("came with 4 bytes", lambda: shaped([2], bytes(4))),
    "too many values": ("came with 4 bytes", lambda: shaped([0], bytes(4))),
    "a product that wraps": ("for 4 bytes", lambda: shaped([2**32, 2**32], bytes(4))),
    "text that is not UTF-8": ("decode byte 0xff", lambda: wrap(b"\x94\x01\xc4\x00\x81\xa1\xff\x01\x80")),
    "two messages": ("extra data", lambda: wrap(msgpack.packb([1, BASE, {}, {}]) * 2)),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_hostile_message_is_refused_at_once_and_shortly(case):
    reason, make = CASES[case]
    message = make()
    tracemalloc.start()
    began = time.process_time()
    said = hostile.refusal(lambda: decode(message), seconds=5)
    seconds, memory = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said is not None
    assert reason in said
    assert len(said) <= REASON
    assert memory < 3_000_000 + 3 * len(message)
    assert seconds < 0.5, f"{case}: {seconds:.2f} s for {len(message):,} bytes"


def test_a_reason_is_short_and_printable_whatever_the_names_are():
    names = {f"\x1b[2J\n{'x' * 400}{i}": 1 for i in range(5_000)}
    reply = decode(packed(names))
    with pytest.raises(MessageError) as caught:
        check(reply, ReplySpec({}, SPEC.scalars), round=1, base=BASE)
    assert len(str(caught.value)) <= REASON
    assert str(caught.value).isprintable()
    assert "x" * 200 in str(caught.value)  # there was something to cut


@given(st.text(st.characters() | st.sampled_from("\u3164\u2800\u115f\u034f\uffa0\u17b4 \n")))
def test_a_reason_can_stand_in_an_order_whatever_the_text_is(text):
    kept = cut_reason(text)
    assert Order("end", reason=kept).reason == kept
    assert len(kept) <= REASON


def test_a_reason_is_cut_where_it_is_long():
    assert cut_reason("as it is") == "as it is"
    assert cut_reason("a\n\tb\x07") == "a b?"
    assert cut_reason("x" * REASON) == "x" * REASON
    assert cut_reason("x" * (REASON + 1)) == "x" * (REASON - 3) + "..."
    assert len(cut_reason(" " * 10_000 + "x" * 10_000)) <= REASON


def test_the_honest_message_passes():
    assert hostile.refusal(lambda: check(decode(encode(HONEST)), SPEC, round=1, base=BASE)) is None
    wide = Message(1, BASE, Payload({"a": np.zeros((1,) * MAX_DIMS)}, {}))
    assert decode(encode(wide)).payload.arrays["a"].shape == (1,) * MAX_DIMS
    none = Message(1, BASE, Payload({"a": np.zeros((5, 0, 3), np.int8)}, {}))
    assert decode(encode(none)).payload.arrays["a"].shape == (5, 0, 3)


def storm(count: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    body = encode(HONEST)[7:]
    counts = {"refused": 0, "accepted": 0}
    for _ in range(count):
        message = wrap(hostile.mutated(rng, body))
        said = hostile.refusal(lambda m=message: check(decode(m), SPEC, round=1, base=BASE), seconds=5)  # type: ignore[misc]
        counts["refused" if said else "accepted"] += 1
    print(f"messages: {counts}")
    return counts


def test_mutated_messages_are_refused_or_within_what_was_agreed():
    assert storm(600, seed=11)["refused"] > 300


@pytest.mark.faults
def test_a_storm_of_mutated_messages(injected):
    counts = storm(100_000, seed=12)
    injected("mutated messages", sum(counts.values()))
    assert counts["refused"] > 50_000
