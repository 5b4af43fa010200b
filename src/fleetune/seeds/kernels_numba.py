# mypy: allow-untyped-defs, allow-untyped-calls
"""Compute directions on a CPU in one fused, threaded pass over the weights (Numba), bit-equal to `kernels_torch`.

Every operation is rounded to float32, and none is contracted (Numba leaves fused multiply-adds out unless asked for them).  A
tile's row of 128 words (`noise`) serves all its 32 rows of 128 elements, so the inner loop tests one fixed bit of consecutive
words and vectorises; the sums of many passes stay in the first-level cache.

Numba's cache on disk knows this file's text only: touch it for new numbers of `noise`.
"""

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fleetune.common.numba_cache import cached_njit
from fleetune.seeds import kernels_torch, noise
from fleetune.seeds.noise import M0, M1, TILE, W0, W1, WIDTH, Passes

SPLIT = 1 << 19  # element-passes that others must take off a thread for waking them (0.05 ms) to pay
CHUNK = 1 << 19  # most elements a thread takes at a time
ROWS = TILE // WIDTH
PLUS, MINUS, BASE = 0, 1, 2  # places of the weights among a kernel's arrays
FP32, BF16, FP16 = 0, 1, 2  # their types

u16, u32, u64, i32, i64, f32 = np.uint16, np.uint32, np.uint64, np.int32, np.int64, np.float32
BITS = (np.uint64(1) << np.arange(ROWS, dtype=np.uint64)).astype(np.uint32)
_M0, _M1, _W0, _W1, _LOW, _HALF = u64(M0), u64(M1), u64(W0), u64(W1), u64(noise.LOW), u64(32)
_MIX, _SIGN = u64(noise.MIX), u32(1 << 31)

_inner = numba.njit(nogil=True, error_model="numpy")
_inlined = numba.njit(nogil=True, error_model="numpy", inline="always")


@_inner
def _philox(words, block, id, key):
    # 32 calls at once, each in a 64-bit lane with an empty upper half: one widening multiply a product.
    low, high = block & _LOW, block >> _HALF
    for j in range(32):
        x0, x1, x2, x3 = low | u64(j), high, id & _LOW, id >> _HALF
        k0, k1 = key & _LOW, key >> _HALF
        for _ in range(10):
            p0, p1 = _M0 * x0, _M1 * x2
            x0, x1 = (p1 >> _HALF) ^ x1 ^ k0, p1 & _LOW
            x2, x3 = (p0 >> _HALF) ^ x3 ^ k1, p0 & _LOW
            k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
        words[j], words[32 + j], words[64 + j], words[96 + j] = u32(x0), u32(x1), u32(x2), u32(x3)


@_inlined
def _place(end, run):
    # Where the values for the 128 elements of a run begin (`noise.places`) in a table of end + 1 values.
    x = (run ^ (run >> _HALF)) * _MIX
    x = (x ^ (x >> _HALF)) * _MIX
    return (x >> u64(40)) & end


@_inner
def _sum_tables(acc, tile, key, ids, tables, end, words):
    acc[:] = 0
    for p in range(ids.size):
        _philox(words, u64(tile) * u64(32), ids[p], key)
        table = tables[p]
        for r in range(ROWS):
            bit, i = BITS[r], u64(r * WIDTH)
            at = _place(end, u64(tile) * u64(ROWS) + u64(r))
            for e in range(WIDTH):
                acc[i + u64(e)] += _signed(table[at + u64(e)], words[e], bit)


@_inlined
def _signed(v, word, bit):
    return -v if word & bit else v


@_inlined
def _turned(v, word, bit):
    # The same of a float, whose sign bit is turned.
    return u32(f32(v).view(u32) ^ (_SIGN if word & bit else u32(0))).view(f32)


