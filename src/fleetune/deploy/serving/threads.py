# SPDX-License-Identifier: Apache-2.0
"""Choose the number of threads of an engine by measuring it.

On a busy device more threads can be eight times slower: the threads of a matrix product spin until the slowest of them
is done.  So a short text is generated with 1, 2, 4, .. threads, for as long as more of them pay.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Final

from fleetune.deploy.serving.openai_client import Address, pieces

GAIN: Final = 1.05  # a step up in threads must be worth 5 %: less is noise, and somebody else's core
TOKENS: Final = 32
SECONDS: Final = 3.0
TEXT: Final = "The lighthouse keeper wrote down the weather every evening, and one day he began"


def cores() -> int:
    """Return the number of cores that this process may use: with OMP_NUM_THREADS no more than that, as in torch."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(found, int(asked)) if asked.isdecimal() and int(asked) else found


def candidates(cores: int) -> list[int]:
    """Return 1, 2, 4, .. below `cores`, and `cores`."""
    return [1 << i for i in range(cores.bit_length()) if 1 << i < cores] + [cores]


def fastest(counts: Sequence[int], rate: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """Return the number of threads to use, and the rate (tokens/s) of each number tried.

    Climbs `counts` while a step is at least `GAIN` times as fast as the best so far; the step that is not is the last.
    """
    rates = {counts[0]: rate(counts[0])}
    best = counts[0]
    for count in counts[1:]:
        rates[count] = rate(count)
        if rates[count] < GAIN * rates[best]:
            break
        best = count
    return best, rates


def speed(at: Address, clock: Callable[[], float] = time.monotonic) -> float:
    """Return how many pieces (nearly tokens) per second an engine generates, prefill of a short text included.

    At most `TOKENS` of them or about `SECONDS` seconds.
    """
    began, count = clock(), 0
    body = {"prompt": TEXT, "temperature": 0, "max_tokens": TOKENS}
    with closing(pieces(at, "/v1/completions", body)) as written:
        for _ in written:
            count += 1
            if clock() - began > SECONDS:
                break
    return count / max(clock() - began, 1e-9)
