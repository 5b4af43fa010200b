# SPDX-License-Identifier: Apache-2.0
"""Compute directions on a CPU in one fused, threaded pass over the weights (Numba), bit-equal to `noise`.

`sweep` moves weights along a sum of +1/-1 directions and along one probe direction in a single pass:

    out[i] = round( (float32(base[i]) + float32(grid * float32(acc[i]))) + sign[i] * table[place(start+i)] )

with acc the integer sum of `noise.Passes` and `place` that of `noise.places`.  Every operation is rounded to
float32 and none is contracted (Numba leaves fused multiply-adds out unless asked for them), so `kernels_torch`
gives the same bits.
The loops are in `loops_numba`; this module checks the arguments and shares the work among threads.

Threads are Python threads: the compiled loop releases the interpreter's lock.  They take chunks from one
counter, so a slow one (torch's own workers spin for a while after a product) delays only its own chunk.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fleetune.seeds import noise
from fleetune.seeds.loops_numba import (
    BF16,
    COPIED,
    FP16,
    IN_PLACE,
    f32,
    i32,
    sweep_groups,
    sweep_tiles,
    u16,
    u64,
)
from fleetune.seeds.noise import TILE, Passes

SPLIT = 1 << 19  # element-passes that others must take off a thread for waking them (0.05 ms) to pay
CHUNK = 1 << 19  # most elements a thread takes at a time


def sweep(
    out: Tensor,
    base: Tensor,
    start: int,
    run_key: int,
    passes: Passes,
    grid: float,
    probe: tuple[int, ArrayLike] | None = None,
    *,
    law: str = "pooled",
    threads: int | None = None,
    block: int | None = None,
) -> None:
    """Set out = base moved by grid * passes, then by sign * table of the probe (formula in the module docstring).

    out, base: 1-D contiguous CPU tensors of one size and type (fp32, bf16, fp16), the same tensor or
    disjoint; start: global index of element 0.  probe: (Philox id, float32 table [K], K a power of two).
    law: tables are read at its `noise.places`.  threads: torch's number by
    default; block: elements a thread takes at a time.  Raises ValueError for tensors or tables of another kind.
    """
    probe_id, step = (0, _NONE) if probe is None else (probe[0], _native(np.asarray(probe[1]), f32))
    noise.check_tables(passes, None if probe is None else step)
    ids = _native(passes.ids, u64)
    tables = _native(passes.tables, i32 if passes.tables.dtype == i32 else np.int64)
    move = (u64(run_key), ids, tables, f32(grid), u64(probe_id), step, int(law == "hashed"))
    cost = out.numel() * max(1, len(ids) // 4)
    _share(sweep_tiles, _weights(out, base, start), start, cost, move, threads, block)


def sweep_gaussian(
    out: Tensor,
    base: Tensor,
    start: int,
    run_key: int,
    ids: ArrayLike,
    coefficients: ArrayLike,
    grid: float,
    probe: tuple[int, float] | None = None,
    *,
    threads: int | None = None,
    block: int | None = None,
) -> None:
    """`sweep` for the gaussian law: out = round((base + grid * sum_p c_p z_p) + scale * z_probe), in float32.

    ids: uint64 [P], summed in this order; coefficients: float32 [P]; probe: (id, scale).
    """
    probe_id, scale = (0, _NONE) if probe is None else (probe[0], np.array([probe[1]], f32))
    keys, factors = _native(np.asarray(ids), u64), _native(np.asarray(coefficients), f32)
    if keys.shape != factors.shape:
        raise ValueError(f"{keys.shape} ids need as many coefficients, got {factors.shape}")
    move = (u64(run_key), keys, factors, f32(grid), u64(probe_id), scale)
    cost = out.numel() * 8 * max(1, len(keys))
    _share(sweep_groups, _weights(out, base, start), start, cost, move, threads, block)


_NONE = np.zeros(0, f32)
_NONE16 = np.zeros(0, u16)


def _weights(out: Tensor, base: Tensor, start: int) -> tuple[Any, ...]:
    """Return (out, base) as float32 arrays or as 16-bit codes, and the kind: one compilation serves all dtypes."""
    dtype = out.dtype
    if base.dtype != dtype or base.shape != out.shape or out.dim() != 1:
        raise ValueError(f"out is {dtype} {list(out.shape)}, base is {base.dtype} {list(base.shape)}")
    if not (out.is_contiguous() and base.is_contiguous() and out.is_cpu and base.is_cpu):
        raise ValueError("out and base must be contiguous and in the CPU's memory")
    if start < 0:
        raise ValueError(f"start is {start}; a global index is 0 or more")
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # so that a backward that needs the old values says so
    if dtype == torch.float32:
        kind = IN_PLACE if out.data_ptr() == base.data_ptr() else COPIED
        return out.detach().numpy(), base.detach().numpy(), _NONE16, _NONE16, kind
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"weights of type {dtype}; fp32, bf16 and fp16 are known")
    codes = (t.detach().view(torch.uint16).numpy() for t in (out, base))
    return _NONE, _NONE, *codes, BF16 if dtype == torch.bfloat16 else FP16


def _share(
    kernel: Callable[..., None],
    weights: tuple[Any, ...],
    start: int,
    cost: int,
    move: tuple[Any, ...],
    threads: int | None,
    block: int | None,
) -> None:
    """Run the kernel over all elements: here when the work is small, else on threads that take chunks in turn."""
    size = max(len(weights[0]), len(weights[2]))
    n_threads = max(1, threads if threads is not None else torch.get_num_threads())
    if block is None:
        if cost * (1 - 1 / n_threads) < SPLIT:
            kernel(*weights, start, 0, size, *move)
            return
        block = max(TILE, min(CHUNK, size // (4 * n_threads)))
    step = -(-block // TILE) * TILE
    counter = itertools.count(-(start % TILE), step)  # chunks end where tiles end; `next` is atomic

    def work() -> None:
        while (lo := next(counter)) < size:
            kernel(*weights, start, max(lo, 0), min(lo + step, size), *move)

    helpers = [_pool(os.getpid(), n_threads - 1).submit(work) for _ in range(n_threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():  # one that has not begun is not waited for
            helper.result()


@functools.lru_cache(maxsize=4)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    # By process, because threads do not survive a fork.
    return ThreadPoolExecutor(max_workers=workers, thread_name_prefix="fleetune-sweep")


def _native(array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Return the array as Numba was compiled for: read-only or strided ones would be compiled anew."""
    if array.dtype == dtype and array.flags.carray:
        return array
    return np.array(array, dtype=dtype, order="C")
