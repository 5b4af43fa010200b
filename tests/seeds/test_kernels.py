"""The two kernel modules against the definition in numpy float32, bit for bit."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fleetune.seeds import kernels_numba, kernels_torch, noise
from fleetune.seeds.noise import EMPTY, TILE, Passes

BACKENDS = [pytest.param(m, id=m.__name__.rsplit("_", 1)[-1]) for m in (kernels_numba, kernels_torch)]
each_backend = pytest.mark.parametrize("kernels", BACKENDS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIXTEEN = DTYPES[1:]
ONE = 7, np.array([0.3], np.float32)
Probe = tuple[int, np.ndarray] | None


def reference(
    base: Tensor, start: int, run_key: int, passes: Passes, grid: float, probe: Any, gaussian=False
):
    """The definition, one numpy float32 operation at a time: float32."""
    n = base.numel()

    def direction(id: int, table: np.ndarray) -> np.ndarray:
        if gaussian:
            return noise.normals(run_key, id, start, n) * table[0].astype(np.float32)
        return noise.signs(run_key, id, start, n) * table[noise.places(len(table), start, n)]

    x = base.float().numpy()
    if len(passes.ids):
        acc = np.zeros(n, np.float32 if gaussian else np.int64)
        for id, table in zip(passes.ids.tolist(), passes.tables, strict=True):
            acc = acc + direction(id, table if gaussian else table.astype(np.int64))
        x = x + np.float32(grid) * acc.astype(np.float32)
    if probe is not None:
        with np.errstate(invalid="ignore"):  # a signalling NaN turns quiet
            x = x + direction(*probe)
    assert x.dtype == np.float32
    return torch.from_numpy(x)


def bits(x: Tensor) -> Tensor:
    """The stored bits, so that -0 is not 0."""
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def weights(seed: int, n: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[:: max(1, n // 7)] = -0.0
    return x


def check(kernels: ModuleType, base: Tensor, *where: Any, gaussian: bool = False, **how: Any) -> None:
    """Sweep for one sign or, with a probe, for both, and compare with the definition; NaN may be any NaN."""
    *move, probe = where
    outs = [torch.full_like(base, 5.0) for _ in range(2)]
    kernels.sweep(outs[0], base, *where, gaussian=gaussian, **how)
    assert_same(outs[0], reference(base, *where, gaussian).to(base.dtype))
    if probe is not None:
        kernels.sweep(outs[0], base, *where, gaussian=gaussian, minus=outs[1], **how)
        for out, sign in zip(outs, (1, -1), strict=True):
            assert_same(out, reference(base, *move, (probe[0], sign * probe[1]), gaussian).to(base.dtype))


def assert_same(out: Tensor, want: Tensor) -> None:
    """To the bit, but for the bits of NaN."""
    numbers = ~want.isnan()
    assert torch.equal(bits(out)[numbers], bits(want)[numbers])
    assert out[~numbers].isnan().all()


@st.composite
def cases(draw: Callable[..., Any]) -> dict[str, Any]:
    law = draw(st.sampled_from(noise.LAWS))
    K = 2 ** draw(st.integers(0, 14)) if law == noise.POOL else 1
    n_ids = draw(st.integers(0, 9))
    top = draw(st.sampled_from([0, 2, 2**32 - 1]))
    one = st.tuples(st.integers(0, top), st.integers(0, K - 1 if law == noise.POOL else 2**32 - 1))
    ids = [a << 32 | b for a, b in draw(st.lists(one, min_size=n_ids, max_size=n_ids))]
    big = draw(st.sampled_from([1, 300, 2**31 - 1]))
    coefficients = draw(st.lists(st.integers(-big, big), min_size=n_ids, max_size=n_ids))
    probe: Probe = None
    if draw(st.booleans()):
        a, b = draw(one)
        id, table = noise.probe(law, K, draw(st.sampled_from([*ids, a << 32 | b])))
        probe = id, table.astype(np.float32) * np.float32(draw(st.sampled_from([1e-3, -0.7, 0.0])))
    return {
        "gaussian": law == "gaussian",
        "passes": noise.passes(law, K, ids, coefficients),
        "probe": probe,
        "n": draw(st.one_of(st.integers(0, 300), st.integers(301, 3 * TILE), st.just(2 * TILE))),
        "start": draw(st.one_of(st.integers(0, 3 * TILE), st.just(TILE), st.integers(0, 2**52))),
        "run_key": draw(st.integers(0, 2**64 - 1)),
        "grid": draw(st.sampled_from([1e-7, 3.7e-4, -0.25, 1e-30])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "place": draw(st.sampled_from(["apart", "plus", "minus"])),
        "wide": draw(st.booleans()),  # a float32 base of 16-bit outputs
        "threads": draw(st.sampled_from([None, 1, 2, 3])),
        "block": draw(st.sampled_from([None, 1, TILE, 5000, 2 * TILE])),
    }


@each_backend
@given(case=cases())
@settings(max_examples=150)
def test_any_sweep_is_the_definition(kernels, case):
    dtype, probe, passes, n = case["dtype"], case["probe"], case["passes"], case["n"]
    where = case["start"], case["run_key"]
    both = probe is not None
    base = weights(len(passes.ids), n, torch.float32 if both and case["wide"] else dtype)
    kept, outs = base.clone(), [torch.full((n,), 5.0, dtype=dtype) for _ in range(1 + both)]
    at = ["plus", "minus"][: 1 + both]
    if case["place"] in at and base.dtype == dtype:
        outs[at.index(case["place"])] = base
    how = {"minus": outs[1] if both else None, **{n: case[n] for n in ("gaussian", "threads", "block")}}
    kernels.sweep(outs[0], base, *where, passes, case["grid"], probe, **how)
    for out, sign in zip(outs, (1, -1), strict=False):
        signed = probe and (probe[0], sign * probe[1])
        want = reference(kept, *where, passes, case["grid"], signed, case["gaussian"])
        assert torch.equal(bits(out), bits(want.to(dtype)))
    if not any(out is base for out in outs):
        assert torch.equal(bits(base), bits(kept))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 16, 8192])
def test_each_way_through_the_kernel(kernels, dtype, K):
    # No, one, few and many passes; the probe's direction among them or not; whole tiles, parts of tiles, less than a row.
    law = "rademacher" if K == 1 else "hashed"
    for n_passes in (0, 1, 2, 5):
        ids = [(e + 1) << 32 | (3 * e % K) for e in range(n_passes)]
        passes = noise.passes(law, K, ids, range(1, n_passes + 1))
        for start, n in ((TILE - 9, 2 * TILE + 700), (TILE + 130, 90), (77, 1), (5, 0)):
            for probed in (*ids[:1], 77 << 32 | (K - 1)):
                id, table = noise.probe(law, K, probed)
                probe = id, table * np.float32(0.37)
                check(kernels, weights(4, n, dtype), start, 5, passes, 1e-2, probe, threads=3, block=TILE)


@each_backend
@given(
    K=st.sampled_from([1, 64, 128, 512, 16384]),
    start=st.one_of(st.integers(0, 3 * TILE), st.integers(0, 2**52)),
    n=st.one_of(st.integers(0, 300), st.integers(301, 3 * TILE)),
    run_key=st.integers(0, 2**64 - 1),
    id=st.sampled_from([0, 3, 2**32 - 1]),
)
@settings(max_examples=60)
def test_a_fold_adds_in_the_order_of_the_elements(kernels, K, start, n, run_key, id):
    x, want = weights(K, n, torch.float32), np.zeros(K, np.float32)
    np.add.at(want, noise.places(K, start, n), noise.signs(run_key, id, start, n) * x.numpy())
    assert_same(kernels.fold(x, start, run_key, id, K), torch.from_numpy(want))


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("units", [1, 5, 100])
def test_directions_whose_words_are_made_together_stay_apart(monkeypatch, gaussian, units):
    # A block's 2 tiles of 7 passes and a probe: one by one, by twos, all at once.
    monkeypatch.setattr(kernels_torch, "UNITS", units)
    monkeypatch.setattr(kernels_torch, "BLOCK", 2 * (128 if gaussian else TILE))
    top = 2**64 - 1
    ids = np.array([3, 5, 2**40, 2**40 + 1, 2**63 + 1, top - 1, top], np.uint64)
    passes = noise.passes("rademacher", 1, ids, range(1, 8))
    base = weights(8, 500 if gaussian else 3 * TILE + 50, torch.float32)
    for id in (2**63 + 1, 8, top):
        probe = id, np.array([0.3], np.float32)
        check(kernels_torch, base, 99, top, passes, 1e-2, probe, gaussian=gaussian)


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
        want = reference(base[-500:], 77 + n - 500, 3, passes, 1e-2, None)
        assert torch.equal(outs[0][-500:], want.bfloat16())


def test_callers_in_several_threads_do_not_disturb_each_other():
    base = weights(3, 20_000, torch.float32)
    passes = noise.passes("rademacher", 1, range(1, 9), range(1, 9))

    def one(key: int) -> Tensor:
        out = torch.empty_like(base)
        kernels_numba.sweep(out, base, 0, key, passes, 1e-3, threads=2, block=TILE)
        return out

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(one, range(8)))
    for key, out in enumerate(got):
        assert torch.equal(out, reference(base, 0, key, passes, 1e-3, None))


@each_backend
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


@each_backend
def test_a_sum_of_zero_is_plus_zero(kernels):
    # -0 + 0 is 0 but -0 - 0 is -0: an element whose integers cancel must see +0, whatever its sign bit.
    table = np.zeros((1, 128), np.int32)
    table[0, ::3] = 5
    out = torch.full((TILE,), -0.0)
    kernels.sweep(out, out, 0, 1, Passes(np.array([1], np.uint64), table), 1e-3)
    assert torch.equal(torch.signbit(out), out < 0)
    kept = torch.full((TILE,), -0.0)
    kernels.sweep(kept, kept, 0, 1, EMPTY, 1e-3)
    assert torch.signbit(kept).all()


@each_backend
@pytest.mark.parametrize(("law", "K", "ids"), [("rademacher", 1, [1, 2]), ("hashed", 4, [0, 1])])
def test_sums_beyond_2_31_are_exact(kernels, law, K, ids):
    passes = noise.passes(law, K, ids, [2**31 - 1] * 2)
    assert passes.tables.dtype == np.int64
    check(kernels, weights(5, 5000, torch.float32), 3, 8, passes, 1e-9, None)


@each_backend
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_16_bit_code_is_read_and_moved_both_ways(kernels, dtype):
    base = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    check(kernels, base, 5, 1, EMPTY, 0.0, None)
    # moved by something of its own size, each code shows the float it was read as
    for scale in (1 / 3, 2.0**-20 / 3):
        check(kernels, base, 5, 1, EMPTY, 0.0, (9, np.array([scale], np.float32)))


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


@each_backend
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_rounding_to_16_bits_is_to_nearest_even(kernels, dtype):
    points = boundaries(dtype)
    base = torch.from_numpy(np.concatenate([points, -points]))
    outs = [torch.empty(len(base), dtype=dtype) for _ in range(2)]
    kernels.sweep(outs[0], base, 0, 1, EMPTY, 0.0, (2, np.zeros(1, np.float32)), minus=outs[1])
    want = base.to(dtype)
    number = ~want.isnan()
    for out in outs:
        assert torch.equal(out[number], want[number])
        assert out[~number].isnan().all()


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_stay(kernels, dtype):
    base = weights(9, TILE + 300, dtype)
    base[::5], base[1::5], base[2::50] = float("inf"), float("-inf"), float("nan")
    passes = noise.passes("hashed", 128, [3, 7], [100, -3])
    for step in (0.3, float("inf"), 3e38):
        check(kernels, base, 60, 2, passes, 1e-3, (0, np.full(128, step, np.float32)))


@each_backend
@pytest.mark.parametrize("law", noise.LAWS)
def test_a_probe_walks_the_direction_of_the_update(kernels, law):
    gaussian, direction = law == "gaussian", 3 << 32 | 11
    id, table = noise.probe(law, 16, direction)
    probed, updated = torch.zeros(TILE + 9), torch.zeros(TILE + 9)
    kernels.sweep(probed, probed, 5, 8, EMPTY, 0.0, (id, table.astype(np.float32)), gaussian=gaussian)
    kernels.sweep(updated, updated, 5, 8, noise.passes(law, 16, [direction], [1]), 1.0, gaussian=gaussian)
    assert torch.equal(probed, updated)
    assert gaussian or torch.equal(probed.abs(), torch.ones(TILE + 9))


@each_backend
@pytest.mark.parametrize("moved", [0, 1])
def test_backward_notices_that_weights_it_needs_have_moved(kernels, moved):
    outs = [torch.ones(8) for _ in range(2)]
    w = torch.ones(8, requires_grad=True)
    loss = (w * outs[moved]).sum()
    kernels.sweep(outs[0], torch.ones(8), 0, 1, EMPTY, 1.0, ONE, minus=outs[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_backend
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


@each_backend
def test_tensors_and_tables_that_do_not_fit_are_refused(kernels):
    passes = noise.passes("rademacher", 1, [1], [1])
    x, y = torch.zeros(10), torch.zeros(10)
    bad = [
        (y.half(), x, x, {}, "base is"),  # the outputs are unlike
        (x, y, x.half(), {}, "base is"),  # only a float32 base may be unlike them
        (x, torch.zeros(9), x, {}, "out is"),
        (torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 5), {}, "out is"),
        (x, torch.zeros(20)[::2], x, {}, "contiguous"),
        (x.double(), x.double(), x.double(), {}, "float64"),
        (x, y, x, {"start": -1}, "start"),
        (x, y, x, {"passes": Passes(passes.ids, np.ones((1, 3), np.int32))}, "3 columns"),
        (x, y, x, {"passes": Passes(passes.ids, np.ones((2, 1), np.int32))}, "integer tables"),
        (x, y, x, {"passes": Passes(passes.ids, np.ones((1, 1), np.float32))}, "integer tables"),
        (x, y, x, {"probe": (1, np.ones(6, np.float32))}, "6 columns"),
    ]
    for plus, minus, base, changed, words in bad:
        move = {"start": 0, "run_key": 1, "passes": passes, "grid": 1.0, "probe": ONE} | changed
        with pytest.raises(ValueError, match=words):
            kernels.sweep(plus, base, **move, minus=minus)
    assert torch.equal(x, torch.zeros(10))
