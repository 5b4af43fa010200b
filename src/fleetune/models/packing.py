# SPDX-License-Identifier: Apache-2.0
"""Pack codes of a few bits into bytes, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 [R, C] codes below 2**bits into uint8 [R, ceil(C bits / 8)], little-endian bits within a row."""
    if 8 % bits:
        planes = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")[..., :bits]
        return torch.from_numpy(np.packbits(planes.reshape(len(codes), -1), axis=1, bitorder="little"))
    each = 8 // bits  # codes of a byte
    R, C = len(codes), -(-codes.shape[1] // each)
    whole = torch.nn.functional.pad(codes, (0, C * each - codes.shape[1])).reshape(R, C, each)
    packed = whole[..., 0].clone()
    for i in range(1, each):
        packed |= whole[..., i] << bits * i
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack`."""
    if 8 % bits:
        flat = np.unpackbits(packed.numpy(), axis=1, bitorder="little")[:, : columns * bits]
        planes = flat.reshape(len(packed), columns, bits)
        return torch.from_numpy(np.packbits(planes, axis=2, bitorder="little")[..., 0])
    each = 8 // bits
    codes = torch.stack([packed >> bits * i & (1 << bits) - 1 for i in range(each)], 2)
    return codes.flatten(1)[:, :columns].contiguous()
