"""Standard errors of losses and of their paired differences, against closed forms and the bootstrap."""

import math

import numpy as np
import pytest

from fleetune.common.paired import Difference, RowLosses, difference, ratio, within_noise


def rows(seed: int, n: int) -> tuple[RowLosses, RowLosses]:
    """The losses of n rows of unlike length under two models: hard rows are hard for both."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 60, n)
    level = rng.normal(4, 1, n)
    before = counts * level
    after = counts * (level - 0.2 + rng.normal(0, 0.1, n))
    return RowLosses(before.tolist(), counts.tolist()), RowLosses(after.tolist(), counts.tolist())


def test_with_rows_of_one_length_it_is_the_error_of_a_mean() -> None:
    values = [4.0, 5.0, 7.0, 8.0]
    R, error = ratio([3 * v for v in values], [3] * 4)
    assert R == 6.0
    assert error == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-14)


def test_the_formula_by_hand() -> None:
    R, error = ratio([2.0, 9.0], [1, 2])  # R = 11/3; residuals 2 - 11/3 and 9 - 22/3: -5/3 and 5/3
    assert pytest.approx(11 / 3, rel=1e-15) == R
    assert error == pytest.approx(math.sqrt(2 * 2 * 25 / 9) / 3, rel=1e-14)


def test_a_difference_is_the_ratio_of_what_each_row_changed_by() -> None:
    before, after = rows(1, 300)
    found, changed = difference(before, after), np.array(after.sums) - np.array(before.sums)
    assert (found.value, found.error) == ratio(changed.tolist(), before.counts)


def test_what_does_not_pair() -> None:
    before, after = rows(5, 4)
    assert difference(before, RowLosses(after.sums, [n + 1 for n in after.counts])) is None
    assert difference(before, RowLosses(after.sums[:3], after.counts[:3])) is None
    one = difference(RowLosses([2.0], [1]), RowLosses([1.0], [1]))
    assert one == Difference(-1.0, None, 1)
    assert one.noise
    bad = difference(before, RowLosses([math.inf, *after.sums[1:]], after.counts))
    assert bad.value == math.inf
    assert bad.error is None
    assert not bad.noise
    both = difference(RowLosses([math.inf], [1]), RowLosses([math.inf], [1]))
    assert math.isnan(both.value)


def test_noise_is_two_standard_errors() -> None:
    assert within_noise(0.2, 0.1)
    assert not within_noise(-0.21, 0.1)
    assert within_noise(9.0, None)
