# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-untyped-calls
"""Compile the inner loops of `kernels_numba`: Philox, sums of passes, the move, 16-bit dtypes, normals.

Tiles, one by one (4096 elements; `noise` has the layout).  A tile's row of 128 words serves all its 32 rows
of 128 elements, so the inner loop over a row tests one fixed bit of consecutive words and vectorises on any
CPU; the sums of many passes stay in the first-level cache while all passes go by.  16-bit weights are widened
into a float32 tile and rounded back with integer operations.

All compiled code is in this file, because Numba's cache on disk knows the text of one file only; whoever
changes a number of `noise` must touch this file.
"""

from __future__ import annotations

import numba
import numpy as np

from fleetune.common.numba_cache import cached_njit
from fleetune.seeds import noise
from fleetune.seeds.noise import M0, M1, TILE, W0, W1, WIDTH

ROWS = TILE // WIDTH
IN_PLACE, COPIED, BF16, FP16 = 0, 1, 2, 3  # what a kernel's weights are: the first two are float32

u16, u32, u64, i32, i64, f32 = np.uint16, np.uint32, np.uint64, np.int32, np.int64, np.float32
BITS = (np.uint64(1) << np.arange(ROWS, dtype=np.uint64)).astype(np.uint32)
_M0, _M1, _W0, _W1, _LOW, _HALF = u64(M0), u64(M1), u64(W0), u64(W1), u64(noise.LOW), u64(32)
_MIX = u64(noise.MIX)

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
def _part(table, run, hashed, wrapped):
    # The table's values for the 128 elements of a run (`noise.places`); `wrapped` is room for those around its end.
    if not hashed:
        at = i64(run * u64(WIDTH)) & (table.size - 1)
        return table[at : at + WIDTH]
    x = (run ^ (run >> _HALF)) * _MIX
    x = (x ^ (x >> _HALF)) * _MIX
    at = i64(x >> u64(40)) & (table.size - 1)
    if at + WIDTH <= table.size:
        return table[at : at + WIDTH]
    for e in range(WIDTH):
        wrapped[e] = table[(at + e) & (table.size - 1)]
    return wrapped


@_inner
def _sum_constants(acc, tile, key, ids, tables, words):
    # sum of c * sign = sum of c - sum of 2c over the set bits (modulo 2^32 or 2^64, so exact); four a time,
    # so that an accumulator is loaded and stored once for four passes.
    total = acc.dtype.type(0)
    for p in range(ids.size):
        total += tables[p, 0]
    acc[:] = total
    twice = np.zeros(4, acc.dtype)
    for first in range(0, ids.size, 4):
        for p in range(4):
            twice[p] = 0
            if first + p < ids.size:
                twice[p] = 2 * tables[first + p, 0]
                _philox(words[p], u64(tile) * u64(32), ids[first + p], key)
        a, b, c, d = twice[0], twice[1], twice[2], twice[3]
        wa, wb, wc, wd = words[0], words[1], words[2], words[3]
        for r in range(ROWS):
            bit, row = BITS[r], acc[r * WIDTH : r * WIDTH + WIDTH]
            for e in range(WIDTH):
                row[e] -= (
                    (a if wa[e] & bit else 0)
                    + (b if wb[e] & bit else 0)
                    + (c if wc[e] & bit else 0)
                    + (d if wd[e] & bit else 0)
                )


@_inner
def _sum_tables(acc, tile, key, ids, tables, words, hashed):
    acc[:] = 0
    wrapped = np.empty(WIDTH, tables.dtype)
    for p in range(ids.size):
        _philox(words[0], u64(tile) * u64(32), ids[p], key)
        table, w = tables[p], words[0]
        for r in range(ROWS):
            bit, row = BITS[r], acc[r * WIDTH : r * WIDTH + WIDTH]
            part = _part(table, u64(tile) * u64(ROWS) + u64(r), hashed, wrapped)
            for e in range(WIDTH):
                row[e] += -part[e] if w[e] & bit else part[e]


@_inlined
def _add_sums(x, y, acc, grid):
    for i in range(TILE):
        x[i] = y[i] + f32(grid * f32(acc[i]))


@_inlined
def _add_pass(x, y, tile, w, table, grid, hashed):
    wrapped = np.empty(WIDTH, table.dtype)
    for r in range(ROWS):
        bit, row, from_ = BITS[r], x[r * WIDTH : r * WIDTH + WIDTH], y[r * WIDTH : r * WIDTH + WIDTH]
        part = _part(table, u64(tile) * u64(ROWS) + u64(r), hashed, wrapped)
        for e in range(WIDTH):
            row[e] = from_[e] + f32(grid * f32(i32(-part[e]) if w[e] & bit else i32(part[e])))


@_inlined
def _add_probe(x, y, tile, w, table, hashed):
    wrapped = np.empty(WIDTH, table.dtype)
    for r in range(ROWS):
        bit, row, from_ = BITS[r], x[r * WIDTH : r * WIDTH + WIDTH], y[r * WIDTH : r * WIDTH + WIDTH]
        part = _part(table, u64(tile) * u64(ROWS) + u64(r), hashed, wrapped)
        for e in range(WIDTH):
            row[e] = from_[e] + (-part[e] if w[e] & bit else part[e])


