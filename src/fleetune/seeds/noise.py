"""Define directions: the readable reference that the kernels must equal bit for bit.

A direction z(id) assigns a number to every trainable weight, as a pure function of (run key, direction id, global element index).
Bits come from Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): key = run
key, counter = (block low, block high, id low, id high).  A tile of 4096 elements takes the 32 blocks tile*32 + j; word c of block
j is words[c*32 + j], and element e of the tile has the bit (words[e % 128] >> (e // 128)) & 1: sign +1 for 0, -1 for 1.

- rademacher: z(id)[i] is that sign.  E[z z'] = I, as MeZO (Malladi et al. 2023, arXiv 2305.17333) needs of z.
- hashed: a pool of K directions, all replayed in one pass.  With id = epoch << 32 | k, z[i] = D[i] * H[place(i), k], D the sign
  for id = epoch, H[j, k] = (-1)^popcount(j & k) (Walsh-Hadamard); so sum_k a_k z_k[i] = D[i] * (H a)[place(i)].  With
  place(i) = i mod K, instead of (h(i // 128) + i mod 128) mod K, a column of a matrix whose width shares a factor with K would
  see few directions.
- gaussian: Box-Muller (1958), see `normals`.  Its sums are floats, so their order matters: ids ascend.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fleetune.errors import UsageError

LAW_VERSION = 1
LAWS = ("hashed", "rademacher", "gaussian")
POOL = "hashed"  # the law with K directions in one pass
OUTER = "outer"  # the law whose entries have signs of their own: a low-rank change
MOST = 1 << 24  # directions of a pool: the table of a pass has as many numbers
PASSES = 1 << 20  # of a sum: ten times the 100,000 steps of the longest runs in MeZO's paper
TABLES = 1 << 26  # numbers in the tables of all passes, 256 MiB: 67 million steps along fresh directions
MIX = 0x9E3779B97F4A7C15  # the multiplier of `run_hashes`: 2^64 over the golden ratio
TILE = 4096  # elements that share 32 Philox calls: one bit each
WIDTH = 128  # words of a tile, and elements of one row of it

# Philox4x32: the two multipliers and the two key increments (Salmon et al., section 3.3)
M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF

# Polynomials of Cephes (Moshier) for float32: (ln(1+x) - x + x^2/2) / x^3, (sin x - x) / x^3 and
# (cos x - 1 + x^2/2) / x^4, the last two in x^2.
LOG_POLY = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
SIN_POLY = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_POLY = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
SQRT_HALF_BITS = 0x3F3504F3
ANGLE = float(np.float32(np.pi / 2**31))  # radians of one unit of a word: 2 pi / 2^32

Ids = NDArray[np.uint64]
Sums = NDArray[np.int64]


class Passes(NamedTuple):
    """A sum of directions in few passes: acc[i] = sum_p sign(ids[p])[i] * tables[p, place(i)], see `places`.

    ids: uint64 [P], ascending.  tables: int32 or int64 [P, K]; K = 1 for rademacher.
    """

    ids: NDArray[np.uint64]
    tables: NDArray[Any]


EMPTY = Passes(np.zeros(0, np.uint64), np.zeros((0, 1), np.int32))


def philox4x32(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Compute Philox4x32-10: counter uint32 [..., 4], key uint32 [2] -> uint32 [..., 4] (Salmon et al. 2011)."""
    x0: Any
    x0, x1, x2, x3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    k0, k1 = (int(k) for k in np.asarray(key, dtype=np.uint64))
    low, half = np.uint64(LOW), np.uint64(32)
    for _ in range(ROUNDS):
        p0, p1 = x0 * np.uint64(M0), x2 * np.uint64(M1)
        x0, x1 = (p1 >> half) ^ x1 ^ np.uint64(k0), p1 & low
        x2, x3 = (p0 >> half) ^ x3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def run_hashes(runs: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return h of the hashed law for run numbers (element // 128): uint64 [n] -> int64 [n], 24 bits each.

    h(r) = m(m(r)) >> 40 with m(x) = (x xor (x >> 32)) * MIX mod 2^64.
    """
    x = runs
    for _ in range(2):
        x = (x ^ (x >> np.uint64(32))) * np.uint64(MIX)
    hashes: NDArray[np.int64] = (x >> np.uint64(40)).astype(np.int64)
    return hashes


def places(K: int, start: int, count: int) -> NDArray[np.int64]:
    """Return the row of a pool's K x K matrix that elements start .. start+count-1 take: int64 [count]."""
    first, last = start // WIDTH, -(-(start + count) // WIDTH)
    h = run_hashes(np.arange(first, last, dtype=np.uint64))
    found: NDArray[np.int64] = (h[:, None] + np.arange(WIDTH)) & (K - 1)
    return found.reshape(-1)[start - first * WIDTH :][:count]


def extended(tables: NDArray[Any]) -> NDArray[Any]:
    """Return tables with the 127 values after their end, from their start on: [.., K] -> [.., K + 127].

    So the 128 values of a run lie side by side wherever it begins.
    """
    return np.concatenate([tables, np.take(tables, range(WIDTH - 1), axis=-1, mode="wrap")], axis=-1)


def run_key(secret: bytes) -> int:
    """Return the run's Philox key: the first 8 bytes of SHA-256 over its secret, little-endian."""
    return int.from_bytes(hashlib.sha256(secret).digest()[:8], "little")


def derive(*parts: int | str) -> int:
    """Derive a 64-bit key for one purpose, e.g. derive(seed, "local", round, client).

    SHA-256 over the parts, each with its type and length, so that no two different lists collide by joining.
    """
    text = bytearray(b"fleetune.derive.1")
    for part in parts:
        kind, raw = (b"s", part.encode()) if isinstance(part, str) else (b"i", b"%d" % part)
        text += kind + len(raw).to_bytes(8, "little") + raw
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def words(run_key: int, id: int, blocks: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Return rows of 128 random words for block numbers that are multiples of 32: uint64 [n] -> uint32 [n, 128]."""
    every: NDArray[Any] = blocks[:, None] + np.arange(32, dtype=np.uint64)
    counter = np.empty((*every.shape, 4), np.uint64)
    counter[..., 0], counter[..., 1] = every & np.uint64(LOW), every >> np.uint64(32)
    counter[..., 2], counter[..., 3] = id & LOW, id >> 32
    out = philox4x32(counter, [run_key & LOW, run_key >> 32])
    return np.swapaxes(out, 1, 2).reshape(-1, WIDTH)


def signs(run_key: int, id: int, start: int, count: int) -> NDArray[np.int8]:
    """Return the signs of direction `id` at elements start .. start+count-1: int8 [count], +1 or -1."""
    first, last = start // TILE, -(-(start + count) // TILE)
    rows = words(run_key, id, np.arange(first, last, dtype=np.uint64) * np.uint64(32))
    bits = (rows[:, None, :] >> np.arange(32, dtype=np.uint32)[:, None]) & np.uint32(1)
    return 1 - 2 * bits.astype(np.int8).reshape(-1)[start - first * TILE :][:count]


def normals(run_key: int, id: int, start: int, count: int) -> NDArray[np.float32]:
    """Return standard normals of direction `id` at elements start .. start+count-1: float32 [count].

    A group of 128 elements takes the blocks group*32 + j; words[c*32 + j] is laid out as for signs.  Words j
    and 32+j give elements j and 32+j of the group, words 64+j and 96+j elements 64+j and 96+j:

        r = sqrt(-2 ln u), u = word * 2^-32 + 2^-33;  z = r cos(t), r sin(t), t = 2 pi * word' / 2^32

    All in float32 with the polynomials above, every operation rounded, none contracted: no math library is
    asked, so the bits do not depend on one.
    """
    first, last = start // WIDTH, -(-(start + count) // WIDTH)
    rows = words(run_key, id, np.arange(first, last, dtype=np.uint64) * np.uint64(32)).reshape(-1, 2, 2, 32)
    z = np.stack(_box_muller(rows[:, :, 0], rows[:, :, 1]), axis=2)
    return z.reshape(-1)[start - first * WIDTH :][:count]


def _box_muller(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> tuple[NDArray[Any], NDArray[Any]]:
    f = np.float32
    u = a.astype(f) * f(2.0**-32) + f(2.0**-33)
    bits = u.view(np.int32)
    e = (bits - np.int32(SQRT_HALF_BITS)) >> np.int32(23)
    x = (bits - (e << np.int32(23))).view(f) - f(1.0)
    xx = x * x
    log = _horner(LOG_POLY, x) * x * xx + e.astype(f) * f(LN2_LOW)
    log = x + (log - f(0.5) * xx) + e.astype(f) * f(LN2_HIGH)
    r = np.sqrt(f(-2.0) * log)
    quadrant = (b + np.uint32(1 << 29)) >> np.uint32(30)
    t = (b - (quadrant << np.uint32(30))).view(np.int32).astype(f) * f(ANGLE)
    tt = t * t
    sine = _horner(SIN_POLY, tt) * tt * t + t
    cosine = _horner(COS_POLY, tt) * tt * tt - f(0.5) * tt + f(1.0)
    odd = (quadrant & np.uint32(1)) == 1
    c, s = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    c = np.where((quadrant == 1) | (quadrant == 2), -c, c)
    s = np.where(quadrant >= 2, -s, s)
    return r * c, r * s


def _horner(coefficients: Sequence[float], x: NDArray[np.float32]) -> NDArray[np.float32]:
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + np.float32(c)
    return y


def fwht(a: ArrayLike) -> NDArray[Any]:
    """Return H a, H[i, k] = (-1)^popcount(i & k), natural order: integers [K] -> int64 [K], exact; floats -> float64.

    The fast Walsh-Hadamard transform, K log2 K additions.  Raises UsageError if K is not a power of two.
    """
    v = np.array(a)
    v = v.astype(np.float64 if v.dtype.kind == "f" else np.int64, copy=False)
    _power_of_two(len(v))
    _transform(v)
    return v


def _transform(v: NDArray[Any]) -> None:
    """Replace v, [K], by H v, in half its memory beside it."""
    half = 1
    while half < len(v):
        pairs = v.reshape(-1, 2, half)
        less = pairs[:, 0] - pairs[:, 1]
        pairs[:, 0] += pairs[:, 1]
        pairs[:, 1] = less
        half *= 2


def hadamard_column(K: int, k: int) -> NDArray[np.int8]:
    """Return column k of the K x K Walsh-Hadamard matrix: int8 [K], +1 or -1."""
    _power_of_two(K)
    if not 0 <= k < K:
        raise UsageError(f"direction {k} is outside a pool of K = {K}", hint=f"use 0 to {K - 1}")
    parity = np.arange(K, dtype=np.uint64) & np.uint64(k)
    for shift in (16, 8, 4, 2, 1):
        parity ^= parity >> np.uint64(shift)
    return 1 - 2 * (parity & np.uint64(1)).astype(np.int8)


def passes(law: str, K: int, ids: ArrayLike, coefficients: ArrayLike) -> Passes:
    """Return the sum of coefficient * direction over all entries in the fewest passes over the weights.

    ids: uint64 [n], equal ones are merged; coefficients: integers [n].  The order of the entries has no
    effect.  Tables are int32 unless an element's sum could reach 2^31, then int64.  K counts for pools
    only.  Raises UsageError for an unknown law, a K that is not a power of two, a k outside the pool or
    sums beyond 2^62, and as `check_size`.
    """
    check_law(law, K)
    ids = np.asarray(ids, dtype=np.uint64).reshape(-1)
    coefficients = np.asarray(coefficients).reshape(-1)
    if ids.shape != coefficients.shape or (len(ids) and coefficients.dtype.kind not in "iu"):
        raise ValueError(
            f"{ids.shape} ids need as many integers, got {coefficients.shape} {coefficients.dtype}"
        )
    most = np.abs(coefficients.astype(np.float64)).sum()
    if most >= 2.0**62:
        raise UsageError("the coefficients sum to more than 2^62", hint="scale the ledger down")
    ids, sums = merged(ids, coefficients.astype(np.int64))
    sums = sums.astype(np.int32 if most < 2.0**31 else np.int64, copy=False)
    tables = sums[:, None]
    if law == POOL:
        ids, tables = _pool(ids, sums, K)
    else:
        check_size(law, K, len(ids))
    reach = int(np.maximum(tables.max(axis=1, initial=0), -tables.min(axis=1, initial=0)).sum())
    return Passes(ids, np.ascontiguousarray(tables, dtype=np.int32 if reach < 2**31 else np.int64))


def count_passes(law: str, ids: Ids, coefficients: NDArray[Any]) -> int:
    """Return the number of passes that `passes` makes of these entries, without their tables."""
    found, _ = merged(ids, coefficients.astype(np.int64))
    return len(np.unique(found >> np.uint64(32))) if law == POOL else len(found)


def check_size(law: str, K: int, count: int) -> None:
    """Raise UsageError for more passes, or more numbers in their tables, than any run makes: `PASSES`, `TABLES`."""
    if law == POOL and count * K > TABLES:
        raise UsageError(
            f"{count:,} epochs of K = {K} directions need tables of {count * K:,} numbers, {TABLES:,} at most",
            hint="a run of that size takes a smaller K, or fewer epochs",
        )
    if count > PASSES:
        raise UsageError(
            f"its directions take {count:,} passes over the weights, {PASSES:,} at most",
            hint="law=hashed takes a pass for K directions",
        )


def probe(law: str, K: int, id: int) -> tuple[int, NDArray[np.int8]]:
    """Return one direction as (Philox id, table): z[i] = sign(Philox id)[i] * table[place(i)], see `places`."""
    check_law(law, K)
    if law == POOL:
        return id >> 32, hadamard_column(K, id & LOW)
    return id, np.ones(1, np.int8)


def check_law(law: str, K: int) -> None:
    """Raise UsageError unless the law exists and, for a pool, K is a power of two of at most `MOST`."""
    if law not in LAWS:
        raise UsageError(f"there is no law {law!r}", hint=f"one of: {', '.join(LAWS)}")
    if law == POOL and _power_of_two(K) > MOST:
        raise UsageError(f"K = {K} is more than {MOST:,} directions", hint=f"use {MOST} or less")


def merged(ids: Ids, values: Sums) -> tuple[Ids, Sums]:
    """Return the different ids, ascending, whose values do not sum to 0, and these sums: uint64 [m], int64 [m]."""
    unique, where = np.unique(ids, return_inverse=True)
    sums = np.zeros(len(unique), np.int64)
    np.add.at(sums, where, values)
    return unique[sums != 0], sums[sums != 0]


def _pool(ids: Ids, sums: NDArray[Any], K: int) -> tuple[Ids, NDArray[Any]]:
    k = ids & np.uint64(LOW)
    if len(k) and int(k.max()) >= K:
        raise UsageError(f"direction {int(k.max())} is outside a pool of K = {K}", hint=f"use 0 to {K - 1}")
    epochs, row = np.unique(ids >> np.uint64(32), return_inverse=True)
    check_size(POOL, K, len(epochs))
    a = np.zeros((len(epochs), K), sums.dtype)
    a[row, k.astype(np.int64)] = sums
    for line in a:
        _transform(line)
    return epochs, a


def _power_of_two(K: int) -> int:
    if K < 1 or K & (K - 1):
        lower = 1 << max(K.bit_length() - 1, 0) if K > 0 else 1
        raise UsageError(f"K = {K} is not a power of two", hint=f"use {lower} or {lower * 2}")
    return K


# --- scales -------------------------------------------------------------------------------------------------
# fp16 scales move along directions on the grid of fp16 itself:
#
#     b    the bits of |d| as a whole number, 0 to 31743: a step of 1 is fp16's next number
#     p    = b / 1024, which is about log2 |d|: equal steps are equal shares of the scale
#     b'   = floor(1024 (p + grid * sum_k c_k z_k) + u)
#
# u in (0, 1) is a fixed number of each scale, from Philox, so a move of a tenth of a step moves a tenth of the scales: the
# mean is exact, and the point is a function of the ledger alone.  A sign never changes, a scale of 0 stays, and none leaves
# fp16's range.  All operations are float32's, each rounded, so the bits are the same everywhere.

STEPS: Final = 1024  # steps of fp16 from one power of two to the next
LARGEST: Final = 0x7BFF  # bits of fp16's largest number
ROUNDING: Final = (
    1 << 64
) - 1  # the direction whose words are the fixed offsets of rounding: no ledger has it
RUN: Final = 4 * WIDTH  # bytes of a row of words


def rounding(run_key: int, start: int, count: int) -> NDArray[np.uint8]:
    """Return the fixed offsets of rounding of the scales from number `start` on, as 256 u - 0.5: uint8 [count].

    They are the bytes of `words` of the direction `ROUNDING`, 512 of each row, least significant first.
    """
    first, last = start // RUN, -(-(start + count) // RUN)
    rows = words(run_key, ROUNDING, np.arange(first, last, dtype=np.uint64) * np.uint64(32))
    every: NDArray[np.uint8] = rows.astype("<u4").reshape(-1).view(np.uint8)
    return every[start - RUN * first :][:count].copy()


def summed(passes: Passes, run_key: int, start: int, count: int) -> NDArray[np.int64]:
    """Return the integer sum of passes at elements start .. start+count-1: int64 [count]; not of the gaussian law."""
    total = np.zeros(count, np.int64)
    where = places(passes.tables.shape[1], start, count)
    for id, table in zip(passes.ids.tolist(), passes.tables, strict=True):
        total += signs(run_key, id, start, count) * table.astype(np.int64)[where]
    return total


def moved_scales(
    bits: NDArray[np.uint16], start: int, run_key: int, passes: Passes, grid: float
) -> NDArray[np.uint16]:
    """Return the bits of scales after passes: uint16 [n] -> uint16 [n]; `start` is the global number of the first."""
    p = (bits & 0x7FFF).astype(np.float32) / np.float32(STEPS)
    if len(passes.ids):
        p = summed(passes, run_key, start, len(bits)).astype(np.float32) * np.float32(grid) + p
    u = (rounding(run_key, start, len(bits)).astype(np.float32) + np.float32(0.5)) / np.float32(256)
    whole = np.clip(np.floor(p * np.float32(STEPS) + u), 0, LARGEST).astype(np.uint16)
    return np.where(bits & 0x7FFF, whole | (bits & 0x8000), bits)


# --- outer products -----------------------------------------------------------------------------------------
# The law `outer`: a low-rank change.  An entry (id, c) has signs b of its own, one for each row of a matrix W
# [rows, columns], and adds
#
#     grid * c * b s'        to W, with s[j] the sign of direction p at the element W[0, j]
#
# where p is the id's upper 32 bits, and its lower ones are the place of W among the head's tensors.  A tensor of more
# dimensions is a matrix whose columns are its last one.  So all entries of one p are a table with a number for each row, and
# acc = sum_p table_p s_p' is an integer product, exact in float64: equal bits in any order and on any number of threads.

MOST_DIRECTIONS: Final = 1 << 12  # p of a ledger: a number for each row of the model is in memory for each


def rows_of(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Return how many rows each tensor has: 0 for a vector."""
    return [math.prod(shape[:-1]) if len(shape) > 1 else 0 for shape in shapes]


def packed(signs: np.ndarray) -> np.ndarray:
    """Return signs as bits, 1 for what is below 0: [rows] -> uint8 [rows / 8, rounded up]."""
    return np.packbits(signs < 0)


def unpacked(bits: np.ndarray, rows: int) -> np.ndarray:
    """Return the signs that bits stand for: int64 [rows], +1 or -1."""
    return 1 - 2 * np.unpackbits(bits, count=rows).astype(np.int64)


def outer_passes(
    shapes: Sequence[Sequence[int]], ids: np.ndarray, coefficients: np.ndarray, bits: np.ndarray
) -> Passes:
    """Return the entries as one table for each p, int64 [p, rows of all tensors], without those that are 0.

    UsageError for more p than a run makes, and for sums that float64 does not hold exactly.
    """
    rows = rows_of(shapes)
    starts = np.concatenate([[0], np.cumsum(rows)])
    p, where = np.unique(ids >> np.uint64(32), return_inverse=True)
    if len(p) > MOST_DIRECTIONS or np.abs(coefficients.astype(np.float64)).sum() >= 2.0**53:
        raise UsageError(
            f"{len(p):,} directions of outer products are more than {MOST_DIRECTIONS:,}, or their sums too large",
            hint="a run of that size takes fewer directions in turn",
        )
    tables, at = np.zeros((len(p), starts[-1]), np.int64), 0
    for number, m, c in zip(
        where.tolist(), (ids & np.uint64(LOW)).tolist(), coefficients.tolist(), strict=True
    ):
        end = at + -(-rows[m] // 8)
        tables[number, starts[m] : starts[m + 1]] += c * unpacked(bits[at:end], rows[m])
        at = end
    kept = tables.any(axis=1)
    return Passes(p[kept], tables[kept])
