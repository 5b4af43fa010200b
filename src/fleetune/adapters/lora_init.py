# SPDX-License-Identifier: Apache-2.0
"""Initialise the factors of LoRA: from a seed, or from the base's weights.

| init | A [r, in] | B [out, r] | source |
|---|---|---|---|
| default | uniform in +-1/sqrt(in) | 0 | Hu et al. 2021, arXiv 2106.09685, as PEFT |
| gaussian | normal, deviation 1/r | 0 | as PEFT |
| shared | a signed sketch: r orthonormal rows, each input in one of them | 0 | ours |
| orthogonal | from half the rows of an orthogonal [r, r] | from the other half | as PEFT |
| pissa | sqrt(S_r / s) V_r' | U_r sqrt(S_r / s) | Meng et al. 2024, arXiv 2404.02948, equations 2 and 3 |
| olora | R_r | Q_r | Buyukakyuz 2024, arXiv 2406.01775, Algorithm 1 |

with U S V' = W0 (the r largest), Q R = W0 and s = alpha / r.  The first three depend on (seed, tensor name) alone
and are made of Philox words without a math library: equal bits on every machine.  `orthogonal` and the
decompositions need one, so the server computes them once and sends them.

The last two start at B A != 0, so s B0 A0 is subtracted from the base.  The base is never written to: B0 and A0
stay beside it as frozen factors.  So nothing is rounded away, removing the adapter restores the base bit for bit,
and all devices subtract the same once they have B0 and A0 from the server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fleetune import models
from fleetune.errors import ModelError
from fleetune.seeds.noise import derive, normals, signs, words

Factors = tuple[np.ndarray, np.ndarray]  # B [out, r], A [r, in], fp32


def default(layer: str, out: int, into: int, r: int, seed: int) -> Factors:
    """Draw A as PEFT starts it (Kaiming-uniform with a = sqrt(5)); B is zero."""
    a = models.uniform(f"lora/{seed}/{layer}.lora_A.weight", (r, into), 1 / math.sqrt(into))
    return np.zeros((out, r), np.float32), a


def gaussian(layer: str, out: int, into: int, r: int, seed: int) -> Factors:
    """Draw A from a normal with deviation 1/r; B is zero."""
    return np.zeros((out, r), np.float32), _normal(seed, layer, "A", r, into) / np.float32(r)


def shared(layer: str, out: int, into: int, r: int, seed: int) -> Factors:
    """Draw rows that are orthonormal under any rounding: an input belongs to one row, with a random sign; B is zero."""
    key = derive("lora", seed, layer)
    order = np.argsort(
        words(key, 0, np.arange(-(-into // 128), dtype=np.uint64) * np.uint64(32)).reshape(-1)[:into]
    )
    row = np.empty(into, np.int64)
    row[order] = np.arange(into) % r
    a = np.zeros((r, into), np.float32)
    size = np.bincount(row, minlength=r)[row].astype(np.float32)
    a[row, np.arange(into)] = signs(key, 1, 0, into) / np.sqrt(size)
    return np.zeros((out, r), np.float32), a


def orthogonal(layer: str, out: int, into: int, r: int, seed: int) -> Factors:
    """Draw both factors with product zero: their inner sides are halves of one orthogonal matrix."""
    if r % 2:
        raise ModelError(f"an orthogonal start needs an even rank, r is {r}", hint=f"use r={r + 1}")
    q, _ = np.linalg.qr(_normal(seed, layer, "Q", r, r).astype(np.float64))
    a = _normal(seed, layer, "A", into, r // 2) @ q[0::2] / 10
    b = _normal(seed, layer, "B", out, r // 2) @ q[1::2] / 10
    return b.astype(np.float32), np.ascontiguousarray(a.T, dtype=np.float32)


def pissa(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the r principal directions of W0 [out, in], so that scale B A is their share of it."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:r] / scale).sqrt()
    return u[:, :r] * root, root[:, None] * vt[:r]


def olora(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the first r columns of Q and rows of R."""
    q, upper = torch.linalg.qr(weight)
    return q[:, :r], upper[:r]


def _normal(seed: int, layer: str, what: str, rows: int, columns: int) -> np.ndarray:
    return normals(derive("lora", seed, layer, what), 0, 0, rows * columns).reshape(rows, columns)


FROM_SEED: Final[Mapping[str, Callable[[str, int, int, int, int], Factors]]] = MappingProxyType(
    {"default": default, "gaussian": gaussian, "shared": shared, "orthogonal": orthogonal}
)
FROM_WEIGHTS: Final[Mapping[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]]] = MappingProxyType(
    {"pissa": pissa, "olora": olora}
)
