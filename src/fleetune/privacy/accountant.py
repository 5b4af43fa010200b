"""Account differential privacy over releases by Google's `dp-accounting`; add or remove one (client, or row).

The stated epsilon is by privacy loss distributions (PLD; Koskela et al. 2020, arXiv 1906.03049), which are tight.  Noise for a
budget is sought by Renyi divergences (Mironov 2017, arXiv 1702.07476), quick and never too low, then lowered by PLD.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, Final

from fleetune.common.shell import pip_install
from fleetune.errors import UsageError

ORDERS: Final = (*(1.5 + x / 10 for x in range(95)), *range(11, 64), 128, 256, 512)  # of Renyi divergences
FINE: Final = 7  # halvings of the interval between the two accountants' noise
LOOSE: Final = 0.6  # of the noise by Renyi divergences: less never suffices
MOST_NOISE: Final = 1e6  # multiplier
COARSE: Final = 1000  # releases
LARGE: Final = 100.0  # epsilon, from which on it is a bound


def epsilon(noise: float, q: float, releases: int, delta: float) -> float:
    """Return epsilon after so many Gaussian releases of multiplier `noise`, each on a Poisson sample of rate q (1: all).

    Infinity without noise; 0 before the first release.  Without sampling, so many Gaussian releases are one of multiplier
    noise / sqrt(releases), exactly.  Beyond `LARGE` it is the bound by Renyi divergences: nobody needs three digits of that;
    so it is where privacy losses are far below the PLD's interval, which makes that the looser of the two bounds.
    """
    if not releases:
        return 0.0
    return _epsilon(noise, q, releases, delta) if noise else math.inf


@functools.lru_cache(maxsize=4096)
def _epsilon(noise: float, q: float, releases: int, delta: float) -> float:
    if q >= 1:
        exact = _accounting().gaussian_mechanism.get_epsilon_gaussian
        return float(exact(noise / math.sqrt(releases), delta))
    if (bound := renyi_epsilon(noise, q, releases, delta)) > LARGE:
        return bound
    interval = (
        1e-3 if releases <= COARSE else 1e-4
    )  # of privacy losses, rounded up: costs 0.1 % of epsilon at most
    accountant = _accounting().pld.PLDAccountant(value_discretization_interval=interval)
    accountant.compose(_release(noise, q), releases)
    return min(bound, float(accountant.get_epsilon(delta)))


def renyi_epsilon(noise: float, q: float, releases: int, delta: float) -> float:
    """Return the upper bound on `epsilon` by Renyi divergences."""
    accountant, told = _accounting().rdp.RdpAccountant(ORDERS), logging.getLogger("absl")
    level = told.level
    try:
        told.setLevel(
            logging.ERROR
        )  # it warns of orders that it leaves out, which makes the bound larger, not wrong
        accountant.compose(_release(noise, q), releases)
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
    while (
        epsilon(found / digits, q, releases, delta) > budget
    ):  # near PLD's interval, more noise may cost more
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
    try:
        import dp_accounting
        import dp_accounting.gaussian_mechanism
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise UsageError(
            "differential privacy is accounted by dp-accounting, which is not installed",
            hint=pip_install("privacy"),
        ) from error
    return dp_accounting
