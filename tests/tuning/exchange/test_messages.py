"""The codec: exact bytes, every damage noticed, hostile bodies harmless; the door; the one-byte code."""

import hashlib
import zlib
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from hypothesis.extra.numpy import array_shapes

from fleetune.errors import MessageError
from fleetune.tuning.exchange import messages
from fleetune.tuning.exchange.messages import LogCode, Message, Payload, add_signs, check, decode, encode

BASE = bytes(range(8))
SMALL = Message(3, BASE, Payload({"c": np.array([1, -2], np.int8)}, {"n": 5, "loss": 0.5}))

SMALL_BODY = bytes.fromhex(
    "94 03 c408 0001020304050607 82 a16e05 a46c6f7373 cb3fe0000000000000 81 a163 93 01 9102 c402 01fe"
)


def assert_same(left: Message, right: Message) -> None:
    assert (left.round, left.base) == (right.round, right.base)
    a, b = left.payload, right.payload
    assert list(a.arrays) == list(b.arrays)
    assert list(a.scalars) == list(b.scalars)
    for name, value in a.scalars.items():
        other = b.scalars[name]
        assert type(value) is type(other)
        assert value == other or (value != value and other != other)
    for name, array in a.arrays.items():
        other = b.arrays[name]
        assert other.dtype == array.dtype.newbyteorder("=")
        assert other.dtype.isnative
        assert other.shape == array.shape
        assert other.tobytes() == array.astype(other.dtype).tobytes()  # NaN payloads and -0 included


scalars = st.one_of(
    st.integers(-(2**63), 2**64 - 1), st.floats(), st.booleans(), st.text(max_size=8), st.binary(max_size=8)
)
sides = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
kinds = st.sampled_from([np.dtype(kind).newbyteorder(order) for kind in messages.DTYPES for order in "=>"])
arrays = kinds.flatmap(lambda kind: hnp.arrays(kind, sides))
names = st.text(max_size=6)
payloads = st.builds(
    Payload, st.dictionaries(names, arrays, max_size=3), st.dictionaries(names, scalars, max_size=4)
)
built = st.builds(Message, st.integers(-(2**63), 2**64 - 1), st.binary(max_size=8), payloads)


@given(message=built, turn=st.booleans())
@settings(max_examples=40)
def test_any_payload_comes_back(message, turn):
    if turn:  # a layout that is not contiguous
        flipped = {n: a.T[::-1] if a.ndim else a for n, a in message.payload.arrays.items()}
        message = replace(message, payload=Payload(flipped, message.payload.scalars))
    assert_same(message, decode(encode(message)))


def test_a_small_message_is_these_bytes():
    crc = zlib.crc32(SMALL_BODY)
    assert crc == 0xD22A6A67
    assert encode(SMALL) == b"FT1" + crc.to_bytes(4, "little") + SMALL_BODY
    assert_same(SMALL, decode(b"FT1" + crc.to_bytes(4, "little") + SMALL_BODY))
    assert len(encode(SMALL)) == 48


@pytest.mark.parametrize("size", [0, 255, 256, 65_536])
def test_a_body_is_what_messagepack_makes_of_it(size):
    """Of one object, as `msgpack.packb` encodes it: the length of every part in its narrowest form."""
    rng = np.random.default_rng(size)
    arrays = {f"a{i}": rng.integers(0, 255, size, dtype=np.uint8) for i in range(20)}
    arrays |= {"none": np.zeros((3, 0, 2), np.float32), "one": np.array(1.5), "turned": np.ones((2, 3)).T}
    scalars = {"bytes": rng.bytes(size), "text": "t" * size, "n": -size, "x": 0.1, "yes": True}
    raw = {n: [messages.DTYPES.index(a.dtype.name), list(a.shape), a.tobytes()] for n, a in arrays.items()}
    body = msgpack.packb([7, b"base", scalars, raw])
    sent = encode(Message(7, b"base", Payload(arrays, scalars)))
    assert type(sent) is bytes
    assert sent == b"FT1" + zlib.crc32(body).to_bytes(4, "little") + body


