# SPDX-License-Identifier: Apache-2.0
"""How much memory this process took; no heavy import, so that a bare process can ask."""

from __future__ import annotations

import resource
import sys


def peak_rss() -> int:
    """The most bytes of memory this process held since its start, or since `rounds.release_memory`."""
    try:
        with open("/proc/self/status", "rb") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
