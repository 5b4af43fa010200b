# SPDX-License-Identifier: Apache-2.0
"""Both signs of a probe in one pass, and cached sums: bit for bit what two sweeps, or all passes, give."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_kernels import BACKENDS, DTYPES, NO_PASSES, SIXTEEN, bits, cases, weights
from torch import Tensor

from fleetune.seeds import kernels_numba, kernels_torch, noise
from fleetune.seeds.noise import TILE, Passes

LAWS = ["rademacher", "hashed"]
ONE = 7, np.array([0.3], np.float32)


def negative(probe: Any) -> Any:
    return probe[0], -probe[1]


def two_sweeps(kernels: ModuleType, base: Tensor, dtype: torch.dtype, *move: Any) -> list[Tensor]:
    """Plus and minus of a move (start, run key, passes, grid, probe), one after the other."""
    *point, probe = move
    outs = []
    for signed in (probe, negative(probe)):
        out = torch.empty_like(base)
        kernels.sweep(out, base, *point, signed)
        outs.append(out.to(dtype))  # of a float32 base: rounded at the end
    return outs


@given(case=cases(), place=st.sampled_from(["apart", "plus", "minus"]), wide=st.booleans())
@settings(max_examples=300)
@pytest.mark.parametrize("kernels", BACKENDS)
def test_both_are_two_sweeps(kernels, case, place, wide):
    dtype = case["dtype"]
    base = weights(case["seed"], case["n"], torch.float32 if wide else dtype)
    move = (case["start"], case["run_key"], case["passes"], case["grid"], case["probe"] or ONE)
    want = two_sweeps(kernels, base, dtype, *move)
    outs = {name: torch.full((case["n"],), 5.0, dtype=dtype) for name in ("plus", "minus")}
    kept = base.clone()
    if place in outs and base.dtype == dtype:
        outs[place] = base
    chunks = {"threads": case["threads"], "block": case["block"]}
    kernels.sweep(outs["plus"], base, *move, minus=outs["minus"], **chunks)
    assert torch.equal(bits(outs["plus"]), bits(want[0]))
    assert torch.equal(bits(outs["minus"]), bits(want[1]))
    if place == "apart":
        assert torch.equal(bits(base), bits(kept))


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n_passes", [0, 1, 2, 40])
def test_each_way_through_the_kernel(kernels, dtype, law, n_passes):
    # Whole tiles, parts of a tile at both ends, less than a row; the probe's direction among the passes or not.
    K = 256 if law == noise.POOL else 1
    passes = noise.passes(law, K, [(e + 1) << 32 | 3 * e for e in range(n_passes)], range(1, n_passes + 1))
    for start, n in ((0, 2 * TILE), (TILE - 9, 2 * TILE + 700), (TILE + 130, 90), (77, 1), (5, 0)):
        base = weights(4, n, dtype)
        for id in (1 << 32 | 9, 77 << 32 | 5):
            number, table = noise.probe(law, K, id)
            move = (start, 5, passes, 1e-2, (number, table * np.float32(0.37)))
            want = two_sweeps(kernels, base, dtype, *move)
            plus, minus = torch.empty_like(base), torch.empty_like(base)
            for threads in (1, 3):
                kernels.sweep(plus, base, *move, threads=threads, block=TILE, minus=minus)
                assert torch.equal(bits(plus), bits(want[0]))
                assert torch.equal(bits(minus), bits(want[1]))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_two_backends_give_the_same_bits(law, dtype):
    K = 64 if law == noise.POOL else 1
    base = weights(3, 3 * TILE + 11, dtype)
    id, table = noise.probe(law, K, 5)
    passes = noise.passes(law, K, [1, 2 << 32 | 3, 5], [3, -4, 9])
    outs = [torch.empty_like(base) for _ in range(4)]
    for kernels, (plus, minus) in ((kernels_numba, outs[:2]), (kernels_torch, outs[2:])):
        kernels.sweep(plus, base, 700, 99, passes, 1e-3, (id, table * np.float32(0.01)), minus=minus)
    assert torch.equal(bits(outs[0]), bits(outs[2]))
    assert torch.equal(bits(outs[1]), bits(outs[3]))
    assert not torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_stay(kernels, dtype):
    base = weights(9, TILE + 300, dtype)
    base[::5], base[1::5], base[2::50] = float("inf"), float("-inf"), float("nan")
    passes = noise.passes("hashed", 128, [3, 7], [100, -3])
    for step in (0.3, float("inf"), 3e38):
        table = np.full(128, step, np.float32)
        move = (60, 2, passes, 1e-3, (0, table))
        want = two_sweeps(kernels, base, dtype, *move)
        plus, minus = torch.empty_like(base), torch.empty_like(base)
        kernels.sweep(plus, base, *move, minus=minus)
        assert torch.equal(bits(plus), bits(want[0]))
        assert torch.equal(bits(minus), bits(want[1]))
        assert plus[base.isnan()].isnan().all()


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_16_bit_code_moves_both_ways(kernels, dtype):
    base = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for scale in (1 / 3, 2.0**-20 / 3):
        move = (5, 1, NO_PASSES, 0.0, (9, np.array([scale], np.float32)))
        want = two_sweeps(kernels, base, dtype, *move)
        plus, minus = torch.empty_like(base), torch.empty_like(base)
        kernels.sweep(plus, base, *move, minus=minus)
        assert torch.equal(bits(plus), bits(want[0]))
        assert torch.equal(bits(minus), bits(want[1]))


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("passes", [([], []), ([3], [2.5]), ([3, 9, 11], [2.5, -7.0, 0.1])])
def test_gaussian_both_are_two_sweeps(kernels, dtype, passes):
    for start, n in ((2**35 + 77, 3000), (0, 512), (3, 20)):
        base = weights(6, n, dtype)
        base[0] = float("nan")
        move = (start, 31, *passes, 1e-2)
        want = torch.empty_like(base), torch.empty_like(base)
        kernels.sweep_gaussian(want[0], base, *move, (5, 0.3))
        kernels.sweep_gaussian(want[1], base, *move, (5, -0.3))
        plus, minus = torch.empty_like(base), torch.empty_like(base)
        for chunks in ({}, {"threads": 3, "block": 256}):
            kernels.sweep_gaussian(plus, base, *move, (5, 0.3), minus=minus, **chunks)
            assert torch.equal(bits(plus), bits(want[0]))
            assert torch.equal(bits(minus), bits(want[1]))


@given(case=cases(), cached=st.integers(0, 9))
@settings(max_examples=200)
@pytest.mark.parametrize("kernels", BACKENDS)
def test_cached_sums_are_as_the_passes(kernels, case, cached):
    # Some of the passes computed before, as integers in float32: exact below 2^24.
    assume(len(case["passes"].ids))  # without any, -0 + 0 is 0 where sums are given
    passes = Passes(case["passes"].ids, case["passes"].tables % 1000)
    early = Passes(passes.ids[:cached], passes.tables[:cached])
    late = Passes(passes.ids[cached:], passes.tables[cached:])
    where = case["start"], case["run_key"]
    base = weights(case["seed"], case["n"], case["dtype"])
    sums = torch.zeros(case["n"])
    kernels.sweep(sums, sums, *where, early, 1.0)
    want, out = torch.empty_like(base), torch.empty_like(base)
    chunks = {"threads": case["threads"], "block": case["block"]}
    for probe in (None, case["probe"]):
        kernels.sweep(want, base, *where, passes, case["grid"], probe)
        kernels.sweep(out, base, *where, late, case["grid"], probe, sums=sums, **chunks)
        assert torch.equal(bits(out), bits(want))
    probe = case["probe"] or ONE
    both = torch.empty_like(base), torch.empty_like(base)
    kernels.sweep(both[0], base, *where, late, case["grid"], probe, minus=both[1], sums=sums, **chunks)
    wanted = two_sweeps(kernels, base, base.dtype, *where, passes, case["grid"], probe)
    assert all(torch.equal(bits(got), bits(want)) for got, want in zip(both, wanted, strict=True))


@pytest.mark.parametrize("kernels", BACKENDS)
def test_backward_notices_that_either_output_has_moved(kernels):
    for moved in range(2):
        outs = [torch.ones(8) for _ in range(2)]
        w = torch.ones(8, requires_grad=True)
        loss = (w * outs[moved]).sum()
        kernels.sweep(outs[0], torch.ones(8), 0, 1, NO_PASSES, 1.0, ONE, minus=outs[1])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("kernels", BACKENDS)
def test_what_a_program_can_get_wrong_is_said(kernels):
    passes = noise.passes("rademacher", 1, [1], [1])
    x, y = torch.zeros(10), torch.zeros(10)
    bad = [
        (y.half(), x, x, 0, passes, ONE, "base is"),  # the outputs are unlike
        (x, y.half(), x, 0, passes, ONE, "base is"),
        (x, y, x.half(), 0, passes, ONE, "base is"),  # only a float32 base may be unlike them
        (x.bfloat16(), y.bfloat16(), x.half(), 0, passes, ONE, "base is"),
        (x, torch.zeros(9), x, 0, passes, ONE, "out is"),
        (torch.zeros(9), x, x, 0, passes, ONE, "out is"),
        (torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 5), 0, passes, ONE, "out is"),
        (x, torch.zeros(20)[::2], x, 0, passes, ONE, "contiguous"),
        (x.double(), x.double(), x.double(), 0, passes, ONE, "float64"),
        (x, y, x, -1, passes, ONE, "start is -1"),
        (x, y, x, 0, Passes(passes.ids, np.ones((1, 3), np.int32)), ONE, "3 columns"),
        (x, y, x, 0, passes, (1, np.ones(6, np.float32)), "6 columns"),
    ]
    for plus, minus, base, start, moved, probe, words in bad:
        with pytest.raises(ValueError, match=words):
            kernels.sweep(plus, base, start, 1, moved, 1.0, probe, minus=minus)
    for plus, minus, base, start, _, _, words in bad[:10]:
        with pytest.raises(ValueError, match=words):
            kernels.sweep_gaussian(plus, base, start, 1, [], [], 1.0, (1, 0.3), minus=minus)
    for sums in (torch.zeros(9), torch.zeros(10).double(), torch.zeros(10).half()):
        with pytest.raises(ValueError, match="sums are"):
            kernels.sweep(x, x, 0, 1, passes, 1.0, sums=sums)
        with pytest.raises(ValueError, match="sums are"):
            kernels.sweep(x, x, 0, 1, passes, 1.0, ONE, minus=y, sums=sums)
    assert torch.equal(x, torch.zeros(10))
