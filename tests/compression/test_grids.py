# SPDX-License-Identifier: Apache-2.0
"""Grids: what they promise of every group, and the nearest code."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.compression.layerwise.column_loop import Segment, nearest
from fleetune.compression.layerwise.grids import BITS, KINDS, Grid


@given(
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from(BITS),
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    search=st.booleans(),
)
@settings(max_examples=300)
def test_a_grid_holds_zero_and_is_exact_in_fp16(
    kind: str, bits: int, values: list[float], search: bool
) -> None:
    if kind == "universal" and bits > 4:
        return
    x = torch.tensor([values])
    grid = Grid(kind, bits, search)
    scale, zero = grid.find(x)
    assert scale.item() != 0
    assert torch.equal(scale, scale.half().float())
    assert torch.equal(zero, zero.round())
    assert 0 <= zero.item() <= grid.top
    assert grid.codes(torch.zeros(1, 1), scale, zero).item() == zero.item()  # 0 is on it
    if kind == "universal":
        offset = (scale * zero).item()
        assert float(np.float16(offset)) == offset
    if not search and scale.abs().item() > 2**-14 and max(map(abs, values)) * 2 < 65504:
        near = (grid.codes(x, scale, zero) - zero[:, None]) * scale[:, None]
        reach = {"ggml": 1.01, "symmetric": 0.52, "asymmetric": 1.02, "universal": 1.02}[kind]
        worst = reach * scale.abs().item() + (2**-6 if kind == "universal" else 2**-9) * x.abs().max().item()
        assert (near - x).abs().max().item() <= worst


def test_the_ggml_grid_keeps_the_signed_extreme() -> None:
    scale, zero = Grid("ggml", 4).find(torch.tensor([[0.5, -1.0, 4.0], [0.5, -4.0, 1.0], [0.0, 0.0, 0.0]]))
    assert scale.tolist() == [-0.5, 0.5, 1.0]
    assert zero.tolist() == [8.0, 8.0, 8.0]


@given(
    rows=st.lists(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), min_size=4, max_size=4), min_size=1)
)
def test_the_ggml_grid_takes_the_first_of_equal_extremes(rows: list[list[float]]) -> None:
    """As ggml does, which looks for a magnitude above all before."""
    want = []
    for row in rows:
        most = 0.0
        for x in row:
            most = x if abs(x) > abs(most) else most
        want.append(most / -8 or 1.0)
    assert Grid("ggml", 4).find(torch.tensor(rows))[0].tolist() == want


def test_search_never_makes_a_group_worse() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) ** 3
    for kind in KINDS:
        errors = []
        for search in (False, True):
            grid = Grid(kind, 3, search)
            scale, zero = grid.find(x)
            errors.append(grid._error(x, scale, zero))
        assert (errors[1] <= errors[0]).all()
        assert errors[1].sum() < 0.95 * errors[0].sum()


def test_nearest_is_the_nearest_code() -> None:
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(10))
    grid = Grid("asymmetric", 4)
    scale, zero = grid.find(W)
    got, codes = nearest(W, lambda Wt, begin, last: Segment(last, scale, zero, grid.top, None))
    assert torch.equal(codes.float(), grid.codes(W, scale, zero))
    assert torch.equal(got, (codes.float() - zero[:, None]) * scale[:, None])
