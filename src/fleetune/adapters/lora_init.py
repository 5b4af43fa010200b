# SPDX-License-Identifier: Apache-2.0
"""Initialise the factors of LoRA: from a seed, or from the base's weights.

| init | A [r, in] | B [out, r] | source |
|---|---|---|---|
| default | uniform in +-1/sqrt(in) | 0 | Hu et al. 2021, arXiv 2106.09685, as PEFT |
| shared | a signed sketch: r orthonormal rows, each input in one of them | 0 | ours |
| pissa | sqrt(S_r / s) V_r' | U_r sqrt(S_r / s) | Meng et al. 2024, arXiv 2404.02948, equations 2 and 3 |
| olora | R_r | Q_r | Buyukakyuz 2024, arXiv 2406.01775, Algorithm 1 |

with U S V' = W0 (the r largest), Q R = W0 and s = alpha / r.  The first two depend on (seed, tensor name) alone
and are made of Philox words without a math library: equal bits on every machine.  The decompositions need one, so
the server computes them once and sends them.

`eva` (`directions`) is the only start that depends on data.  Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter: "One
Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", 2024, arXiv 2410.07170 (section 3).  With the
inputs of a layer as the rows of X and U S V' = X, A starts as the first r rows of V', the directions that explain most of X; B
is zero.  X is too large for memory.  Batch by batch, [S V' so far; new rows] is reduced to its best `WIDER` r rows: exact up
to that many rows, else a close approximation.  Differences from the paper: every layer has rank r (the paper's rho = 1), and
batches are read until the rows end, not until the directions converge.

The last two start at B A != 0, so s B0 A0 is subtracted from the base.  The base is never written to: B0 and A0
stay beside it as frozen factors.  So nothing is rounded away, removing the adapter restores the base bit for bit,
and all devices subtract the same once they have B0 and A0 from the server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fleetune import models
from fleetune.adapters.attachment import attachment_of
from fleetune.data.encode import Batch
from fleetune.errors import ModelError
from fleetune.models.net.model import Model
from fleetune.seeds.noise import derive, signs, words

Factors = tuple[np.ndarray, np.ndarray]  # B [out, r], A [r, in], fp32


def default(layer: str, out: int, into: int, r: int, seed: int) -> Factors:
    """Draw A as PEFT starts it (Kaiming-uniform with a = sqrt(5)); B is zero."""
    a = models.uniform(f"lora/{seed}/{layer}.lora_A.weight", (r, into), 1 / math.sqrt(into))
    return np.zeros((out, r), np.float32), a


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


def pissa(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the r principal directions of W0 [out, in], so that scale B A is their share of it."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:r] / scale).sqrt()
    return u[:, :r] * root, root[:, None] * vt[:r]


def olora(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the first r columns of Q and rows of R."""
    q, upper = torch.linalg.qr(weight)
    return q[:, :r], upper[:r]


FROM_SEED: Final[Mapping[str, Callable[[str, int, int, int, int], Factors]]] = MappingProxyType(
    {"default": default, "shared": shared}
)
FROM_WEIGHTS: Final[Mapping[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]]] = MappingProxyType(
    {"pissa": pissa, "olora": olora}
)


WIDER: Final = 4  # rows stored between batches, in ranks


def directions(model: Model, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """Return A [r, in] fp32 of every layer of the model's LoRA, by the parameter's name.

    The LoRA must be at a start with B A = 0.  ModelError when a layer's inputs have fewer than r directions.
    """
    part: Any = attachment_of(model).parts[0]
    rank = min(len(p) for n, p in part.parameters.items() if ".lora_A." in n)
    best_rows: dict[tuple[str, ...], Tensor] = {}
    for batch in batches:
        for layers, rows in _inputs(model, part, batch).items():
            if layers in best_rows:
                rows = torch.cat([best_rows[layers], rows])
            best_rows[layers] = _best(rows, WIDER * rank)
    made = {}
    for layers, best in best_rows.items():
        size = best.norm(dim=1, keepdim=True)
        if len(best) < rank or size[rank - 1] <= 1e-6 * size[0]:
            raise ModelError(
                f"the inputs of {layers[0]} have fewer than {rank} directions on these rows",
                hint="give it more rows, or use a smaller rank",
            )
        a = (best / size)[:rank].float().cpu().numpy()
        made.update({f"{layer}.lora_A.weight": a for layer in layers})
    return made


def _inputs(model: Model, part: Any, batch: Batch) -> dict[tuple[str, ...], Tensor]:
    """Return the layers' inputs at the tokens of a batch, [tokens, in] float64; layers with the same input together."""
    # by the tensor's identity; the tensor itself is stored too, so that no identity is used twice
    seen: dict[int, tuple[Tensor, list[str]]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(id(args[0]), (args[0], []))[1].append(name)

        return hook

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in part.layers.items()]
    more = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    try:
        with torch.inference_mode():
            model.net(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more)
    finally:
        for hook in hooks:
            hook.remove()
    real = batch.attention_mask.bool()
    return {tuple(names): x[real].double() for x, names in seen.values()}


def _best(rows: Tensor, count: int) -> Tensor:
    """Return the first `count` rows of S V' where U S V' = `rows`, from the smaller of rows' rows and rows rows'."""
    if len(rows) > rows.shape[1]:
        size, v = torch.linalg.eigh(rows.T @ rows)
        scaled: Tensor = (v * size.clamp(min=0).sqrt()).flip(1)
        return scaled[:, :count].T
    u: Tensor = torch.linalg.eigh(rows @ rows.T)[1].flip(1)
    return u[:, :count].T @ rows