@_inlined
def _add_both(x, y, tile, w, table, grid, v, probe, hashed):
    wrapped, around = np.empty(WIDTH, table.dtype), np.empty(WIDTH, f32)
    for r in range(ROWS):
        bit, row, from_ = BITS[r], x[r * WIDTH : r * WIDTH + WIDTH], y[r * WIDTH : r * WIDTH + WIDTH]
        part = _part(table, u64(tile) * u64(ROWS) + u64(r), hashed, wrapped)
        step = _part(probe, u64(tile) * u64(ROWS) + u64(r), hashed, around)
        for e in range(WIDTH):
            moved = f32(from_[e] + f32(grid * f32(i32(-part[e]) if w[e] & bit else i32(part[e]))))
            row[e] = moved + (-step[e] if v[e] & bit else step[e])


@_inlined
def _move(x, y, tile, key, ids, tables, grid, probe_id, probe, hashed, words, acc):
    # One whole tile, of y into x (which may be y).  `words` is [5, 128]: four for sums, the last for the probe.
    if probe.size:
        _philox(words[4], u64(tile) * u64(32), probe_id, key)
    if acc.size:
        if tables.shape[1] == 1:
            _sum_constants(acc, tile, key, ids, tables, words)
        else:
            _sum_tables(acc, tile, key, ids, tables, words, hashed)
        _add_sums(x, y, acc, grid)
        y = x
    elif ids.size:
        if probe.size and probe_id == ids[0]:
            _copy(words[0], words[4])
        else:
            _philox(words[0], u64(tile) * u64(32), ids[0], key)
        if probe.size:
            _add_both(x, y, tile, words[0], tables[0], grid, words[4], probe, hashed)
        else:
            _add_pass(x, y, tile, words[0], tables[0], grid, hashed)
        return
    if probe.size:
        _add_probe(x, y, tile, words[4], probe, hashed)
    else:
        _copy(x, y)


@_inner
def _copy(x, y):
    for i in range(x.size):
        x[i] = y[i]


@_inner
def _load(x, base, base16, lo, kind):
    # Widen 16-bit codes to float32, exactly.
    if kind <= COPIED:
        _copy(x, base[lo : lo + x.size])
        return
    codes = base16[lo : lo + x.size]
    if kind == BF16:
        for i in range(x.size):
            x[i] = u32(u32(codes[i]) << u32(16)).view(np.float32)
        return
    for i in range(x.size):
        code = u32(codes[i])
        a = u32(code & u32(0x7FFF))
        # the exponent moves from bias 15 to 127, and once more by as much for infinities and NaN
        b = u32((a << u32(13)) + (u32(0x70000000) if a >= u32(0x7C00) else u32(0x38000000)))
        y = f32(i32(a)) * f32(2.0**-24) if a < u32(0x400) else b.view(np.float32)
        x[i] = -y if code & u32(0x8000) else y


@_inner
def _store(out, out16, lo, x, kind):
    # Round to 16 bits, to nearest, ties to even; NaN stays a quiet NaN.
    if kind <= COPIED:
        _copy(out[lo : lo + x.size], x)
        return
    codes = out16[lo : lo + x.size]
    if kind == BF16:
        for i in range(x.size):
            b = f32(x[i]).view(np.uint32)
            nearest = u32(u32(b + u32(0x7FFF) + (u32(b >> u32(16)) & u32(1))) >> u32(16))
            quiet = u32(u32(b >> u32(16)) | u32(0x40))
            codes[i] = u16(nearest if u32(b & u32(0x7FFFFFFF)) <= u32(0x7F800000) else quiet)
        return
    for i in range(x.size):
        b = f32(x[i]).view(np.uint32)
        a = u32(b & u32(0x7FFFFFFF))
        code = u32(u32(a - u32(0x38000000) + u32(0xFFF) + (u32(a >> u32(13)) & u32(1))) >> u32(13))
        # below 2^-14 the spacing is 2^-24, the spacing of float32 just above 1/2
        small = u32(f32(a.view(np.float32) + f32(0.5)).view(np.uint32) - u32(0x3F000000))
        code = small if a < u32(0x38800000) else code
        code = u32(0x7C00) if a >= u32(0x477FF000) else code
        code = u32(0x7E00) if a > u32(0x7F800000) else code
        codes[i] = u16(code | u32(u32(b >> u32(16)) & u32(0x8000)))


@_inner
def _widen(table, size):
    out = np.empty((table.shape[0], size), table.dtype)
    for p in range(table.shape[0]):
        for i in range(size):
            out[p, i] = table[p, i & (table.shape[1] - 1)]
    return out


