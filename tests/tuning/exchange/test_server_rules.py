"""Server rules against the papers' updates written once more, number by number, in Python floats."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.tuning.exchange import server_rules


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


@pytest.mark.parametrize("rule", server_rules.ETA)
@given(seed=st.integers(0, 999), rounds=st.integers(1, 6), scale=st.sampled_from([1e-5, 1e-2, 3.0]))
@settings(max_examples=10)
def test_several_rounds_equal_the_papers_updates(rule, seed, rounds, scale):
    rng = np.random.default_rng(seed)
    w = {"a": rng.normal(size=(2, 3)).astype(np.float32), "b": rng.normal(size=4)}
    deltas = [{n: rng.normal(size=t.shape) * scale for n, t in w.items()} for _ in range(rounds)]
    point, moments = w, {}
    for delta in deltas:
        point, moments = server_rules.step(rule, point, delta, moments, lr=0.3)
    for name, start in w.items():
        for i, value in np.ndenumerate(start):
            want = one_number(rule, float(value), [d[name][i] for d in deltas], 0.3)
            assert point[name][i] == pytest.approx(want, rel=1e-12, abs=1e-14)
        assert point[name].dtype == np.float64


def test_the_usual_numbers_are_the_papers():
    """beta 0.9, beta_2 0.99, tau 1e-3; the first step of Adam from m = 0 and v = tau^2."""
    delta = {"w": np.array([0.2])}
    v = 0.99e-6 + 0.01 * 0.04
    moved, moments = server_rules.step("adam", {"w": np.zeros(1)}, delta, {})
    assert moments["v/w"][0] == pytest.approx(v, rel=1e-12)
    assert moved["w"][0] == pytest.approx(1e-3 * 0.02 / (math.sqrt(v) + 1e-3), rel=1e-12)
    first, moments = server_rules.step("avgm", {"w": np.zeros(1)}, delta, {})
    second, _ = server_rules.step("avgm", first, delta, moments)
    assert first["w"][0] == pytest.approx(0.2)
    assert second["w"][0] == pytest.approx(0.2 + 0.2 * 1.9)


def test_what_cannot_be_is_refused():
    server_rules.check("adam", lr=0.1)
    with pytest.raises(ValueError, match="avg, avgm, adam"):
        server_rules.check("fedadm", lr=0.0)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="must be"):
            server_rules.check("adam", lr=bad)


def test_scaffolds_variate_is_the_mean_gradient_of_the_walk():
    """Option II: with w_k = w - eta sum_t (g_t - c_k + c), the new c_k is the mean of the g_t."""
    rng = np.random.default_rng(5)
    w, c_k, c = ({"x": rng.normal(size=6)} for _ in range(3))
    gradients, eta = rng.normal(size=(7, 6)), 0.03
    y = w["x"].copy()
    for g in gradients:
        y -= eta * (g - c_k["x"] + c["x"])
    found = server_rules.client_variate(c_k, c, w, {"x": y}, 7 * eta)["x"]
    np.testing.assert_allclose(found, gradients.mean(axis=0), rtol=0, atol=1e-12)
    # nobody has a variate before round 1
    first = server_rules.client_variate({}, {}, w, {"x": w["x"] - eta * gradients.sum(0)}, 7 * eta)["x"]
    np.testing.assert_allclose(first, found, atol=1e-12)
