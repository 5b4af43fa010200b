"""Compute directions on any device of torch, bit-equal to `kernels_numba`.

    out[i] = round( (float32(base[i]) + float32(grid * float32(acc[i]))) + sign[i] * table[place(start+i)] )

acc is the integer sum of `noise.Passes` and `place` that of `noise.places`.  Each float operation is a torch call of its own, so
none is contracted.  32-bit words are held in int64, whose products wrap modulo 2^64.  Denormals must not be flushed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fleetune.seeds import noise
from fleetune.seeds.noise import LOW, M0, M1, MIX, ROUNDS, TILE, W0, W1, WIDTH, Passes, extended

BLOCK = 1 << 19  # elements at a time on a CPU: few for its cache, many because any call costs torch some time
BLOCK_DEVICE = 1 << 22  # and elsewhere, to fill the device
UNITS = 256  # tiles (of all directions) whose Philox calls are made in one go on a CPU
UNITS_DEVICE = 1 << 14  # and elsewhere

ROWS = TILE // WIDTH
_MIX = MIX - (1 << 64)  # as a signed number

Probe = tuple[int, ArrayLike]


def sweep(
    out: Tensor,
    base: Tensor,
    start: int,
    run_key: int,
    passes: Passes,
    grid: float,
    probe: Probe | None = None,
    *,
    gaussian: bool = False,
    minus: Tensor | None = None,
    threads: int | None = None,
    block: int | None = None,
) -> None:
    """Set out = base moved by grid * passes, then by sign * table of the probe (formula in the module docstring).

    out, base: 1-D contiguous tensors of one size, type (fp32, bf16, fp16) and device, the same tensor or disjoint;
    start: global index of element 0.  probe: (Philox id, float32 table [K], K a power of two).  gaussian: normal numbers
    (`noise.normals`) in the place of signs; sums of passes are then float32, in their order.  minus: gets the same with
    -table, in one pass over the base, which then may be float32 too; disjoint from `out`.
    threads has no effect here (torch has its own); block: elements at a time.  ValueError for tensors or tables of another kind.
    """
    outputs, device, unit = checked(out, base, start, passes, probe, minus), base.device, TILE
    if gaussian:
        unit, tables = WIDTH, passes.tables.astype(np.float32)
    else:
        tables = passes.tables if passes.tables.dtype == np.int32 else passes.tables.astype(np.int64)
    table = _period(tables, device)
    step = None if probe is None else _period(np.array(probe[1], np.float32)[None], device)[0]
    ids, probed = _with_probe(passes.ids, probe)
    grid = float(np.float32(grid))
    with torch.inference_mode():
        for lo, hi, first, count in _blocks(base, start, unit, block):
            where = slice(start + lo - first * unit, start + hi - first * unit)
            turned = None
            acc = torch.zeros(count * WIDTH, device=device) if gaussian and len(passes.ids) else None
            for p, words in enumerate(_words(run_key, ids, first, count, device)):
                if p < len(table):
                    term = _normals(words) * table[p, 0, 0] if gaussian else _summand(words, table[p], first)
                    acc = term if acc is None else acc.add_(term)
                if p == probed and step is not None:
                    turned = _normals(words) * step[0, 0] if gaussian else _signed(words, step, first)
            x = base[lo:hi].float()
            moved = x if acc is None else acc.view(-1)[where].float().mul_(grid).add_(x)
            _write(outputs, lo, hi, moved, turned, where)


def fold(x: Tensor, start: int, run_key: int, id: int, K: int) -> Tensor:
    """Return the fold of x, float32 [n], from global index `start` on: float32 [K], the sums of sign[i] x[i] at each place.

    On a CPU they are added in the order of i.
    """
    signed = torch.zeros_like(x)
    sweep(signed, signed, start, run_key, noise.EMPTY, 0.0, (id, np.ones(1, np.float32)))
    where = torch.from_numpy(noise.places(K, start, x.numel())).to(x.device)
    return torch.zeros(K, device=x.device).index_add_(0, where, signed.mul_(x))


def checked(
    out: Tensor, base: Tensor, start: int, passes: Passes, probe: Probe | None, minus: Tensor | None
) -> list[Tensor]:
    """Return the outputs of a sweep; ValueError for tensors or tables that do not fit each other."""
    dtype, outputs = out.dtype, [out] if minus is None else [out, minus]
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weights of type {dtype}; fp32, bf16 and fp16 are known")
    reads = (dtype,) if minus is None else (dtype, torch.float32)
    for other in outputs:
        alike = other.dtype == dtype and base.shape == other.shape and base.device == other.device
        if not alike or base.dtype not in reads or other.dim() != 1:
            raise ValueError(
                f"out is {other.dtype} {list(other.shape)}, base is {base.dtype} {list(base.shape)}"
            )
    if not all(t.is_contiguous() for t in (*outputs, base)):
        raise ValueError("out and base must be contiguous")
    if start < 0:
        raise ValueError(f"start is {start}; a global index is 0 or more")
    P, tables = len(passes.ids), passes.tables
    if tables.ndim != 2 or len(tables) != P or tables.dtype.kind != "i":
        raise ValueError(f"{P} ids need integer tables [{P}, K], got {tables.dtype} {list(tables.shape)}")
    for width in (tables.shape[1] if P else 1, 1 if probe is None else np.size(probe[1])):
        if width < 1 or width & (width - 1):
            raise ValueError(f"a table of {width} columns; a power of two is needed")
    return outputs


def _write(outputs: list[Tensor], lo: int, hi: int, x: Tensor, made: Tensor | None, where: slice) -> None:
    # x + step to the first output and x - step to a second.  Both are computed first: x may lie in an output.
    step = None if made is None else made.view(-1)[where]
    moved = [x] if step is None else [x + step, x - step] if len(outputs) > 1 else [step.add_(x)]
    for out, values in zip(outputs, moved, strict=True):
        out[lo:hi].copy_(values)


def _blocks(base: Tensor, start: int, unit: int, block: int | None) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first element, last + 1, first tile or group, number of them), cut where tiles end."""
    size = base.numel()
    if block is None:
        block = BLOCK if base.device.type == "cpu" else BLOCK_DEVICE
    step = -(-block // unit) * unit
    lo = 0
    while lo < size:
        hi = min(size, lo + step - (start + lo) % unit)
        first, end = (start + lo) // unit, -(-(start + hi) // unit)
        yield lo, hi, first, end - first
        lo = hi


def _with_probe(ids: NDArray[np.uint64], probe: Probe | None) -> tuple[NDArray[np.uint64], int | None]:
    # The ids and the probe's, whose words are made once where it is one of them; and its place.
    if probe is None:
        return ids, None
    (found,) = np.nonzero(ids == np.uint64(probe[0]))
    return (ids, int(found[0])) if len(found) else (np.append(ids, np.uint64(probe[0])), len(ids))


def _summand(words: Tensor, table: Tensor, tile: int) -> Tensor:
    # One pass over n tiles: sign * table, integers [n, 4096].
    signs = _bits(words).bitwise_right_shift_(31).bitwise_or_(1)
    return signs.to(table.dtype).mul_(_tiled(table, tile, len(words)))


def _words(
    run_key: int, ids: NDArray[np.uint64], first: int, n: int, device: torch.device
) -> Iterator[Tensor]:
    # noise.words of each direction for the n block numbers (first + t) * 32, as signed words: int32 [n, 128].
    number = (first + torch.arange(n, device=device))[:, None] * 32 + torch.arange(32, device=device)
    together = max(1, (UNITS if device.type == "cpu" else UNITS_DEVICE) // n)
    for lo in range(0, len(ids), together):
        some = torch.tensor(ids[lo : lo + together].view(np.int64), device=device)[:, None, None]
        shape = (len(some), n, 32)
        even = torch.stack([(number & LOW).expand(shape), (some & LOW).expand(shape)])
        odd = torch.stack([(number >> 32).expand(shape), ((some >> 32) & LOW).expand(shape)])
        yield from _philox(even, odd, run_key).to(torch.int32).view(len(some), n, WIDTH)


def _philox(even: Tensor, odd: Tensor, run_key: int) -> Tensor:
    # noise.philox4x32 of the counters (even[0], odd[0], even[1], odd[1]): int64 [2, ids, n, 32] -> [ids, n, 4, 32],
    # each word as a signed one.
    k0, k1 = run_key & LOW, run_key >> 32
    lanes = (2, 1, 1, 1)
    times = torch.tensor([M0, M1], device=even.device).view(lanes)
    keys = [[(k0 + r * W0) & LOW, (k1 + r * W1) & LOW] for r in range(ROUNDS)]
    for key in torch.tensor(keys, device=even.device).view(ROUNDS, *lanes):
        product = (even * times).flip(0)
        even, odd = (product >> 32).bitwise_and_(LOW).bitwise_xor_(odd).bitwise_xor_(key), product & LOW
    words = torch.stack([even[0], odd[0], even[1], odd[1]], dim=2)
    return words - ((words >> 31) << 32)


def _bits(words: Tensor) -> Tensor:
    # Each element's own bit of n tiles' words as the sign bit, over others: int32 [n, 128] -> [n, 4096].
    shift = torch.arange(31, -1, -1, dtype=torch.int32, device=words.device)[:, None]
    return (words[:, None, :] << shift).view(-1, TILE)


def _signed(words: Tensor, table: Tensor, tile: int) -> Tensor:
    # sign * table in n tiles, float32 [n, 4096]: a float's sign bit turned is a product with -1.
    turned = _bits(words).bitwise_and_(-(1 << 31))
    return turned.bitwise_xor_(_tiled(table, tile, len(words)).view(torch.int32)).view(torch.float32)


def _period(tables: NDArray[Any], device: torch.device) -> Tensor:
    # Tables [P, K] as `_tiled` reads them: the 128 values from each place on, [P, K, 128], which are views of
    # one line; [P, 1, 1] for K = 1.
    if tables.shape[1] == 1:
        return torch.tensor(tables, device=device)[:, None]
    return torch.from_numpy(extended(tables)).to(device).unfold(1, WIDTH, 1)


def _tiled(table: Tensor, tile: int, n: int) -> Tensor:
    # The table's values in n tiles: [n, 4096], or [1, 1] to broadcast.
    if len(table) == 1:
        return table
    return table[_hashes(tile, n, table.device) % len(table)].view(n, TILE)


def _hashes(tile: int, n: int, device: torch.device) -> Tensor:
    # noise.run_hashes of the runs in n tiles: int64 [n * 32].
    x = torch.arange(tile * ROWS, (tile + n) * ROWS, device=device)
    for _ in range(2):
        x = (x ^ ((x >> 32) & LOW)) * _MIX
    return (x >> 40) & 0xFFFFFF


def _normals(words: Tensor) -> Tensor:
    # noise.normals of a direction in n groups, from its words: int32 [n, 128] -> float32 [n * 128].
    pairs = words.long().bitwise_and_(LOW).view(-1, 2, 2, 32)
    return torch.stack(_box_muller(pairs[:, :, 0], pairs[:, :, 1]), dim=2).view(-1)


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    # noise._box_muller, operation for operation.
    u = a.float() * 2.0**-32 + 2.0**-33
    bits = u.view(torch.int32)
    e = (bits - noise.SQRT_HALF_BITS) >> 23
    x = (bits - (e << 23)).view(torch.float32) - 1.0
    xx = x * x
    log = _horner(noise.LOG_POLY, x) * x * xx + e.float() * noise.LN2_LOW
    log = x + (log - xx * 0.5) + e.float() * noise.LN2_HIGH
    r = _sqrt(log * -2.0)
    quadrant = ((b + (1 << 29)) & LOW) >> 30
    t = (b - (quadrant << 30)).to(torch.int32).float() * noise.ANGLE
    tt = t * t
    sine = _horner(noise.SIN_POLY, tt) * tt * t + t
    cosine = _horner(noise.COS_POLY, tt) * tt * tt - tt * 0.5 + 1.0
    odd = (quadrant & 1) == 1
    c, s = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    c = torch.where((quadrant == 1) | (quadrant == 2), -c, c)
    s = torch.where(quadrant >= 2, -s, s)
    return r * c, r * s


def _sqrt(x: Tensor) -> Tensor:
    # Where torch asks a vendor's library, one float32 root in six is a unit off.  A float64 root rounds to the
    # right float32: no root of a float32 is nearer to a midpoint of two of them than 2^-51 of itself.
    return torch.sqrt(x) if x.device.type == "mps" else torch.sqrt(x.double()).float()  # mps has no float64


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    y = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y
