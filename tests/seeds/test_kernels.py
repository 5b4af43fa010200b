# SPDX-License-Identifier: Apache-2.0
"""The two kernel modules against the definition in numpy float32, and against each other bit for bit."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fleetune.common import numba_cache
from fleetune.seeds import kernels_numba, kernels_torch, noise
from fleetune.seeds.noise import TILE, Passes

BACKENDS = [pytest.param(m, id=m.__name__.rsplit("_", 1)[-1]) for m in (kernels_numba, kernels_torch)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIXTEEN = [torch.bfloat16, torch.float16]
NO_PASSES = Passes(np.zeros(0, np.uint64), np.zeros((0, 1), np.int32))

Probe = tuple[int, np.ndarray] | None


def reference(base: Tensor, start: int, run_key: int, passes: Passes, grid: float, probe: Probe) -> Tensor:
    """The definition, one numpy float32 operation at a time; torch rounds to 16 bits."""
    n = base.numel()

    def at(table: np.ndarray) -> np.ndarray:
        return table[noise.places(len(table), start, n)]

    x = base.float().numpy()
    if len(passes.ids):
        acc = np.zeros(n, np.int64)
        for id, table in zip(passes.ids.tolist(), passes.tables, strict=True):
            acc += noise.signs(run_key, id, start, n) * at(table).astype(np.int64)
        x = x + np.float32(grid) * acc.astype(np.float32)
    if probe is not None:
        id, step = probe
        with np.errstate(invalid="ignore"):  # a signalling NaN turns quiet
            x = x + noise.signs(run_key, id, start, n).astype(np.float32) * at(step)
    return torch.from_numpy(x).to(base.dtype)


def bits(x: Tensor) -> Tensor:
    """The stored bits, so that -0 is not 0."""
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def weights(seed: int, n: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[:: max(1, n // 7)] = -0.0
    return x


@st.composite
def cases(draw):
    law = draw(st.sampled_from(["rademacher", "hashed"]))
    K = 2 ** draw(st.integers(0, 14)) if law == noise.POOL else 1
    n_ids = draw(st.integers(0, 9))
    top = draw(st.sampled_from([0, 2, 2**32 - 1]))
    one = st.tuples(st.integers(0, top), st.integers(0, K - 1 if law == noise.POOL else 2**32 - 1))
    ids = [a << 32 | b for a, b in draw(st.lists(one, min_size=n_ids, max_size=n_ids))]
    big = draw(st.sampled_from([1, 300, 2**31 - 1]))
    coefficients = draw(st.lists(st.integers(-big, big), min_size=n_ids, max_size=n_ids))
    passes = noise.passes(law, K, ids, coefficients)
    probe: Probe = None
    if draw(st.booleans()):
        a, b = draw(one)
        id, table = noise.probe(law, K, draw(st.sampled_from([*ids, a << 32 | b])))
        probe = id, table.astype(np.float32) * np.float32(draw(st.sampled_from([1e-3, -0.7, 0.0])))
    return {
        "passes": passes,
        "probe": probe,
        "n": draw(st.one_of(st.integers(0, 300), st.integers(301, 3 * TILE), st.just(2 * TILE))),
        "start": draw(st.one_of(st.integers(0, 3 * TILE), st.just(TILE), st.integers(0, 2**52))),
        "run_key": draw(st.integers(0, 2**64 - 1)),
        "grid": draw(st.sampled_from([1e-7, 3.7e-4, -0.25, 1e-30])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 1000)),
        "in_place": draw(st.booleans()),
        "threads": draw(st.sampled_from([None, 1, 2, 3])),
        "block": draw(st.sampled_from([None, 1, TILE, 5000, 2 * TILE])),
    }


def run(kernels: ModuleType, case: dict, *, threads: int | None = None, block: int | None = None) -> Tensor:
    base = weights(case["seed"], case["n"], case["dtype"])
    kept = base.clone()
    out = base if case["in_place"] else torch.full_like(base, 5.0)
    move = (case["start"], case["run_key"], case["passes"], case["grid"], case["probe"])
    kernels.sweep(out, base, *move, threads=threads, block=block)
    if not case["in_place"]:
        assert torch.equal(bits(base), bits(kept))
    return out


@given(case=cases())
@settings(max_examples=400)
def test_numba_equals_the_definition(case):
    base = weights(case["seed"], case["n"], case["dtype"])
    move = (case["start"], case["run_key"], case["passes"], case["grid"], case["probe"])
    want = reference(base, *move)
    assert torch.equal(bits(run(kernels_numba, case)), bits(want))


@given(case=cases())
@settings(max_examples=300)
def test_torch_equals_numba_whatever_the_threads_and_chunks(case):
    left = run(kernels_numba, case, threads=case["threads"], block=case["block"])
    right = run(kernels_torch, case, block=case["block"])
    assert torch.equal(bits(left), bits(right))


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("K", [1, 16, 128, 4096, 8192])
def test_every_mix_of_passes_and_probe(kernels, K):
    # Each has its own way through the kernel: no, one, few and many passes; the probe's direction among
    # them or not; whole tiles and parts of tiles.
    law = "rademacher" if K == 1 else "hashed"
    base = weights(4, 2 * TILE + 700, torch.float32)
    for n_passes in (0, 1, 2, 4, 5):
        ids = [(e + 1) << 32 | (3 * e % K) for e in range(n_passes)]
        passes = noise.passes(law, K, ids, range(1, n_passes + 1))
        assert len(passes.ids) == n_passes
        for probed in (None, *ids[:1], 77 << 32 | (K - 1)):
            probe = None
            if probed is not None:
                id, table = noise.probe(law, K, probed)
                probe = id, table * np.float32(0.37)
            out = torch.empty_like(base)
            kernels.sweep(out, base, TILE - 9, 5, passes, 1e-2, probe)
            assert torch.equal(bits(out), bits(reference(base, TILE - 9, 5, passes, 1e-2, probe)))


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("law", ["rademacher", "hashed"])
def test_pieces_of_a_tensor_equal_the_whole(kernels, law):
    K = 64 if law == noise.POOL else 1
    passes = noise.passes(law, K, [1, 2 << 32 | 3, 5], [3, -4, 9])
    id, table = noise.probe(law, K, 5)
    probe = id, table.astype(np.float32) * np.float32(0.01)
    base = weights(1, 30_000, torch.float32)
    whole, parts = torch.empty_like(base), torch.empty_like(base)
    kernels.sweep(whole, base, 700, 99, passes, 1e-3, probe)
    edges = [0, 1, 576, 4096, 9000, 9001, 29_999, 30_000]
    for lo, hi in itertools.pairwise(edges):
        kernels.sweep(parts[lo:hi], base[lo:hi], 700 + lo, 99, passes, 1e-3, probe)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
@pytest.mark.parametrize("units", [1, 4, 5, 100])
def test_directions_whose_words_are_made_together_stay_apart(monkeypatch, law, units):
    # A block's 2 tiles of 7 passes and a probe: one by one, by twos, all at once.
    monkeypatch.setattr(kernels_torch, "UNITS", units)
    monkeypatch.setattr(kernels_torch, "BLOCK", 2 * (TILE if law == "rademacher" else 128))
    base = weights(8, 3 * TILE + 50, torch.float32)
    left, right = torch.empty_like(base), torch.empty_like(base)
    top = 2**64 - 1
    ids = np.array([3, 5, 2**40, 2**40 + 1, 2**63 + 1, top - 1, top], np.uint64)
    for id in (2**63 + 1, 8, top):
        for out, kernels in ((left, kernels_numba), (right, kernels_torch)):
            if law == "gaussian":
                kernels.sweep_gaussian(out, base, 99, top, ids, range(1, 8), 1e-2, (id, 0.3))
                continue
            passes = noise.passes(law, 1, ids.tolist(), range(1, 8))
            kernels.sweep(out, base, 99, top, passes, 1e-2, (id, np.array([0.3], np.float32)))
        assert torch.equal(bits(left), bits(right))


def test_threads_share_a_large_tensor():
    # Beyond the size at which work is split by default, with every kind of pass.
    n = kernels_numba.SPLIT + 12_345
    base = weights(2, n, torch.bfloat16)
    for ids in ([7], [1, 2, 3, 4, 5, 6, 7, 8, 9]):
        passes = noise.passes("rademacher", 1, ids, range(1, len(ids) + 1))
        outs = [torch.empty_like(base) for _ in range(3)]
        for out, threads in zip(outs, (1, 2, 5), strict=True):
            kernels_numba.sweep(out, base, 77, 3, passes, 1e-2, threads=threads)
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
        assert torch.equal(outs[0][-500:], reference(base[-500:], 77 + n - 500, 3, passes, 1e-2, None))


def test_callers_in_several_threads_do_not_disturb_each_other():
    base = weights(3, 50_000, torch.float32)
    passes = noise.passes("rademacher", 1, range(1, 9), range(1, 9))

    def one(key: int) -> Tensor:
        out = torch.empty_like(base)
        kernels_numba.sweep(out, base, 0, key, passes, 1e-3, threads=2, block=TILE)
        return out

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(one, range(8)))
    for key, out in enumerate(got):
        assert torch.equal(out, reference(base, 0, key, passes, 1e-3, None))


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("parts", [(1,), (1, 2)])
def test_products_are_rounded_before_they_are_added(kernels, parts):
    # base = -round(grid * acc): the sum is exactly 0, where a fused multiply-add leaves the product's error.
    grid, n = np.float32(0.1), 2 * TILE
    passes = noise.passes("rademacher", 1, parts, [7] * len(parts))
    acc = sum(7 * noise.signs(4, id, 0, n).astype(np.int64) for id in parts).astype(np.float32)
    error = np.float64(grid) * acc.astype(np.float64) - (grid * acc).astype(np.float64)
    assert np.count_nonzero(error) > n / 4
    out = torch.from_numpy(-(grid * acc))
    kernels.sweep(out, out, 0, 4, passes, float(grid))
    assert torch.equal(bits(out), torch.zeros(n, dtype=torch.int32))


@pytest.mark.parametrize("kernels", BACKENDS)
def test_a_sum_of_zero_is_plus_zero(kernels):
    # -0 + 0 is 0 but -0 - 0 is -0: an element whose integers cancel must see +0, whatever its sign bit.
    table = np.zeros((1, 128), np.int32)
    table[0, ::3] = 5
    out = torch.full((TILE,), -0.0)
    kernels.sweep(out, out, 0, 1, Passes(np.array([1], np.uint64), table), 1e-3)
    assert torch.equal(torch.signbit(out), out < 0)
    kept = torch.full((TILE,), -0.0)
    kernels.sweep(kept, kept, 0, 1, NO_PASSES, 1e-3)
    assert torch.signbit(kept).all()


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_beyond_2_31_are_exact(kernels, dtype):
    passes = noise.passes("rademacher", 1, [1, 2, 3], [2**31 - 1, 2**31 - 1, 1])
    assert passes.tables.dtype == np.int64
    base = weights(5, 5000, dtype)
    out = torch.empty_like(base)
    kernels.sweep(out, base, 3, 8, passes, 1e-9)
    assert torch.equal(bits(out), bits(reference(base, 3, 8, passes, 1e-9, None)))
    one = noise.passes("hashed", 4, [0, 1], [2**31 - 1, 2**31 - 1])
    assert (one.tables.dtype, one.ids.tolist()) == (np.int64, [0])
    kernels.sweep(out, base, 3, 8, one, 1e-9)
    assert torch.equal(bits(out), bits(reference(base, 3, 8, one, 1e-9, None)))


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_16_bit_code_is_read_right(kernels, dtype):
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    base = codes.view(dtype)
    number = ~base.isnan()
    out = torch.empty_like(base)
    kernels.sweep(out, base, 5, 1, NO_PASSES, 0.0)
    assert torch.equal(bits(out)[number], codes[number])
    assert out[~number].isnan().all()
    # moved by something of its own size, each code shows the float it was read as
    step = np.float32(1.0) / np.float32(3.0)
    for scale in (step, step * np.float32(2.0**-20)):
        probe = 9, np.array([scale], np.float32)
        kernels.sweep(out, base, 5, 1, NO_PASSES, 0.0, probe)
        want = reference(base, 5, 1, NO_PASSES, 0.0, probe)
        assert torch.equal(bits(out)[number], bits(want)[number])
        assert out[~number].isnan().all()


def boundaries(dtype: torch.dtype) -> np.ndarray:
    """All numbers of a 16-bit type, the midpoints between neighbours, and the floats beside both."""
    codes = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    exact = codes[codes.isfinite()].double().numpy()
    top = exact[-1] + (exact[-1] - exact[-2])  # where infinity would be if it were the next number
    with np.errstate(over="ignore"):
        middle = ((exact + np.append(exact[1:], top)) / 2).astype(np.float32)
    points = np.concatenate([exact.astype(np.float32), middle])
    near = [points, np.nextafter(points, np.float32(-1)), np.nextafter(points, np.float32(np.inf))]
    special = np.array([np.inf, np.nan, 3.4e38, 1e-45, 2.0**-25, 2.0**-24, 65519.996, 65520.0], np.float32)
    return np.concatenate([*near, special])


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_rounding_to_16_bits_is_to_nearest_even(kernels, dtype):
    points = boundaries(dtype)
    points = np.concatenate([points, -points])
    base = torch.full((len(points),), -0.0, dtype=dtype)
    out, sign = torch.empty_like(base), noise.signs(1, 2, 0, 128).astype(np.float32)
    for first in range(0, len(points), 128):  # a run takes all places of a table of 128
        some, table = points[first : first + 128], np.zeros(128, np.float32)
        table[noise.places(128, 0, len(some))] = sign[: len(some)] * some
        part = slice(first, first + len(some))
        kernels.sweep(out[part], base[part], 0, 1, NO_PASSES, 0.0, (2, table))
    want = torch.from_numpy(points + np.float32(-0.0)).to(dtype)
    number = ~want.isnan()
    assert torch.equal(bits(out)[number], bits(want)[number])
    assert out[~number].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probed", [False, True])
def test_gaussian_is_the_definition(dtype, probed):
    start, n = 2**35 + 77, 3000
    base = weights(6, n, dtype)
    acc = np.zeros(n, np.float32)
    for id, c in ((3, 2.5), (9, -7.0)):
        acc = acc + np.float32(c) * noise.normals(31, id, start, n)
    x = base.float().numpy() + np.float32(1e-2) * acc
    if probed:
        x = x + np.float32(0.3) * noise.normals(31, 5, start, n)
    want = torch.from_numpy(x).to(dtype)
    probe = (5, 0.3) if probed else None
    out = torch.empty_like(base)
    kernels_numba.sweep_gaussian(out, base, start, 31, [3, 9], [2.5, -7.0], 1e-2, probe, threads=2, block=500)
    assert torch.equal(bits(out), bits(want))
    out.zero_()
    kernels_torch.sweep_gaussian(out, base, start, 31, [3, 9], [2.5, -7.0], 1e-2, probe, block=500)
    assert torch.equal(bits(out), bits(want))


@pytest.mark.parametrize("kernels", BACKENDS)
def test_a_gaussian_probe_walks_the_direction_of_the_update(kernels):
    zero = torch.zeros(1000)
    probed, updated = torch.empty(1000), torch.empty(1000)
    kernels.sweep_gaussian(probed, zero, 50, 8, [], [], 1.0, (4, 1.0))
    kernels.sweep_gaussian(updated, zero, 50, 8, [4], [1.0], 1.0)
    assert torch.equal(probed, updated)
    assert np.allclose(probed.numpy(), noise.normals(8, 4, 50, 1000), rtol=1e-6)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("law", ["rademacher", "hashed"])
def test_a_probe_walks_the_direction_of_the_update(kernels, law):
    id, table = noise.probe(law, 16, 3 << 32 | 11)
    probed, updated = torch.zeros(TILE + 9), torch.zeros(TILE + 9)
    kernels.sweep(probed, probed, 5, 8, NO_PASSES, 0.0, (id, table.astype(np.float32)))
    kernels.sweep(updated, updated, 5, 8, noise.passes(law, 16, [3 << 32 | 11], [1]), 1.0)
    assert torch.equal(probed, updated)
    assert torch.equal(probed.abs(), torch.ones(TILE + 9))


@pytest.mark.parametrize("kernels", BACKENDS)
def test_backward_notices_that_weights_it_needs_have_moved(kernels):
    w = torch.ones(8, requires_grad=True)
    loss = (w * w).sum()
    kernels.sweep(w.detach(), w.detach(), 0, 1, noise.passes("rademacher", 1, [1], [1]), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kernels", BACKENDS)
def test_inference_tensors_and_read_only_tables_are_taken(kernels):
    passes = noise.passes("rademacher", 1, [1, 2], [3, 4])
    for array in passes:
        array.flags.writeable = False
    strided = Passes(np.repeat(passes.ids, 2)[::2], np.repeat(passes.tables, 2, axis=0)[::2])
    normal = weights(7, 600, torch.float32)
    want = reference(normal, 0, 1, passes, 0.5, None)
    with torch.inference_mode():
        inside = normal.clone()
        kernels.sweep(inside, inside, 0, 1, passes, 0.5)
        kernels.sweep(normal, normal, 0, 1, strided, 0.5)
    assert torch.equal(inside, want)
    assert torch.equal(normal, want)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_what_a_program_can_get_wrong_is_said(kernels):
    passes = noise.passes("rademacher", 1, [1], [1])
    x = torch.zeros(10)
    bad = [
        (torch.zeros(10).half(), x, 0, passes, None, "base is"),
        (torch.zeros(9), x, 0, passes, None, "base is"),
        (torch.zeros(2, 5), torch.zeros(2, 5), 0, passes, None, "out is"),
        (torch.zeros(20)[::2], x, 0, passes, None, "contiguous"),
        (x.double(), x.double(), 0, passes, None, "float64"),
        (x, x, -1, passes, None, "start is -1"),
        (x, x, 0, Passes(passes.ids, np.ones((1, 3), np.int32)), None, "3 columns"),
        (x, x, 0, Passes(passes.ids, np.ones((2, 1), np.int32)), None, "integer tables"),
        (x, x, 0, Passes(passes.ids, np.ones((1, 1), np.float32)), None, "integer tables"),
        (x, x, 0, passes, (1, np.ones(6, np.float32)), "6 columns"),
        (x, x, 0, passes, (1, np.ones(0, np.float32)), "0 columns"),
    ]
    for out, base, start, moved, probe, words in bad:
        with pytest.raises(ValueError, match=words):
            kernels.sweep(out, base, start, 1, moved, 1.0, probe)
    assert torch.equal(x, torch.zeros(10))


def twice(x):
    for i in range(x.size):
        x[i] *= 2


def test_compiling_needs_no_folder_and_no_disk(monkeypatch):
    x = np.ones(3)
    monkeypatch.setattr(numba.core.caching.Cache, "save_overload", full_disk)
    numba_cache.cached_njit(twice)(x)
    assert x.tolist() == [2.0] * 3
    monkeypatch.setattr(numba, "njit", without_folder(numba.njit))
    numba_cache.cached_njit(twice)(x)
    assert x.tolist() == [4.0] * 3


def full_disk(self, sig, data):
    raise OSError(28, "No space left on device")


def without_folder(njit):
    def refuse(*args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    return refuse


def test_slow_compiling_is_said_and_quick_is_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba_cache, "SILENT", 0.01)
    with numba_cache.said_when_slow():
        time.sleep(0.1)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "compiling the kernels for this processor"
    ]
    caplog.clear()
    monkeypatch.setattr(numba_cache, "SILENT", 0.05)
    with numba_cache.said_when_slow():
        pass
    time.sleep(0.1)
    assert not caplog.records


KERNEL = """
import logging, pathlib, sys, time
import numpy as np
from fleetune.common import numba_cache

numba_cache.SILENT = 0.0
logging.basicConfig(format="%(message)s", stream=sys.stdout)


def add(x):
    for i in range(x.size):
        x[i] += i


if __name__ == "__main__":
    here, kernel, x = pathlib.Path(sys.argv[1]), numba_cache.cached_njit(add), np.zeros(3)
    (here / sys.argv[2]).touch()
    while len(list(here.iterdir())) < int(sys.argv[3]):
        time.sleep(0.01)
    kernel(x)
    assert x.tolist() == [0, 1, 2]
"""


def test_of_processes_that_begin_at_once_one_compiles_and_later_ones_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL)
    (tmp_path / "here").mkdir()

    def begin(name: str, processes: int) -> subprocess.Popen[str]:
        words = [sys.executable, "kernel.py", "here", name, str(processes)]
        return subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    said = [process.communicate(timeout=120)[0] for process in [begin(f"p{i}", 3) for i in range(3)]]
    assert sum("compiling the kernels" in text for text in said) == 1
    assert all("waiting for it" in text for text in said if text and "compiling" not in text)
    assert begin("later", 1).communicate(timeout=120)[0] == ""
