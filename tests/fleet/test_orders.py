"""What a server orders and a device answers: it comes back as it was, and nothing else gets through."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune import errors
from fleetune.common.display import one_line
from fleetune.errors import MessageError
from fleetune.fleet import orders
from fleetune.fleet.orders import Declined, Device, DeviceReply, Job, Order, in_words, reason_of
from fleetune.tuning.exchange.messages import Payload, decode, encode
from fleetune.tuning.recipe import recipe as recipes

SET = {"K": 64, "lr": 1e-3, "clip": 0.0}
JOB = Job("a" * 32, "fedkseed", SET, "m", "b" * 64, "fp32", 64, ("yes", "no"), 3)
DEVICE = Device(50, "c" * 64, 1 << 33, 2, "0.1.0")
number = st.integers(0, 2**64 - 1)
small = st.integers(0, 2**31 - 1)
crc = st.integers(0, 2**32 - 1)


@given(
    st.sampled_from(["job", "work", "eval", "begin", "block", "end"]),
    small,
    small,
    number,
    st.binary(max_size=99),
    st.tuples(st.integers(-1, 2**31 - 1), crc),
    small,
    st.text(max_size=99).map(lambda text: one_line(text.encode("utf-8", "ignore").decode())),
)
def test_an_order_comes_back(what, round, client, key, body, kept, oldest, reason):
    order = Order(what, round, client, key, body, kept, oldest, reason)
    assert Order.decode(order.encode()) == order


@given(
    st.sampled_from(["ready", "done", "failed", "declined", "refused"]),
    st.sampled_from(["", "battery", "busy 75", "few-tokens 9000"]),
    st.binary(min_size=16, max_size=16),
    st.integers(3, 2**31 - 1),
    st.binary(max_size=99),
    st.floats(0, 1e6),
    st.integers(0, 2**40),
)
def test_an_answer_comes_back(what, code, nonce, round, body, seconds, rss):
    if what not in ("ready", "done"):
        code = code or "fault"
    reply = DeviceReply(what, nonce, round, body, (3, 7), seconds, rss, code)
    assert DeviceReply.decode(reply.encode()) == reply


def changed(whole: Order | DeviceReply, **parts: object) -> bytes:
    """Its message, with some of its parts changed or added."""
    message = decode(whole.encode())
    payload = Payload({}, {**message.payload.scalars, **parts})
    return encode(dataclasses.replace(message, payload=payload))


def test_orders_of_one_body_end_alike():
    one = Order("work", 1, 2, 3, b"the body")
    other = Order("work", 9, 400, 1 << 60, b"the body", (3, 4), 5, "why")
    assert one.encode()[-one.common :] == other.encode()[-other.common :]
    assert one.encode()[-one.common :].startswith(b"the body")


def test_no_two_orders_are_the_same():
    assert Order("work").encode() != Order("work").encode()


def test_an_order_is_no_answer_and_the_other_way_round():
    with pytest.raises(MessageError, match="a device's reason is a code"):
        DeviceReply.decode(Order("work").encode())
    with pytest.raises(MessageError, match="the order is not as agreed"):
        Order.decode(DeviceReply("done", bytes(16)).encode())


@pytest.mark.parametrize("name", ["client", "key", "body", "kept_round", "kept_crc", "oldest", "reason"])
@pytest.mark.parametrize("value", [1.5, True])
def test_an_order_with_a_part_of_another_type_is_refused(name, value):
    with pytest.raises(MessageError):
        Order.decode(changed(Order("work"), **{name: value}))


def test_a_job_comes_back():
    assert Job.from_json(JOB.to_json()) == JOB


MANY = {str(i): i for i in range(101)}
SETS = [[], MANY, {"K": [1]}, {"K": None}, {"../K": 1}, {"r": 1 << 63}, {"r": -(1 << 64)}]
ODD = {
    # some would lead a device out of its state folder, or fill its memory
    "run": [3, "x/../../victim", "a" * 300, "A" * 32, "a" * 31 + "\n", "a" * 32 + "\n"],
    "base": ["../" + "b" * 61],
    "result": ["b" * 63],
    "method": [None, "../fedit", "os.path", ""],
    "set": [*SETS, {"lr": "x" * 5000}],
    "rounds": [1.0, -1, 1 << 30],
    "max_length": ["9", True, 0, 1 << 63],
    "labels": ["yes", [1], ["a"] * 1001, ["a" * 201], [""]],
    "dtype": ["fp8"],
    "train": ["all"],
    "task": ["calibrated"],
    "model": ["m" * 1001],
    "secure": [{"clients": 4, "least": 3, "clip": 2.9e-316, "noise": 1.0}],  # a grid in denormal numbers
    "hidden": [{"epsilon": 8.0, "delta": 1e-5, "clip": 2.9e-316}],
    "format": [2],
    "more": [1],
}
LINES = {  # would write lines of their own on a device's console
    "model": ["tiny)\n  try: this", "a\u200fb", "a\u061cb\x1b[2J", "tiny" + "\u3164" * 40 + "error: this"],
    "set": [{"objective": "x:y\r"}],
    "labels": [["a\u2028b"], ["yes" + " \u200b" * 40 + "error: this"]],
}


@pytest.mark.parametrize(
    "change", [{name: value} for table in (ODD, LINES) for name, values in table.items() for value in values]
)
def test_a_job_of_another_form_or_size_is_refused(change):
    with pytest.raises(MessageError, match="the job is not as agreed"):
        Job.from_json(json.dumps(json.loads(JOB.to_json()) | change))


def test_a_job_may_have_any_letters_of_a_line():
    job = dataclasses.replace(JOB, model="modèle 模型", labels=("می\u200cخواهم", "👩\u200d🔬"))
    assert Job.from_json(job.to_json()) == job
    recipe = recipes.make({"model": "tiny", "data": "rows.jsonl", "method": "mezo"})
    with pytest.raises(MessageError, match=r"model = .* it is no printable line"):
        orders.job_of(recipe, JOB.run, JOB.base, model="a\nb")


@pytest.mark.parametrize("set_", ['{"lr": NaN}', '{"lr": 1e999}', '{"K": 1' + "0" * 5000 + "}"])
def test_a_setting_that_is_no_number_is_refused(set_):
    text = JOB.to_json().replace(json.dumps(JOB.set), set_)
    assert set_ in text
    with pytest.raises(MessageError):
        Job.from_json(text)


CODES = ["", "busy", "busy 75 80", "busy -1", "busy x", "busy  75", "busy 9" + "0" * 20, "rows 12", "Rows"]


@pytest.mark.parametrize("reason", [*CODES, "HIV positive since 2019"])
def test_a_reason_is_a_code_with_its_numbers_and_nothing_else(reason):
    whole = DeviceReply("failed", bytes(16), code="fault")
    with pytest.raises(MessageError, match="is none that a device can have"):
        DeviceReply.decode(changed(whole, code=reason))
    with pytest.raises(MessageError, match="a device's reason is a code"):
        DeviceReply.decode(changed(whole, code=reason, reason="words"))


def test_every_error_of_ours_has_a_code_of_the_list():
    told = {
        errors.DataError("'HIV positive' is not one of the words"): "rows",
        errors.ModelError("m"): "model",
        errors.FitError("f"): "memory 5",
        errors.StorageError("s"): "storage",
        MessageError("m"): "order",
        errors.LedgerError("l"): "order",
        errors.UsageError("u"): "settings",
        errors.FleetError("f"): "fault",
        ValueError("v"): "fault",
        MemoryError(): "memory 5",
        Declined("busy", 75): "busy 75",
    }
    assert {error: reason_of(error, 5 << 20) for error in told} == told
    assert in_words("busy 75") == "other programs take 75 % of its processors" == Declined("busy", 75).message
    assert all(in_words(" ".join([code, *["7"] * words.count("{}")])) for code, words in orders.WORDS.items())


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "[" * 100_000, "{}"])
def test_what_is_no_job_is_refused(text):
    with pytest.raises(MessageError):
        Job.from_json(text)
    with pytest.raises(MessageError):
        Device.from_json(text.encode())


def test_a_device_comes_back_and_its_claim_of_rows_is_bounded():
    assert Device.from_json(DEVICE.to_json()) == DEVICE
    able = dataclasses.replace(DEVICE, speed=41.5, kinds=(0, 2))
    assert Device.from_json(able.to_json()) == able
    whole = json.loads(DEVICE.to_json())
    for name, odd in (
        *(("rows", rows) for rows in (0, -1, 1 << 22, 1 << 70, True, 1.0, "9")),
        *(("speed", speed) for speed in (-1.0, float("nan"), float("inf"), 1.7e308, "3")),
        *(("processor", words) for words in ("x86_64; dev-1 is revoked", "x86 ", 65 * "x")),
        *(("torch", words) for words in ("2.13\n", "2.13" + 20 * " " + "round 9")),
        *(("kinds", kinds) for kinds in ([], [True], ["0"], [0] * 1001, 0)),
        ("version", " 1"),
    ):
        with pytest.raises(MessageError, match=name):
            Device.from_json(json.dumps(whole | {name: odd}).encode())
