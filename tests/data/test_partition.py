"""Partitions and held-out rows: exact covers, exact counts, fixed by the seed, skewed as alpha says."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetune.data import Example, check_partition_spec, hold_out, keyed_order, read
from fleetune.data.partition import RowsSpec, _dirichlet_draw, partition, split
from fleetune.errors import DataError, RecipeError


def rows(labels) -> list[Example]:
    return [Example((("user", f"q{i}"),), "a", {"kind": str(v), "id": str(i)}) for i, v in enumerate(labels)]


def balanced(n: int, kinds: int) -> list[Example]:
    return rows(i % kinds for i in range(n))


def skew(examples: list[Example], parts: list[np.ndarray]) -> float:
    """Mean total variation distance of the clients' label mixes from the whole's."""
    labels = np.array([example.meta["kind"] for example in examples])
    kinds = np.unique(labels)
    whole = np.array([(labels == kind).mean() for kind in kinds])
    mixes = [np.array([(labels[part] == kind).mean() for kind in kinds]) for part in parts]
    return float(np.mean([np.abs(mix - whole).sum() / 2 for mix in mixes]))


def assert_exact_cover(parts: list[np.ndarray], n: int) -> None:
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as in Salmon et al. 2011, written out in Python integers."""
    for _ in range(10):
        a, b = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        low = 2**64 - 1
        counter = [(b >> 64) ^ counter[1] ^ key[0], b & low, (a >> 64) ^ counter[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B97F4A7C15) & low, (key[1] + 0xBB67AE8584CAA73B) & low]
    return counter


SPECS = st.one_of(st.just("iid"), st.floats(1e-3, 1e3).map(lambda alpha: f"dirichlet:{alpha}:kind"))


