# SPDX-License-Identifier: Apache-2.0
"""Rotate the values of each attention head: the same function, other groups of weights.

One orthogonal matrix turns the rows of a key-value head's value projection, its transpose the columns of the output projection
that belong to the query heads sharing it: R2 of SpinQuant (Liu et al., ICLR 2025, arXiv 2405.16406), a Hadamard matrix with
random signs as in QuaRot (Ashkboos et al., NeurIPS 2024, arXiv 2404.00456).  It is exact in the dense model and costs nothing
when the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fleetune.models import Model


def hadamard(n: int, g: torch.Generator) -> Tensor:
    """An orthogonal float64 [n, n] of entries +-1/sqrt(n); n is a power of 2."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / n**0.5 * (torch.randint(0, 2, (n,), generator=g) * 2 - 1)


@contextmanager
def rotated_heads(model: Model, seed: int = 5) -> Iterator[None]:
    """Rotate a llama-like model without biases while the block runs."""
    net: Any = model.net
    config, g = net.config, torch.Generator().manual_seed(seed)
    width = config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // config.num_key_value_heads
    layers = [layer.self_attn for layer in net.model.layers]
    before = [(a.v_proj.weight.data, a.o_proj.weight.data) for a in layers]
    for a in layers:
        V, O = a.v_proj.weight.data.double(), a.o_proj.weight.data.double()
        for head, rows in enumerate(V.split(width)):
            R = hadamard(width, g)
            rows.copy_(R @ rows)
            for columns in O.split(width, 1)[head * shared : (head + 1) * shared]:
                columns.copy_(columns @ R.T)
        a.v_proj.weight.data, a.o_proj.weight.data = V.float(), O.float()
    try:
        yield
    finally:
        for a, (v, o) in zip(layers, before, strict=True):
            a.v_proj.weight.data, a.o_proj.weight.data = v, o
