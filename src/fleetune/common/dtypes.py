# SPDX-License-Identifier: Apache-2.0
"""Name the types that weights are loaded in: `fp32`, `bf16` and `fp16`, with torch's names and their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

TORCH_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
)
SIZES: Final[Mapping[str, int]] = MappingProxyType({"fp32": 4, "bf16": 2, "fp16": 2})  # bytes of a weight
