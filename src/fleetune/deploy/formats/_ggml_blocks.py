"""Pack quantised matrices into ggml blocks and super-blocks, or say why that would lose bits.

A block is 32 columns of a row (llama.cpp, ggml-common.h); numbers are little-endian, d and m are fp16.  With w = scale t, where t
= code - zero or a codebook's value for the code, and groups that are multiples of 32:

    Q4_0   d, 16 bytes: byte j = u[j] | u[j + 16] << 4    w = d (u - 8)       d = scale, u = t + 8; -8 <= t <= 7
    IQ4_NL d, 16 bytes: the same                          w = d CODEBOOKS["iq4_nl"][u]      d = scale, u = code
    Q4_1   d, m, 16 bytes: the same                       w = d u + m         u = code <= 15, m = -scale zero exact in fp16
    Q5_0   d, h, 16 bytes: bit i of h is 2^4 of u[i]      w = d (u - 16)      d = scale, u = t + 16; -16 <= t <= 15
    Q5_1   d, m, h, 16 bytes: the same                    w = d u + m         as Q4_1, code <= 31
    Q8_0   d, 32 bytes: int8 q                            w = d q             d = scale, q = t; -128 <= t <= 127
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fleetune.models.artefact import Quantised, SuperBlocks
from fleetune.models.families.number_types import SUPER_WIDTH

BLOCK: Final = 32
CHUNK: Final = 1 << 12  # blocks that are rounded at a time: they stay in the cache
# the fp32 below 0.5: added before a cut, it rounds half away from 0
BELOW_HALF: Final = torch.tensor(0.5 - 2.0**-25)
RANGES: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
)
TOPS: Final[Mapping[str, int]] = MappingProxyType({"Q4_1": 15, "Q5_1": 31})  # of types with a minimum


def misfit(q: Quantised, kind: str) -> str | None:
    """Return why blocks of `kind` (one of `PACKERS`) cannot hold the matrix without loss; None when they can."""
    if kind in SUPER:
        fits = q.blocks is not None and q.blocks.kind == kind.lower()
        return None if fits else f"its codes are not those of the grid {kind.lower()}"
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
    first, last = q.step_range()
    if first < low or last > high:
        return f"{kind} holds steps {low} to {high} about the zero, it has {first} to {last}"
    return None


def pack_blocks(kind: str, q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into blocks of 4 or 5 bits a code, uint8 [R, C / 32 * bytes of a block]."""
    moved = kind in RANGES and bool((q.zero != -RANGES[kind][0]).any())
    codes = (q.steps() - RANGES[kind][0]).to(torch.uint8) if moved else q.codes
    parts = [_per_block(q, q.scale)]
    if kind in TOPS:
        parts.append(_per_block(q, _minimum(q)))
    if kind.startswith("Q5"):
        parts.append(_fifth_bits(codes))
    return _join(*parts, _nibbles(codes & 15))


