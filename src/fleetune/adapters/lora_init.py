"""Initialise the factors of LoRA: from a seed, from the base's weights, or from the activations of each layer.

| init | A [r, in] | B [out, r] | source |
|---|---|---|---|
| default | uniform in +-1/sqrt(in) | 0 | Hu et al. 2021, arXiv 2106.09685, as PEFT |
| gaussian | normal, deviation 1/r | 0 | as PEFT |
| shared | a signed sketch: r orthonormal rows, each input in one of them | 0 | ours |
| orthogonal | from half the rows of an orthogonal [r, r] | from the other half | as PEFT |
| pissa | sqrt(S_r / s) V_r' | U_r sqrt(S_r / s) | Meng et al. 2024, arXiv 2404.02948, equations 2 and 3 |
| olora | R_r | Q_r | Buyukakyuz 2024, arXiv 2406.01775, Algorithm 1 |
| eva | the first r rows of V' of the layer's inputs X = U S V' | 0 | Paischer et al. 2024, arXiv 2410.07170, section 3 |
| gradient | V_r' of the gradient U S V' of W0 | U_r (0, where it is trained) | LoRA-SB, arXiv 2411.19557, section 4 |

with U S V' = W0 (the r largest), Q R = W0 and s = alpha / r.  The first three depend on (seed, tensor name) alone and need no
math library, so they have equal bits on every machine; the server computes the others once and sends them.  `pissa` and `olora`
start at B A != 0, which `lora.py` subtracts.  For `eva`, batch by batch, [S V' so far; new rows] is reduced to its best `WIDER` r
rows: exact up to that many rows, else a close approximation.  Unlike the paper, every layer has rank r (its rho = 1), and batches
are read until the rows end.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from fleetune import models
from fleetune.data import Batch
from fleetune.errors import ModelError
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.net.model import Model
from fleetune.seeds.noise import derive, normals, signs, words

Factors = tuple[np.ndarray, np.ndarray]  # B [out, r], A [r, in], fp32
WIDER: Final = 4  # rows stored between batches of `explained_directions`, in ranks


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


def explained_directions(
    model: Model, layers: Mapping[str, nn.Module], rank: int, batches: Iterable[Batch]
) -> dict[str, np.ndarray]:
    """Return A [rank, in] fp32 of these LoRA layers, which are at a start with B A = 0, by the parameter's name.

    ModelError when a layer's inputs have fewer than `rank` directions.
    """
    best: dict[tuple[str, ...], Tensor] = {}
    for batch in batches:
        for names, rows in _inputs(model, layers, batch).items():
            rows = torch.cat([best[names], rows]) if names in best else rows
            # S V' of rows = U S V', by way of the smaller of rows' rows and rows rows'
            if len(rows) > rows.shape[1]:
                squares, v = torch.linalg.eigh(rows.T @ rows)
                rows = (v * squares.clamp(min=0).sqrt()).flip(1).T
            else:
                rows = torch.linalg.eigh(rows @ rows.T)[1].flip(1).T @ rows
            best[names] = rows[: WIDER * rank]
    made: dict[str, np.ndarray] = {}
    for names, rows in best.items():
        size = rows.norm(dim=1, keepdim=True)
        if len(rows) < rank or size[rank - 1] <= 1e-6 * size[0]:
            raise ModelError(
                f"the inputs of {names[0]} have fewer than {rank} directions on these rows",
                hint="give it more rows, or use a smaller rank",
            )
        a = (rows / size)[:rank].float().cpu().numpy()
        made |= {f"{name}.lora_A.weight": a for name in names}
    return made


def gradient_directions(
    model: Model, layers: Mapping[str, nn.Module], rank: int, batches: Iterable[Batch]
) -> dict[str, np.ndarray]:
    """Return B [out, rank] and A [rank, in] fp32, orthonormal, of these LoRA layers, by the parameter's name.

    In memory are the gradients of all these weights in fp32.  ModelError when one has fewer than `rank` directions.
    """
    seen: list[tuple[str, Tensor, Tensor]] = []  # of a batch: layer, its input, its output
    sums: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.append((name, args[0], output))

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            for batch in batches:
                loss = loss_tensor(model, batch)
                slopes = torch.autograd.grad(loss, [output for *_, output in seen], materialize_grads=True)
                for (name, x, _), slope in zip(seen, slopes, strict=True):
                    of_weight = slope.flatten(0, -2).T.float() @ x.detach().flatten(0, -2).float()
                    sums[name] = sums.get(name, 0) + of_weight
                seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    made: dict[str, np.ndarray] = {}
    for name, total in sums.items():
        wide = (total if len(total) <= total.shape[1] else total.T).double()
        u = torch.linalg.eigh(wide @ wide.T)[1].flip(1)[:, :rank]
        v = u.T @ wide
        size = v.norm(dim=1, keepdim=True)
        if len(size) < rank or size[-1] <= 1e-6 * size[0]:
            raise ModelError(
                f"the gradient of {name} has fewer than {rank} directions on these rows",
                hint="give it more rows, or use a smaller rank",
            )
        b, a = (u, v / size) if wide.shape == total.shape else ((v / size).T, u.T)
        made[f"{name}.lora_B.weight"] = np.ascontiguousarray(b.float().cpu().numpy())
        made[f"{name}.lora_A.weight"] = np.ascontiguousarray(a.float().cpu().numpy())
    return made


def _inputs(model: Model, layers: Mapping[str, nn.Module], batch: Batch) -> dict[tuple[str, ...], Tensor]:
    """Return the layers' inputs at real tokens, [tokens, in] float64; layers with the same input together."""
    seen: dict[int, tuple[Tensor, list[str]]] = {}  # by id; the tensor stays, so that no id comes twice

    def keep(name: str) -> Any:
        return lambda module, args: seen.setdefault(id(args[0]), (args[0], []))[1].append(name)

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    more = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    try:
        with torch.inference_mode():
            model.net(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **more)
    finally:
        for hook in hooks:
            hook.remove()
    real = batch.attention_mask.bool()
    return {tuple(names): x[real].double() for x, names in seen.values()}


def _normal(seed: int, layer: str, what: str, rows: int, columns: int) -> np.ndarray:
    return normals(derive("lora", seed, layer, what), 0, 0, rows * columns).reshape(rows, columns)


FROM_SEED: Final[Mapping[str, Callable[[str, int, int, int, int], Factors]]] = MappingProxyType(
    {"default": default, "gaussian": gaussian, "shared": shared, "orthogonal": orthogonal}
)
FROM_WEIGHTS: Final[Mapping[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]]] = MappingProxyType(
    {"pissa": pissa, "olora": olora}
)
