# SPDX-License-Identifier: Apache-2.0
"""What a server orders and a device answers: it comes back as it was, and nothing else gets through."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.errors import MessageError
from fleetune.fleet.orders import ANSWERS, ORDERS, Device, Job, Order, Reply
from fleetune.tuning.messages import Message, Payload, encode

JOB = Job(
    "a" * 32, "fedkseed", {"K": 64, "lr": 1e-3, "pro": False}, "m", "b" * 64, "fp32", 64, ("yes", "no"), 3
)
DEVICE = Device(50, "c" * 64, 1 << 33, 2, "0.1.0")
number = st.integers(0, 2**64 - 1)
small = st.integers(-1, 2**31)


@given(
    st.sampled_from(ORDERS),
    small,
    small,
    number,
    st.binary(max_size=99),
    st.tuples(small, small),
    small,
    st.text(),
)
def test_an_order_comes_back(what, round, client, key, body, kept, oldest, reason):
    order = Order(what, round, client, key, body, kept, oldest, reason.encode("utf-8", "ignore").decode())
    assert Order.decode(order.encode()) == order


@given(
    st.sampled_from(ANSWERS),
    st.binary(min_size=16, max_size=16),
    st.integers(3, 2**31),
    st.binary(max_size=99),
    st.floats(0, 1e6),
    st.integers(0, 2**40),
)
def test_an_answer_comes_back(what, nonce, round, body, seconds, rss):
    reply = Reply(what, nonce, round, body, (3, 7), seconds, rss, "a reason")
    assert Reply.decode(reply.encode()) == reply


def test_orders_of_one_body_end_alike():
    one, other = (
        Order("work", 1, 2, 3, b"the body"),
        Order("work", 9, 400, 1 << 60, b"the body", (3, 4), 5, "why"),
    )
    assert one.encode()[-one.common :] == other.encode()[-other.common :]
    assert one.encode()[-one.common :].startswith(b"the body")


def test_no_two_orders_are_the_same():
    assert Order("work").encode() != Order("work").encode()


def test_an_order_is_no_answer_and_the_other_way_round():
    with pytest.raises(MessageError, match="'work' is none of"):
        Reply.decode(Order("work").encode())
    with pytest.raises(MessageError, match="'done' is none of"):
        Order.decode(Reply("done", bytes(16)).encode())


@pytest.mark.parametrize("name", ["client", "key", "body", "kept_round", "kept_crc", "oldest", "reason"])
@pytest.mark.parametrize("value", [None, 1.5, [1]])
def test_an_order_with_a_part_of_another_type_is_refused(name, value):
    whole = {
        "what": "work",
        "client": 0,
        "key": 0,
        "body": b"",
        "kept_round": 0,
        "kept_crc": 0,
        "oldest": 0,
        "reason": "",
    }
    if value is None:
        del whole[name]
    elif value == [1]:
        whole[name] = True
    else:
        whole[name] = value
    with pytest.raises(MessageError):
        Order.decode(encode(Message(0, bytes(16), Payload({}, whole))))


def test_a_mutated_answer_is_refused_or_another_answer():
    """Ten thousand mutated bodies with a good checksum: each is refused with a MessageError, or decodes."""
    rng, refused = random.Random(7), 0
    whole = Reply("done", bytes(16), 3, b"x" * 40, (2, 9), 1.0, 5, "").encode()
    for _ in range(10_000):
        body = bytearray(whole[7:])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(body))
            match rng.randrange(3):
                case 0:
                    body[at] = rng.randrange(256)
                case 1:
                    del body[at : at + rng.randint(1, 9)]
                case 2:
                    body[at:at] = rng.randbytes(rng.randint(1, 9))
        import zlib

        data = whole[:3] + zlib.crc32(bytes(body)).to_bytes(4, "little") + bytes(body)
        try:
            Reply.decode(data)
        except MessageError:
            refused += 1
    assert refused > 8_000


def test_a_job_comes_back():
    assert Job.from_json(JOB.to_json()) == JOB


@pytest.mark.parametrize(
    "change",
    [
        {"run": 3}, {"set": []}, {"set": {"K": [1]}}, {"set": {"K": None}}, {"labels": "yes"}, {"labels": [1]},
        {"max_length": "9"}, {"max_length": True}, {"format": 2}, {"more": 1}, {"method": None}, {"rounds": 1.0},
    ],
)  # fmt: skip
def test_a_job_of_another_form_is_refused(change):
    with pytest.raises(MessageError):
        Job.from_json(json.dumps(json.loads(JOB.to_json()) | change))


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "[" * 100_000, "{}"])
def test_what_is_no_job_is_refused(text):
    with pytest.raises(MessageError):
        Job.from_json(text)
    with pytest.raises(MessageError):
        Device.from_json(text.encode())


def test_a_device_comes_back_and_its_claim_of_rows_is_bounded():
    assert Device.from_json(DEVICE.to_json()) == DEVICE
    for rows in (0, -1, 1 << 31, 1 << 70):
        with pytest.raises(MessageError, match="rows"):
            Device.from_json(dataclasses.replace(DEVICE, rows=rows).to_json())
    able = dataclasses.replace(DEVICE, speed=41.5, kinds=(0, 2))
    assert Device.from_json(able.to_json()) == able
    whole = json.loads(DEVICE.to_json())
    for name, odd in (("speed", -1.0), ("speed", float("nan")), ("speed", float("inf")), ("kinds", []), ("kinds", [True]),
                      ("kinds", ["0"]), ("kinds", [0] * 1001), ("kinds", 0), ("speed", 3)):  # fmt: skip
        with pytest.raises(MessageError):
            Device.from_json(json.dumps(whole | {name: odd}).encode())
    for odd in (True, 1.0, "9"):
        with pytest.raises(MessageError, match="fields"):
            Device.from_json(json.dumps(json.loads(DEVICE.to_json()) | {"rows": odd}).encode())