@_inlined
def _from_fp16(code):
    a = u32(code & u32(0x7FFF))
    # the exponent moves from bias 15 to 127, and once more by as much for infinities and NaN
    b = u32((a << u32(13)) + (u32(0x70000000) if a >= u32(0x7C00) else u32(0x38000000)))
    y = f32(i32(a)) * f32(2.0**-24) if a < u32(0x400) else b.view(f32)
    return -y if code & u32(0x8000) else y


@_inlined
def _to_bf16(x):
    # This and the next round to nearest, ties to even; NaN stays a quiet NaN.
    b = f32(x).view(u32)
    nearest = u32(b + (u32(0x8000) if b & u32(0x10000) else u32(0x7FFF)))
    return u16(u32(u32(b | u32(0x400000)) if x != x else nearest) >> u32(16))


@_inlined
def _to_fp16(x):
    b = f32(x).view(u32)
    a = u32(b & u32(0x7FFFFFFF))
    c = min(a, u32(0x47800000))  # 2^16, the code of infinity
    code = u32(c - (u32(0x37FFF000) if c & u32(0x2000) else u32(0x37FFF001))) >> u32(13)
    # below 2^-14 the spacing is 2^-24, the spacing of float32 just above 1/2
    small = u32(f32(a.view(f32) + f32(0.5)).view(u32) - u32(0x3F000000))
    code = small if a < u32(0x38800000) else code
    code = u32(0x7E00) if x != x else code
    return u16(code | u32(u32(b >> u32(16)) & u32(0x8000)))


@_inner
def _rows(floats, codes, kinds, at, first, end, run, acc, grid, table, ends, words, probe, probe_words, x, y):
    # Move rows first..end, row 0 beginning at element `at` of the weights: by acc, or else by one pass's table,
    # and by the probe's.  All loops are written out here: an array handed on within the loop over rows, or a
    # slice of one, costs as much in reference counts as a row's work.  Indices are unsigned: no look for negative ones.
    plus, minus, base = floats
    plus16, minus16, base16 = codes
    reads, writes, both = kinds
    table_end, probe_end = ends  # the last places that a run may begin at
    for r in range(first, end):
        bit, i, j = BITS[r], u64(at + r * WIDTH), u64(r * WIDTH)
        if reads == BF16:
            for e in range(WIDTH):
                x[e] = u32(u32(base16[i + u64(e)]) << u32(16)).view(f32)
        elif reads == FP16:
            for e in range(WIDTH):
                x[e] = _from_fp16(u32(base16[i + u64(e)]))
        else:
            for e in range(WIDTH):
                x[e] = base[i + u64(e)]
        if acc.size:
            for e in range(WIDTH):
                x[e] += f32(grid * f32(acc[j + u64(e)]))
        elif table.size:
            k = _place(table_end, run + u64(r))
            for e in range(WIDTH):
                x[e] += f32(grid * f32(i32(_signed(table[k + u64(e)], words[e], bit))))
        if probe.size:
            k = _place(probe_end, run + u64(r))
            for e in range(WIDTH):
                y[e] = _turned(probe[k + u64(e)], probe_words[e], bit)
            if both:
                for e in range(WIDTH):
                    step = y[e]
                    y[e] = x[e] + (-step)
                    x[e] += step
            else:
                for e in range(WIDTH):
                    x[e] += y[e]
        if writes == BF16:
            for e in range(WIDTH):
                plus16[i + u64(e)] = _to_bf16(x[e])
            if both:
                for e in range(WIDTH):
                    minus16[i + u64(e)] = _to_bf16(y[e])
        elif writes == FP16:
            for e in range(WIDTH):
                plus16[i + u64(e)] = _to_fp16(x[e])
            if both:
                for e in range(WIDTH):
                    minus16[i + u64(e)] = _to_fp16(y[e])
        else:
            for e in range(WIDTH):
                plus[i + u64(e)] = x[e]
            if both:
                for e in range(WIDTH):
                    minus[i + u64(e)] = y[e]


