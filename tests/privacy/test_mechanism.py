"""Client-level differential privacy: the bound on a client, the noise, and the known numbers of accountants."""

import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.privacy import mechanism
from fleetune.privacy.mechanism import Privacy, PrivateSum, S, discrete_gaussian, units_of

NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=64)
P = Privacy(clip=2.0, noise=0.7, q=0.5, N=100)


def renyi(z: float, q: float, alpha: int) -> float:
    """Mironov, Talwar, Zhang 2019 (arXiv 1908.10530), section 3.3: the bound of order alpha, a whole number, in float64."""
    sampled = [math.log(math.comb(alpha, k)) + (alpha - k) * math.log1p(-q) for k in range(alpha + 1)]
    logs = [log + k * math.log(q) + k * (k - 1) / (2 * z * z) for k, log in enumerate(sampled)]
    top = max(logs)
    return (top + math.log(math.fsum(math.exp(x - top) for x in logs))) / (alpha - 1)


def by_moments(z: float, q: float, steps: int, delta: float) -> float:
    """Abadi et al. 2016 (arXiv 1607.00133), Theorem 2, tail bound."""
    return min(steps * renyi(z, q, a) + math.log(1 / delta) / (a - 1) for a in range(2, 200))


@pytest.mark.parametrize(
    ("z", "q", "steps", "delta", "moments", "pld"),
    [
        (4.0, 0.01, 10_000, 1e-5, 1.26, 0.9470),  # Abadi et al. 2016
        (1.3, 256 / 60_000, 15 * 60_000 // 256, 1e-5, 1.19, None),  # TensorFlow Privacy's tutorial: MNIST
        (1.1, 256 / 60_000, 60 * 60_000 // 256, 1e-5, 3.01, 2.382),
        (0.7, 256 / 60_000, 45 * 60_000 // 256, 1e-5, 7.10, None),
    ],
)
def test_epsilon_of_published_runs(z, q, steps, delta, moments, pld):
    """The published numbers are of the moments accountant; ours are tighter, and never above the Renyi bound."""
    assert by_moments(z, q, steps, delta) == pytest.approx(moments, rel=4e-3)  # of whole orders alone
    ours = mechanism.epsilon(z, q, steps, delta)
    assert ours < mechanism.renyi_epsilon(z, q, steps, delta) < moments
    if pld is not None:
        assert ours == pytest.approx(pld, abs=1e-3)


@pytest.mark.parametrize(
    ("clients", "asked", "rounds", "z", "sampled", "all_take_part"),
    [(100, 10, 100, 1.0, 4.78, 14), (1000, 100, 100, 1.0, 5.97, 16), (10_000, 200, 500, 0.8, 4.7, None)],
)
def test_epsilon_of_the_planning_table(clients, asked, rounds, z, sampled, all_take_part):
    delta = 0.1 / clients
    assert mechanism.epsilon(z, asked / clients, rounds, delta) == pytest.approx(sampled, abs=0.05)
    if all_take_part is not None:  # the claim of sampling is most of the number
        assert mechanism.epsilon(z, 1.0, 1, delta) < sampled < all_take_part
        assert mechanism.epsilon(z, 1.0, rounds, delta) > 10 * sampled


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Balle and Wang 2018 (arXiv 1805.06530), Theorem 8: the exact delta of one release."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    a, b = 1 / (2 * sigma), epsilon * sigma
    return phi(a - b) - math.exp(epsilon) * phi(-a - b)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 8.0])
def test_noise_of_one_release_is_the_least_that_suffices(epsilon):
    """Within a hundredth; at epsilon 1 and delta 1e-5 the exact multiplier is 3.7306."""
    z = mechanism.noise_for(epsilon, 1.0, 1, 1e-5)
    assert gaussian_delta(z, epsilon) <= 1e-5 < gaussian_delta(z * 0.99, epsilon)
    assert epsilon != 1.0 or 3.7306 <= z < 3.76


@pytest.mark.parametrize(("q", "rounds"), [(1.0, 10), (0.1, 100)])
def test_noise_for_a_budget_keeps_it_to_the_last_round(q, rounds):
    z = mechanism.noise_for(8.0, q, rounds, 1e-4)
    assert 7.8 < mechanism.epsilon(z, q, rounds, 1e-4) <= 8.0
    most = mechanism.releases_within(8.0, z, q, 10 * rounds, 1e-4)
    assert rounds <= most <= rounds + rounds // 10
    assert mechanism.releases_within(8.0, z / 20, q, rounds, 1e-4) == 0


@pytest.mark.parametrize(("budget", "q", "n", "delta"), [(0.006, 0.01, 1000, 1e-4), (0.001, 0.1, 100, 1e-3)])
def test_noise_for_a_tiny_budget_keeps_it_as_well(budget, q, n, delta):
    """Where the losses of a release are far below the interval of the PLD, which then is the looser bound."""
    z = mechanism.noise_for(budget, q, n, delta)
    assert 0 < max(mechanism.epsilon(z, q, releases, delta) for releases in (1, n // 2, n)) <= budget


@given(
    st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=0, max_size=4),
    st.lists(NUMBERS, min_size=3, max_size=3),
)
def test_a_client_moves_the_sum_by_the_clip_at_most(others, one):
    """Neighbouring rounds, with and without a client that may send anything: the integers differ by C / g at most, exactly."""
    start = {"w": np.array([0.5, -2.0]), "b": np.array([3.0])}

    def total(replies: Sequence[list[float]]) -> list[int]:
        made = PrivateSum(P, start)
        for x in replies:
            made.add(1e12, {"w": np.array(x[:2]), "b": np.array(x[2:])})
        return [int(v) for part in made._sums.values() for v in part]

    apart = [a - b for a, b in zip(total([*others, one]), total(others), strict=True)]
    assert sum(Fraction(d) ** 2 for d in apart) <= (Fraction(P.clip) / Fraction(P.grid)) ** 2


def test_a_move_within_the_clip_stays_to_the_grid():
    """Nothing is scaled that needs not be, and truncation is below a unit (2^-24 of the noise)."""
    move = np.random.default_rng(0).normal(size=1000)
    move *= P.clip / 2 / np.linalg.norm(move)
    units = units_of({"w": move}, P.clip, P.grid)["w"]
    assert np.abs(units * P.grid - move).max() < P.grid + 2e-6 * np.abs(move).max()
    far = units_of({"w": 1e6 * move}, P.clip, P.grid)["w"] * P.grid
    assert np.linalg.norm(far) == pytest.approx(P.clip, rel=1e-5)
    assert far == pytest.approx(2 * move, rel=1e-4, abs=P.grid)


def test_the_grid_lengthens_no_vector_of_many_numbers():
    """Rounding to the nearest would: by up to half a unit in each of these numbers, which together go past the clip."""
    most = P.clip / P.grid
    d = next(d for d in range(1 << 18, 1 << 19) if 0.6 < most / math.sqrt(d) % 1 < 0.9)
    y = units_of({"w": np.full(d, 1e3)}, P.clip, P.grid)["w"]
    assert y[0] == int(most / math.sqrt(d))
    assert sum(int(v) ** 2 for v in y.tolist()) <= (Fraction(P.clip) / Fraction(P.grid)) ** 2


def test_noise_is_the_discrete_gaussian():
    """Counts in bins of half a deviation against the normal distribution, which is within 1e-14 of it here (chi-square)."""
    n = 400_000
    x = discrete_gaussian(n)
    edges = np.arange(-3.0, 3.01, 0.5)
    cdf = np.array([math.erfc(-e / math.sqrt(2)) / 2 for e in edges])
    expected = n * np.diff(np.concatenate([[0], cdf, [1]]))
    counts = np.bincount(np.searchsorted(edges, x / S), minlength=len(expected))
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 45  # 13 degrees of freedom: chance 2e-5
    for bits in (x & 1, (x >> 8) & 1):  # the low bits are uniform
        assert abs(bits.mean() - 0.5) < 5 / math.sqrt(4 * n)


@pytest.mark.parametrize("replies", [0, 3])
def test_a_release_has_the_stated_variance(replies):
    """z C / (q N) a number, whoever took part, and around the exact mean."""
    d = 100_000
    start = {"w": np.zeros(d)}
    made = PrivateSum(P, start)
    move = np.zeros(d)
    move[0] = 1.0
    for _ in range(replies):
        made.add(1.0, {"w": move})
    released = made.tensors()["w"]
    deviation = P.noise * P.clip / (P.q * P.N)
    assert released[1:].std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * d))
    assert abs(released[1:].mean()) < 5 * deviation / math.sqrt(d)
    assert abs(released[0] - replies / (P.q * P.N)) < 6 * deviation