@settings(max_examples=150)
@given(
    labels=st.lists(st.sampled_from("abcde"), min_size=1, max_size=120),
    spec=SPECS,
    clients=st.integers(1, 30),
    min_rows=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_row_goes_to_one_client_and_all_get_enough(labels, spec, clients, min_rows, seed):
    examples = rows(labels)
    try:
        parts = partition(examples, spec, clients, seed, min_rows)
    except DataError:
        assert clients * min_rows > len(labels)
        return
    assert len(parts) == clients
    assert_exact_cover(parts, len(labels))
    assert min(len(part) for part in parts) >= min_rows
    again = partition(examples, spec, clients, seed, min_rows)
    assert all(np.array_equal(x, y) for x, y in zip(parts, again, strict=True))


@pytest.mark.parametrize("alpha", ["1e-320", "1e-20", "1e-5", "1e5", "1e308"])
@pytest.mark.parametrize("column", ["kind", "id"])
def test_extreme_alphas_still_cover(alpha, column):
    examples = balanced(100, 3)
    parts = partition(examples, f"dirichlet:{alpha}:{column}", 7, 3)
    assert_exact_cover(parts, 100)
    assert min(len(part) for part in parts) >= 1


def test_iid_sizes_are_equal_within_one_and_mixed():
    parts = partition(balanced(1003, 5), "iid", 10, 7)
    assert sorted({len(part) for part in parts}) == [100, 101]
    assert skew(balanced(1003, 5), parts) < 0.15


def test_dirichlet_shares_have_the_moments_of_the_law():
    # One value of the column and no cap in the way: shares ~ Dir(alpha), so Var = (1/K)(1-1/K)/(K alpha+1).
    K, alpha, n = 4, 2.0, 4000
    shares, examples = [], rows("x" * n)
    for seed in range(400):
        parts = partition(examples, f"dirichlet:{alpha}:kind", K, seed)
        shares += [len(part) / n for part in parts]
    expected = (1 / K) * (1 - 1 / K) / (K * alpha + 1)
    assert np.isclose(np.var(shares), expected, rtol=0.15)


def test_a_full_client_gets_no_more():
    # alpha near 0 gives each value whole to one client; N/K is the size of a value, so none gets two.
    examples = balanced(400, 4)
    for seed in range(20):
        parts = partition(examples, "dirichlet:1e-9:kind", 4, seed)
        assert [len(part) for part in parts] == [100] * 4
        assert skew(examples, parts) == pytest.approx(0.75)


def test_rows_move_from_the_richest_when_draws_do_not_give_enough():
    examples = balanced(60, 2)
    parts = partition(examples, "dirichlet:0.01:kind", 20, 0, min_rows=3)
    assert [len(part) for part in parts] == [3] * 20
    parts = partition(examples, "dirichlet:0.01:kind", 10, 0, min_rows=2)
    sizes = sorted(len(part) for part in parts)
    assert sizes[0] == 2
    assert sizes[-1] > 10  # the others stay as the draw made them


def test_dirichlet_is_drawn_again_until_all_have_enough(monkeypatch):
    poor, poorer, enough = np.array([0] * 9 + [1]), np.zeros(10, int), np.array([0] * 5 + [1] * 5)
    for draws, expected in (([poor, enough, poorer], 5), ([poorer, poor, *[poorer] * 8], 3)):
        left = iter(draws)
        monkeypatch.setattr("fleetune.data.partition._dirichlet_draw", lambda *_, it=left: next(it).copy())
        parts = partition(balanced(10, 2), "dirichlet:1:kind", 2, 0, min_rows=3)
        assert len(parts[1]) == expected
        assert 9 in parts[1]  # the best draw is the one that rows are moved in


def test_shares_that_sum_to_just_below_one_lose_no_row():
    assert np.cumsum(np.full(10, 0.1))[-1] < 1
    raw = SimpleNamespace(random_raw=np.arange)
    rng = SimpleNamespace(dirichlet=lambda alpha: np.full(10, 0.1), random=lambda: 0.0, bit_generator=raw)
    owner = _dirichlet_draw([("x", np.arange(100))], 10, 1.0, rng)
    assert np.bincount(owner, minlength=10).sum() == 100


def test_column_makes_one_client_per_value():
    examples = rows("ccabbb")
    assert [part.tolist() for part in partition(examples, "column:kind", None, 0)] == [[2], [3, 4, 5], [0, 1]]
    assert [part.tolist() for part in partition(examples, "column:kind", 2, 0)] == [[3, 4, 5], [0, 1]]
    assert [part.tolist() for part in partition(examples, "column:kind", None, 0, min_rows=3)] == [[3, 4, 5]]


def test_keyed_order_sorts_the_words_of_philox():
    key, stream, n = 0x0123456789ABCDEF, 5, 10
    blocks = [philox4x64([i + 1, 0, 0, stream], [key, 0]) for i in range(3)]  # numpy counts before it draws
    words = [word for block in blocks for word in block][:n]
    assert keyed_order(key, stream, n).tolist() == sorted(range(n), key=words.__getitem__)
    assert keyed_order(key + 2**64, stream, n).tolist() == keyed_order(key, stream, n).tolist()
    assert keyed_order(-1, stream, n).tolist() == keyed_order(2**64 - 1, stream, n).tolist()
    assert keyed_order(key, stream + 1, n).tolist() != keyed_order(key, stream, n).tolist()


def test_golden_partitions():
    examples = balanced(24, 3)
    assert [part.tolist() for part in partition(examples, "iid", 3, 11)] == GOLDEN_IID
    assert [part.tolist() for part in partition(examples, "dirichlet:0.5:kind", 4, 11)] == GOLDEN_SKEWED
    assert hold_out(examples, 6, 11, "kind")[1].tolist() == GOLDEN_HELD


GOLDEN_IID = [[2, 3, 7, 13, 14, 17, 18, 21], [4, 5, 6, 8, 9, 10, 19, 20], [0, 1, 11, 12, 15, 16, 22, 23]]
GOLDEN_SKEWED = [[0, 4, 16, 19], [6, 7, 13, 14, 17, 20], [1, 2, 3, 5, 8, 10, 18, 22, 23], [9, 11, 12, 15, 21]]
GOLDEN_HELD = [0, 1, 2, 4, 5, 21]


@pytest.mark.parametrize(
    ("spec", "says", "hints"),
    [
        ("", "no kind ''", "dirichlet:ALPHA:COLUMN"),
        ("dirichelt:0.5:kind", "did you mean 'dirichlet'", "iid"),
        ("iid:kind", "not complete", "iid"),
        ("dirichlet", "not complete", "dirichlet:ALPHA:COLUMN"),
        ("dirichlet:0.5", "not complete", "dirichlet:ALPHA:COLUMN"),
        ("dirichlet:0.5:", "not complete", "dirichlet:ALPHA:COLUMN"),
        ("dirichlet:kind:0.5", "alpha must be a number greater than 0, got 'kind'", "dirichlet:0.5:category"),
        ("dirichlet:0:kind", "greater than 0, got '0'", "0.5"),
        ("dirichlet:-1:kind", "greater than 0, got '-1'", "0.5"),
        ("dirichlet:nan:kind", "greater than 0, got 'nan'", "0.5"),
        ("dirichlet:inf:kind", "greater than 0, got 'inf'", "0.5"),
        ("column:", "not complete", "column:COLUMN"),
    ],
)
def test_a_wrong_spec_is_refused_without_data(spec, says, hints):
    with pytest.raises(RecipeError) as caught:
        check_partition_spec(spec)
    assert says in caught.value.message
    assert hints in (caught.value.hint or "")


def test_a_column_name_may_hold_a_colon():
    examples = [Example((("user", "q"),), "a", {"a:b": str(i % 2)}) for i in range(8)]
    assert [len(part) for part in partition(examples, "column:a:b", None, 0)] == [4, 4]
    assert_exact_cover(partition(examples, "dirichlet:1:a:b", 2, 0), 8)


@pytest.mark.parametrize(
    ("spec", "clients", "min_rows", "says", "hints"),
    [
        ("iid", 11, 1, "10 training rows cannot give 11 clients at least 1", "at most 10 clients"),
        ("dirichlet:1:kind", 4, 3, "10 training rows cannot give 4 clients at least 3", "at most 3 clients"),
        ("column:kind", 3, 1, "has 2 values with at least 1 rows, 3 clients were asked for", "fewer clients"),
        ("column:kind", None, 6, "has 0 values with at least 6 rows", "another column"),
        ("column:kinds", None, 1, "no column 'kinds' in the data; did you mean 'kind'?", "id, kind, site"),
        ("dirichlet:1:zzz", 2, 1, "no column 'zzz' in the data", "columns beside texts: id, kind, site"),
        ("column:site", 2, 1, "column 'site' is missing in 9 of 10 rows, first in row 1", "fill in 'site'"),
    ],
)
def test_rows_that_do_not_allow_it(spec, clients, min_rows, says, hints):
    examples = balanced(10, 2)
    examples[-1] = Example((("user", "q"),), "a", {"kind": "1", "id": "9", "site": "x"})
    with pytest.raises(DataError) as caught:
        partition(examples, spec, clients, 0, min_rows)
    assert says in caught.value.message
    assert hints in (caught.value.hint or "")


@settings(max_examples=150)
@given(
    labels=st.lists(st.sampled_from("abcd"), min_size=2, max_size=80),
    part=st.one_of(st.integers(0, 79), st.floats(0.01, 0.98)),
    seed=st.integers(0, 2**64 - 1),
)
def test_hold_out_is_a_stratified_split(labels, part, seed):
    n = len(labels)
    count = part if isinstance(part, int) else max(1, round(part * n))
    if count >= n:
        with pytest.raises(DataError, match="none would be left"):
            hold_out(rows(labels), part, seed, "kind")
        return
    train, held = hold_out(rows(labels), part, seed, "kind")
    assert_exact_cover([train, held] if count else [train], n)
    assert len(held) == count
    values = set(labels)
    sizes = {v: labels.count(v) for v in values}
    got = {v: sum(labels[i] == v for i in held) for v in values}
    room = sum(size - 1 for size in sizes.values())
    if count <= room:
        assert all(got[v] < sizes[v] for v in values)  # each value keeps a row for training
    if all(count * size // n + 1 < size for size in sizes.values()):
        assert all(abs(got[v] - count * sizes[v] / n) < 1 for v in values)
    assert np.array_equal(held, hold_out(rows(labels), part, seed, "kind")[1])


def test_hold_out_shares_by_largest_remainder():
    held = hold_out(rows("aaaaabbbcc"), 4, 0, "kind")[1]  # 2, 1.2 and 0.8 of 4
    assert [sum(low <= i < high for i in held) for low, high in ((0, 5), (5, 8), (8, 10))] == [2, 1, 1]
    assert len(hold_out(balanced(40, 4), 0.1, 0, "kind")[1]) == 4
    assert len(hold_out(balanced(3, 3), 0.01, 0)[1]) == 1


@pytest.mark.parametrize(
    ("part", "says"),
    [(1.5, "1.5: must be a whole number of rows"), (math.nan, "nan"), (-0.1, "-0.1"), (-3, "-3")],
)
def test_hold_out_refuses_numbers_that_cannot_be(part, says):
    with pytest.raises(RecipeError, match=says):
        hold_out(balanced(10, 2), part, 0)


def rows_file(tmp_path: Path, rows: list[tuple[str, str]]) -> RowsSpec:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": q, "response": a}) + "\n" for q, a in rows))
    return RowsSpec(str(file), held_out=2, clients=1)


PAIR = st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz"))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(PAIR, min_size=4, max_size=20), dedupe=st.booleans(), seed=st.integers(0, 9))
def test_no_row_is_on_both_sides_of_the_split(tmp_path, rows, dedupe, seed):
    spec = replace(rows_file(tmp_path, rows), dedupe=dedupe, seed=seed)
    plain_train, plain_held = hold_out(read(spec.data), 2, seed)
    parts = split(spec, 1)
    said = [(e.messages[0][1], e.response) for e in parts.examples]
    held, training = [[said[i] for i in p] for p in (parts.held.tolist(), parts.clients[0].tolist())]
    assert held == [rows[i] for i in plain_held]
    left = [rows[i] for i in plain_train if rows[i] not in held]
    left = list(dict.fromkeys(left)) if dedupe else left
    assert training == (left or [rows[i] for i in plain_train])
    gone = len(plain_train) - len(training)
    assert bool(gone) == any(note.startswith("left out: ") for note in parts.notes)


def test_rows_of_no_client_are_left_out_with_a_note_and_odd_names_are_named(tmp_path):
    """An empty cell of a CSV is "", null in JSON is no field: neither is the name of a client."""
    wards = ["North"] * 16 + ["South"] * 14 + ["north "] * 8 + [" ", "", None]
    rows = [{"prompt": f"q{i}", "response": "a", "ward": ward} for i, ward in enumerate(wards)]
    (file := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = RowsSpec(str(file), held_out=6, clients=2, partition="column:ward")
    assert split(spec, 8).notes == (
        "left out: 3 rows without a value of 'ward'",
        "'North' and 'north ' of 'ward' are two: write them alike if they are one",
        "left out: 7 rows beyond the 2 largest values of 'ward'",
    )
    with pytest.raises(DataError, match=r"'ward' is missing in 3 of 41 rows, first in \S+jsonl:39"):
        split(replace(spec, strict=True), 8)


def test_rows_of_a_validation_file_are_left_out_where_asked(tmp_path):
    spec = rows_file(tmp_path, [("a", "x"), ("a", "x"), ("b", "y"), ("c", "z")])
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "b", "response": "y"}\n')
    spec = replace(spec, eval_data=str(held))
    assert (len(split(spec, 1).clients[0]), len(split(spec, 1).trained_too())) == (4, 1)
    parts = split(replace(spec, dedupe=True), 1)
    assert (len(parts.clients[0]), parts.trained_too(), len(parts.held)) == (2, [], 1)
    assert parts.notes == ("left out: 2 training rows equal to a held-out or an earlier one",)


def test_all_answers_of_a_conversation_are_trained_on_where_asked(tmp_path):
    turns = [("system", "s"), *[(r, f"{r}{i}") for i in range(3) for r in ("user", "assistant")]]
    rows = [
        {"messages": [{"role": role, "content": f"{text} {n}"} for role, text in turns], "who": "ab"[n % 2]}
        for n in range(6)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = RowsSpec(str(file), held_out=2, partition="column:who")
    last, every = split(spec, 2), split(replace(spec, train_turns="all"), 2)
    assert every.held.tolist() == last.held.tolist()
    for few, many in zip(last.clients, every.clients, strict=True):
        got = [every.examples[i] for i in many.tolist()]
        assert [e.response for e in got[: len(few)]] == [last.examples[i].response for i in few.tolist()]
        assert {e.where for e in got} == {e.where for e in got[: len(few)]}, "of its own conversations"
        for n in (last.examples[i].response[-1] for i in few.tolist()):
            mine = sorted((len(e.messages), e.response, e.messages[-1]) for e in got if e.response[-1] == n)
            assert mine == [(2 * i + 2, f"assistant{i} {n}", ("user", f"user{i} {n}")) for i in range(3)]