@_inner
def _edges():
    # Room for the weights of a part of a tile, as if it were whole: like `floats` and `codes`.
    a, b = np.empty((3, TILE), f32), np.empty((3, TILE), u16)
    return (a[0], a[1], a[2]), (b[0], b[1], b[2])


@_inner
def _copy_part(to, i, from_, j, n):
    # The array for a type that the weights have not is empty.
    if to.size and from_.size:
        to[i : i + n] = from_[j : j + n]


@_inner
def _enter(edges, edges16, floats, codes, at, lo, n):
    _copy_part(edges[BASE], at, floats[BASE], lo, n)
    _copy_part(edges16[BASE], at, codes[BASE], lo, n)


@_inner
def _leave(edges, edges16, floats, codes, at, lo, n):
    for k in (PLUS, MINUS):
        _copy_part(floats[k], lo, edges[k], at, n)
        _copy_part(codes[k], lo, edges16[k], at, n)


@cached_njit
def sweep_tiles(floats, codes, kinds, start, lo, hi, move):
    # A single int32 pass needs no accumulator.  Tables are `extended`.  Parts of tiles are moved in a tile of their own.
    key, ids, tables, ends, grid, probe_id, probe = move
    summed = ids.size > 1 or (ids.size == 1 and tables.itemsize == 8)
    acc = np.empty(TILE if summed else 0, tables.dtype)
    words, x, y = np.empty((2, WIDTH), u32), np.empty(WIDTH, f32), np.empty(WIDTH, f32)
    edges, edges16 = _edges()
    while lo < hi:
        tile, at = (start + lo) // TILE, (start + lo) % TILE
        n = min(TILE - at, hi - lo)
        if probe.size:
            _philox(words[1], u64(tile) * u64(32), probe_id, key)
        if summed:
            _sum_tables(acc, tile, key, ids, tables, ends[0], words[0])
        elif ids.size:
            if probe.size and probe_id == ids[0]:
                words[0] = words[1]
            else:
                _philox(words[0], u64(tile) * u64(32), ids[0], key)
        to, to16, begin, first, end = floats, codes, lo, 0, ROWS
        if n < TILE:
            to, to16, begin, first, end = edges, edges16, 0, at // WIDTH, (at + n + WIDTH - 1) // WIDTH
            _enter(edges, edges16, floats, codes, at, lo, n)
        run, table = u64(tile) * u64(ROWS), tables.reshape(tables.size)
        _rows(
            to, to16, kinds, begin, first, end, run, acc, grid, table, ends, words[0], probe, words[1], x, y
        )
        if n < TILE:
            _leave(edges, edges16, floats, codes, at, lo, n)
        lo += n


@cached_njit
def fold_tiles(x, start, id, key, sums):
    # A run's sums lie side by side, but for those that begin anew at the table's end.
    words, end, lo = np.empty(WIDTH, u32), u64(sums.size - 1), 0
    while lo < x.size:
        tile, at = (start + lo) // TILE, (start + lo) % TILE
        last = min(TILE, at + x.size - lo)
        _philox(words, u64(tile) * u64(32), id, key)
        while at < last:
            r, first = at // WIDTH, at % WIDTH
            n = min(WIDTH - first, last - at)
            bit, i, k = BITS[r], u64(lo), _place(end, u64(tile) * u64(ROWS) + u64(r))
            if n == WIDTH and k + u64(WIDTH) <= u64(sums.size):
                for e in range(WIDTH):
                    sums[k + u64(e)] += _turned(x[i + u64(e)], words[e], bit)
            else:
                for e in range(n):
                    word = words[first + e]
                    sums[(k + u64(first + e)) & end] += _turned(x[i + u64(e)], word, bit)
            at, lo = at + n, lo + n


# --- the work and its threads -----------------------------------------------------------------------------


