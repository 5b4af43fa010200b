# SPDX-License-Identifier: Apache-2.0
"""What the functions of the pipeline share: types of arguments, and lists of names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetune.common import settings
from fleetune.common.settings import Value

Setting = Value | Callable[..., Any]  # of a method; a function is an objective or a reward
Rows = str | Path | Iterable[Mapping[str, Any]]  # a file, a hub id, or rows: dicts, a datasets.Dataset


def words(given: str | Sequence[str]) -> list[str]:
    r"""Return names as a list; a text may have several, with commas (one of a name itself is written `\,`)."""
    return settings.given_words(given) if isinstance(given, str) else list(given)
