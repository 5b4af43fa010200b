# SPDX-License-Identifier: Apache-2.0
"""Write an event as the line that `--json` prints."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from typing import cast

from fleetune.common.events import VERSION


def line_of(event: Mapping[str, object]) -> str:
    """An event as one line of strict JSON; "v" comes first, numbers that are not finite become null."""
    return json.dumps({"v": VERSION, **cast(dict[str, object], _strict(event))}, allow_nan=False)


def _strict(value: object) -> object:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(float(value)) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value)
