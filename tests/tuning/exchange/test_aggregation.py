"""Means against float64, products against the dense SVD, rules against numpy and the papers; in methods, runs, ledgers."""

import math
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import methods_harness as harness
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from methods_harness import CLIENTS, begun, bits
from methods_harness import mean_of as float32_mean

from fleetune.tuning import methods
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.exchange.aggregation import MEAN, REDUCE, Rule, Spool, cut, parse, product_mean, trimmed
from fleetune.tuning.exchange.messages import LogCode, Payload
from fleetune.tuning.methods import fedit
from fleetune.tuning.methods._zeroth import draw

PAIRS = {"q": ("q.B", "q.A"), "v": ("v.B", "v.A")}
SHAPES = {"q": (12, 9), "v": (5, 14)}
Tensors = dict[str, np.ndarray]


def clients(seed: int, count: int, rank: int) -> list[tuple[float, Tensors]]:
    """`count` devices with adapters of this rank on both layers: (rows, tensors)."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tensors = {}
        for layer, (out, into) in SHAPES.items():
            tensors[f"{layer}.B"] = rng.normal(size=(out, rank)).astype(np.float32)
            tensors[f"{layer}.A"] = rng.normal(size=(rank, into)).astype(np.float32)
        found.append((float(rng.integers(1, 50)), tensors))
    return found


def mean_of(taken, pairs=PAIRS):
    """`product_mean` of devices that all had the rank of what they were sent."""
    return product_mean(taken, pairs, taken[0][1])


@given(seed=st.integers(0, 99), count=st.integers(1, 9), scale=st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=30)
def test_weighted_mean_is_the_float64_mean_rounded_once(seed, count, scale):
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 1000, count)
    values = (rng.normal(size=(count, 4, 3)) * scale).astype(np.float32)
    mean = float32_mean((float(k), {"w": v, "b": v[0]}) for k, v in zip(n, values, strict=True))
    want = np.average(values.astype(np.float64), axis=0, weights=n)
    assert list(mean) == ["w", "b"]
    assert mean["w"].dtype == np.float32
    close = np.finfo(np.float32).eps * np.abs(values).max()
    np.testing.assert_allclose(mean["w"], want, rtol=0, atol=close)
    np.testing.assert_allclose(mean["b"], want[0], rtol=0, atol=close)


def test_weighted_mean_keeps_what_float32_sums_would_lose():
    values = [np.array([x], np.float32) for x in (3e7, 1.0, -3e7, 1.0)]
    assert float32_mean((1.0, {"w": v}) for v in values)["w"].tolist() == [0.5]
    half = [(1.0, {"w": np.array([60000.0], np.float16)})] * 3  # whose sum is no float16
    assert float32_mean(half)["w"].tolist() == [60000.0]


def test_a_layer_thinner_than_the_rank_keeps_its_shape():
    rng, shapes = np.random.default_rng(6), {"q.B": (3, 8), "q.A": (8, 20)}
    taken = [(2.0, {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}) for _ in range(2)]
    tensors, lost = mean_of(taken, {"q": PAIRS["q"]})
    assert {n: t.shape for n, t in tensors.items()} == shapes
    np.testing.assert_allclose(
        tensors["q.B"] @ tensors["q.A"], exact_mean(taken[0][1], taken, "q"), atol=1e-4
    )
    assert lost == 0.0


def test_adapters_of_zeros_average_to_zeros():
    taken = [(1.0, {"q.B": np.zeros((12, 2), np.float32), "q.A": np.ones((2, 9), np.float32)})] * 3
    tensors, lost = mean_of(taken, {"q": PAIRS["q"]})
    assert lost == 0.0
    assert not (tensors["q.B"] @ tensors["q.A"]).any()
    assert (tensors["q.A"] == 1).all()  # what a factor of zeros would need to learn again


def mixed(seed: int, ranks: list[int], top: int) -> tuple[Tensors, list[tuple[float, Tensors]]]:
    """(the adapter of rank `top` that they began with, what devices of these ranks send)."""
    start = clients(seed, 1, top)[0][1]
    return start, [clients(seed + 1 + i, 1, rank)[0] for i, rank in enumerate(ranks)]


def exact_mean(start, taken, layer):
    """sum_k p_k (B_k A_k + what of B A was not sent), dense, in float64."""
    total = sum(n for n, _ in taken)
    b, a = start[f"{layer}.B"].astype(float), start[f"{layer}.A"].astype(float)
    mean = np.zeros((len(b), a.shape[1]))
    for n, sent in taken:
        rank = sent[f"{layer}.A"].shape[0]
        mean += n / total * (sent[f"{layer}.B"].astype(float) @ sent[f"{layer}.A"].astype(float))
        for i in range(rank, len(a)):
            mean += n / total * np.outer(b[:, i], a[i])
    return mean


@given(
    seed=st.integers(0, 50), ranks=st.lists(st.integers(1, 4), min_size=1, max_size=12), zeros=st.booleans()
)
@settings(max_examples=40)
def test_unlike_ranks_are_averaged_exactly(seed, ranks, zeros):
    start, taken = mixed(seed, ranks, 4)
    if zeros:  # a fresh adapter
        start = {n: t * (not n.endswith(".B")) for n, t in start.items()}
    tensors, lost = product_mean(taken, PAIRS, start)
    kept = whole = 0.0
    for layer in PAIRS:
        u, s, vt = np.linalg.svd(exact_mean(start, taken, layer), full_matrices=False)
        got = tensors[f"{layer}.B"].astype(float) @ tensors[f"{layer}.A"].astype(float)
        np.testing.assert_allclose(got, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5 * s[0])
        assert all(tensors[n].shape == start[n].shape for n in PAIRS[layer])
        assert {tensors[n].dtype.name for n in PAIRS[layer]} == {"float32"}
        kept, whole = kept + (s[:4] ** 2).sum(), whole + (s**2).sum()
    assert lost == pytest.approx(1 - kept / whole, abs=1e-9)
    if zeros and sum(ranks) <= 4:
        assert lost < 1e-12  # nothing had to go


def test_idle_directions_can_still_learn():
    start, taken = mixed(8, [2], 4)
    start = {n: t * (not n.endswith(".B")) for n, t in start.items()}
    tensors, _ = product_mean(taken, PAIRS, start)
    for b, a in PAIRS.values():
        assert not tensors[b][:, 2:].any()
        assert (tensors[a][2:] == start[a][2:]).all()
        assert tensors[b][:, :2].any(axis=0).all()


def test_cut_takes_the_first_directions_and_leaves_others_whole():
    _, ((_, tensors),) = mixed(1, [4], 4)
    part = cut(tensors | {"head": np.arange(3.0)}, PAIRS, 2)
    for b, a in PAIRS.values():
        assert (part[b] == tensors[b][:, :2]).all()
        assert (part[a] == tensors[a][:2]).all()
        assert part[b].flags.c_contiguous
    assert (part["head"] == np.arange(3.0)).all()
    whole = cut(tensors, PAIRS, 9)
    assert all((whole[n] == t).all() for n, t in tensors.items())


def test_a_head_beside_the_factors_is_averaged_plainly():
    taken = [(n, t | {"head": np.full(2, n, np.float32)}) for n, t in clients(9, 3, 2)]
    tensors, _ = mean_of(taken)
    n = np.array([n for n, _ in taken])
    np.testing.assert_allclose(tensors["head"], (n * n).sum() / n.sum(), rtol=1e-6)
    assert tensors.keys() == taken[0][1].keys()


RULES = [*REDUCE, "trimmed-mean:0.3"]


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spool]:
    opened = Spool(tmp_path_factory.mktemp("spool"), 1 << 10)
    yield opened
    opened.close()


def combined(rule: str, spool: Spool, values: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """float64[d]: what a rule makes of values[m, d], handed over in two tensors."""
    half = values.shape[1] // 2
    begun = {} if start is None else {"a": start[:half], "b": start[half:].reshape(1, -1)}
    taken = replace(parse(rule), spool=spool).combining(begun)
    for i, row in enumerate(values):
        taken.add(1.0 + i, {"a": row[:half], "b": row[half:].reshape(1, -1)})
    found = taken.tensors()
    assert taken.total == len(values)
    return np.concatenate([found["a"], found["b"].ravel()])


def drawn(seed: int, m: int, d: int) -> np.ndarray:
    """Numbers of many sizes, some of them equal, some 0."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(m, d)) * 10.0 ** rng.integers(-6, 7, (m, d))
    return np.where(rng.random((m, d)) < 0.2, 0.0, np.where(rng.random((m, d)) < 0.2, 1.5, values))


