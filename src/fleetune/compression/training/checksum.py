# SPDX-License-Identifier: Apache-2.0
"""Compute the checksum of tensors that a stopped compression is resumed from, so that a damaged file is not taken."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def of_tensors(head: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the CRC-32, as 8 digits, of a text and of named tensors in the order of their names."""
    import torch

    crc = zlib.crc32(head.encode())
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        values = tensor.detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {values.dtype} {tuple(values.shape)} ".encode(), crc)
        crc = zlib.crc32(values.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
