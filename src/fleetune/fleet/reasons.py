# SPDX-License-Identifier: Apache-2.0
"""Say to a server why a device does not do a work: by a code of this list and numbers, never by words of the device's own.

The text of an error may quote a row, a label or a path.  So it stays on the device's console, and what leaves the device is
`code number ..`: "busy 75" is "other programs take 75 % of its processors" on the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fleetune.common.memory import is_out_of_memory
from fleetune.errors import (
    DataError,
    FitError,
    FleetError,
    LedgerError,
    MessageError,
    ModelError,
    StorageError,
    UsageError,
)

WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "battery": "it runs on its battery",
        "busy": "other programs take {} % of its processors",
        "calibrated": "it has calibrated one compression on {} windows of {} tokens, and gives no other sums",
        "fault": "its work ended in an error; its console says which",
        "few-tokens": "sums over so few tokens could give its rows away; it makes none over fewer than {}",
        "measured": "it has made {} measurements, and makes no other",
        "measured-at": "it has measured its held-out rows at {} tokens, and does so at no other length and with no other labels",
        "memory": "the work does not fit the {} MB that it may use",
        "model": "it has not the run's model in this revision; its console says more",
        "no-calibration": "it takes no part in calibrations: fleetune fleet join .. --calibrate",
        "no-data": "it was not told which rows it has: start the SuperNode with --node-config \"data='FILE'\"",
        "no-evaluation": "it takes no part in evaluations: join with the --held-out that it trained with, or --eval-data FILE",
        "no-job": "it has no job yet; does another process use its key?",
        "order": "it was sent something that it does not obey; its console says more",
        "remembers": "it no longer has what it kept in round {}; its console says more",
        "rows": "its rows cannot be used for this run; its console says more",
        "settings": "it cannot do this work with these settings; its console says more",
        "storage": "its disk takes no more",
        "work": "it was asked for {} rows' work in a round, and does {} at most",
    }
)
OF_ERRORS: Final = (
    (MessageError, "order"),
    (LedgerError, "order"),
    (DataError, "rows"),
    (ModelError, "model"),
    (StorageError, "storage"),
    (UsageError, "settings"),
)
LARGEST: Final = 1 << 63  # of a number


class Declined(FleetError):
    """A device does not do what it is asked: `WORDS[code]` with these numbers, and for its own console a hint."""

    def __init__(self, code: str, *numbers: int, hint: str | None = None) -> None:
        super().__init__(WORDS[code].format(*(f"{n:,}" for n in numbers)), hint=hint)
        self.reason = " ".join([code, *(str(min(n, LARGEST - 1)) for n in numbers)])

    @property
    def page(self) -> str:
        """The section of the docs on errors of the fleet."""
        return FleetError("").page


def reason_of(error: BaseException, memory: int) -> str:
    """Return what a server is told of an error, on a device that may use so many bytes of memory."""
    if isinstance(error, Declined):
        return error.reason
    if isinstance(error, FitError) or is_out_of_memory(error):
        return f"memory {memory // 10**6}"
    return next((code for kind, code in OF_ERRORS if isinstance(error, kind)), "fault")


def in_words(reason: str) -> str:
    """Return a device's reason as a sentence; MessageError for one that is none of the list."""
    code, *numbers = reason.split(" ")
    plain = all(n.isascii() and n.isdigit() and len(n) < 20 and int(n) < LARGEST for n in numbers)
    if code not in WORDS or not plain or WORDS[code].count("{}") != len(numbers):
        raise MessageError(f"the reason {reason!r:.60} is none that a device can have")
    return WORDS[code].format(*(f"{int(n):,}" for n in numbers))
