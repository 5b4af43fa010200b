# SPDX-License-Identifier: Apache-2.0
"""Dequantise blocks of ggml's formats with torch, bit-equal to the package gguf.

A block is 32 numbers of a row: a scale d (fp16), an offset m (fp16, Q4_1 alone) and codes q,

    Q4_0   d (q - 8)      Q4_1   d q + m      Q5_0   d (q - 16)      Q8_0   d q      IQ4_NL   d CODEBOOKS["iq4_nl"][q]

each operation rounded to float32.  The low halves of 16 bytes are numbers 0..15, the high halves 16..31; Q5_0 has a word of
32 fifth bits.  The package itself does all other formats, more slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import gguf
import torch
from torch import Tensor

from fleetune.models.codebooks import CODEBOOKS

BLOCK: Final = 32
_IQ4_NL: Final = torch.tensor(CODEBOOKS["iq4_nl"], dtype=torch.float32)
_LOW, _HIGH = _IQ4_NL.repeat(16), _IQ4_NL.repeat_interleave(16)  # of a byte's halves
_BITS: Final = torch.arange(BLOCK, dtype=torch.int32)


def dequantise(out: Tensor, data: Tensor, kind: str) -> None:
    """Write the numbers of whole blocks: data uint8 [bytes] -> out float32 [numbers], both contiguous."""
    if (write := _KINDS.get(kind)) is not None:
        write(out.view(-1, BLOCK), data.view(len(out) // BLOCK, -1))
        return
    values = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])
    out.copy_(torch.from_numpy(values))


def _halves(bytes: Tensor) -> Tensor:
    """Return fp16 numbers [n, bytes / 2] in float32."""
    return bytes.contiguous().view(torch.float16).float()


def _nibbles(out: Tensor, codes: Tensor) -> None:
    out[:, :16] = codes & 15
    out[:, 16:] = codes >> 4


def _q4_0(out: Tensor, blocks: Tensor) -> None:
    _nibbles(out, blocks[:, 2:])
    out.sub_(8).mul_(_halves(blocks[:, :2]))


def _iq4_nl(out: Tensor, blocks: Tensor) -> None:
    bytes = blocks[:, 2:].int().reshape(-1)
    out[:, :16] = _LOW.index_select(0, bytes).view(-1, 16)
    out[:, 16:] = _HIGH.index_select(0, bytes).view(-1, 16)
    out.mul_(_halves(blocks[:, :2]))


def _q4_1(out: Tensor, blocks: Tensor) -> None:
    halves = _halves(blocks[:, :4])
    _nibbles(out, blocks[:, 4:])
    out.mul_(halves[:, :1]).add_(halves[:, 1:])


def _q5_0(out: Tensor, blocks: Tensor) -> None:
    word = blocks[:, 2:6].contiguous().view(torch.int32)
    _nibbles(out, blocks[:, 6:])
    out.add_((word >> _BITS & 1) << 4).sub_(16).mul_(_halves(blocks[:, :2]))


def _q8_0(out: Tensor, blocks: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_halves(blocks[:, :2]))


_KINDS: Final[Mapping[str, Callable[[Tensor, Tensor], None]]] = MappingProxyType(
    {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q8_0": _q8_0, "IQ4_NL": _iq4_nl}
)
