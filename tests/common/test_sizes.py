# SPDX-License-Identifier: Apache-2.0
"""Sizes of memory and speeds of a line as people write them."""

from __future__ import annotations

import pytest

from fleetune.common import settings as sizes
from fleetune.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("512 MB", 512 * 10**6),
        ("2GiB", 1 << 31),
        ("8e9", 8 * 10**9),
        ("1.5g", 1_500_000_000),
        (" 640 kb ", 640_000),
        ("16 KiB", 16384),
        ("1TB", 10**12),
        ("1234567", 1234567),
        ("123 b", 123),
        ("2E3MB", 2 * 10**9),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert sizes.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["4", "1.5", "512", " 8 "])
def test_a_number_that_is_no_memory_is_asked_about(text: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean {text.strip()}GB"):
        sizes.parse_bytes(text)


@pytest.mark.parametrize(
    "text", ["", "GB", "-4GB", "4 XB", "4GBs", "0", "0GB", "nan", "inf", "1e999", "4,5GB", "4 4GB", "4ib"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--ram"):
        sizes.parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1Mbps", 125_000),
        ("500kbit/s", 62_500),
        ("2 MB/s", 2e6),
        ("1 Gbit/s", 125e6),
        ("9600bps", 1200),
        ("1.5 MiB/s", 1.5 * 2**20),
        ("3Kb/s", 375),
        ("10 Mbits/s", 1.25e6),
    ],
)
def test_speeds(text: str, rate: float) -> None:
    assert sizes.parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "1M", "1e6", "Mbps", "-1Mbps", "0 Mbps", "1 Mbp", "fast", "1Mb", "1 parsec/s", "1e999bps"]
)
def test_what_is_no_speed(text: str) -> None:
    with pytest.raises(UsageError, match="--uplink"):
        sizes.parse_rate(text)


def test_nothing_stays_nothing() -> None:
    assert sizes.parse_bytes(None) is None
    assert sizes.parse_rate(None) is None
