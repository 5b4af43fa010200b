# SPDX-License-Identifier: Apache-2.0
"""Averages against the same in float64, and products against the dense product's own SVD."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.tuning.exchange.aggregation import cut, product_mean, weighted_mean

PAIRS = {"q": ("q.B", "q.A"), "v": ("v.B", "v.A")}
SHAPES = {"q": (12, 9), "v": (5, 14)}


def clients(seed: int, count: int, rank: int) -> list[tuple[float, dict[str, np.ndarray]]]:
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


def dense_mean(taken: list[tuple[float, dict[str, np.ndarray]]], layer: str) -> np.ndarray:
    total = sum(n for n, _ in taken)
    return sum(n / total * (t[f"{layer}.B"].astype(float) @ t[f"{layer}.A"].astype(float)) for n, t in taken)


# --- weighted mean ------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), count=st.integers(1, 9), scale=st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=30)
def test_weighted_mean_is_the_float64_mean_rounded_once(seed, count, scale):
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 1000, count)
    values = (rng.normal(size=(count, 4, 3)) * scale).astype(np.float32)
    mean = weighted_mean((float(k), {"w": v, "b": v[0]}) for k, v in zip(n, values, strict=True))
    want = np.average(values.astype(np.float64), axis=0, weights=n)
    assert list(mean) == ["w", "b"]
    assert mean["w"].dtype == np.float32
    close = np.finfo(np.float32).eps * np.abs(values).max()
    np.testing.assert_allclose(mean["w"], want, rtol=0, atol=close)
    np.testing.assert_allclose(mean["b"], want[0], rtol=0, atol=close)


@given(order=st.permutations(list(range(8))))
@settings(max_examples=20)
def test_weighted_mean_does_not_mind_the_order(order):
    taken = clients(3, 8, 2)
    first, other = weighted_mean(taken), weighted_mean([taken[i] for i in order])
    for name in first:
        np.testing.assert_allclose(other[name], first[name], rtol=1e-6, atol=1e-7)


def test_weighted_mean_keeps_what_float32_sums_would_lose():
    values = [np.array([x], np.float32) for x in (3e7, 1.0, -3e7, 1.0)]
    assert weighted_mean((1.0, {"w": v}) for v in values)["w"].tolist() == [0.5]
    half = [(1.0, {"w": np.array([60000.0], np.float16)})] * 3  # whose sum is no float16
    assert weighted_mean(half)["w"].tolist() == [60000.0]


def test_weighted_mean_of_nobody_and_of_one():
    assert weighted_mean([]) == {}
    value = np.array([1.1, -2.2], np.float32)
    assert (weighted_mean([(7.0, {"w": value})])["w"] == value).all()


def test_weighted_mean_takes_replies_one_at_a_time():
    alive = []

    def stream() -> Iterator[tuple[float, dict[str, np.ndarray]]]:
        for i in range(5):
            alive.append(i)
            yield 1.0, {"w": np.full(2, i, np.float32)}
            assert alive == list(range(i + 1))

    assert weighted_mean(stream())["w"].tolist() == [2.0, 2.0]


# --- product mean -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "rank"), [(1, 2), (3, 2), (6, 1), (4, 4)])
def test_product_mean_is_the_best_of_its_rank(count, rank):
    taken = clients(count, count, rank)
    tensors, lost = mean_of(taken)
    cut = whole = 0.0
    for layer in PAIRS:
        dense = dense_mean(taken, layer)
        u, s, vt = np.linalg.svd(dense, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        got = tensors[f"{layer}.B"].astype(float) @ tensors[f"{layer}.A"].astype(float)
        np.testing.assert_allclose(got, best, atol=1e-5 * s[0])
        assert tensors[f"{layer}.B"].shape == taken[0][1][f"{layer}.B"].shape
        assert tensors[f"{layer}.A"].shape == taken[0][1][f"{layer}.A"].shape
        assert {tensors[f"{layer}.{m}"].dtype.name for m in "AB"} == {"float32"}
        cut += (s[rank:] ** 2).sum()
        whole += (s**2).sum()
    assert lost == pytest.approx(cut / whole, rel=1e-9, abs=1e-15)
    assert (lost > 0.01) == (count > 1)


def test_product_mean_balances_its_factors():
    tensors, _ = mean_of(clients(0, 3, 2))
    for b, a in PAIRS.values():
        np.testing.assert_allclose(
            tensors[b].T @ tensors[b], tensors[a] @ tensors[a].T, atol=1e-5 * np.abs(tensors[b]).max() ** 2
        )


def test_product_mean_is_exact_when_the_rank_suffices():
    rng = np.random.default_rng(1)
    shared = {m: rng.normal(size=s).astype(np.float32) for m, s in {"B": (12, 1), "A": (1, 9)}.items()}
    taken = []
    for n in (1.0, 5.0, 2.0):  # rank 3 adapters that share one column space of rank 1: the mean has rank 1
        mix = rng.normal(size=(1, 3)).astype(np.float32)
        taken.append((n, {"q.B": shared["B"] @ mix, "q.A": mix.T @ shared["A"]}))
    tensors, lost = mean_of(taken, {"q": PAIRS["q"]})
    want = dense_mean(taken, "q")
    np.testing.assert_allclose(tensors["q.B"] @ tensors["q.A"], want, atol=1e-5 * np.abs(want).max())
    assert lost < 1e-12


def test_the_plain_average_is_something_else():
    taken = clients(2, 2, 2)
    mean = weighted_mean(taken)
    want = dense_mean(taken, "q")
    product, _ = mean_of(taken)
    apart = np.linalg.norm(mean["q.B"] @ mean["q.A"] - want)
    assert np.linalg.norm(product["q.B"] @ product["q.A"] - want) < apart / 1.5


def test_product_mean_does_not_mind_the_order():
    taken = clients(4, 5, 3)
    first, lost = mean_of(taken)
    other, lost_too = mean_of(taken[::-1])
    for b, a in PAIRS.values():
        np.testing.assert_allclose(other[b] @ other[a], first[b] @ first[a], atol=1e-5)
    assert lost == pytest.approx(lost_too, rel=1e-9)


def test_a_layer_thinner_than_the_rank_keeps_its_shape():
    rng = np.random.default_rng(6)
    taken = [
        (
            2.0,
            {
                "q.B": rng.normal(size=(3, 8)).astype(np.float32),
                "q.A": rng.normal(size=(8, 20)).astype(np.float32),
            },
        )
        for _ in range(2)
    ]
    tensors, lost = mean_of(taken, {"q": PAIRS["q"]})
    assert tensors["q.B"].shape == (3, 8)
    assert tensors["q.A"].shape == (8, 20)
    np.testing.assert_allclose(tensors["q.B"] @ tensors["q.A"], dense_mean(taken, "q"), atol=1e-4)
    assert lost == 0.0


def test_adapters_of_zeros_average_to_zeros():
    taken = [(1.0, {"q.B": np.zeros((12, 2), np.float32), "q.A": np.ones((2, 9), np.float32)})] * 3
    tensors, lost = mean_of(taken, {"q": PAIRS["q"]})
    assert lost == 0.0
    assert not (tensors["q.B"] @ tensors["q.A"]).any()
    assert (tensors["q.A"] == 1).all()  # what a factor of zeros would need to learn again


# --- devices of unlike ranks --------------------------------------------------------------------------------


def mixed(
    seed: int, ranks: list[int], top: int
) -> tuple[dict[str, np.ndarray], list[tuple[float, dict[str, np.ndarray]]]]:
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
        assert tensors[f"{layer}.B"].shape == start[f"{layer}.B"].shape
        kept, whole = kept + (s[:4] ** 2).sum(), whole + (s**2).sum()
    assert lost == pytest.approx(1 - kept / whole, abs=1e-9)
    if zeros and sum(ranks) <= 4:
        assert lost < 1e-12  # nothing had to go


def test_a_device_of_low_rank_that_changes_nothing_changes_nothing():
    start, _ = mixed(7, [], 4)
    tensors, lost = product_mean([(3.0, cut(start, PAIRS, 1)), (5.0, cut(start, PAIRS, 3))], PAIRS, start)
    for b, a in PAIRS.values():
        np.testing.assert_allclose(tensors[b] @ tensors[a], start[b] @ start[a], atol=1e-5)
    assert lost < 1e-12


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
