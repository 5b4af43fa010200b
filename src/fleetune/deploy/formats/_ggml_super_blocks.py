# SPDX-License-Identifier: Apache-2.0
"""Pack matrices in super-blocks of 256 columns: ggml's Q2_K .. Q6_K and IQ4_XS.

The bytes of a super-block (ggml-common.h, block_q2_K and following; read by gguf.quants): c are the codes, k and m the groups'
multiples of d and dmin, which are fp16; numbers are little-endian.

    Q2_K    16 bytes: k | m << 4;  64 bytes: 2 bits of c;  d, dmin
    Q3_K    32 bytes: bit 2 of c;  64 bytes: 2 low bits of c;  12 bytes: k + 32 in 6 bits;  d
    Q4_K    d, dmin;  12 bytes: k and m in 6 bits;  128 bytes: 4 bits of c
    Q5_K    d, dmin;  12 bytes: the same;  32 bytes: bit 4 of c;  128 bytes: 4 low bits of c
    Q6_K    128 bytes: 4 low bits of c;  64 bytes: 2 high bits of c;  16 bytes: k, signed;  d
    IQ4_XS  d;  2 + 4 bytes: k + 32 in 6 bits;  128 bytes: 4 bits of c

8 / b columns share a byte, of b bits each.  In every run of w 8 / b columns byte i has those of columns i, i + w, i + 2 w .., the
first in the lowest bits; w is 32, of Q6_K's low bits 64, of IQ4_XS 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from torch import Tensor

from fleetune.models.artefact import Quantised
from fleetune.models.superblocks import WIDTH, SuperBlocks


def misfit(q: Quantised, kind: str) -> str | None:
    """Return why super-blocks of `kind` (one of `PACKERS`) cannot hold the matrix without loss; None when they can."""
    fits = q.blocks is not None and q.blocks.kind == kind.lower()
    return None if fits else f"its codes are not those of the grid {kind.lower()}"


def pack_q2_k(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 256 * 84]."""
    blocks, codes = _parts(q)
    scales = _groups(blocks.multiples) | _groups(blocks.minima) << 4
    return _join(q, scales, _together(codes, 2, 32), _halves(blocks.d), _halves(blocks.dmin))


def pack_q3_k(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 256 * 110]."""
    blocks, codes = _parts(q)
    k = _groups(blocks.multiples, 32).reshape(len(codes), -1)
    scales = _together(k & 15, 4, 8), _together(k >> 4, 2, 4)
    return _join(q, _together(codes >> 2, 1, 32), _together(codes & 3, 2, 32), *scales, _halves(blocks.d))


def pack_q4_k(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 256 * 144]."""
    blocks, codes = _parts(q)
    return _join(q, _halves(blocks.d), _halves(blocks.dmin), _six_bits(blocks), _together(codes, 4, 32))


def pack_q5_k(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 256 * 176]."""
    blocks, codes = _parts(q)
    high, low = _together(codes >> 4, 1, 32), _together(codes & 15, 4, 32)
    return _join(q, _halves(blocks.d), _halves(blocks.dmin), _six_bits(blocks), high, low)


def pack_q6_k(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 256 * 210]."""
    blocks, codes = _parts(q)
    low, high = _together(codes & 15, 4, 64), _together(codes >> 4, 2, 32)
    return _join(q, low, high, _groups(blocks.multiples), _halves(blocks.d))


def pack_iq4_xs(q: Quantised) -> np.ndarray:
    """Pack a matrix that fits into uint8 [R, C / 256 * 136]."""
    blocks, codes = _parts(q)
    k = _groups(blocks.multiples, 32).reshape(len(codes), -1)
    scales = _together(k >> 4, 2, 1), _together(k & 15, 4, 1)
    return _join(q, _halves(blocks.d), *scales, _together(codes, 4, 16))


PACKERS: Final[Mapping[str, Callable[[Quantised], np.ndarray]]] = MappingProxyType(
    {
        "Q2_K": pack_q2_k, "Q3_K": pack_q3_k, "IQ4_XS": pack_iq4_xs, "Q4_K": pack_q4_k, "Q5_K": pack_q5_k,
        "Q6_K": pack_q6_k,
    }
)  # by size  # fmt: skip


def _parts(q: Quantised) -> tuple[SuperBlocks, np.ndarray]:
    """Return the scales, and the codes as uint8 [N, 256], N super-blocks."""
    assert q.blocks is not None
    return q.blocks, q.codes.numpy().reshape(-1, WIDTH)


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


def _join(q: Quantised, *parts: np.ndarray) -> np.ndarray:
    N = q.codes.numel() // WIDTH
    return np.concatenate([part.reshape(N, -1) for part in parts], axis=1).reshape(len(q.codes), -1)
