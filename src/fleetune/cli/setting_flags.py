# SPDX-License-Identifier: Apache-2.0
"""Find the setting of a method that an option of the command line means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fleetune.common.registry import Registry

ALIKE: Final[Mapping[str, str]] = {"learning_rate": "lr", "rank": "r", "lora_r": "r", "lora_alpha": "alpha"}


def registry_of(command: str) -> Registry | None:
    """Return the registry whose members have the settings of a command's `--set`; None for a command without it."""
    if command in ("tune", "sweep", "fleet"):
        from fleetune.tuning import methods

        return methods.REGISTRY
    if command == "compress":
        from fleetune import compression

        return compression.REGISTRY
    return None


def close_to(flag: str, names: list[str]) -> str:
    """Return the setting that `--flag` means, "" for none: `--batch-size` is batch_size, `--k` is K."""
    asked = flag.lstrip("-").replace("-", "_")
    by_lower = {name.lower(): name for name in names}
    for word in (asked, asked.lower(), ALIKE.get(asked.lower(), "")):
        if word in names:
            return word
        if word in by_lower:
            return by_lower[word]
    return ""