def test_every_lost_flipped_or_doubled_byte_is_refused():
    data = encode(SMALL)
    damaged = [data[:i] + data[i + 1 :] for i in range(len(data))]
    damaged += [data[:i] + data[i : i + 1] + data[i:] for i in range(len(data))]
    damaged += [data[:i] for i in range(len(data))]
    for i in range(len(data)):
        damaged += [data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :] for bit in range(8)]
        if i and data[i] != data[i - 1]:
            damaged.append(data[: i - 1] + data[i : i + 1] + data[i - 1 : i] + data[i + 1 :])
    for other in damaged:
        with pytest.raises(MessageError, match=r"not a Fleetune message|is damaged"):
            decode(other)


@pytest.mark.parametrize(
    "value", [None, np.int64(3), np.float32(3), np.bool_(True), 2**64, -(2**63) - 1, "\ud800", [1], {"a": 1}]
)
def test_a_scalar_without_a_wire_type_is_refused_by_the_sender(value):
    with pytest.raises(MessageError, match=r"has no wire type|has type"):
        encode(Message(1, b"", Payload({}, {"v": value})))


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([1j]), np.array([True]), np.array([None])])
def test_an_array_without_a_wire_type_is_refused_by_the_sender(value):
    with pytest.raises(MessageError, match=r"'v' has dtype .* no wire type"):
        encode(Message(1, b"", Payload({"v": value})))


def test_a_message_over_the_limit_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr("fleetune.tuning.exchange.messages.MAX_BYTES", 47)
    with pytest.raises(MessageError, match="48 bytes is over the limit of 47"):
        decode(encode(SMALL))
    assert_same(SMALL, decode(encode(SMALL), any_size=True))


def test_payload_gives_what_it_has_and_says_what_it_lacks():
    payload = Payload({"a": np.arange(3)}, {"i": 2, "f": 0.5, "b": True, "s": "x"})
    assert payload.int("i") == 2
    assert payload.float("f") == 0.5
    assert payload.float("i") == 2.0
    assert type(payload.float("i")) is float
    assert payload.array("a").tolist() == [0, 1, 2]
    wrong = [(payload.int, name, "an integer") for name in ("f", "b", "s", "none")]
    for get, name, kind in (*wrong, *((payload.float, name, "a number") for _, name, _ in wrong[1:])):
        with pytest.raises(MessageError, match=f"scalar '{name}' is .*, expected {kind}"):
            get(name)
    with pytest.raises(MessageError, match="array 'z' is missing; there are a"):
        payload.array("z")


SPEC = messages.ReplySpec(
    {"a": ("float32", (2, -9)), "codes": ("uint8", (-3,))}, {"n": (int, 1, 10), "loss": (float, -1e9, 1e9)}
)


def reply(**changes: Any) -> Message:
    """A good reply, with parts put in another way (a `None` takes a part out)."""
    good = {"a": np.zeros((2, 5), np.float32), "codes": np.zeros(2, np.uint8), "n": 4, "loss": 1.5}
    found = {name: value for name, value in {**good, **changes}.items() if value is not None}
    kept = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    return Message(7, BASE, Payload(kept, {n: v for n, v in found.items() if n not in kept}))


AGREED: list[dict[str, Any]] = [{}, {"n": 1, "loss": -1e9}, {"n": 10, "loss": 1e9}]
AGREED += [{"a": np.zeros((2, 0), np.float32)}, {"a": np.full((2, 1), 1e9, np.float32)}]
AGREED += [{"codes": np.zeros(n, np.uint8)} for n in (0, 3)]


@pytest.mark.parametrize("message", [reply(**changes) for changes in AGREED])
def test_the_door_lets_what_was_agreed_through(message):
    assert check(decode(encode(message)), SPEC, round=7, base=BASE).scalars == message.payload.scalars