def pack_q8_0(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 32 * 34]."""
    steps = q.steps().to(torch.int8).numpy()
    return _join(_per_block(q, q.scale), steps.view(np.uint8).reshape(len(steps), -1, BLOCK))


def round_q8_0(weight: Tensor) -> np.ndarray:
    """Round fp32 [.., C] to blocks as llama.cpp's reference does, uint8 [.., C / 32 * 34]."""
    made, every = np.empty((weight.numel() // BLOCK, 34), np.uint8), weight.view(-1, BLOCK)
    for start in range(0, len(every), CHUNK):
        blocks = every[start : start + CHUNK]
        d = blocks.abs().amax(1, keepdim=True) / 127
        scaled = blocks * torch.where(d == 0, 0, 1 / d)
        steps = scaled.add_(torch.copysign(BELOW_HALF, scaled)).to(torch.int8)  # cut
        rows = made[start : start + CHUNK]
        rows[:, :2] = d.half().numpy().astype("<f2").view(np.uint8)
        rows[:, 2:] = steps.numpy().view(np.uint8)
    return made.reshape(*weight.shape[:-1], -1)


# ---------------------------------------------------------------- super-blocks
#
# Super-blocks have 256 columns.  Their bytes, where c are the codes, k and m the groups' multiples of d and dmin:
#
#     Q2_K    16 bytes: k | m << 4;  64 bytes: 2 bits of c;  d, dmin
#     Q3_K    32 bytes: bit 2 of c;  64 bytes: 2 low bits of c;  12 bytes: k + 32 in 6 bits;  d
#     Q4_K    d, dmin;  12 bytes: k and m in 6 bits;  128 bytes: 4 bits of c
#     Q5_K    d, dmin;  12 bytes: the same;  32 bytes: bit 4 of c;  128 bytes: 4 low bits of c
#     Q6_K    128 bytes: 4 low bits of c;  64 bytes: 2 high bits of c;  16 bytes: k, signed;  d
#     IQ4_XS  d;  2 + 4 bytes: k + 32 in 6 bits;  128 bytes: 4 bits of c
#
# 8 / b columns share a byte, of b bits each.  In every run of w 8 / b columns byte i has those of columns i, i + w, i + 2 w ..,
# the first in the lowest bits; w is 32, of Q6_K's low bits 64, of IQ4_XS 16.


def pack_q2_k(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 256 * 84]."""
    blocks, codes = _parts(q)
    scales = _groups(blocks.multiples) | _groups(blocks.minima) << 4
    return _join_super(q, scales, _together(codes, 2, 32), _halves(blocks.d), _halves(blocks.dmin))


def pack_q3_k(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 256 * 110]."""
    blocks, codes = _parts(q)
    k = _groups(blocks.multiples, 32).reshape(len(codes), -1)
    scales = _together(k & 15, 4, 8), _together(k >> 4, 2, 4)
    return _join_super(
        q, _together(codes >> 2, 1, 32), _together(codes & 3, 2, 32), *scales, _halves(blocks.d)
    )


def pack_q4_k(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 256 * 144]."""
    blocks, codes = _parts(q)
    return _join_super(q, _halves(blocks.d), _halves(blocks.dmin), _six_bits(blocks), _together(codes, 4, 32))


def pack_q5_k(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 256 * 176]."""
    blocks, codes = _parts(q)
    high, low = _together(codes >> 4, 1, 32), _together(codes & 15, 4, 32)
    return _join_super(q, _halves(blocks.d), _halves(blocks.dmin), _six_bits(blocks), high, low)


def pack_q6_k(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 256 * 210]."""
    blocks, codes = _parts(q)
    low, high = _together(codes & 15, 4, 64), _together(codes >> 4, 2, 32)
    return _join_super(q, low, high, _groups(blocks.multiples), _halves(blocks.d))


def pack_iq4_xs(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 256 * 136]."""
    blocks, codes = _parts(q)
    k = _groups(blocks.multiples, 32).reshape(len(codes), -1)
    scales = _together(k >> 4, 2, 1), _together(k & 15, 4, 1)
    return _join_super(q, _halves(blocks.d), *scales, _together(codes, 4, 16))


SUPER: Final[Mapping[str, Callable[[Quantised], np.ndarray]]] = MappingProxyType(
    {
        "Q2_K": pack_q2_k,
        "Q3_K": pack_q3_k,
        "IQ4_XS": pack_iq4_xs,
        "Q4_K": pack_q4_k,
        "Q5_K": pack_q5_k,
        "Q6_K": pack_q6_k,
    }
)
PACKERS: Final[Mapping[str, Callable[[Quantised], np.ndarray]]] = MappingProxyType(
    {
        **{kind: partial(pack_blocks, kind) for kind in ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1")},
        "Q8_0": pack_q8_0,
        **SUPER,
    }
)  # by size, super-blocks after the others


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


def _parts(q: Quantised) -> tuple[SuperBlocks, np.ndarray]:
    """Return the scales, and the codes as uint8 [N, 256], N super-blocks."""
    assert q.blocks is not None
    return q.blocks, q.codes.numpy().reshape(-1, SUPER_WIDTH)


def _groups(multiples: Tensor, more: int = 0) -> np.ndarray:
    """Return the multiples, plus `more`, row by row: uint8 [R, C / group] (two's complement below 0)."""
    found: np.ndarray = (multiples + more).contiguous().numpy().view(np.uint8)
    return found


def _halves(values: Tensor) -> np.ndarray:
    """Return fp16 [R, N / R] as bytes, uint8 [N, 2]."""
    found: np.ndarray = values.contiguous().numpy().astype("<f2").reshape(-1, 1).view(np.uint8)
    return found


def _together(values: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Pack values of so many bits: in each run of 8 / bits * width columns, those that are `width` apart into one byte."""
    each = 8 // bits
    runs = values.reshape(len(values), -1, each, width) << (bits * np.arange(each, dtype=np.uint8))[:, None]
    packed: np.ndarray = np.bitwise_or.reduce(runs, axis=2)
    return packed.reshape(len(values), -1)


def _six_bits(blocks: SuperBlocks) -> np.ndarray:
    """Pack k and m of 8 groups, 0 .. 63, into uint8 [N, 12]: groups 4 to 7 lend their two high bits to groups 0 to 3."""
    N = blocks.d.numel()
    k, m = _groups(blocks.multiples).reshape(N, 8), _groups(blocks.minima).reshape(N, 8)
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (k, m)]
    return np.concatenate([*first, k[:, 4:] & 15 | (m[:, 4:] & 15) << 4], axis=1)


def _join_super(q: Quantised, *parts: np.ndarray) -> np.ndarray:
    N = q.codes.numel() // SUPER_WIDTH
    return np.concatenate([part.reshape(N, -1) for part in parts], axis=1).reshape(len(q.codes), -1)
