# SPDX-License-Identifier: Apache-2.0
"""List the dtypes of weights: what options, torch and file formats call each of them, and its bytes.

No torch is imported here, so that a plan and the check of a recipe can ask as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple


class Dtype(NamedTuple):
    """One dtype of weights."""

    full: str  # in torch, numpy and ledgers
    tag: str  # in safetensors and GGUF files
    size: int  # bytes of a number


WEIGHTS: Final[Mapping[str, Dtype]] = MappingProxyType(
    {
        "fp32": Dtype("float32", "F32", 4),
        "bf16": Dtype("bfloat16", "BF16", 2),
        "fp16": Dtype("float16", "F16", 2),
    }
)


def from_full(full: str) -> str | None:
    """Return the option's name of "float32" and so on; None for a dtype that weights do not have."""
    return next((name for name, dtype in WEIGHTS.items() if dtype.full == full), None)
