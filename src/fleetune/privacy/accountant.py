"""Account differential privacy over releases by Google's `dp-accounting`; add or remove one (client, or row).

The stated epsilon is by privacy loss distributions (PLD; Koskela et al. 2020, arXiv 1906.03049), which are tight.  Noise for a
budget is sought by Renyi divergences (Mironov 2017, arXiv 1702.07476), quick and never too low, then lowered by PLD.
"""

import functools
import logging
import math
from typing import Any, Final

from fleetune.common.display import check_installed

ORDERS: Final = (*(1.5 + x / 10 for x in range(95)), *range(11, 64), 128, 256, 512)  # of Renyi divergences
FINE: Final = 7  # halvings of the interval between the two accountants' noise
LOOSE: Final = 0.6  # of the noise by Renyi divergences: less never suffices
MOST_NOISE: Final = 1e6  # multiplier
COARSE: Final = 1000  # releases
LARGE: Final = 100.0  # epsilon, from which on it is a bound


Releases = tuple[tuple[float, float, int], ...]  # (noise multiplier, rate of the sample or 1: all, how many)


def epsilon(noise: float, q: float, releases: int, delta: float) -> float:
    """Return epsilon after so many Gaussian releases of multiplier `noise`, each on a Poisson sample of rate q (1: all)."""
    return epsilon_of(((noise, q, releases),), delta)


@functools.lru_cache(maxsize=4096)
def epsilon_of(releases: Releases, delta: float) -> float:
    """Return epsilon after releases of several kinds.

    Infinity without noise; 0 before the first release.  Without sampling, Gaussian releases of multipliers z_i are one of
    (sum z_i^-2)^(-1/2), exactly.  Beyond `LARGE` it is the bound by Renyi divergences: nobody needs three digits of that;
    so it is where privacy losses are far below the PLD's interval, which makes that the looser of the two bounds.
    """
    releases = tuple(made for made in releases if made[2])
    if not all(noise for noise, _, _ in releases):
        return math.inf
    if all(q >= 1 for _, q, _ in releases):
        exact = _accounting().gaussian_mechanism.get_epsilon_gaussian
        return float(exact(sum(n / z**2 for z, _, n in releases) ** -0.5, delta)) if releases else 0.0
    if (bound := _renyi(releases, delta)) > LARGE:
        return bound
    # of privacy losses, rounded up: costs 0.1 % of epsilon at most
    interval = 1e-3 if sum(n for _, _, n in releases) <= COARSE else 1e-4
    accountant = _accounting().pld.PLDAccountant(value_discretization_interval=interval)
    for noise, q, n in releases:
        accountant.compose(_release(noise, q), n)
    return min(bound, float(accountant.get_epsilon(delta)))


def renyi_epsilon(noise: float, q: float, releases: int, delta: float) -> float:
    """Return the upper bound on `epsilon` by Renyi divergences."""
    return _renyi(((noise, q, releases),), delta)


def _renyi(releases: Releases, delta: float) -> float:
    accountant, told = _accounting().rdp.RdpAccountant(ORDERS), logging.getLogger("absl")
    level = told.level
    try:
        # it warns of orders that it leaves out, which makes the bound larger, not wrong
        told.setLevel(logging.ERROR)
        for noise, q, n in releases:
            accountant.compose(_release(noise, q), n)
    finally:
        told.setLevel(level)
    return float(accountant.get_epsilon(delta))


def noise_for(budget: float, q: float, releases: int, delta: float) -> float:
    """Return a noise multiplier of three digits after which `epsilon` is at most `budget`: the least, unless that is tiny.

    ValueError where none below 10^6 suffices.
    """
    high = 0.2
    while renyi_epsilon(high, q, releases, delta) > budget:
        high *= 1.2
        if high > MOST_NOISE:
            raise ValueError(f"no noise gives epsilon {budget:g} after {releases:,} releases")
    low = high * LOOSE
    for _ in range(FINE):
        middle = math.sqrt(low * high)
        if epsilon(middle, q, releases, delta) <= budget:
            high = middle
        else:
            low = middle
    digits = 10.0 ** (2 - math.floor(math.log10(high)))
    found = math.ceil(high * digits)
    # near PLD's interval, more noise may cost more
    while epsilon(found / digits, q, releases, delta) > budget:
        found += 1
    return found / digits


def releases_within(budget: float, noise: float, q: float, most: int, delta: float) -> int:
    """Return after how many of `most` releases epsilon is still at most `budget`."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if epsilon(noise, q, middle, delta) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def version() -> str:
    """Return the accountant's name and version."""
    from importlib.metadata import version as of

    _accounting()
    return f"dp-accounting {of('dp-accounting')}, PLD"


def _release(noise: float, q: float) -> Any:
    events = _accounting()
    release = events.GaussianDpEvent(noise)
    return release if q >= 1 else events.PoissonSampledDpEvent(q, release)


def _accounting() -> Any:
    """Return the package; UsageError where it is missing."""
    check_installed("the account of privacy", "privacy", "dp_accounting")
    import dp_accounting
    import dp_accounting.gaussian_mechanism
    import dp_accounting.pld
    import dp_accounting.rdp

    return dp_accounting
