# SPDX-License-Identifier: Apache-2.0
"""Dequantise blocks of ggml's formats with torch, bit-equal to the package gguf.

A block is 32 numbers of a row: a scale d (fp16), in Q4_1 and Q5_1 an offset m (fp16), and codes q,

    Q4_0   d (q - 8)      Q5_0   d (q - 16)      Q4_1, Q5_1   d q + m      Q8_0   d q      IQ4_NL   d CODEBOOKS["iq4_nl"][q]

each operation rounded to float32.  The low halves of 16 bytes are numbers 0..15, the high halves 16..31; Q5_0 and Q5_1 have a
word of 32 fifth bits.  The package itself does all other formats, more slowly.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import gguf
import torch
from torch import Tensor

from fleetune.common.ggml import BLOCK, HALVES
from fleetune.models.families.codebooks import CODEBOOKS

_IQ4_NL: Final = torch.tensor(CODEBOOKS["iq4_nl"], dtype=torch.float32)
_LOW, _HIGH = _IQ4_NL.repeat(16), _IQ4_NL.repeat_interleave(16)  # of a byte's halves
_MIDDLES: Final[Mapping[str, int]] = MappingProxyType({"Q4_0": 8, "Q5_0": 16})
_BITS: Final = torch.arange(BLOCK, dtype=torch.int32)


def dequantise(out: Tensor, data: Tensor, kind: str) -> None:
    """Write the numbers of whole blocks: data uint8 [bytes] -> out float32 [numbers], both contiguous."""
    if kind in HALVES:
        blocks = data.view(len(out) // BLOCK, -1)
        write_codes(out.view(-1, BLOCK), blocks, kind)
        apply_scales(out.view(-1, BLOCK), scale_bits(blocks, kind).view(torch.float16).float())
        return
    values = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])
    out.copy_(torch.from_numpy(values))


def scale_bits(blocks: Tensor, kind: str) -> Tensor:
    """Return the fp16 numbers d (and m) of blocks uint8 [n, bytes], as their bits: int16 [n, 1 or 2]."""
    return blocks[:, : 2 * HALVES[kind]].contiguous().view(torch.int16)


def write_codes(out: Tensor, blocks: Tensor, kind: str) -> None:
    """Write what the scale d is multiplied by, whole numbers: blocks uint8 [n, bytes] -> out float32 [n, 32]."""
    codes = blocks[:, 2 * HALVES[kind] :]
    if kind == "Q8_0":
        out.copy_(codes.view(torch.int8))
        return
    nibbles = codes[:, -BLOCK // 2 :]
    if kind == "IQ4_NL":
        bytes = nibbles.int().reshape(-1)
        out[:, : BLOCK // 2] = _LOW.index_select(0, bytes).view(-1, BLOCK // 2)
        out[:, BLOCK // 2 :] = _HIGH.index_select(0, bytes).view(-1, BLOCK // 2)
        return
    out[:, : BLOCK // 2] = nibbles & 15
    out[:, BLOCK // 2 :] = nibbles >> 4
    if kind in ("Q5_0", "Q5_1"):
        word = codes[:, :4].clone(memory_format=torch.contiguous_format).view(torch.int32)  # aligned
        out.add_((word >> _BITS & 1) << 4)
    if kind in _MIDDLES:
        out.sub_(_MIDDLES[kind])


def apply_scales(out: Tensor, scales: Tensor) -> None:
    """Make codes [n, 32] numbers, in place: times d, plus m where there is one; scales float32 [n, 1 or 2]."""
    out.mul_(scales[:, :1])
    if scales.shape[1] == 2:
        out.add_(scales[:, 1:])