def test_noise_comes_from_the_system_alone(monkeypatch):
    """numpy's and torch's generators, which a seed decides, change nothing; the system's generator decides all of it."""
    import torch

    def drawn() -> np.ndarray:
        np.random.seed(1)
        torch.manual_seed(1)
        return discrete_gaussian(50)

    assert (drawn() != drawn()).any()
    monkeypatch.setattr(mechanism.os, "urandom", lambda n: bytes(i * 97 % 251 for i in range(n)))
    assert (drawn() == drawn()).all()


def test_clients_are_sampled_with_the_stated_probability(monkeypatch):
    """Each by itself (Poisson): the count varies as it must, and every client's share is q."""
    draws = [mechanism.sample(range(50), 0.3) for _ in range(2000)]
    counts = np.array([len(d) for d in draws])
    assert counts.mean() == pytest.approx(15, abs=5 * math.sqrt(50 * 0.21 / 2000))
    assert counts.var() == pytest.approx(50 * 0.21, rel=0.2)
    each = np.bincount(np.concatenate([np.array(d, int) for d in draws]), minlength=50) / 2000
    assert np.abs(each - 0.3).max() < 5 * math.sqrt(0.21 / 2000)
    assert mechanism.sample(range(5), 1.0) == [0, 1, 2, 3, 4]