SEEDS = {"seed": st.integers(0, 999), "m": st.integers(1, 12), "d": st.integers(2, 30)}


@given(**SEEDS)
@settings(max_examples=20)
def test_the_median_is_numpys(spool, seed, m, d):
    values = drawn(seed, m, d)
    assert np.array_equal(combined("median", spool, values), np.median(values, axis=0))


@given(**SEEDS, share=st.sampled_from(["0.1", "0.2", "0.25", "0.45"]))
@settings(max_examples=20)
def test_the_trimmed_mean_is_the_formula(spool, seed, m, d, share):
    """ceil(share m) numbers go at either end; of so few that none would be left, all but one or two."""
    values = drawn(seed, m, d)
    cut = min(-int(-Fraction(share) * m // 1), (m - 1) // 2)
    assert cut >= 1 or m < 3
    want = [float(np.sort(column)[cut : m - cut].mean()) for column in values.T]
    np.testing.assert_allclose(combined(f"trimmed-mean:{share}", spool, values), want, rtol=1e-12, atol=1e-12)


@given(**SEEDS)
@settings(max_examples=20)
def test_clipping_is_the_formula(spool, seed, m, d):
    """start + mean of (x - start) min(1, median norm / norm)."""
    values, start = drawn(seed, m, d), drawn(seed + 1, 1, d)[0]
    norms = np.linalg.norm(values - start, axis=1)
    most = np.sort(norms[norms > 0])[(np.count_nonzero(norms) - 1) // 2] if norms.any() else 0.0
    want = start + np.mean(
        [(x - start) * min(1.0, most / (n or 1.0)) for x, n in zip(values, norms, strict=True)], axis=0
    )
    close = 1e-12 * max(most, np.abs(start).max())
    np.testing.assert_allclose(combined("norm-clip", spool, values, start), want, rtol=0, atol=close)


@given(**SEEDS)
@settings(max_examples=20)
def test_the_vote_is_the_sign_of_most_times_the_usual_size(spool, seed, m, d):
    values = drawn(seed, m, d)
    sizes = np.sqrt(np.square(values).mean(axis=1))
    usual = np.sort(sizes[sizes > 0])[(np.count_nonzero(sizes) - 1) // 2] if sizes.any() else 0.0
    most = np.sign((values > 0).sum(axis=0) - (values < 0).sum(axis=0))
    np.testing.assert_allclose(combined("sign-vote", spool, values), usual * most, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@given(**SEEDS, order=st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_the_order_of_the_replies_changes_no_bit(rule, spool, seed, m, d, order):
    values, start = drawn(seed, m, d), drawn(seed + 1, 1, d)[0]
    values[np.random.default_rng(seed).random((m, d)) < 0.1] = -0.0
    shuffled = values[order.sample(range(m), m)]
    assert combined(rule, spool, values, start).tobytes() == combined(rule, spool, shuffled, start).tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_so_many_columns_at_a_time_change_no_bit(rule, spool, monkeypatch):
    values = drawn(3, 9, 41)
    whole = combined(rule, spool, values)
    monkeypatch.setattr(aggregation, "NUMBERS", 9 * 7)
    assert combined(rule, spool, values).tobytes() == whole.tobytes()


def test_a_number_that_a_client_could_not_have_is_left_out():
    """Three of four clients have the first number, one the second, nobody the third."""
    none = np.nan
    values = np.array([[1.0, none, none], [5.0, none, none], [2.0, 8.0, none], [none, none, none]])
    assert trimmed(values, Fraction(1, 2)).tolist() == [0.75 * 2, 0.25 * 8, 0.0]
    assert trimmed(values, Fraction(0)).tolist() == np.nansum(values / 4, axis=0).tolist()
    assert aggregation.vote(values, 4.0).tolist() == [3.0, 1.0, 0.0]
    assert aggregation.size_of(values[2]) == np.sqrt(34)
    assert aggregation.size_of(values[3]) == 0.0


def test_numbers_are_kept_as_they_came(spool):
    """Integers of 32 bits and float64 lose nothing on the disk; float32 and float16 take 4 bytes."""
    largest = {"int32": 2**31 - 1, "float64": 1 + 2**-50, "float32": 1 + 2**-20, "float16": 1.5}
    for dtype, value in largest.items():
        taken = Rule("median", spool=spool).combining()
        for _ in range(3):
            taken.add(1.0, {"x": np.full(2, value, dtype)})
        assert taken.tensors()["x"].tolist() == [value, value]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("krum", "one of mean, median, trimmed-mean, norm-clip, sign-vote"),
        ("median:0.2", "trimmed-mean a share"),
        ("mean:0.5", "only mean takes a number, from 1 on"),
        *((f"trimmed-mean:{share}", "between 0 and 0.5") for share in ("0.5", "1/0", "nan", "-0.2")),
    ],
)
def test_what_is_no_rule_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_a_rule_has_its_text():
    assert [parse(text).text for text in (*RULES, "mean")] == [*RULES, "mean"]
    assert parse("trimmed-mean:0.2") == parse("trimmed-mean")


def after(case: str, payloads: Sequence[Payload], rule: Rule, folder: Path, order: Sequence[int] = ()) -> Any:
    with harness.gathered(*begun(case), payloads, folder, order, rule) as taken:
        return taken.aggregate()


def replies_of(case: str) -> list[Payload]:
    return [harness.usual(*begun(case), c) for c in range(CLIENTS)]


@pytest.mark.parametrize("rule", REDUCE)
@pytest.mark.parametrize("case", harness.CASES)
def test_every_method_takes_a_rule_or_says_why_not(case, rule, tmp_path):
    """Neither the order of the replies nor the rows that a client states make a difference."""
    method, state = begun(case)
    parsed = parse(rule)
    if why := method.rule_problem(parsed, CLIENTS):
        assert "; use aggregation=" in why
        return
    payloads = replies_of(case)
    there = after(case, payloads, parsed, tmp_path)
    assert bits(there) == bits(after(case, payloads, parsed, tmp_path, [3, 1, 4, 0, 2])) != bits(state)
    light = [Payload(p.arrays, {**p.scalars, "n": 1}) for p in payloads]
    if "scaffold" not in case and "fedpeptao" not in case:  # whose number of steps goes by rows
        assert bits(there) == bits(after(case, light, parsed, tmp_path))


def test_mezos_integers_and_fedits_tensors_are_numpys_medians(tmp_path):
    payloads = replies_of("mezo")
    want = np.rint(np.median([p.array("c") for p in payloads], axis=0))
    assert after("mezo", payloads, parse("median"), tmp_path).ledger.coefficients.tolist() == want.tolist()
    payloads = replies_of("fedit")
    for name, tensor in after("fedit", payloads, parse("median"), tmp_path).tensors.items():
        want = np.median([p.array(name) for p in payloads], axis=0)
        assert tensor.tobytes() == want.astype(np.float32).tobytes()


def test_fedkseed_combines_among_those_who_drew_the_direction(tmp_path):
    method, _ = begun("fedkseed")
    payloads = [Payload({"codes": p.array("codes")[:8]}, p.scalars) for p in replies_of("fedkseed")]
    table = np.full((CLIENTS, method.K), np.nan)
    for c, p in enumerate(payloads):
        k = draw(c, 8, method.K)
        table[c, k] = 0.0
        np.add.at(table[c], k, LogCode.decode(p.array("codes")))
    assert np.isnan(table).any()
    ledger = after("fedkseed", payloads, parse("median"), tmp_path).ledger
    have = (~np.isnan(table)).sum(axis=0)
    columns = zip(table.T, have, strict=True)
    want = np.rint([np.median(c[~np.isnan(c)]) * (n / CLIENTS) if n else 0 for c, n in columns])
    sums = np.zeros(method.K)
    np.add.at(sums, (ledger.ids & np.uint64(0xFFFFFFFF)).astype(int), ledger.coefficients)
    assert sums.tolist() == want.tolist()


def test_scaffolds_mean_moves_by_the_combined_change(tmp_path):
    """One device that lies about w moves c no further than the others do."""
    _, state = begun("fedit scaffold")
    payloads = replies_of("fedit scaffold")
    # within the bound of the door
    lie = {n: a + (a - state.tensors[n]) for n, a in payloads[4].arrays.items()}
    lying = [*payloads[:4], Payload(lie, payloads[4].scalars)]
    moved = {}
    for rule in (MEAN, parse("norm-clip")):
        honest, other = (after("fedit scaffold", p, rule, tmp_path) for p in (payloads, lying))
        assert other.seen.tolist() == honest.seen.tolist() == list(range(CLIENTS))
        moved[rule.name] = methods.norm(other.c[n] - honest.c[n] for n in other.c)
    assert moved["norm-clip"] < 0.7 * moved["mean"]


def test_memory_does_not_grow_with_the_clients(tmp_path, monkeypatch):
    """Half a megabyte a reply: 40 of them take no more memory than 4."""
    monkeypatch.setattr(aggregation, "NUMBERS", 1 << 14)

    def peak(clients: int) -> int:
        spool = Spool(tmp_path, 1 << 12)
        taken = Rule("trimmed-mean", spool=spool).combining()
        tracemalloc.start()
        for c in range(clients):
            taken.add(1.0, {"w": np.full(1 << 17, c, np.float32)})
        taken.tensors()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        spool.close()
        return most

    assert peak(40) < peak(4) + (1 << 18)


REFUSED = [
    ("fedit", {"average": "product"}, "median", 10, "use average=separate"),
    ("fedit", {"scaffold": True}, "median", 10, "a median leaves out adds up"),
    ("fedpetuning", {"scaffold": True}, "trimmed-mean", 10, "use aggregation=norm-clip"),
    ("fedpetuning", {}, "sign-vote", 10, "signs do not say how far"),
    ("fedpeptao", {}, "sign-vote", 10, "signs do not say how far"),
    ("fedkseed", {"backprop": 0.5}, "norm-clip", 10, "set backprop to 0 or 1"),
    ("fedkseed", {}, "median", 8, "a direction of 1024 is drawn by 1.4 of 8 clients in a round"),
    ("onebyte", {}, "trimmed-mean", 10, "or wire=sign, where all try the same"),
    ("onebyte", {"wire": "sign"}, "median", 10, "use aggregation=sign-vote"),
    ("fwdllm", {}, "median", 10, "use aggregation=norm-clip"),
    ("mezo", {}, "median", 2, "2 clients are asked in a round"),
]


@pytest.mark.parametrize(("name", "values", "rule", "asked", "says"), REFUSED)
def test_what_does_not_go_together_is_refused(name, values, rule, asked, says):
    method = methods.make(name, values)
    assert says in method.rule_problem(parse(rule), asked)
    assert method.rule_problem(MEAN, asked) == ""


def test_a_method_of_ones_own_keeps_its_rule():
    class Own(fedit.Method):
        """A method that takes no rule."""

        cannot_combine = methods.Method.cannot_combine

    assert "leave aggregation out" in Own().rule_problem(parse("median"), 9)


def one_number(rule: str, w: float, deltas: list[float], eta: float) -> float:
    """A single weight through several rounds, as the papers write it."""
    b1, b2, tau, m, v = 0.9, 0.99, 1e-3, 0.0, 1e-3 * 1e-3
    for g in deltas:
        if rule == "avg":
            w += eta * g
            continue
        if rule == "avgm":
            m = b1 * m + g
            w += eta * m
            continue
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        w += eta * m / (math.sqrt(v) + tau)
    return w


@pytest.mark.parametrize(("rule", "own"), [("avg", 1.0), ("avgm", 1.0), ("adam", 1e-3)])
@pytest.mark.parametrize("lr", [0.0, 0.3])
@given(seed=st.integers(0, 999), rounds=st.integers(1, 6), scale=st.sampled_from([1e-5, 1e-2, 3.0]))
@settings(max_examples=10)
def test_several_rounds_equal_the_papers_updates(rule, own, lr, seed, rounds, scale):
    rng = np.random.default_rng(seed)
    w = {"a": rng.normal(size=(2, 3)).astype(np.float32), "b": rng.normal(size=4)}
    deltas = [{n: rng.normal(size=t.shape) * scale for n, t in w.items()} for _ in range(rounds)]
    point, moments = w, {}
    for delta in deltas:
        point, moments = aggregation.server_step(rule, point, delta, moments, lr=lr)
    for name, start in w.items():
        for i, value in np.ndenumerate(start):
            want = one_number(rule, float(value), [d[name][i] for d in deltas], lr or own)
            assert point[name][i] == pytest.approx(want, rel=1e-12, abs=1e-14)
        assert point[name].dtype == np.float64


def test_scaffolds_variate_is_the_mean_gradient_of_the_walk():
    """Option II: with w_k = w - eta sum_t (g_t - c_k + c), the new c_k is the mean of the g_t."""
    rng = np.random.default_rng(5)
    w, c_k, c = ({"x": rng.normal(size=6)} for _ in range(3))
    gradients, eta = rng.normal(size=(7, 6)), 0.03
    y = w["x"].copy()
    for g in gradients:
        y -= eta * (g - c_k["x"] + c["x"])
    found = aggregation.client_variate(c_k, c, w, {"x": y}, 7 * eta)["x"]
    np.testing.assert_allclose(found, gradients.mean(axis=0), rtol=0, atol=1e-12)
    # nobody has a variate before round 1
    first = aggregation.client_variate({}, {}, w, {"x": w["x"] - eta * gradients.sum(0)}, 7 * eta)["x"]
    np.testing.assert_allclose(first, found, atol=1e-12)
