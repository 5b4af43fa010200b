"""Grids: what they promise of every group, and the nearest code."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.compression.layerwise import grids
from fleetune.compression.layerwise.column_loop import Segment, nearest
from fleetune.compression.layerwise.grids import BITS, KINDS, UNIFORM, Grid
from fleetune.models.artefact import Quantised, stored
from fleetune.models.families.number_types import CODEBOOKS, SUPER_TYPES

FLOATS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40)


@given(kind=st.sampled_from(UNIFORM), bits=st.sampled_from(BITS), values=FLOATS)
@settings(max_examples=100)
def test_a_grid_holds_zero_and_is_exact_in_fp16(kind: str, bits: int, values: list[float]) -> None:
    if kind == "universal" and bits > 5:
        return
    x = torch.tensor([values])
    grid = Grid(kind, bits)
    scale, zero = grid.find(x)
    assert scale.item() != 0
    assert torch.equal(scale, scale.half().float())
    assert torch.equal(zero, zero.round())
    assert 0 <= zero.item() <= grid.top
    assert grid.codes(torch.zeros(1, 1), scale, zero).item() == zero.item()  # 0 is on it
    if kind == "universal":
        offset = (scale * zero).item()
        assert float(np.float16(offset)) == offset
    if scale.abs().item() > 2**-14 and max(map(abs, values)) * 2 < 65504:
        near = (grid.codes(x, scale, zero) - zero[:, None]) * scale[:, None]
        reach = {"ggml": 1.01, "symmetric": 0.52, "asymmetric": 1.02, "universal": 1.02}[kind]
        share = {5: 2**-5}.get(bits, 2**-6) if kind == "universal" else 2**-9
        worst = reach * scale.abs().item() + share * x.abs().max().item()
        assert (near - x).abs().max().item() <= worst


def test_the_ggml_grid_keeps_the_signed_extreme() -> None:
    scale, zero = Grid("ggml", 4).find(torch.tensor([[0.5, -1.0, 4.0], [0.5, -4.0, 1.0], [0.0, 0.0, 0.0]]))
    assert scale.tolist() == [-0.5, 0.5, 1.0]
    assert zero.tolist() == [8.0, 8.0, 8.0]


@given(st.lists(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), min_size=4, max_size=4), min_size=1))
def test_the_ggml_grid_takes_the_first_of_equal_extremes(rows: list[list[float]]) -> None:
    """As ggml does, which looks for a magnitude above all before."""
    want = []
    for row in rows:
        most = 0.0
        for x in row:
            most = x if abs(x) > abs(most) else most
        want.append(most / -8 or 1.0)
    assert Grid("ggml", 4).find(torch.tensor(rows))[0].tolist() == want


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_is_the_nearest_code(kind: str) -> None:
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(10))
    grid = Grid(kind, 4)
    scale, zero = grid.find(W)
    got, codes = nearest(W, lambda Wt, begin, last: Segment(last, scale, zero, grid.top, None, grid.levels))
    assert torch.equal(codes.float(), grid.codes(W, scale, zero))
    q = Quantised(codes, scale[:, None].half(), zero[:, None].to(torch.uint8), 4, 64, grid.codebook)
    assert torch.equal(got, q.dense())
    every = dataclasses.replace(q, codes=torch.arange(16).repeat(8, 1).to(torch.uint8), group=16).dense()
    assert torch.equal((got - W).abs(), (every[:, None] - W[..., None]).abs().amin(2))  # no value is nearer


@pytest.mark.parametrize("kind", [*KINDS, *SUPER_TYPES])
@pytest.mark.parametrize("weighted", [False, True])
def test_all_groups_at_once_are_rounded_as_the_column_loop_rounds_them(
    kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, "PART", 3 * 512)  # three rows at once
    g, of = torch.Generator().manual_seed(4), SUPER_TYPES.get(kind)
    grid = Grid(kind, 4 if of is None else of.bits)
    W, h = torch.randn(8, 512, generator=g), torch.rand(512, generator=g) if weighted else None
    W[2, 32:64] = 0
    got, want = (
        grids.rounded(W, grid, 32, h),
        grids.quantise(W, grid, 32, nearest, None, h).solved(grid, 32).weight,
    )
    found, expected = (stored("w", each) for each in (got, want))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[part], expected[part]) for part in expected)


def errors(x: np.ndarray, h: np.ndarray, scale: np.ndarray, book: np.ndarray) -> np.ndarray:
    """sum h (x - q)^2 of rows x [R, n] rounded to the nearest of scale [R] * book, in float64."""
    near = np.abs(x[..., None] - scale[:, None, None] * book).min(2)
    return (h * near**2).sum(1)


def groups(seed: int, R: int = 40, n: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a heavier tail than normal ones, of many sizes, and weights of their errors."""
    rng = np.random.default_rng(seed)
    return rng.standard_t(5, (R, n)) * 2.0 ** rng.integers(-9, 4, (R, 1)), rng.lognormal(0, 1, n)


def test_the_scale_is_the_best_of_those_that_are_tried() -> None:
    """The candidates written out: the largest near either end, the one that counts most on each value; least squares then."""
    book = np.array(CODEBOOKS["iq4_nl"], np.float64)
    x, h = groups(2)
    got = Grid("iq4_nl", 4).find(torch.from_numpy(x), torch.from_numpy(h))[0].numpy()
    for row, scale in zip(x, got, strict=True):
        largest, heaviest, tried = row[np.abs(row).argmax()], row[(np.sqrt(h) * np.abs(row)).argmax()], []
        ends = [target / largest for target in (*range(-151, -102, 6), *range(89, 138, 6))]
        for factor in [*ends, *(value / heaviest for value in book)]:
            q = book[np.abs(row[:, None] * factor - book).argmin(1)]
            best = (h * q * row).sum() / (h * q * q).sum()
            tried.append(((h * (row - best * q) ** 2).sum(), best))
        assert scale == np.float16(min(tried)[1])


def test_rows_on_a_codebook_are_found_and_rows_of_zeros_stay_zero() -> None:
    grid, g = Grid("iq4_nl", 4), torch.Generator().manual_seed(3)
    x = torch.randn(64, 32, generator=g)
    scale, zero = grid.find(x)
    levels = torch.tensor(CODEBOOKS["iq4_nl"])
    once = scale[:, None] * levels[grid.codes(x, scale, zero).long()]
    once[5] = 0
    again, _ = grid.find(once)
    assert torch.equal(again[[5]], torch.zeros(1))
    want = scale.clone()
    want[5] = 0
    assert torch.equal(again, want)
    got, _ = nearest(once, lambda Wt, begin, last: Segment(last, again, zero, grid.top, None, grid.levels))
    assert torch.equal(got, once)
