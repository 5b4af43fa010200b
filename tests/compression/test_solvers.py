# SPDX-License-Identifier: Apache-2.0
"""OPTQ and SparseGPT on one matrix, against optimal-brain updates with explicit inverses in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fleetune import compression
from fleetune.compression.layerwise import hessian
from fleetune.compression.layerwise.column_loop import Segment, sweep
from fleetune.compression.layerwise.grids import KINDS, UNIFORM, Grid
from fleetune.errors import RecipeError, UsageError
from fleetune.models.artefact import Quantised
from fleetune.models.families.number_types import CODEBOOKS


def work(seed: int, R: int, C: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(weights [R, C], Hessian [C, C] of inputs whose variances fall like i^-1.4, as those of language models do)."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(C, C, generator=g, dtype=dtype))[0]
    spread = torch.arange(1, C + 1, dtype=dtype)[:, None] ** -0.7
    x = torch.randn(4 * C, C, generator=g, dtype=dtype) @ (spread * turn)
    H = torch.zeros(C, C, dtype=dtype)
    hessian.accumulate(H, x)
    return torch.randn(R, C, generator=g, dtype=dtype), hessian.mirrored(H)


def relative_error(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """||W X - Q X||^2 / ||W X||^2 from H = 2 X X^T."""
    return hessian.share(hessian.trace(W - Q, H), hessian.trace(W, H))


def damped(H: Tensor, damping: float) -> Tensor:
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def brain_surgeon(W: Tensor, H: Tensor, settle) -> Tensor:
    """Column by column with (H_F)^-1 inverted anew for every column; settle(i, updated W) gives column i."""
    W = W.clone()
    for i in range(W.shape[1]):
        inverse = torch.linalg.inv(H[i:, i:])
        q = settle(i, W)
        W[:, i + 1 :] -= torch.outer((W[:, i] - q) / inverse[0, 0], inverse[0, 1:])
        W[:, i] = q
    return W


def onto(grid: Grid, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest values to w [R]."""
    if not grid.codebook:
        return scale * ((torch.round(w / scale) + zero).clamp(0, grid.top) - zero)
    values = scale[:, None] * torch.tensor(CODEBOOKS[grid.codebook], dtype=w.dtype)
    return values.gather(1, (values - w[:, None]).abs().argmin(1, keepdim=True))[:, 0]


def curvature(H: Tensor) -> Tensor:
    """1 / [H_F^-1]_ii with F the columns from i on, [C]."""
    return torch.stack([1 / torch.linalg.inv(H[i:, i:])[0, 0] for i in range(len(H))])


def dense(solved: compression.Solved) -> Tensor:
    return solved.weight.dense() if isinstance(solved.weight, Quantised) else solved.weight


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

    if (
        block == 3
    ):  # groups that go beyond a block are fitted before its end is known: only the loop is compared
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
    [
        *(("rtn", {"grid": kind, "bits": 4, "group": 8}) for kind in KINDS),
        *(("optq", {"grid": kind, "bits": 4, "group": 8}) for kind in KINDS),
        ("qronos", {"group": 8}),
        ("sparsegpt", {}),
    ],
)
@pytest.mark.parametrize("R", [1, 5])
def test_weights_in_another_layout_are_solved_alike_and_stay(
    method: str, settings: dict[str, object], R: int
) -> None:
    """gpt-oss has its experts as [in, out]: a matrix is a view of them, contiguous when it is transposed."""
    W, H = work(8, R, 24, torch.float32)
    solver = compression.make(method, settings)
    want = dense(solver.solve(W.clone(), H))
    for weights in (W.clone(), W.T.contiguous().T):
        found = solver.solve(weights, H)
        assert torch.equal(weights, W)
        assert torch.equal(dense(found), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["none", "static", "gar"])
