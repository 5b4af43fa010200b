# SPDX-License-Identifier: Apache-2.0
"""Pack quantised matrices into ggml blocks (Q4_0, IQ4_NL, Q4_1, Q5_0, Q5_1, Q8_0), or say why that would lose bits.

A block is 32 columns of a row (llama.cpp, ggml-common.h, block_q4_0 and following); numbers are
little-endian, d and m are fp16:

    Q4_0   d, 16 bytes:      byte j = u[j] | u[j + 16] << 4          w = d (u - 8)       4.5 bits a weight
    IQ4_NL d, 16 bytes:      the same                                w = d CODEBOOKS["iq4_nl"][u]    4.5
    Q4_1   d, m, 16 bytes:   the same                                w = d u + m         5.0
    Q5_0   d, h, 16 bytes:   the same, bit i of h 2^4 of u[i]        w = d (u - 16)                5.5
    Q5_1   d, m, h, 16 bytes: the same                               w = d u + m                   6.0
    Q8_0   d, 32 bytes:      int8 q                                  w = d q             8.5

With w = scale t, where t = code - zero or a codebook's value for the code, whole numbers:

    Q4_0   d = scale, u = t + 8      needs -8 <= t <= 7 (a 4-bit symmetric grid has zero 8)
    IQ4_NL d = scale, u = code       needs that codebook
    Q4_1   d = scale, u = code       needs t = code - zero, code <= 15, and m = -scale zero exact in fp16
    Q5_0   d = scale, u = t + 16     needs -16 <= t <= 15
    Q5_1   as Q4_1                   needs code <= 31
    Q8_0   d = scale, q = t          needs -128 <= t <= 127

and a group that is a multiple of 32, of which each block repeats the scale.  Super-blocks: `_ggml_super_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fleetune.deploy.formats import _ggml_super_blocks
from fleetune.models.artefact import Quantised

BLOCK: Final = 32
RANGES: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
)
TOPS: Final[Mapping[str, int]] = MappingProxyType({"Q4_1": 15, "Q5_1": 31})  # of types with a minimum


def misfit(q: Quantised, kind: str) -> str | None:
    """Return why blocks of `kind` (one of `PACKERS`) cannot hold the matrix without loss; None when they can."""
    if kind in _ggml_super_blocks.PACKERS:
        return _ggml_super_blocks.misfit(q, kind)
    if q.blocks is not None:
        return f"its scales are those of {q.blocks.kind}'s super-blocks, which {kind} has not"
    if q.group % BLOCK:
        return f"its groups of {q.group} are no multiple of {kind}'s blocks of {BLOCK}"
    if kind == "IQ4_NL":
        return None if q.codebook == "iq4_nl" else "its codes are not those of the grid iq4_nl"
    if kind in TOPS:
        if q.codebook:
            return f"{kind} holds evenly spaced values, those of the grid {q.codebook} are not"
        if int(q.codes.max()) > TOPS[kind]:
            return f"{kind} has {TOPS[kind].bit_length()} bits, its codes have {q.bits}"
        exact = -q.scale.float() * q.zero.float()
        if bool((exact.half().float() != exact).any()):
            return "the minimum scale * zero of some groups is not exact in fp16"
        return None
    low, high = RANGES[kind]
    steps = q.steps()
    if int(steps.min()) < low or int(steps.max()) > high:
        return f"{kind} holds steps {low} to {high} about the zero, it has {int(steps.min())} to {int(steps.max())}"
    return None


def pack_q4_0(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 32 * 18]."""
    return _join(_per_block(q, q.scale), _nibbles((q.steps() + 8).to(torch.uint8)))


def pack_iq4_nl(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 32 * 18]."""
    return _join(_per_block(q, q.scale), _nibbles(q.codes))


def pack_q4_1(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 32 * 20]."""
    return _join(_per_block(q, q.scale), _per_block(q, _minimum(q)), _nibbles(q.codes))


def pack_q5_0(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 32 * 22]."""
    codes = (q.steps() + 16).to(torch.uint8)
    return _join(_per_block(q, q.scale), _fifth_bits(codes), _nibbles(codes & 15))


def pack_q5_1(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 32 * 24]."""
    scale, minimum = _per_block(q, q.scale), _per_block(q, _minimum(q))
    return _join(scale, minimum, _fifth_bits(q.codes), _nibbles(q.codes & 15))


def pack_q8_0(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 32 * 34]."""
    steps = q.steps().to(torch.int8).numpy()
    return _join(_per_block(q, q.scale), steps.view(np.uint8).reshape(len(steps), -1, BLOCK))


PACKERS: Final[Mapping[str, Callable[[Quantised], np.ndarray]]] = MappingProxyType(
    {
        "Q4_0": pack_q4_0, "IQ4_NL": pack_iq4_nl, "Q4_1": pack_q4_1, "Q5_0": pack_q5_0, "Q5_1": pack_q5_1,
        "Q8_0": pack_q8_0, **_ggml_super_blocks.PACKERS,
    }
)  # by size, super-blocks after the others  # fmt: skip


def _per_block(q: Quantised, values: Tensor) -> np.ndarray:
    """Repeat fp16 [R, C / group] for each block, as bytes: uint8 [R, C / 32, 2]."""
    each: np.ndarray = values.repeat_interleave(q.group // BLOCK, 1).contiguous().numpy().astype("<f2")
    return each[..., None].view(np.uint8)


def _minimum(q: Quantised) -> Tensor:
    return (-q.scale.float() * q.zero.float()).half()


def _fifth_bits(codes: Tensor) -> np.ndarray:
    """Pack the bits of value 16 of uint8 [R, C] into uint8 [R, C / 32, 4], the first in the lowest bit."""
    bits: np.ndarray = np.packbits((codes >> 4 & 1).numpy(), axis=1, bitorder="little")
    return bits.reshape(len(codes), -1, 4)


def _nibbles(codes: Tensor) -> np.ndarray:
    """Pack uint8 [R, C] below 16 into uint8 [R, C / 32, 16], the block's first half in the low bits."""
    halves = codes.reshape(len(codes), -1, 2, BLOCK // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).numpy()


def _join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis=2).reshape(len(parts[0]), -1)
