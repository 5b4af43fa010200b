# SPDX-License-Identifier: Apache-2.0
"""Short names of usual small models on the hub: each stands for a hub id, and for nothing more.

Nothing of them comes with Fleetune, and no revision is fixed: a name means what its hub id means.  Parameters and licence
are as the model's card states them.  A folder or a file of that name goes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from fleetune.models.cache.cache import ORIGINS, Origin


@dataclass(frozen=True)
class ShortName:
    """A model on the hub that has a short name."""

    name: str
    hub: str  # hub id
    params: float  # about, as the card rounds
    licence: str
    gated: bool = False  # the hub asks for an account that has accepted the licence


_ALL: Final = (
    ShortName("gemma-3-270m", "google/gemma-3-270m-it", 270e6, "gemma", gated=True),
    ShortName("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", 360e6, "apache-2.0"),
    ShortName("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 490e6, "apache-2.0"),
    ShortName("qwen3-0.6b", "Qwen/Qwen3-0.6B", 600e6, "apache-2.0"),
    ShortName("gemma-3-1b", "google/gemma-3-1b-it", 1e9, "gemma", gated=True),
    ShortName("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1.1e9, "apache-2.0"),
    ShortName("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", 1.23e9, "llama3.2", gated=True),
    ShortName("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 1.7e9, "apache-2.0"),
)
SHORT_NAMES: Final[Mapping[str, ShortName]] = MappingProxyType({s.name: s for s in _ALL})


def hub_of(name: str) -> str | None:
    """Return the hub id of a built-in model or a short name; None for any other name."""
    found = _known(name)
    return found.hub if found else None


def licence_of(name: str) -> str | None:
    """Return the licence of a built-in model or a short name; None for any other name."""
    found = _known(name)
    return found.licence if found else None


def _known(name: str) -> Origin | ShortName | None:
    short = SHORT_NAMES.get(name)
    return ORIGINS.get(name) or (None if short and Path(name).exists() else short)


def every() -> list[str]:
    """Return the built-in names, then the short ones."""
    return [*ORIGINS, *SHORT_NAMES]