@cached_njit
def sweep_tiles(
    out, base, out16, base16, kind, start, lo, hi, key, ids, tables, grid, probe_id, probe, hashed
):
    # A single int32 pass needs no accumulator.  Many constants keep their one column; other tables are
    # repeated to at least a row.
    summed = ids.size > 1 or (ids.size == 1 and tables.itemsize == 8)
    acc = np.empty(TILE if summed else 0, tables.dtype)
    if tables.shape[1] < WIDTH and not (summed and tables.shape[1] == 1):
        tables = _widen(tables, WIDTH)
    if 0 < probe.size < WIDTH:
        probe = _widen(probe.reshape(1, -1), WIDTH)[0]
    words, edge = np.empty((5, WIDTH), u32), np.zeros(TILE, f32)
    while lo < hi:
        tile, at = (start + lo) // TILE, (start + lo) % TILE
        n = min(TILE - at, hi - lo)
        whole = kind <= COPIED and n == TILE
        # Two calls, so that each is compiled knowing whether x is y; no more, for they take seconds to compile.
        if whole and kind == COPIED:
            x, y = out[lo : lo + TILE], base[lo : lo + TILE]
            _move(x, y, tile, key, ids, tables, grid, probe_id, probe, hashed, words, acc)
        else:
            x = out[lo : lo + TILE] if whole else edge
            if not whole:
                _load(edge[at : at + n], base, base16, lo, kind)
            _move(x, x, tile, key, ids, tables, grid, probe_id, probe, hashed, words, acc)
            if not whole:
                _store(out, out16, lo, edge[at : at + n], kind)
        lo += n


_LOG, _SIN, _COS = (tuple(f32(c) for c in p) for p in (noise.LOG_POLY, noise.SIN_POLY, noise.COS_POLY))
_LN2_HIGH, _LN2_LOW, _ANGLE = f32(noise.LN2_HIGH), f32(noise.LN2_LOW), f32(noise.ANGLE)
_SQRT_HALF = i32(noise.SQRT_HALF_BITS)


@_inner
def _horner(y, x, a, b):
    return f32(f32(f32(f32(y * x) + a) * x) + b)


@_inner
def _normals(z, w):
    # noise.normals for one group of 128: operation for operation.
    for pair in range(2):
        first, second = w[pair * 64 : pair * 64 + 32], w[pair * 64 + 32 : pair * 64 + 64]
        zc, zs = z[pair * 64 : pair * 64 + 32], z[pair * 64 + 32 : pair * 64 + 64]
        for j in range(32):
            bits = f32(f32(f32(first[j]) * f32(2.0**-32)) + f32(2.0**-33)).view(np.int32)
            e = i32(i32(bits - _SQRT_HALF) >> i32(23))
            x = f32(i32(bits - i32(e << i32(23))).view(np.float32) - f32(1.0))
            xx = f32(x * x)
            log = _horner(_LOG[0], x, _LOG[1], _LOG[2])
            log = _horner(log, x, _LOG[3], _LOG[4])
            log = _horner(log, x, _LOG[5], _LOG[6])
            log = _horner(log, x, _LOG[7], _LOG[8])
            log = f32(f32(f32(log * x) * xx) + f32(f32(e) * _LN2_LOW))
            log = f32(f32(x + f32(log - f32(f32(0.5) * xx))) + f32(f32(e) * _LN2_HIGH))
            r = f32(np.sqrt(f32(f32(-2.0) * log)))
            quadrant = u32(u32(second[j] + u32(1 << 29)) >> u32(30))
            t = f32(f32(i32(second[j] - u32(quadrant << u32(30)))) * _ANGLE)
            tt = f32(t * t)
            sine = f32(f32(f32(_horner(_SIN[0], tt, _SIN[1], _SIN[2]) * tt) * t) + t)
            cosine = f32(f32(_horner(_COS[0], tt, _COS[1], _COS[2]) * tt) * tt)
            cosine = f32(f32(cosine - f32(f32(0.5) * tt)) + f32(1.0))
            odd = (quadrant & u32(1)) != 0
            c, s = (sine if odd else cosine), (cosine if odd else sine)
            zc[j] = f32(r * (-c if quadrant == 1 or quadrant == 2 else c))
            zs[j] = f32(r * (-s if quadrant >= 2 else s))


@cached_njit
def sweep_groups(
    out, base, out16, base16, kind, start, lo, hi, key, ids, coefficients, grid, probe_id, scale
):
    # Groups of 128, one by one; scale holds the probe's step or nothing.
    x, z, acc, words = np.zeros(WIDTH, f32), np.empty(WIDTH, f32), np.empty(WIDTH, f32), np.empty(WIDTH, u32)
    while lo < hi:
        group, at = (start + lo) // WIDTH, (start + lo) % WIDTH
        n = min(WIDTH - at, hi - lo)
        _load(x[at : at + n], base, base16, lo, kind)
        if ids.size:
            acc[:] = 0
            for p in range(ids.size):
                _philox(words, u64(group) * u64(32), ids[p], key)
                _normals(z, words)
                for i in range(WIDTH):
                    acc[i] += f32(coefficients[p] * z[i])
            for i in range(WIDTH):
                x[i] += f32(grid * acc[i])
        if scale.size:
            _philox(words, u64(group) * u64(32), probe_id, key)
            _normals(z, words)
            for i in range(WIDTH):
                x[i] += f32(scale[0] * z[i])
        _store(out, out16, lo, x[at : at + n], kind)
        lo += n