def sweep(
    out: Tensor,
    base: Tensor,
    start: int,
    run_key: int,
    passes: Passes,
    grid: float,
    probe: kernels_torch.Probe | None = None,
    *,
    gaussian: bool = False,
    minus: Tensor | None = None,
    threads: int | None = None,
    block: int | None = None,
) -> None:
    """Do what `kernels_torch.sweep` does, on a CPU; `threads` is torch's number by default."""
    if gaussian:  # normal numbers are torch's to make
        move = (start, run_key, passes, grid, probe)
        return kernels_torch.sweep(out, base, *move, gaussian=True, minus=minus, block=block)
    outputs = kernels_torch.checked(out, base, start, passes, probe, minus)
    ids = _native(passes.ids, u64)
    probe_id, step = (0, _NONE) if probe is None else (probe[0], _native(np.asarray(probe[1]), f32))
    tables = _native(passes.tables, i32 if passes.tables.dtype == i32 else i64)
    ends = (u64(tables.shape[1] - 1), u64(max(1, len(step)) - 1))
    tables = _extended("passes", tables) if len(ids) else tables
    step = _extended("probe", step) if len(step) else step
    moves = (u64(run_key), ids, tables, ends, f32(grid), u64(probe_id), step)
    for moved in outputs:
        if not moved.is_inference():
            # so that a backward that needs the old values says so
            torch.autograd.graph.increment_version(moved)
    floats, codes = zip(*(_arrays(tensor) for tensor in (out, minus, base)), strict=True)
    weights = floats, codes, (_KINDS[base.dtype], _KINDS[out.dtype], int(minus is not None))
    _share(weights, start, base.numel(), max(1, len(ids) // 4), moves, threads, block)


def fold(x: Tensor, start: int, run_key: int, id: int, K: int) -> Tensor:
    """Do what `kernels_torch.fold` does, on a CPU and on one thread."""
    sums = np.zeros(K, f32)
    fold_tiles(_native(x.detach().numpy(), f32), start, u64(id), u64(run_key), sums)
    return torch.from_numpy(sums)


_NONE = np.zeros(0, f32)
_NONE16 = np.zeros(0, u16)
_KINDS = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}

# A kernel's arguments: what it writes and reads (plus, minus, base, each as float32 or as 16-bit codes, the other empty, so
# that one compilation serves all dtypes; and what is read, what is written, whether minus is), and the move.
Weights = tuple[tuple[NDArray[Any], ...], tuple[NDArray[Any], ...], tuple[int, int, int]]
Move = tuple[Any, ...]


_EXTENDED: dict[
    str, tuple[NDArray[Any], NDArray[Any]]
] = {}  # the last tables, and what `noise.extended` made of them


def _extended(what: str, tables: NDArray[Any]) -> NDArray[Any]:
    last = _EXTENDED.get(what)
    if last is None or last[0] is not tables:
        last = _EXTENDED[what] = tables, noise.extended(tables)
    return last[1]


def _arrays(tensor: Tensor | None) -> tuple[NDArray[Any], NDArray[Any]]:
    if tensor is None:
        return _NONE, _NONE16
    if tensor.dtype == torch.float32:
        return tensor.detach().numpy(), _NONE16
    return _NONE, tensor.detach().view(torch.uint16).numpy()


def _share(
    weights: Weights, start: int, size: int, cost: int, move: Move, threads: int | None, block: int | None
) -> None:
    """Run `sweep_tiles` over all elements: here when the work is small, else on threads that take chunks in turn.

    cost: element-passes an element.
    """
    n_threads = max(1, threads if threads is not None else torch.get_num_threads())
    if block is None:
        if size * cost * (1 - 1 / n_threads) < SPLIT:
            sweep_tiles(*weights, start, 0, size, move)
            return
        block = max(TILE, min(CHUNK, size // (4 * n_threads)))
    step = -(-block // TILE) * TILE
    counter = itertools.count(-(start % TILE), step)  # chunks end where tiles end; `next` is atomic

    def work() -> None:
        while (lo := next(counter)) < size:
            sweep_tiles(*weights, start, max(lo, 0), min(lo + step, size), move)

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
