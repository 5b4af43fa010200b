"""Directions against published vectors, a slow reference written from the format, and frozen digests."""

import hashlib
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.errors import UsageError
from fleetune.seeds import noise
from law_definition import direction, hadamard, slow_philox, slow_places, slow_sign

TOP = 2**64 - 1
U64 = st.integers(0, TOP)
PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
# Random123's kat_vectors for philox4x32 with 10 rounds.
KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (PI[:4], PI[4:], "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# (run key, id, start, count, SHA-256 of the signs as int8), made once by the slow reference.
GOLDEN = [
    (0, 0, 0, 4096, "ad6c7dd7142705b22a186b81c61c3d90919415ec6d65d0729560d724b947a812"),
    (0x0123456789ABCDEF, 7, 4090, 5000, "e6f901b4e5bc7bcd9015cb986943fd75b6e6800081ec57b863680fd012b93139"),
    (TOP, TOP, 2**45 + 12345, 4096, "e99cffae20b525268edafc104bf4496391985aec5b55675f6cafcb1800e0e392"),
    (42, 5 << 32 | 9, 26542157, 577, "ef2bcb2291d22ee984d3680c3e57f0ca3107ffd16732e675bffa6199a7f4d982"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(counter, key, answer):
    want = [int(word, 16) for word in answer.split()]
    assert noise.philox4x32(counter, key).tolist() == want
    assert slow_philox(counter, key) == want


@given(run_key=U64, id=U64, start=st.integers(0, 2**50), count=st.integers(0, 300))
@settings(max_examples=30)
def test_signs_follow_the_format(run_key, id, start, count):
    want = [slow_sign(run_key, id, i) for i in range(start, start + count)]
    signs = noise.signs(run_key, id, start, count)
    assert signs.dtype == np.int8
    assert signs.tolist() == want


@pytest.mark.parametrize(("run_key", "id", "start", "count", "digest"), GOLDEN)
def test_signs_are_frozen(run_key, id, start, count, digest):
    assert hashlib.sha256(noise.signs(run_key, id, start, count).tobytes()).hexdigest() == digest


def test_keys_are_frozen_and_domains_apart():
    assert noise.run_key(b"fleetune") == 1053109089447305467
    assert noise.derive(7, "local", 3, 12) == 9141807694276827173
    numbers = [(), (1,), (1, 2), (12,), (2, 1), (-1,), (2**80,)]
    lists = [*numbers, ("1",), ("a", "b"), ("ab",), ("ab", ""), ("a", 1)]
    assert len({noise.derive(*parts) for parts in lists}) == len(lists)
    assert all(0 <= noise.derive(*parts) < 2**64 for parts in lists)


@pytest.mark.parametrize("K", [1, 2, 8, 64])
def test_fwht_and_columns_equal_the_dense_matrix(K):
    H = hadamard(K)
    a = np.random.default_rng(K).integers(-1000, 1000, K)
    assert noise.fwht(a).tolist() == (H @ a).tolist()
    assert noise.fwht(noise.fwht(a)).tolist() == (K * a).tolist()
    assert np.array_equal(np.stack([noise.hadamard_column(K, k) for k in range(K)], axis=1), H)


def total(law: str, passes: noise.Passes, run_key: int, start: int, count: int) -> np.ndarray:
    acc = np.zeros(count, np.int64)
    for id, table in zip(passes.ids.tolist(), passes.tables, strict=True):
        acc += noise.signs(run_key, id, start, count) * table[slow_places(len(table), start, count)]
    return acc


@st.composite
def entries(draw):
    law = draw(st.sampled_from(["rademacher", "hashed"]))
    K = 2 ** draw(st.integers(0, 9)) if law == noise.POOL else 1
    one = st.tuples(st.integers(0, 3), st.integers(0, K - 1)).map(lambda p: p[0] << 32 | p[1])
    size = draw(st.integers(0, 8))
    ids = draw(st.lists(one if law == noise.POOL else st.integers(0, 5), min_size=size, max_size=size))
    big = draw(st.sampled_from([3, 1000, 2**30, 2**40]))
    coefficients = draw(st.lists(st.integers(-big, big), min_size=size, max_size=size))
    return law, K, ids, coefficients


@given(case=entries(), run_key=U64, start=st.integers(0, 10_000), random=st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_passes_sum_the_directions_in_any_order(case, run_key, start, random):
    law, K, ids, coefficients = case
    passes = noise.passes(law, K, ids, coefficients)
    want = np.zeros(40, np.int64)
    for id, c in zip(ids, coefficients, strict=True):
        want += c * direction(law, id, start, 40, K, run_key)
    assert total(law, passes, run_key, start, 40).tolist() == want.tolist()
    assert len(passes.ids) <= len({i >> 32 if law == noise.POOL else i for i in ids})
    pairs = list(zip(ids, coefficients, strict=True))
    random.shuffle(pairs)
    again = noise.passes(law, K, [i for i, _ in pairs], [c for _, c in pairs])
    assert np.array_equal(again.ids, passes.ids)
    assert again.tables.dtype == passes.tables.dtype
    assert np.array_equal(again.tables, passes.tables)


def test_passes_merge_and_drop():
    passes = noise.passes("rademacher", 1, [9, 4, 9, 2], [5, 1, -5, 3])
    assert passes.ids.tolist() == [2, 4]
    assert passes.tables.tolist() == [[3], [1]]
    assert passes.ids.dtype == np.uint64
    pool = noise.passes("hashed", 4, [1 << 32 | 2, 3, 1 << 32 | 2], [6, 1, -6])
    assert pool.ids.tolist() == [0]
    assert pool.tables.tolist() == [[1, -1, -1, 1]]
    assert noise.passes("hashed", 8, [], []).tables.shape == (0, 8)
    assert noise.passes("rademacher", 1, [], []).tables.shape == (0, 1)


@pytest.mark.parametrize(
    ("law", "K", "ids", "coefficients", "dtype"),
    [
        ("rademacher", 1, [1, 2], [2**30, 2**30 - 1], np.int32),
        ("rademacher", 1, [1, 2], [2**30, -(2**30)], np.int64),
        ("rademacher", 1, [1], [-(2**31)], np.int64),
        ("hashed", 2, [0, 1], [2**30, 2**30 - 1], np.int32),
        ("hashed", 2, [0, 1], [2**30, 2**30], np.int64),
        ("hashed", 2, [0, 1 << 32], [2**30, 2**30], np.int64),
    ],
)
def test_tables_widen_where_a_sum_could_reach_2_31(law, K, ids, coefficients, dtype):
    assert noise.passes(law, K, ids, coefficients).tables.dtype == dtype


@given(k=st.integers(0, 20), start=st.integers(0, 2**40), count=st.integers(0, 700))
def test_places_are_those_of_the_definition(k, start, count):
    assert np.array_equal(noise.places(2**k, start, count), slow_places(2**k, start, count))


def test_places_never_change():
    found = [int(noise.places(4096, 128 * run, 1)[0]) for run in (0, 1, 2, 1000, 2**33)]
    assert found == [0, 1694, 705, 2916, 408]


@pytest.mark.parametrize("width", [64, 576, 2048, 4096])
def test_members_of_a_hashed_pool_differ_within_a_column(width):
    """With place(i) = i mod K the first directions would be one or few in a column."""
    K, rows, column = 4096, 512, 5
    at = noise.places(K, 0, width * rows)[column + width * np.arange(rows)]
    found = [noise.hadamard_column(K, k)[at].astype(float) for k in range(256)]
    assert int(np.linalg.matrix_rank(np.stack(found))) >= 200


@pytest.mark.parametrize(
    ("law", "K", "ids", "coefficients", "words"),
    [
        ("uniform", 1, [1], [1], "uniform"),
        ("hashed", 6, [1], [1], "K = 6"),
        ("hashed", 0, [1], [1], "K = 0"),
        ("hashed", 8, [8], [1], "direction 8"),
        ("rademacher", 1, [1, 2], [2**62, 2**62], "2^62"),
    ],
)
def test_what_a_user_can_get_wrong_is_said(law, K, ids, coefficients, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        noise.passes(law, K, ids, coefficients)


def test_what_does_not_fit_is_refused():
    for ids, coefficients in (([1, 2], [1]), ([1], [0.5])):
        with pytest.raises(ValueError, match="as many integers"):
            noise.passes("rademacher", 1, ids, coefficients)
    with pytest.raises(UsageError, match="power of two"):
        noise.fwht(np.ones(3, np.int64))


def test_normals_are_frozen():
    z = noise.normals(42, 9, 100, 5000).astype("<f4")
    digest = "c7b2e644d35afc16d2615dac15467a79bca3bd73e3a00184839a38937ceb1fd0"
    assert hashlib.sha256(z.tobytes()).hexdigest() == digest


def test_normals_follow_the_format_closely():
    start, count = 2**40 + 90, 200
    z = noise.normals(77, 5 << 32 | 1, start, count)
    for at in range(count):
        group, e = divmod(start + at, 128)
        c, j = divmod(e, 32)
        block = group * 32 + j
        words = slow_philox([block % 2**32, block >> 32, 1, 5], [77, 0])
        u, t = (words[c & 2] + 0.5) / 2**32, 2 * math.pi * words[c | 1] / 2**32
        want = math.sqrt(-2 * math.log(u)) * (math.sin(t) if c & 1 else math.cos(t))
        assert abs(z[at] - want) < 1e-5 * max(1.0, abs(want))


def test_normals_of_extreme_words_are_finite():
    a = np.array([0, 1, 2**31, 2**32 - 1, 2**32 - 128, 2**32 - 129], np.uint32)
    for b in (0, 1, 2**29, 2**29 - 1, 2**30, 2**31, 2**32 - 2**29, 2**32 - 1):
        pair = noise._box_muller(a, np.full_like(a, b))
        assert all(np.isfinite(z).all() for z in pair)
        r = np.hypot(*(z.astype(np.float64) for z in pair))
        u = a.astype(np.float32).astype(np.float64) / 2**32 + 2**-33
        want = np.sqrt(-2 * np.log(u).clip(max=0))
        assert np.allclose(r, want, rtol=1e-4, atol=4e-4)


SHAPES = [(5, 3), (4,), (2, 3, 7), (16, 2)]  # 5, 0, 6 and 16 rows
STARTS = [0, 5, 5, 11]
IDS = st.sampled_from([0, 1, 7, 2**32 - 1])
outer_entries = st.tuples(IDS, st.integers(0, 3), st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**16 - 1))


@given(entries=st.lists(outer_entries, max_size=8))
@settings(max_examples=25)
def test_the_tables_of_outer_products_are_the_sums_of_the_entries(entries):
    """Row by row: the first is the most significant bit of the entry's first byte; 1 is below 0."""
    want: dict[int, list[int]] = {}
    signs = b""
    for p, m, c, drawn in entries:
        rows = [5, 0, 6, 16][m]
        mine = drawn.to_bytes(2, "big")[: (rows + 7) // 8]
        signs += mine
        for row in range(rows):
            down = mine[row // 8] >> (7 - row % 8) & 1
            table = want.setdefault(p, [0] * 27)
            table[STARTS[m] + row] += -c if down else c
    ids = np.array([p << 32 | m for p, m, _, _ in entries], np.uint64)
    coefficients = np.array([c for _, _, c, _ in entries], np.int32)
    found = noise.outer_passes(SHAPES, ids, coefficients, np.frombuffer(signs, np.uint8))
    kept = {p: table for p, table in sorted(want.items()) if any(table)}
    assert found.ids.tolist() == list(kept)
    assert found.tables.tolist() == list(kept.values())
    assert found.tables.shape == (len(kept), 27)
    assert found.tables.dtype == np.int64


@given(st.lists(st.sampled_from([-3.5, -0.0, 0.0, 2.0]), max_size=19))
@settings(max_examples=25)
def test_signs_as_bits_come_back(values):
    bits = noise.packed(np.array(values))
    assert noise.unpacked(bits, len(values)).tolist() == [-1 if x < 0 else 1 for x in values]
    assert bits.nbytes == -(-len(values) // 8)


def test_more_outer_products_than_a_run_makes_are_refused():
    assert noise.MOST_DIRECTIONS == 4096
    ids = np.arange(4097, dtype=np.uint64) << np.uint64(32)
    ones, bits = np.ones(4097, np.int32), np.zeros(4097, np.uint8)
    assert len(noise.outer_passes([(1, 1)], ids[1:], ones[1:], bits[1:]).ids) == 4096
    with pytest.raises(UsageError, match="4,097 directions of outer products"):
        noise.outer_passes([(1, 1)], ids, ones, bits)
    most = np.array([2**53 - 1, 1])
    with pytest.raises(UsageError, match="or their sums too large"):
        noise.outer_passes([(1, 1)], ids[:1].repeat(2), most, bits[:2])
