# SPDX-License-Identifier: Apache-2.0
"""Name the kinds of ggml's blocks that can be tuned: 32 codes of a row, and one or two fp16 numbers in front of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import gguf

BLOCK: Final = 32  # numbers of a block
PARTS: Final = ("scales", "codes")  # of blocks, either of which can be trained alone
ALIGNMENT: Final = int(gguf.GGUF_DEFAULT_ALIGNMENT)  # bytes in a file
HALVES: Final[Mapping[str, int]] = MappingProxyType(  # fp16 numbers that a block begins with: d, or d and m
    {"Q4_0": 1, "Q4_1": 2, "Q5_0": 1, "Q5_1": 2, "Q8_0": 1, "IQ4_NL": 1}
)
BYTES: Final[Mapping[str, int]] = MappingProxyType(  # of a block
    {kind: int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]) for kind in HALVES}
)


def padded(size: int) -> int:
    """Return the bytes that a tensor or the header takes in a file: a multiple of 32."""
    return -(-size // ALIGNMENT) * ALIGNMENT
