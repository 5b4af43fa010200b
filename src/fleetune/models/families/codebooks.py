# SPDX-License-Identifier: Apache-2.0
"""Name the codebooks of quantised matrices: the values that the codes 0, 1, 2 .. stand for, times a scale."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

CODEBOOKS: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        # llama.cpp's type IQ4_NL (ggml-common.h, kvalues_iq4nl)
        "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    }
)
