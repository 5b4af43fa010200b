# SPDX-License-Identifier: Apache-2.0
"""Compute directions on a CPU in one fused, threaded pass over the weights (Numba), bit-equal to `noise`.

`sweep` moves weights along a sum of +1/-1 directions and along one probe direction in a single pass:

    out[i] = round( (float32(base[i]) + float32(grid * float32(acc[i]))) + sign[i] * table[place(start+i)] )

with acc the integer sum of `noise.Passes` and `place` that of `noise.places`.  Every operation is rounded to
float32 and none is contracted (Numba leaves fused multiply-adds out unless asked for them), so `kernels_torch`
gives the same bits.  With `minus` it writes this for the probe and for the opposite one, in one pass too.
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
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fleetune.seeds import noise
from fleetune.seeds.loops_numba import BF16, FP16, FP32, f32, i32, sweep_groups, sweep_tiles, u16, u64
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
    minus: Tensor | None = None,
    threads: int | None = None,
    block: int | None = None,
    sums: Tensor | None = None,
) -> None:
    """Set out = base moved by grid * passes, then by sign * table of the probe (formula in the module docstring).

    out, base: 1-D contiguous CPU tensors of one size and type (fp32, bf16, fp16), the same tensor or
    disjoint; start: global index of element 0.  probe: (Philox id, float32 table [K], K a power of two).
    minus: gets the same with -table, in one pass over the base, which then may be float32 too; disjoint from `out`.
    threads: torch's number by default; block: elements a thread takes at a time.  sums: integers that are added to
    the passes' sum: float32, of base's size, no total reaching 2^24.  Raises ValueError for tensors or tables of
    another kind.
    """
    probe_id, step = (0, _NONE) if probe is None else (probe[0], _native(np.asarray(probe[1]), f32))
    noise.check_tables(passes, None if probe is None else step)
    ids = _native(passes.ids, u64)
    tables = _native(passes.tables, i32 if passes.tables.dtype == i32 else np.int64)
    move = (u64(run_key), ids, tables, _cached(sums, base), f32(grid), u64(probe_id), step)
    cost = max(1, len(ids) // 4)
    _share(sweep_tiles, _weights(out, minus, base, start), start, cost, move, threads, block)


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
    minus: Tensor | None = None,
    threads: int | None = None,
    block: int | None = None,
) -> None:
    """`sweep` for the gaussian law: out = round((base + grid * sum_p c_p z_p) + scale * z_probe), in float32.

    ids: uint64 [P], summed in this order; coefficients: float32 [P]; probe: (id, scale), with -scale for `minus`.
    """
    probe_id, scale = (0, _NONE) if probe is None else (probe[0], np.array([probe[1]], f32))
    keys, factors = _native(np.asarray(ids), u64), _native(np.asarray(coefficients), f32)
    if keys.shape != factors.shape:
        raise ValueError(f"{keys.shape} ids need as many coefficients, got {factors.shape}")
    move = (u64(run_key), keys, factors, f32(grid), u64(probe_id), scale)
    cost = 8 * max(1, len(keys))
    _share(sweep_groups, _weights(out, minus, base, start), start, cost, move, threads, block)


_NONE = np.zeros(0, f32)
_NONE16 = np.zeros(0, u16)
_KINDS = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}

Move = tuple[Any, ...]  # a kernel's last argument


def _cached(sums: Tensor | None, base: Tensor) -> NDArray[Any]:
    if sums is None:
        return _NONE
    if sums.dtype != torch.float32 or sums.shape != base.shape or not (sums.is_cpu and sums.is_contiguous()):
        raise ValueError(f"sums are {sums.dtype} {list(sums.shape)}, base is {base.dtype} {list(base.shape)}")
    return _arrays(sums)[0]


class Weights(NamedTuple):
    """What a kernel writes and reads: plus, minus and base, each as float32 or as 16-bit codes, the other empty.

    One compilation serves all dtypes.  kinds: what is read, what is written, whether minus is.
    """

    floats: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
    codes: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
    kinds: tuple[int, int, int]


def _weights(plus: Tensor, minus: Tensor | None, base: Tensor, start: int) -> Weights:
    """Check the tensors and lay them out for a kernel; `plus` is the only output where `minus` is None."""
    dtype = plus.dtype
    outputs = [plus] if minus is None else [plus, minus]
    reads = [dtype] if minus is None else [dtype, torch.float32]
    for out in outputs:
        if base.dtype not in reads or out.dtype != dtype or base.shape != out.shape or out.dim() != 1:
            raise ValueError(f"out is {out.dtype} {list(out.shape)}, base is {base.dtype} {list(base.shape)}")
    if not all(t.is_contiguous() and t.is_cpu for t in (*outputs, base)):
        raise ValueError("out and base must be contiguous and in the CPU's memory")
    if start < 0:
        raise ValueError(f"start is {start}; a global index is 0 or more")
    if dtype not in _KINDS:
        raise ValueError(f"weights of type {dtype}; fp32, bf16 and fp16 are known")
    for out in outputs:
        if not out.is_inference():
            # so that a backward that needs the old values says so
            torch.autograd.graph.increment_version(out)
    floats, codes = zip(*(_arrays(t) for t in (plus, minus, base)), strict=True)
    return Weights(floats, codes, (_KINDS[base.dtype], _KINDS[dtype], int(minus is not None)))


def _arrays(tensor: Tensor | None) -> tuple[NDArray[Any], NDArray[Any]]:
    if tensor is None:
        return _NONE, _NONE16
    if tensor.dtype == torch.float32:
        return tensor.detach().numpy(), _NONE16
    return _NONE, tensor.detach().view(torch.uint16).numpy()


def _share(
    kernel: Callable[..., None],
    weights: Weights,
    start: int,
    cost: int,
    move: Move,
    threads: int | None,
    block: int | None,
) -> None:
    """Run the kernel over all elements: here when the work is small, else on threads that take chunks in turn.

    cost: element-passes an element.
    """
    size = max(len(weights.floats[0]), len(weights.codes[0]))
    n_threads = max(1, threads if threads is not None else torch.get_num_threads())
    if block is None:
        if size * cost * (1 - 1 / n_threads) < SPLIT:
            kernel(*weights, start, 0, size, move)
            return
        block = max(TILE, min(CHUNK, size // (4 * n_threads)))
    step = -(-block // TILE) * TILE
    counter = itertools.count(-(start % TILE), step)  # chunks end where tiles end; `next` is atomic

    def work() -> None:
        while (lo := next(counter)) < size:
            kernel(*weights, start, max(lo, 0), min(lo + step, size), move)

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
