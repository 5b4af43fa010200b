# SPDX-License-Identifier: Apache-2.0
"""Say of a run that is resumed how far it is, how long the rest takes, and what of the machine is another now."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fleetune.common.display import counted, human_time
from fleetune.runs import rundir

# of env.json: what decides the bits of a result beside the recipe
DECIDES: Final = (
    "fleetune",
    "python",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "numba",
    "numpy",
    "system",
    "machine",
    "device",
    "gpu",
    "cuda",
    "threads",
    "instructions",
)


def progress(run: Path, rounds: int) -> str:
    """Say after which of `rounds` rounds a run goes on, and about how long the rest takes, at the time of those done."""
    done = {int(e["round"]): float(e["seconds"]) for e in rundir.events(run) if e["event"] == "round"}
    last = max(done, default=0)
    said = f"goes on after round {last} of {rounds}"
    if not done or last >= rounds:
        return said
    each = statistics.median(done.values())
    return f"{said}: about {human_time(each * (rounds - last))} left, {counted(rounds - last, 'round')} of {human_time(each)}"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say what of versions and machine differs from the sitting before; "" where nothing does, or it is not known."""
    differ = [
        f"{name} {before[name]} -> {now[name]}"
        for name in DECIDES
        if name in before and name in now and before[name] != now[name]
    ]
    if not differ:
        return ""
    return (
        f"since the last sitting there changed: {', '.join(differ)}; the result may differ in its last bits"
    )
