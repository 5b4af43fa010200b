# SPDX-License-Identifier: Apache-2.0
"""Initialise LoRA's A from the activations of its layer (EVA).

Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter: "One Initialization to Rule them All: Fine-tuning
via Explained Variance Adaptation", 2024, arXiv 2410.07170 (section 3).  With the inputs of a layer as the rows
of X and U S V' = X, A starts as the first r rows of V', the directions that explain most of X; B is zero.

X is too large for memory.  Batch by batch, [S V' so far; new rows] is reduced to its best `WIDER` r rows: exact up
to that many rows, else a close approximation.

Differences from the paper: every layer has rank r (the paper's rho = 1), and batches are read until the rows end,
not until the directions converge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fleetune.adapters.attachment import attachment_of
from fleetune.adapters.lora import LoraPart
from fleetune.data.encode import Batch
from fleetune.errors import ModelError
from fleetune.models.net.model import Model

WIDER: Final = 4  # rows stored between batches, in ranks


def directions(model: Model, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """Return A [r, in] fp32 of every layer of the model's LoRA, by the parameter's name.

    The LoRA must be at a start with B A = 0.  ModelError when a layer's inputs have fewer than r directions.
    """
    part = attachment_of(model).parts[0]
    assert isinstance(part, LoraPart)
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


def _inputs(model: Model, part: LoraPart, batch: Batch) -> dict[tuple[str, ...], Tensor]:
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
