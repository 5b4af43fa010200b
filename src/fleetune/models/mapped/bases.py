# SPDX-License-Identifier: Apache-2.0
"""Name the places where the weights of a base may be.  No torch is imported here, so that a plan can ask as well."""

from __future__ import annotations

from typing import Final

PLACES: Final = ("memory", "mapped")  # mapped: in their file, from which pieces are read
BASES: Final = ("auto", *PLACES)
BLOCKS: Final = (
    "blocks"  # mapped; of a built-in model its GGUF file, also where plain weights of it are in the cache
)
MAPPED: Final = ("mapped", BLOCKS)
SHARE: Final = 0.5  # of the memory: weights that would take more stay in their file, under auto