def lower_bound(right: int, guesses: int, delta: float, canaries: int, confidence: float = 0.95) -> float:
    """Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846), Theorem 5.2 without its delta term's refinement: the least epsilon.

    Of `guesses` about which of the canaries took part, so many are right: at epsilon, each is right with a chance of at most
    e^eps / (1 + e^eps), so as many have a chance of at most a binomial tail (plus 2 m delta).
    """

    def chance(epsilon: float) -> float:
        p = 1 / (1 + math.exp(-epsilon))
        n = guesses
        return math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(right, n + 1))

    low, high = 0.0, 20.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        unlikely = chance(middle) + 2 * canaries * delta < 1 - confidence
        low, high = (middle, high) if unlikely else (low, middle)
    return low


@pytest.mark.parametrize(("noisy", "z"), [(True, 1.0), (True, 0.4), (False, 1.0)])
def test_an_auditor_finds_less_than_the_stated_epsilon(noisy, z, monkeypatch):
    """One round with 400 canary clients, each as loud as the clip allows; without the noise the same auditor finds it out."""
    m, delta = 400, 1e-6
    P = Privacy(clip=1.0, noise=z, q=1.0, N=m)
    if not noisy:
        monkeypatch.setattr(mechanism, "discrete_gaussian", lambda count: np.zeros(count, np.int64))
    there = np.frombuffer(os.urandom(m), np.uint8) < 128
    made = PrivateSum(P, {"w": np.zeros(m)})
    for canary in np.flatnonzero(there):
        made.add(1.0, {"w": np.eye(1, m, canary)[0]})
    scores = made.tensors()["w"]
    order = np.argsort(scores)
    guessed_in, guessed_out = order[-40:], order[:40]
    right = int(there[guessed_in].sum() + (~there[guessed_out]).sum())
    found = lower_bound(right, 80, delta, m)
    stated = mechanism.epsilon(z, 1.0, 1, delta)
    if noisy:
        assert found < stated
    else:
        assert found > 3.0


def test_a_private_sum_knows_no_reply_by_its_rows():
    """Weights are ignored, and other names than agreed are an error."""
    start: Mapping[str, np.ndarray] = {"w": np.zeros(2)}
    one, other = PrivateSum(P, start), PrivateSum(P, start)
    one.add(1.0, {"w": np.ones(2)})
    other.add(1e9, {"w": np.ones(2)})
    assert (one._sums["w"] == other._sums["w"]).all()
    with pytest.raises(KeyError):
        one.add(1.0, {"v": np.ones(2)})
