"""Grids of GGUF's super-blocks: what is fitted, that every code is the nearest, and OPTQ on them."""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_harness import brain_surgeon, curvature, damped, dense, work
from torch import Tensor

from fleetune import compression
from fleetune.compression.layerwise import driver, fits
from fleetune.compression.layerwise.grids import ALL, INSTEAD, KINDS, Grid, grid_problems, rounded
from fleetune.deploy.formats import _ggml_blocks
from fleetune.errors import RecipeError
from fleetune.models import tiny_llama
from fleetune.models.artefact import Quantised
from fleetune.models.families.number_types import CODEBOOKS, SUPER_TYPES, SUPER_WIDTH

TYPES = sorted(SUPER_TYPES)
WITHOUT_ZERO = ("iq4_xs", "q2_k", "q4_k", "q5_k")
FOUND = importlib.util.find_spec("llama_cpp_py_sync")
LIBRARY = Path(FOUND.origin).parent / "libggml-base.so.0" if FOUND and FOUND.origin else None
needs_llama = pytest.mark.skipif(LIBRARY is None or not LIBRARY.is_file(), reason="no llama.cpp")


@cache
def library() -> Any:
    opened = ctypes.CDLL(str(LIBRARY))
    opened.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    opened.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    return opened


def llama_cpp(x: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """What llama.cpp makes of x float32 [R, C] in blocks of `kind`; importance float32 [C] is its importance matrix."""
    x, type_ = np.ascontiguousarray(x, np.float32), gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    out = np.zeros((len(x), x.shape[1] // block * size), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    at = None if weights is None else weights.ctypes.data
    written = library().ggml_quantize_chunk(int(type_), x.ctypes.data, out.ctypes.data, 0, *x.shape, at)
    assert written == out.size
    read: np.ndarray = gguf.quants.dequantize(out, type_)
    return read


def grid_of(kind: str) -> Grid:
    return Grid(kind, SUPER_TYPES[kind].bits)


def values_of(q: Quantised, column: int) -> Tensor:
    """All values that a weight of this column could have, [R, 2^bits]."""
    of, g = SUPER_TYPES[q.blocks.kind], column // q.group
    steps = torch.tensor(CODEBOOKS[of.codebook] if of.codebook else range(1 << of.bits)).float() - of.middle
    values = steps * q.blocks.scale()[:, g, None]
    offset = q.blocks.offset()
    return values if offset is None else values - offset[:, g, None]


SHAPES = {
    "normal": lambda x: x,
    "heavy": lambda x: x**3,
    "positive": lambda x: x.abs(),
    "negative": lambda x: -x.abs(),
    "constant": lambda x: x[:, :1].expand_as(x),
    "zero": lambda x: x * 0,
    "one": lambda x: torch.eye(*x.shape) * x,
    "one far out": lambda x: x + 1e4 * torch.eye(*x.shape),
    "far from zero": lambda x: x * 0.01 + 3,
}


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Rows [8, 512] of which every 64 columns are of a shape and size of their own."""
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    parts = []
    for part in x.split(64, 1):
        shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
        parts.append(shape(part) * 2.0 ** draw(st.sampled_from([0, -30, -20, -12, -3, 3, 12])))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", TYPES)
@given(W=matrices(), weighted=st.booleans())
@settings(max_examples=8)
def test_any_matrix_is_rounded_to_nearest_and_the_file_holds_it(kind: str, W: Tensor, weighted: bool) -> None:
    h = torch.logspace(-2, 2, 512)[torch.arange(512) * 7 % 512] if weighted else None
    q = rounded(W, grid_of(kind), 32, h)
    of, got = SUPER_TYPES[kind], q.dense()
    assert q.blocks.misfit(8, 512) == ""
    assert (q.bits, q.group) == (of.bits, of.group)
    raw = _ggml_blocks.PACKERS[kind.upper()](q)
    read = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(read.view(np.int32), got.numpy().view(np.int32))  # to the bit, and the sign of 0
    assert torch.isfinite(got).all()
    for column in range(0, 512, 37):
        near = (values_of(q, column) - W[:, column, None]).abs().amin(1)
        assert ((got[:, column] - W[:, column]).abs() <= near * (1 + 1e-5) + 1e-7 * W[:, column].abs()).all()
    # no row is further from its weights than 0 is
    each = torch.ones(512) if h is None else h
    assert ((each * (got - W).double() ** 2).sum(1) <= (each * W.double() ** 2).sum(1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_units_that_are_not_finite_do_not_fit(value: float) -> None:
    q = rounded(torch.randn(2, 256), grid_of("q4_k"), 32)
    for part in ("d", "dmin"):
        unit = getattr(q.blocks, part).clone()
        unit[1, 0] = value
        blocks = q.blocks._replace(**{part: unit})
        assert blocks.misfit(2, 256) == "units that are no finite numbers"


@pytest.mark.parametrize("kind", TYPES)
def test_d_and_dmin_are_of_least_squares_for_the_codes(kind: str) -> None:
    """Against numpy's least squares of each row, to fp16's rounding."""
    of, g = SUPER_TYPES[kind], torch.Generator().manual_seed(6)
    x, h = torch.randn(6, SUPER_WIDTH, generator=g).double(), torch.rand(SUPER_WIDTH, generator=g) + 0.1
    work = fits._Work(x, of, h)
    tried = work.started(*work.groups(), 1.0)
    work.settle(tried)
    found, tried = work.refitted(tried).shaped(()), tried.shaped(())
    k, m = (part.repeat_interleave(of.group, 0).T.numpy() for part in (tried.k, tried.m))
    steps = np.array(CODEBOOKS[of.codebook] if of.codebook else range(1 << of.bits)) - float(of.middle)
    d, dmin, root = tried.d.numpy(), tried.dmin.numpy(), np.sqrt(h.numpy())
    for r in range(6):
        values = (d[r] * k[r])[:, None] * steps - (dmin[r] * m[r])[:, None]
        a = k[r] * steps[np.abs(values - x[r].numpy()[:, None]).argmin(1)]
        sides = np.stack([a, -m[r]][: 1 + of.minimum], 1) * root[:, None]
        best = np.linalg.lstsq(sides, x[r].numpy() * root, rcond=None)[0]
        assert found.d[r].item() == pytest.approx(best[0], rel=2**-11)
        if of.minimum:
            assert found.dmin[r].item() == pytest.approx(best[1], rel=2**-11)


@pytest.mark.parametrize("top", [3, 31])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_a_range_and_its_minimum_are_nearly_the_best_of_many(top: int, shift: float) -> None:
    """Against 400 x 60 pairs of S and M >= 0, where the weights are about 0, mostly above, and all on one side of it."""
    g = torch.Generator().manual_seed(7)
    columns, h = torch.randn(32, 12, generator=g) + shift, torch.rand(32, generator=g) + 0.1
    S, M = (part[0] for part in fits.fit_range(columns[None], h[None], top))
    assert (M >= 0).all()

    def errors(S: Tensor, M: Tensor, x: Tensor) -> Tensor:
        codes = ((x + M[:, None]) / S[:, None]).round().clamp(0, top)
        return (h * (S[:, None] * codes - M[:, None] - x) ** 2).sum(1)

    found = least = 0.0
    for r, x in enumerate(columns.T):
        found += errors(S[r, None], M[r, None], x).item()
        width = float(x.max() - min(float(x.min()), 0.0))
        scales = torch.linspace(0.4, 1.2, 400) * width / top
        minima = (torch.linspace(-0.5, 0.2, 60) * width - x.min()).clamp(min=0)
        least += errors(*torch.cartesian_prod(scales, minima).T, x).min().item()
    assert found < 1.06 * least


@needs_llama
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tail", ["student", "positive"])
@pytest.mark.parametrize("spread", [None, 1.0])
def test_the_error_is_below_that_of_llama_cpp_s_quantiser(kind: str, tail: str, spread: float | None) -> None:
    """Weighted by what it is given as an importance matrix, or not at all."""
    rng = np.random.default_rng(3)
    x = rng.standard_t(4, (64, 512))
    x = (0.02 * (np.abs(x) if tail == "positive" else x)).astype(np.float32)
    h = None if spread is None else rng.lognormal(0, spread, 512).astype(np.float32)
    own = rounded(torch.from_numpy(x), grid_of(kind), 32, None if h is None else torch.from_numpy(h))
    theirs = llama_cpp(x, kind.upper(), h)
    each = 1 if h is None else h
    errors = [(each * (q - x.astype(np.float64)) ** 2).sum() for q in (own.dense().numpy(), theirs)]
    assert errors[0] < 0.985 * errors[1]
    if h is None:  # and below its best, which takes an importance of 1 for all
        flat = llama_cpp(x, kind.upper(), np.ones(512))
        assert errors[0] < ((flat - x.astype(np.float64)) ** 2).sum()


@pytest.mark.parametrize("kind", ALL)
def test_the_bits_of_a_weight_are_those_of_the_file(kind: str) -> None:
    """Of a matrix that needs all codes: groups about 0, groups of one sign, and ends that are not alike."""
    W = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    W[1], W[2], W[3] = W[1].abs(), -W[2].abs(), W[3].where(W[3] > 0, W[3] * 0.3)
    for bits in (2, 3, 4, 5, 8) if kind in KINDS else (SUPER_TYPES[kind].bits,):
        if grid_problems(kind, bits, 32):
            continue
        grid = Grid(kind, bits)
        q = rounded(W, grid, 32)
        held = [name for name in _ggml_blocks.PACKERS if _ggml_blocks.misfit(q, name) is None]
        found = _ggml_blocks.PACKERS[held[0]](q).size * 8 / W.numel() if held else None
        assert found == (8 * grid.block[1] / grid.block[0] if grid.block else None), bits


@cache
def problem(C: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, their Hessian, and the same damped."""
    W, H = work(2, 3, C)
    return W, H, damped(H, 0.02)


@pytest.mark.parametrize("kind", TYPES)
def test_optq_is_the_surgeon_on_super_blocks(kind: str) -> None:
    """A super-block is fitted when it is reached, a group's multiples again when it is."""
    of = SUPER_TYPES[kind]
    W, H, damped_ = problem(512 if kind == "q4_k" else 256)
    got = dense(compression.make("optq", {"grid": kind, "damping": 0.02}).solve(W.clone(), H.clone()))
    H = damped_
    h, found = curvature(H), dict[int, fits.SuperFit]()
    steps = torch.tensor(CODEBOOKS[of.codebook] if of.codebook else range(1 << of.bits)).double() - of.middle

    def settle(i: int, now: Tensor) -> Tensor:
        first, g = i - i % SUPER_WIDTH, i % SUPER_WIDTH // of.group
        if i % SUPER_WIDTH == 0:
            found[first] = fits.fit_block(now[:, i : i + SUPER_WIDTH], of, h[i : i + SUPER_WIDTH])
        elif i % of.group == 0:
            one = found[first]._replace(k=found[first].k[g : g + 1], m=found[first].m[g : g + 1])
            again = fits.refit_groups(now[:, i : i + of.group], of, h[i : i + of.group], one)
            found[first].k[g], found[first].m[g] = again.k[0], again.m[0]
        values = found[first].scale()[g][:, None] * steps - found[first].offset()[g][:, None]
        return values.gather(1, (values - now[:, i, None]).abs().argmin(1, keepdim=True))[:, 0]

    torch.testing.assert_close(got.double(), brain_surgeon(W, H, settle), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", TYPES)
def test_zeros_stay_where_the_grid_has_0_and_a_pruned_matrix_is_refused_where_it_has_not(kind: str) -> None:
    W, H = work(5, 8, SUPER_WIDTH, torch.float32)
    W[:, ::5] = 0
    solver = compression.make("optq", {"grid": kind})
    if kind not in WITHOUT_ZERO:
        assert not dense(solver.solve(W.clone(), H.clone()))[W == 0].any()
        return
    with pytest.raises(RecipeError, match=f"20% of a matrix is exactly 0, and the grid {kind} has no 0"):
        solver.solve(W, H)


def test_dead_inputs_and_matrices_that_nothing_reached() -> None:
    W, H = work(11, 6, 512)
    dead = [3, 200, *range(256, 512)]  # and a whole super-block
    H[:, dead] = 0
    H[dead] = 0
    for kind in TYPES:
        solver = compression.make("optq", {"grid": kind, "damping": 0.1})
        solved = solver.solve(W.clone(), H.clone())
        D = W - dense(solved)
        assert solved.loss == pytest.approx(torch.trace(D @ H @ D.T).item(), rel=1e-4)
        assert not dense(solved)[:, 256:].any()
        plain = dense(solver.solve(W.clone(), torch.zeros_like(H)))
        assert torch.equal(plain, dense(compression.make("rtn", {"grid": kind}).solve(W.clone(), H)))


@pytest.mark.parametrize("method", ["optq", "rtn"])
def test_bits_and_group_follow_from_the_type(method: str) -> None:
    for kind, of in SUPER_TYPES.items():
        solver = compression.make(method, {"grid": kind})
        assert (solver.bits, solver.group) == (of.bits, of.group)
        assert compression.make(method, {"grid": kind, "bits": of.bits, "group": of.group}) == solver


@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_rows_that_super_blocks_do_not_divide_are_told_what_fits(kind: str) -> None:
    solver = compression.make("optq", {"grid": kind})
    grid, bits = INSTEAD[kind]
    assert solver.check("q", 9, 1536) == ""
    assert solver.check("q", 9, 576) == (
        f"q has 576 columns, which super-blocks of 256 do not divide (grid={grid} with bits={bits} is for groups of 32)"
    )
    assert solver.check("q", 9, 40) == "q has 40 columns, which super-blocks of 256 do not divide"
    with pytest.raises(RecipeError, match="super-blocks of 256 do not divide") as caught:
        driver.check(tiny_llama(), solver)
    assert caught.value.hint == "choose a grid whose groups fit every layer"