def test_optq_in_any_order_is_the_surgeon_on_sorted_columns(kind: str, order: str) -> None:
    W, H = work(2, 4, 32)
    group = 8
    solver = compression.make("optq", {"group": group, "grid": kind, "order": order, "damping": 0.02})
    got = dense(solver.solve(W.clone(), H.clone()))
    sort = {
        "none": list(range(32)),
        "static": sorted(range(32), key=lambda i: -H[i, i].item()),
        "gar": list(
            itertools.chain.from_iterable(
                sorted(columns, key=lambda i: -H[i, i].item())
                for columns in sorted(
                    (range(g, g + group) for g in range(0, 32, group)),
                    key=lambda columns: -max(H[i, i].item() for i in columns),
                )
            )
        ),
    }[order]
    grid, fits = Grid(kind, 4), dict[int, tuple[Tensor, Tensor]]()
    h = curvature(damped(H, 0.02)[sort][:, sort])
    if order == "static":
        whole = h[torch.tensor(sort).argsort()]
        fits = {
            g: grid.find(W[:, a : a + group], whole[a : a + group]) for g, a in enumerate(range(0, 32, group))
        }

    def settle(i: int, now: Tensor) -> Tensor:
        g = sort[i] // group
        if g not in fits:
            fits[g] = grid.find(now[:, i : i + group], h[i : i + group])
        return onto(grid, now[:, i], *fits[g])

    want = brain_surgeon(W[:, sort], damped(H, 0.02)[sort][:, sort], settle)
    torch.testing.assert_close(got.double()[:, sort], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", ["none", "static", "gar"])
def test_without_a_factor_a_ggml_grid_is_ggmls_in_any_order(order: str) -> None:
    W, grid = work(3, 8, 32)[0], Grid("ggml", 4)
    solved = compression.make("optq", {"group": 8, "order": order}).solve(
        W.clone(), torch.zeros_like(W.T @ W)
    )
    assert solved.notes == ("nothing reached it: rounded to nearest",)
    wanted = []
    for part in W.split(8, 1):
        scale, zero = grid.find(part)
        wanted.append((grid.codes(part, scale, zero) - zero[:, None]) * scale[:, None])
    assert torch.equal(dense(solved).double(), torch.cat(wanted, 1))


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


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
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
@settings(max_examples=30)
def test_exactly_the_share_of_each_block_is_pruned(seed: int, sparsity: float, C: int, R: int) -> None:
    W, H = work(seed, R, C, torch.float32)
    got = dense(compression.make("sparsegpt", {"sparsity": sparsity}).solve(W.clone(), H))
    want = [int(len(W[:, a : a + 128].reshape(-1)) * sparsity) for a in range(0, C, 128)]
    assert [int((got[:, a : a + 128] == 0).sum()) for a in range(0, C, 128)] == want


def test_pruned_weights_stay_zero_when_they_are_quantised_later() -> None:
    W, H = work(5, 16, 64, torch.float32)
    pruned = dense(compression.make("sparsegpt", {"n": 2, "m": 4}).solve(W.clone(), H.clone()))
    for kind, order in itertools.product(UNIFORM, ("none", "static", "gar")):
        solver = compression.make("optq", {"grid": kind, "order": order, "group": 16})
        assert not dense(solver.solve(pruned.clone(), H.clone()))[pruned == 0].any()


@pytest.mark.parametrize("method", ["optq", "rtn"])
def test_a_codebook_without_0_takes_no_pruned_matrix(method: str) -> None:
    W, H = work(5, 16, 64, torch.float32)
    solver = compression.make(method, {"grid": "iq4_nl"})
    W.view(-1)[:1020:20] = 0.0  # 51; one more is 5 %
    got = dense(solver.solve(W.clone(), H.clone()))
    assert got.all()  # 0 is not on it
    W.view(-1)[1020] = 0.0
    with pytest.raises(
        RecipeError, match="5% of a matrix is exactly 0, and the grid iq4_nl has no 0"
    ) as caught:
        solver.solve(W.clone(), H.clone())
    assert "grid=ggml" in (caught.value.hint or "")


@pytest.mark.parametrize("count", [1, 10, 200])
def test_exact_zeros_stay_zero_however_few_they_are(count: int) -> None:
    W, H = work(5, 16, 64, torch.float32)
    places = torch.randperm(W.numel(), generator=torch.Generator().manual_seed(count))[:count]
    W.view(-1)[places] = 0.0
    for order in ("none", "static", "gar"):
        solver = compression.make("optq", {"bits": 8, "order": order, "group": 16})
        assert not dense(solver.solve(W.clone(), H.clone()))[W == 0].any()


@pytest.mark.parametrize("method", ["optq", "sparsegpt"])
def test_error_feedback_pays(method: str) -> None:
    """||WX - QX||^2 is well below that of rounding (or of magnitude pruning) on correlated inputs."""
    W, H = work(6, 48, 256, torch.float32)
    if method == "optq":
        ours = dense(compression.make("optq", {"bits": 3}).solve(W.clone(), H.clone()))
        plain = dense(compression.make("rtn", {"bits": 3}).solve(W.clone(), H.clone()))
    else:
        ours = dense(compression.make("sparsegpt", {}).solve(W.clone(), H.clone()))
        plain = W * (W.abs() > W.abs().flatten().median())
    errors = [relative_error(W, q, H) for q in (ours, plain)]
    assert errors[0] < 0.4 * errors[1]


@pytest.mark.parametrize("C", [7, 128, 129, 300])  # less than a strip, one, and several
def test_sums_and_errors_are_those_of_the_inputs_and_outputs(C: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(50, C, generator=g).double(), torch.randn(3, C, generator=g).double()
    Q, H = torch.round(W), torch.zeros(C, C).double()
    for part in x.split(20):
        hessian.accumulate(H, part[None])
    H = hessian.mirrored(H)
    torch.testing.assert_close(H, 2 * x.T @ x)
    assert torch.equal(H, H.T)
    want = ((x @ (W - Q).T) ** 2).sum() / ((x @ W.T) ** 2).sum()
    assert relative_error(W, Q, H) == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("optq", {"grid": kind, "order": order, "group": 16})
        for kind in UNIFORM
        for order in ("none", "static", "gar")
    ]
    + [("sparsegpt", {}), ("sparsegpt", {"n": 2}), ("sparsegpt", {"bits": 3, "group": 16})],
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


def test_the_loss_on_a_codebook_is_that_of_the_matrix() -> None:
    """With dead inputs: errors in their weights cost nothing."""
    W, H = work(11, 6, 320)
    dead = [3, 200, *range(64, 96)]
    H[:, dead] = 0
    H[dead] = 0
    solver = compression.make("optq", {"grid": "iq4_nl", "damping": 0.1})
    solved = solver.solve(W.clone(), H.clone())
    D = W - dense(solved)
    assert solved.loss == pytest.approx(torch.trace(D @ H @ D.T).item(), rel=1e-6)
    assert not dense(solved)[:, 64:96].any()  # a whole group


def test_the_curvature_is_that_of_the_columns_that_are_left_and_0_for_dead_inputs() -> None:
    _, H = work(9, 1, 12)
    H[:, [2, 11]] = 0
    H[[2, 11]] = 0
    factor = hessian.inverse_cholesky(H.clone(), 0.0)
    left = H.clone()
    left[[2, 11], [2, 11]] = 1
    want = curvature(left)
    want[[2, 11]] = 0
    assert factor.curvature is not None
    torch.testing.assert_close(factor.curvature, want, rtol=1e-9, atol=1e-12)
    assert hessian.inverse_cholesky(torch.zeros(3, 3), 0.01).curvature is None


def test_the_loss_of_damping_that_had_to_grow_is_without_it() -> None:
    W, _ = work(8, 4, 32)
    singular = torch.ones(32, 32, dtype=W.dtype)  # no factor at a damping of 0
    solved = compression.make("optq", {"damping": 0.0}).solve(W.clone(), singular.clone())
    assert solved.notes == ("no Cholesky factor: damping raised to 0.01",)
    D = W - dense(solved)
    assert solved.loss == pytest.approx(torch.trace(D @ singular @ D.T).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("method", "values"),
    [("optq", {}), ("optq", {"order": "gar"}), ("sparsegpt", {}), ("sparsegpt", {"bits": 4}), ("rtn", {})],
)
def test_a_solver_leaves_what_it_is_given(method: str, values: dict[str, object]) -> None:
    """Layers with one input share a Hessian, and a layer's weights are its own."""
    W, H = work(13, 6, 64)
    H[:, 5] = H[5] = 0
    before = W.clone(), H.clone()
    compression.make(method, values).solve(W, H)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


def test_what_is_on_the_grid_already_costs_nothing() -> None:
    W, H = work(12, 4, 32, torch.float32)
    for kind in ("ggml", "iq4_nl"):
        once = dense(compression.make("rtn", {"grid": kind}).solve(W, H))
        assert compression.make("optq", {"grid": kind}).solve(once.clone(), H.clone()).loss == 0.0


# --- trouble --------------------------------------------------------------------------------------------------


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


def test_u_holds_every_inverse() -> None:
    """U_ii^2 and U_ii U[i, i:] against explicit inverses of what is left."""
    _, H = work(9, 1, 12)
    U, _, _, notes = hessian.inverse_cholesky(H.clone(), 0.05)
    assert U is not None
    assert notes == ()
    for i in range(12):
        left = torch.linalg.inv(damped(H, 0.05)[i:, i:])
        torch.testing.assert_close(U[i, i] * U[i, i:], left[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("C", [1, 64, 65, 200])
def test_u_of_a_wide_layer_is_put_together_of_halves(C: int) -> None:
    _, H = work(4, 1, C)
    U, *_ = hessian.inverse_cholesky(H.clone(), 0.05)
    assert U is not None
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(damped(H, 0.05)), rtol=1e-9, atol=1e-12)


# --- settings -------------------------------------------------------------------------------------------------


def test_unknown_solvers_are_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'optq'"):
        compression.make("opt", {})


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("optq", {"bits": 6}, "bits = 6 is none of 2, 3, 4, 5, 8"),
        ("optq", {"grid": "q4_0"}, "grid = 'q4_0' is none of ggml"),
        ("optq", {"grid": "iq4_nl", "bits": 3}, "grid = 'iq4_nl' has 16 values: bits = 4, not 3"),
        ("rtn", {"grid": "iq4_nl", "search": True}, "leave search out"),
        ("optq", {"grid": "iq4_nl", "search": True}, "leave search out"),
        ("sparsegpt", {"grid": "iq4_nl", "bits": 4}, "grid = 'iq4_nl' has no 0, which pruned weights need"),
        ("optq", {"order": "desc"}, "is none of none, static, gar"),
        ("optq", {"damping": "2"}, "is not between 0 and 1"),
        ("optq", {"grid": "universal", "bits": 8}, "5 bits at most"),
        ("rtn", {"group": -1}, "is below 0"),
        ("sparsegpt", {"sparsity": 1}, r"is not in \[0, 1\)"),
        ("sparsegpt", {"n": 4, "m": 4}, "0 < n < m"),
        ("sparsegpt", {"n": 2, "m": 5}, "must divide 128"),
        ("sparsegpt", {"n": 2, "m": 64, "bits": 4}, "not whole patterns"),
        ("sparsegpt", {"sparcity": 0.5}, "Did you mean 'sparsity'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, values: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        compression.make(name, values)


def test_matrices_that_do_not_fit_are_told_what_would() -> None:
    assert compression.make("optq", {"group": 128}).check("q", 9, 576) == (
        "q has 576 columns, which groups of 128 do not divide (groups of 64 do)"
    )
    assert "group=0 takes" in compression.make("rtn", {}).check("q", 9, 31)
    assert "patterns of 4" in compression.make("sparsegpt", {"n": 2}).check("q", 9, 31)
    assert compression.make("sparsegpt", {"group": 7}).check("q", 9, 31) == ""
    assert compression.make("optq", {"group": 0}).check("q", 9, 31) == ""