REFUSED: list[tuple[Message, str]] = [
    (replace(reply(), round=6), "reply is for round 6, this is round 7"),
    (replace(reply(), base=b"\1" * 8), f"on base {'01' * 8}, this run's base is {BASE.hex()}"),
    (reply(a=None), r"arrays differ from the agreed: \[\] more, \['a'\] missing"),
    (reply(n=None), r"scalars differ from the agreed: \[\] more, \['n'\] missing"),
    (reply(codes=np.zeros(2, np.int8)), "array 'codes' is int8, agreed was uint8"),
    (reply(a=np.zeros((3, 5), np.float32)), r"array 'a' has shape \(3, 5\), agreed was \(2, -9\)"),
    (reply(codes=np.zeros(4, np.uint8)), r"array 'codes' has shape \(4,\), agreed was \(-3,\)"),
    (reply(a=np.array([[1, np.nan], [np.inf, 1]], np.float32)), "'a' holds 2 values that are not finite"),
    (reply(a=np.array([[-np.inf], [0]], np.float32)), "'a' holds 1 values that are not finite"),
    (reply(a=np.array([[0], [-1.1e9]], np.float32)), r"'a' holds 1\.1e\+09, agreed"),
    (reply(n=0), "scalar 'n' is 0, agreed was 1 to 10"),
    (reply(loss=-1.1e9), "scalar 'loss' is -1"),
]


@pytest.mark.parametrize(("message", "reason"), REFUSED, ids=[r[:40] for _, r in REFUSED])
def test_the_door_refuses_each_deviation_with_a_reason(message, reason):
    with pytest.raises(MessageError, match=reason):
        check(decode(encode(message)), SPEC, round=7, base=BASE)


NARROW = {
    "int8": ([], [127, -127]),
    "int16": ([128], [-128]),
    "int32": ([-32768], [2**31 - 1]),
    "int64": ([2**31],),
}


@pytest.mark.parametrize(("kind", "values"), [(kind, each) for kind in NARROW for each in NARROW[kind]])
def test_narrow_takes_the_narrowest_type_that_holds_all(values, kind):
    wide = np.array(values, np.int64)
    assert messages.narrow(wide).dtype == kind
    assert messages.narrow(wide).tolist() == values


LEVELS_SHA = "9629ac5dba70a28c23c2b261502ede0abc1a31344f0a383d941c406ab463bef3"


def test_the_levels_never_change():
    levels = LogCode.LEVELS
    assert levels[:11].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert levels[15:20].tolist() == [15, 16, 18, 20, 22]
    assert int(levels[-1]) == 6_349_996
    assert len(levels) == 128
    assert (np.diff(levels) > 0).all()
    assert hashlib.sha256(levels.astype("<i8").tobytes()).hexdigest() == LEVELS_SHA


def test_every_code_decodes_and_comes_back():
    codes = np.delete(np.arange(256), 128).astype(np.uint8)  # 128 would be minus zero
    values = LogCode.decode(codes)
    assert values.dtype == np.int64
    assert len(set(values.tolist())) == 255
    assert (values[1:128] == -values[128:]).all()
    for u in (0.0, 0.5, 1 - 2**-32):
        assert (LogCode.encode(values.astype(np.float64), np.full(255, u)) == codes).all()
    assert LogCode.decode(np.array([128], np.uint8)).tolist() == [0]


def test_a_code_is_unbiased():
    n = 4096
    u = (np.arange(n) + 0.5) / n  # every uniform equally often: the mean is exact to a step of 1/n
    rng = np.random.default_rng(5)
    large = np.exp(rng.uniform(0, np.log(6.3e6), 60))
    sizes = np.concatenate([rng.uniform(0, 20, 40), large, [0.25, 6_349_995.5]])
    for x in np.concatenate([sizes, -sizes]):
        got = LogCode.decode(LogCode.encode(np.full(n, x), u))
        above = int(np.searchsorted(LogCode.LEVELS, abs(x), side="right"))
        gap = LogCode.LEVELS[above] - LogCode.LEVELS[above - 1]
        assert abs(got.mean() - x) <= gap / n, x
        assert set(np.abs(got).tolist()) <= set(LogCode.LEVELS[above - 1 : above + 1].tolist())


