# SPDX-License-Identifier: Apache-2.0
"""Write and read a pruner's decision of what stays, so that a resumed run does not estimate again.

    {"origin": the fingerprint of weights, rows and settings, "blocks": {"0": {"heads": [..], "channels": [..]}, ..}}

or `"hidden": [..]` in place of `"blocks"`: the channels of the residual stream that stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

from fleetune.common.files import write_atomic
from fleetune.errors import StorageError, UsageError
from fleetune.models.families.widths import KeptUnits

Decision: TypeAlias = (
    dict[int, KeptUnits] | list[int]
)  # the units of each block that stays, or hidden channels


def write(file: Path, origin: str, kept: Decision) -> None:
    """Write the decision; its folder is created."""
    file.parent.mkdir(parents=True, exist_ok=True)
    what = (
        {"blocks": {i: k._asdict() for i, k in kept.items()}} if isinstance(kept, dict) else {"hidden": kept}
    )
    write_atomic(file, json.dumps({"origin": origin} | what) + "\n")


def read(file: Path, origin: str) -> Decision:
    """Read a decision; UsageError for one of other weights, rows or settings, StorageError for a damaged file."""
    kept: Decision
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        found = raw["origin"]
        if "hidden" in raw:
            kept = [int(c) for c in raw["hidden"]]
        else:
            kept = {int(i): KeptUnits(**stays) for i, stays in raw["blocks"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{file} is damaged ({error!r})", hint="remove it to begin anew") from error
    if found != origin:
        raise UsageError(
            f"{file} is of other weights, rows or settings",
            hint="bring back what it began with, or begin anew without --resume",
        )
    return kept
