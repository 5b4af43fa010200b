# SPDX-License-Identifier: Apache-2.0
"""Numbers and measures as people read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fleetune.common.display import change, human_bytes, human_count, human_time, improved, metric, show


@pytest.mark.parametrize(
    ("shown", "number", "text"),
    [
        (human_bytes, 0, "0 B"),
        (human_bytes, 999, "999 B"),
        (human_bytes, 999.6, "1.0 kB"),
        (human_bytes, 99_960, "100 kB"),
        (human_bytes, 999_500, "1.0 MB"),
        (human_bytes, 1.19e9, "1.19 GB"),
        (human_bytes, 5e18, "5000 PB"),
        (human_bytes, None, "-"),
        (human_time, 0.04, "0.0 s"),
        (human_time, 9.96, "10 s"),
        (human_time, 59.6, "1m00s"),
        (human_time, 124, "2m04s"),
        (human_time, 3599.6, "1h00m"),
        (human_time, 86_399, "1d00h"),
        (human_time, None, "-"),
        (human_count, 4096, "4,096"),
        (human_count, 150_000, "150 k"),
        (human_count, 134_515_008, "135 M"),
        (human_count, 1.235e9, "1.24 B"),
        (human_count, 999_600, "1.00 M"),
        (human_count, None, "-"),
    ],
)
def test_numbers_for_people(shown: Callable[[float | None], str], number: float | None, text: str) -> None:
    assert shown(number) == text


def test_change_is_in_percent_for_losses_and_in_points_else() -> None:
    assert change("loss", 2.914, 2.377) == "-18.4 %"
    assert change("rouge_l", 12.6, 24.9) == "+12.3"
    assert change("loss", None, 2.0) == change("loss", 0.0, 2.0) == change("loss", float("nan"), 1.0) == ""
    assert improved("loss", 2.9, 2.3) is True
    assert improved("rouge_l", 12.6, 9.0) is False
    assert improved("loss", 2.0, 2.0) is None
    assert show("loss", 2.37749) == "2.377"
    assert show("rouge_l", None) == "-"
    assert metric("gsm8k_acc").label == "gsm8k acc"


def test_a_loss_below_zero_has_no_percentage_and_float_noise_is_no_change() -> None:
    assert change("loss", -0.5, -0.6) == "-0.100"  # in percent of a negative base it would read +20.0
    assert change("objective", -0.25, -0.5) == "-0.2500"
    assert improved("objective", -0.25, -0.5) is True
    assert improved("loss", 4.669, 4.669 * (1 + 1e-9)) is None


def test_the_words_have_the_error_and_better_is_said_beyond_noise_alone() -> None:
    assert change("loss", 4.0, 3.656, 0.048) == "-8.6 ± 1.2 %"
    assert change("loss", 4.0, 3.996, 0.0004) == "-0.10 ± 0.01 %"
    assert change("accuracy", 50.0, 62.3, 4.0) == "+12.3 ± 4.0"
    assert change("loss", 4.0, 3.656) == "-8.6 %"
    assert improved("loss", 4.0, 3.9, 0.04) is True
    assert improved("loss", 4.0, 4.1, 0.04) is False
    assert improved("loss", 4.0, 3.9, 0.051) is None
