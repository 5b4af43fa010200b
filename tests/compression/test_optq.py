"""OPTQ and SparseGPT on one matrix, against optimal-brain updates with explicit inverses in float64; what solvers do with odd ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_harness import brain_surgeon, curvature, damped, dense, onto, work
from torch import Tensor

from fleetune import compression
from fleetune.compression.layerwise import hessian
from fleetune.compression.layerwise.column_loop import Segment, sweep
from fleetune.compression.layerwise.grids import KINDS, UNIFORM, Grid
from fleetune.errors import RecipeError

OF_8 = {"group": 8}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [3, 8, 128])
def test_optq_is_the_optimal_brain_surgeon_on_a_grid(kind: str, block: int) -> None:
    """Every block size gives what explicit inverses give, groups fitted to the updated weights."""
    W, H = work(1, 5, 24)
    H = damped(H, 0.01)
    grid, group, h = Grid(kind, 4), 8, curvature(H)
    fits: dict[int, tuple[Tensor, Tensor]] = {}

    def settle(i: int, now: Tensor) -> Tensor:
        if i % group == 0:
            fits[i // group] = grid.find(now[:, i : i + group], h[i : i + group])
        return onto(grid, now[:, i], *fits[i // group])

    want = brain_surgeon(W, H, settle)
    U, *_ = hessian.inverse_cholesky(H.clone(), 0.0)
    assert U is not None
    found: list[tuple[Tensor, Tensor]] = []

    def choose(Wt: Tensor, begin: int, last: int) -> Segment:
        if begin % group == 0:
            found.append(grid.find(Wt[begin : begin + group].T, h[begin : begin + group]))
        return Segment(begin - begin % group + group, *found[-1], grid.top, None, grid.levels)

    # groups that go beyond a block are fitted before its end is known: only the loop is compared
    if block == 3:
        scale, zero = grid.find(W)

        def alike(i: int, now: Tensor) -> Tensor:
            return onto(grid, now[:, i], scale, zero)

        want = brain_surgeon(W, H, alike)
        alone = Segment(24, scale, zero, grid.top, None, grid.levels)
        got, _, _ = sweep(W, U, lambda Wt, begin, last: alone, block)
    else:
        got, _, _ = sweep(W, U, choose, block)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("rtn", {"grid": "iq4_nl"} | OF_8), ("optq", OF_8), ("qronos", OF_8), ("sparsegpt", {})],
)
def test_weights_in_another_layout_are_solved_alike_and_stay(method: str, settings: dict) -> None:
    """gpt-oss has its experts as [in, out]: a matrix is a view of them, contiguous when it is transposed."""
    W, H = work(8, 1, 24, torch.float32)
    solver = compression.make(method, settings)
    want = dense(solver.solve(W.clone(), H))
    for weights in (W.clone(), W.T.contiguous().T):
        found = solver.solve(weights, H)
        assert torch.equal(weights, W)
        assert torch.equal(dense(found), want)


def test_pruned_weights_stay_zero_when_they_are_quantised_later() -> None:
    W, H = work(5, 16, 64, torch.float32)
    pruned = dense(compression.make("sparsegpt", {"n": 2, "m": 4}).solve(W.clone(), H.clone()))
    for kind in UNIFORM:
        solver = compression.make("optq", {"grid": kind, "group": 16})
        assert not dense(solver.solve(pruned.clone(), H.clone()))[pruned == 0].any()


@pytest.mark.parametrize("method", ["optq", "rtn"])
def test_a_codebook_without_0_takes_no_pruned_matrix(method: str) -> None:
    W, H = work(5, 16, 64, torch.float32)
    solver = compression.make(method, {"grid": "iq4_nl"})
    W.view(-1)[:1020:20] = 0.0  # 51; one more is 5 %
    assert dense(solver.solve(W.clone(), H.clone())).all()  # 0 is not on it
    W.view(-1)[1020] = 0.0
    with pytest.raises(RecipeError, match=r"5% of a matrix is exactly 0, .* iq4_nl has no 0") as caught:
        solver.solve(W.clone(), H.clone())
    assert "grid=ggml" in (caught.value.hint or "")


@pytest.mark.parametrize("count", [1, 200])
def test_exact_zeros_stay_zero_however_few_they_are(count: int) -> None:
    W, H = work(5, 16, 64, torch.float32)
    places = torch.randperm(W.numel(), generator=torch.Generator().manual_seed(count))[:count]
    W.view(-1)[places] = 0.0
    solver = compression.make("optq", {"bits": 8, "group": 16})
    assert not dense(solver.solve(W.clone(), H.clone()))[W == 0].any()


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("optq", {"grid": "ggml", "group": 16}),
        ("optq", {"grid": "asymmetric", "group": 16}),
        ("sparsegpt", {}),
        ("sparsegpt", {"n": 2}),
        ("sparsegpt", {"bits": 3, "group": 16}),
    ],
)
def test_the_loss_that_the_loop_tells_is_that_of_the_matrix(method: str, values: dict[str, object]) -> None:
    """Over several blocks, with dead inputs, and zeros that stay; damping is not a part of it."""
    W, H = work(11, 6, 320)
    W[:, ::3] = 0
    H[:, [3, 200]] = 0
    H[[3, 200]] = 0
    solved = compression.make(method, {**values, "damping": 0.1}).solve(W.clone(), H.clone())
    D = W - dense(solved)
    assert solved.loss == pytest.approx(torch.trace(D @ H @ D.T).item(), rel=1e-6)


def test_what_is_on_the_grid_already_costs_nothing() -> None:
    W, H = work(12, 4, 32, torch.float32)
    for kind in ("ggml", "iq4_nl"):
        once = dense(compression.make("rtn", {"grid": kind}).solve(W, H))
        assert compression.make("optq", {"grid": kind}).solve(once.clone(), H.clone()).loss == 0.0


def test_dead_inputs_are_said_and_their_weights_become_zero() -> None:
    W, H = work(7, 4, 32, torch.float32)
    H[:, [3, 20]] = 0
    H[[3, 20]] = 0
    for name in ("optq", "sparsegpt"):
        solved = compression.make(name, {}).solve(W.clone(), H.clone())
        assert not dense(solved)[:, [3, 20]].any()
        assert solved.notes == ("2 of 32 inputs are always zero",)


def test_a_matrix_without_a_factor_is_damped_then_rounded_and_said() -> None:
    W, _ = work(8, 4, 32, torch.float32)
    indefinite = torch.eye(32)
    indefinite[0, 1] = indefinite[1, 0] = 1.005
    solved = compression.make("optq", {"damping": 0.001}).solve(W.clone(), indefinite.clone())
    assert solved.notes == ("no Cholesky factor: damping raised to 0.01",)
    hopeless = torch.eye(32)
    hopeless[0, 1] = hopeless[1, 0] = 9.0
    solved = compression.make("optq", {}).solve(W.clone(), hopeless)
    assert solved.notes[-1] == "no Cholesky factor at any damping: rounded to nearest"
    assert solved.loss is None  # nobody knows it without a factor
    assert torch.equal(dense(solved), dense(compression.make("rtn", {}).solve(W.clone(), hopeless)))


def test_matrices_that_do_not_fit_are_told_what_would() -> None:
    assert compression.make("optq", {"group": 128}).check("q", 9, 576) == (
        "q has 576 columns, which groups of 128 do not divide (groups of 64 do)"
    )
    assert "group=0 takes" in compression.make("rtn", {}).check("q", 9, 31)
    assert "patterns of 4" in compression.make("sparsegpt", {"n": 2}).check("q", 9, 31)
    assert compression.make("sparsegpt", {"group": 7}).check("q", 9, 31) == ""
    assert compression.make("optq", {"group": 0}).check("q", 9, 31) == ""


@pytest.mark.parametrize("bits", [0, 4])
def test_sparsegpt_unstructured_is_the_surgeon_with_a_mask(bits: int) -> None:
    """C < 128: one block, so the mask comes from the weights and U as they are at its start."""
    W, H = work(3, 6, 16)
    solver = compression.make("sparsegpt", {"sparsity": 0.4, "bits": bits, "group": 8, "grid": "asymmetric"})
    got = dense(solver.solve(W.clone(), H.clone())).double()
    H = damped(H, 0.01)
    spread = torch.tensor([torch.linalg.inv(H[i:, i:])[0, 0] for i in range(16)], dtype=W.dtype)
    score = (W**2 / spread).reshape(-1)
    mask = torch.zeros(len(score), dtype=torch.bool)
    mask[score.argsort()[: int(0.4 * len(score))]] = True
    mask = mask.view_as(W)
    assert int((got == 0).sum()) >= int(mask.sum()) == 38
    fits: dict[int, tuple[Tensor, Tensor]] = {}

    def settle(i: int, now: Tensor) -> Tensor:
        if not bits:
            return now[:, i].masked_fill(mask[:, i], 0.0)
        if i % 8 == 0:
            fits[i // 8] = Grid("asymmetric", 4).find(now[:, i : i + 8].masked_fill(mask[:, i : i + 8], 0.0))
        scale, zero = fits[i // 8]
        q = scale * ((torch.round(now[:, i] / scale) + zero).clamp(0, 15) - zero)
        return q.masked_fill(mask[:, i], 0.0)

    torch.testing.assert_close(got, brain_surgeon(W, H, settle), rtol=0, atol=1e-6 if bits else 1e-9)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
def test_sparsegpt_patterns_follow_the_updated_weights(n: int, m: int) -> None:
    W, H = work(4, 6, 32)
    got = dense(compression.make("sparsegpt", {"n": n, "m": m}).solve(W.clone(), H.clone()))
    assert ((got.view(6, -1, m) == 0).sum(2) == n).all()
    H = damped(H, 0.01)
    spread = torch.tensor([torch.linalg.inv(H[i:, i:])[0, 0] for i in range(32)], dtype=W.dtype)
    mask = torch.zeros_like(W, dtype=torch.bool)

    def settle(i: int, now: Tensor) -> Tensor:
        if i % m == 0:
            score = now[:, i : i + m] ** 2 / spread[i : i + m]
            mask[:, i : i + m].scatter_(1, score.argsort(1)[:, :n], True)
        return now[:, i].masked_fill(mask[:, i], 0.0)

    torch.testing.assert_close(got, brain_surgeon(W, H, settle), rtol=0, atol=1e-9)


@given(seed=st.integers(0, 99), sparsity=st.floats(0, 0.99), C=st.integers(1, 200), R=st.integers(1, 8))
@settings(max_examples=15)
def test_exactly_the_share_of_each_block_is_pruned(seed: int, sparsity: float, C: int, R: int) -> None:
    W, H = work(seed, R, C, torch.float32)
    got = dense(compression.make("sparsegpt", {"sparsity": sparsity}).solve(W.clone(), H))
    want = [int(len(W[:, a : a + 128].reshape(-1)) * sparsity) for a in range(0, C, 128)]
    assert [int((got[:, a : a + 128] == 0).sum()) for a in range(0, C, 128)] == want
