# SPDX-License-Identifier: Apache-2.0
"""Parse sizes and speeds as people write them."""

from __future__ import annotations

import math
import re
from typing import Final

from fleetune.errors import UsageError

LEAST: Final = 1_000_000  # a number without a unit that is smaller was meant in another one
_NUMBER = r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*"
_BYTES = re.compile(_NUMBER + r"(?:([kmgt]i?)?b?)\s*", re.IGNORECASE)
_RATE = re.compile(_NUMBER + r"([kKmMgG]i?)?(bits?|b|B)(?:/s|ps|/sec)\s*")


def parse_bytes(text: str | None, flag: str = "--ram", least: int = LEAST) -> int | None:
    """Parse a size as bytes: 4GB, 512 MB, 2GiB, 8e9.  None stays None; UsageError, which names `flag`, for anything else.

    A plain number below `least` is taken for one whose unit was forgotten.
    """
    if text is None:
        return None
    found = _BYTES.fullmatch(text)
    value = float(found[1]) * _factor(found[2]) if found else 0.0
    if not 1 <= value < math.inf:
        raise UsageError(f"{flag} {text!r} is not a size", hint="write 4GB, 512MB, 2GiB or a number of bytes")
    if found and text.strip()[-1] in "0123456789." and value < least:
        raise UsageError(
            f"{flag} {text}: {text.strip()} bytes are too few. Did you mean {text.strip()}GB?",
            hint="write 4GB, 512MB, 2GiB or a number of bytes",
        )
    return int(value)


def parse_rate(text: str | None) -> float | None:
    """Parse a speed as bytes a second: 1Mbps, 500kbit/s, 2 MB/s (b is a bit, B a byte).  None stays None."""
    if text is None:
        return None
    found = _RATE.fullmatch(text)
    value = float(found[1]) * _factor(found[2]) / (1 if found[3] == "B" else 8) if found else 0.0
    if not 0 < value < math.inf:
        raise UsageError(f"--uplink {text!r} is not a speed", hint="write 1Mbps, 500kbit/s or 2MB/s")
    return value


def _factor(prefix: str | None) -> int:
    """Return what a prefix stands for: k 1000, Ki 1024, .."""
    if not prefix:
        return 1
    power = "kmgt".index(prefix[0].lower()) + 1
    return int(1024**power if len(prefix) == 2 else 1000**power)