def test_zero_and_the_ends():
    x = np.array([0.0, -0.0, 1e-300, -0.25, -0.25, -1.0, 6_349_996.0, -6_349_996.0, np.inf, -np.inf])
    got = LogCode.encode(x, np.array([0.0, 0.0, 0.5, 0.25, 0.2, 0.0, 0.0, 0.0, 0.5, 0.5]))
    assert got.dtype == np.uint8
    assert got.tolist() == [0, 0, 0, 0, 129, 129, 127, 255, 127, 255]


shapes = st.lists(array_shapes(max_dims=4, max_side=6), min_size=1, max_size=4)


@given(shapes, st.integers(0, 99))
def test_tensors_go_into_one_vector_and_back(sides, seed):
    rng = np.random.default_rng(seed)
    tensors = {f"t{9 - i}": rng.normal(size=side).astype(np.float32) for i, side in enumerate(sides)}
    layout = messages.Layout.of(tensors)
    vector = layout.flat(tensors)
    back = layout.tensors(vector)
    assert list(back) == sorted(tensors)
    assert all(np.array_equal(back[n], t) for n, t in tensors.items())
    assert layout.sizes.sum() == len(vector) == sum(t.size for t in tensors.values())


def test_a_group_is_a_row_of_a_and_a_column_of_b():
    a, b = np.arange(10, dtype=np.float32).reshape(2, 5), -np.arange(6, dtype=np.float32).reshape(3, 2)
    layout = messages.Layout.of({"b": b, "a": a, "bias": np.ones(4)})
    assert layout.groups.tolist() == [[2, 5], [2, 3], [1, 4]]
    parts = np.split(layout.flat({"a": a, "b": b, "bias": np.ones(4)}), np.cumsum(layout.sizes)[:-1])
    for part, wanted in zip(parts, [a[0], a[1], b[:, 0], b[:, 1], np.ones(4)], strict=True):
        np.testing.assert_array_equal(part, wanted)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 99))
def test_each_plane_is_the_mean_size_and_the_signs_of_what_is_left(each, planes, seed):
    sizes, x = np.array(each), np.random.default_rng(seed).normal(size=sum(each))
    signs = messages.signs_of(x, sizes, planes)
    assert (signs.bits.dtype, signs.scales.dtype) == (np.uint8, np.float32)
    assert signs.bits.shape == (planes, -(-len(x) // 8))
    left, total = x.copy(), np.zeros(len(x), np.float32)
    for plane in range(planes):
        at = 0
        for group, size in enumerate(each):
            scale = signs.scales[plane, group]
            np.testing.assert_allclose(scale, np.abs(left[at : at + size]).mean(), rtol=1e-6)
            for i in range(at, at + size):
                bit = signs.bits[plane, i // 8] >> (7 - i % 8) & 1
                assert bit == (left[i] < 0)
                left[i] -= -scale if bit else scale
                total[i] += -scale if bit else scale
            at += size
    np.testing.assert_array_equal(add_signs(np.zeros(len(x)), signs, sizes), total)


def test_planes_that_come_apart_add_up_to_the_same_bits():
    rng = np.random.default_rng(0)
    start, sizes = rng.normal(size=300).astype(np.float32), np.array([100, 200])
    signs = messages.signs_of(rng.normal(size=300), sizes, 3)
    apart = start
    for i in range(3):
        apart = add_signs(apart, messages.Signs(signs.bits[i : i + 1], signs.scales[i : i + 1]), sizes)
    np.testing.assert_array_equal(apart, add_signs(start, signs, sizes))
    assert start.dtype == np.float32
    nothing = messages.Signs(signs.bits[:0], signs.scales[:0])
    np.testing.assert_array_equal(add_signs(start, nothing, sizes), start)
