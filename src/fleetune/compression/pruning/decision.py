# SPDX-License-Identifier: Apache-2.0
"""What a pruner has decided to leave, as a file that a resumed run reads rather than decide again.

    {"origin": SHA-256 of all that the choice is a function of, "blocks": {"0": {"heads": [..], "channels": [..]}, ..}}

or, of a narrower residual stream, `"hidden": [..]` in place of `"blocks"`.
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
    """Keep what was decided; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    said = (
        {"blocks": {i: k._asdict() for i, k in kept.items()}} if isinstance(kept, dict) else {"hidden": kept}
    )
    write_atomic(file, json.dumps({"origin": origin} | said) + "\n")


def read(file: Path, origin: str) -> Decision:
    """What a file says stays; UsageError when it is of other work, StorageError when it is damaged."""
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
