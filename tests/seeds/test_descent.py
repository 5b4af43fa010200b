"""Slopes against back-propagation, both descents step by step, and the draws both sides make."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fleetune.data.encode import Batch, Encoded, collate
from fleetune.evaluation.objectives import get, loss_tensor
from fleetune.models import Model, digest, named_tensors, tiny_llama
from fleetune.seeds import descent, noise
from fleetune.seeds.descent import Position, Projection, descend, descend_projected, two_point, uniforms
from fleetune.seeds.noise import passes, probe
from fleetune.seeds.view import Tape, View
from fleetune.seeds.weights import MovedWeights, kernels
from fleetune.tuning.methods._zeroth import draw, pool_ids
from law_definition import direction, hadamard, slow_places

KEY, K, EPOCH = 0x5EED, 64, 3
GRID = float(np.float32(1e-6))


@pytest.fixture(scope="module")
def tiny() -> Model:
    return tiny_llama(seed=2)


@pytest.fixture
def view(tiny: Model) -> Iterator[View]:
    made = view_of(tiny)
    yield made
    made.remove()


def batch_of() -> Batch:
    return collate([Encoded(np.arange(3 + i, 15 + i, dtype=np.int32), 4) for i in range(3)], 0)


def view_of(model: Model, law: str = "hashed", grid: float = GRID) -> View:
    return View(named_tensors(model.net), model.net, run_key=KEY, law=law, grid=grid)


def z_of(view: View, id: int) -> dict[str, np.ndarray]:
    return {
        s.name: direction(view.law, id, s.start, s.tensor.numel(), K, KEY).reshape(s.tensor.shape)
        for s in view.slots
    }


def gradient_at(view: View, model: Model) -> dict[str, np.ndarray]:
    """Back-propagation in float64, of a net that holds the weights at the view's point."""
    moved = dict(view.tensors())
    twin: Any = copy.copy(model)
    twin.net = tiny_llama(seed=2).net.double()
    for name, tensor in named_tensors(twin.net):
        tensor.data.copy_(moved[name])
    twin.net.requires_grad_(True)
    twin.net.model.embed_tokens.padding_idx = None  # which would leave the pad row's gradient out
    loss_tensor(twin, batch_of()).backward()
    return {name: tensor.grad.numpy() for name, tensor in named_tensors(twin.net)}


@pytest.mark.parametrize("law", noise.LAWS)
def test_the_slope_is_the_gradient_along_z(tiny, law):
    """Fails for a wrong sign, a wrong factor, one-sided differences and points that are 3 eps apart (-2 eps)."""
    batch, objective, view = batch_of(), get("loss"), view_of(tiny, law)
    grads = gradient_at(view, tiny)
    length = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    errors: dict[float, list[float]] = {3e-3: [], 1e-3: [], 2e-4: []}
    slopes = []
    for id in range(4):
        z = z_of(view, id)
        slopes.append(sum(float((grads[n] * z[n]).sum()) for n in z))
        for eps, apart in errors.items():
            plus, minus = two_point(view, probe(law, K, id), eps, lambda: objective(tiny, batch))
            apart.append((plus - minus) / (2 * eps) - slopes[-1])
    view.remove()
    assert max(map(abs, slopes)) > length / 2
    rough, fine, finest = (math.sqrt(np.mean(np.square(e))) / length for e in errors.values())
    assert finest < 2e-3  # relative to the gradient's length: the usual size of a slope
    assert 6 < rough / fine < 12  # a central difference: the error falls with eps squared, 9 times


@pytest.mark.parametrize("eps", [0.5, 1e-2])
def test_a_linear_function_has_its_exact_slope(view, eps):
    rng = np.random.default_rng(1)
    a = {s.name: rng.normal(size=tuple(s.tensor.shape)) for s in view.slots}

    def linear() -> float:
        return sum(float((t.double().numpy() * a[n]).sum()) for n, t in view.tensors())

    id = 2 << 32 | 17
    plus, minus = two_point(view, probe("hashed", K, id), eps, linear)
    want, here = sum(float((a[n] * z).sum()) for n, z in z_of(view, id).items()), linear()
    assert (plus - minus) / (2 * eps) == pytest.approx(want, abs=3e-5 / eps)  # float32 rounding of w +- eps z
    assert plus - here == pytest.approx(eps * want, abs=6e-5)  # each of the two by itself


def test_plus_comes_first_and_the_view_is_left_clean(view):
    view.place(passes("hashed", K, np.array([3], np.uint64), np.array([9])))
    before, calls = digest(view.tensors()), list[tuple[int, float]]()

    def loss() -> float:
        calls.append((view.direction[0], float(view.direction[1][0])))
        return float(len(calls))

    assert two_point(view, probe("hashed", K, 7 << 32), 0.25, loss) == (1.0, 2.0)
    assert calls == [(7, 0.25), (7, -0.25)]
    assert view.direction is None
    assert digest(view.tensors()) == before


@pytest.mark.parametrize("at", [1, 2])
def test_the_view_is_clean_after_an_objective_that_raises(tiny, view, at):
    calls: list[int] = []

    def loss() -> float:
        calls.append(1)
        if len(calls) == at:
            raise ValueError("no")
        return 1.0

    with pytest.raises(ValueError, match="no"):
        two_point(view, probe("hashed", K, 7), 0.25, loss)
    assert view.direction is None
    assert digest(view.tensors()) == tiny.digest


def test_a_position_is_the_sum_of_its_moves(tiny, view):
    position = Position("hashed", K, np.array([1, 5], np.uint64), np.array([10, -20], np.int64))
    position.move(5, 7)
    position.move(9, 0)  # no move at all
    position.move(3 << 32 | 1, 4)
    assert (position.ids, position.coefficients) == ([1, 5, 5, 3 << 32 | 1], [10, -20, 7, 4])
    position.place(view)
    moved = digest(view.tensors())
    view.place(passes("hashed", K, np.array([3 << 32 | 1, 5, 1], np.uint64), np.array([4, -13, 10])))
    assert digest(view.tensors()) == moved != tiny.digest
    empty().place(view)
    assert digest(view.tensors()) == tiny.digest


def empty() -> Position:
    return Position("hashed", K, np.zeros(0, np.uint64), np.zeros(0, np.int64))


def walk(view: View, losses: Sequence[float] | Callable[[], float], *, steps: int, **how: Any) -> Any:
    """`descend` from the base with an objective that is a list of answers, or a function."""
    loss, position = losses if callable(losses) else iter(losses).__next__, empty()
    how = {"eps": 0.5, "clip": 0.0, "to_units": lambda step, g: round(-g * 100)} | how
    batches: Any = [batch_of()] * steps
    taken = descend(None, view, position, list(range(steps)), batches, lambda m, b: loss(), **how)
    assert view.direction is None
    here = digest(view.tensors())
    position.place(view)
    assert digest(view.tensors()) == here  # the view stands where the steps led
    return taken, position


def test_a_step_is_the_integer_that_was_taken(view):
    seen = []

    def to_units(step: int, g: float) -> int:
        seen.append((step, g))
        return round(-g * 100)

    taken, position = walk(view, [2.0, 1.0, 1.0, 1.5, 3.0, 3.0], steps=3, eps=0.25, to_units=to_units)
    assert seen == [(0, 2.0), (1, -1.0), (2, 0.0)]  # (l+ - l-) / (2 eps)
    assert taken.coefficients.tolist() == [-200, 100, 0]
    assert taken.coefficients.dtype == np.int64
    assert (taken.loss, taken.skipped) == (np.mean([1.5, 1.25, 3.0]), 0)
    assert (position.ids, position.coefficients) == ([0, 1], [-200, 100])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_slope_that_is_not_finite_is_no_step(view, bad):
    losses = [1.0, bad, bad, 1.0, bad, bad, 4.0, 2.0]
    taken, position = walk(view, losses, steps=4, to_units=lambda step, g: 5)
    assert taken.coefficients.tolist() == [0, 0, 0, 5]
    assert (taken.skipped, taken.loss, position.ids) == (3, 3.0, [3])
    none, position = walk(view, [bad] * 4, steps=2)
    assert (none.coefficients.tolist(), none.loss, none.skipped) == ([0, 0], math.inf, 2)
    assert position.ids == []


@pytest.mark.parametrize(
    ("clip", "want"), [(0.0, [-900, 700, -10]), (3.0, [-300, 300, -10]), (0.05, [-5, 5, -5])]
)
def test_clip_cuts_the_slope_on_both_sides(view, clip, want):
    taken, _ = walk(view, [9.0, 0.0, 0.0, 7.0, 0.1, 0.0], steps=3, clip=clip)
    assert taken.coefficients.tolist() == want


def test_each_step_starts_where_the_last_one_ended(view):
    seen: list[str] = []

    def loss() -> float:
        seen.append(digest(view.tensors()))
        return float(len(seen) % 2)

    walk(view, loss, steps=3, to_units=lambda step, g: 1000 * (step + 1))
    want = []
    for step in range(3):
        done = np.arange(step, dtype=np.uint64)
        view.place(passes("hashed", K, done, 1000 * (done.astype(np.int64) + 1)))
        for eps in (0.5, -0.5):
            view.probe(probe("hashed", K, step), eps)
            want.append(digest(view.tensors()))
    view.probe(None)
    assert seen == want


def dense(K: int, start: int, g: np.ndarray) -> np.ndarray:
    """p_k = sum_i D[i] H[place(i), k] g[i], written out."""
    D = noise.signs(KEY, EPOCH, start, g.size).astype(np.float64)
    return (D * g) @ hadamard(K)[slow_places(K, start, g.size)]


def no_weights() -> MovedWeights:
    return MovedWeights([("x", torch.zeros(1))], run_key=KEY, law="hashed", grid=1.0)


@pytest.mark.parametrize(("backend", "threads"), [("numba", 1), ("numba", 3), ("torch", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 64, 512])
def test_a_fold_and_a_transform_are_the_slopes_along_all_directions(K, dtype, backend, threads, monkeypatch):
    monkeypatch.setattr("fleetune.seeds.descent.CHUNK", 5000)  # cut in the middle of tiles and of rows
    weights = no_weights()
    weights.kernels, weights.threads = kernels(weights.device, backend), threads
    draw, projection = torch.Generator().manual_seed(K), Projection(weights, K, EPOCH)
    expected, start, size = np.zeros(K), 0, 0.0
    for shape in ((70, 61), (4096,), (1,), (3, 2731)):
        g = torch.randn(shape, generator=draw).to(dtype)
        projection.add(start, g)
        plain = g.double().numpy().ravel()
        expected += dense(K, start, plain)
        start, size = start + -(-g.numel() // 4096) * 4096, size + float((plain**2).sum())
    np.testing.assert_allclose(projection.take(), expected, rtol=0, atol=1e-5 * size**0.5)
    assert not projection.take().any()


def test_a_pool_may_be_wider_than_a_tile():
    """Against single slopes of some directions: the start of a tensor is then any multiple of 4096 modulo K."""
    K, start = 16384, 5 * 4096
    g = np.random.default_rng(0).normal(size=3 * K + 777).astype(np.float32)
    projection = Projection(no_weights(), K, EPOCH)
    projection.add(start, torch.from_numpy(g))
    p, D = projection.take(), noise.signs(KEY, EPOCH, start, g.size).astype(np.float64)
    for k in (0, 1, 4095, K // 2, K - 1):
        column = noise.hadamard_column(K, k)[slow_places(K, start, g.size)]
        assert p[k] == pytest.approx(float((D * column) @ g), abs=1e-2)


def moved_view(model: Model) -> tuple[View, Position]:
    view = view_of(model, grid=1e-3 / 256)
    ids = np.arange(K, dtype=np.uint64) + (np.uint64(EPOCH) << np.uint64(32))
    position = Position("hashed", K, ids, np.random.default_rng(5).integers(-400, 400, K))
    position.place(view)
    return view, position


def projected(view: View, model: Model) -> np.ndarray:
    """p of an ordinary gradient at the view's point."""
    gradient = gradient_at(view, model)
    return np.sum([dense(K, slot.start, gradient[slot.name].ravel()) for slot in view.slots], axis=0)


def test_the_projection_of_backward_is_the_projection_of_the_gradient_at_the_point():
    model = tiny_llama(seed=2)
    view, _ = moved_view(model)
    expected, projection = projected(view, model), Projection(view, K, EPOCH)
    with Tape(view, projection.add), torch.enable_grad():
        loss_tensor(model, batch_of()).backward()  # type: ignore[no-untyped-call]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(projection.take(), expected, rtol=0, atol=2e-5)
    assert not any(p.requires_grad or p.grad is not None for p in model.net.parameters())


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_projected_walk_is_gradient_descent_in_the_space_of_the_pool(clip):
    """a <- a - units/K p, with p of an ordinary gradient at the point of the rounded a, step by step."""
    model, units, b = tiny_llama(seed=2), 3e3, batch_of()
    view, position = moved_view(model)
    begun = get("loss")(model, b)
    taken = descend_projected(model, view, position, EPOCH, [b, b, b], units=units, clip=clip)
    assert get("loss")(model, b) == begun  # the view is where the walk began
    ids, moved = np.array(position.ids, np.uint64), np.zeros(K)

    def place() -> None:
        view.place(noise.passes("hashed", K, ids, position.coefficients + np.rint(moved).astype(np.int64)))

    for _ in range(3):
        place()
        p = projected(view, model)
        moved -= units / K * (np.clip(p, -clip, clip) if clip else p)
    assert taken.steps == 3
    np.testing.assert_allclose(taken.moved, moved, rtol=0, atol=0.01)
    place()
    assert get("loss")(model, b) < begun


@pytest.mark.parametrize("units", [1e4, 1e6, 1e30])
def test_no_rate_loses_the_model(units):
    model, b = tiny_llama(seed=2), batch_of()
    view, position = moved_view(model)
    begun = get("loss")(model, b)
    taken = descend_projected(model, view, position, EPOCH, [b] * 5, units=units, clip=0.0)
    for k, c in zip(position.ids[:K], np.rint(taken.moved).astype(int).tolist(), strict=True):
        position.move(k, c)
    position.place(view)
    assert get("loss")(model, b) < begun - 0.1


@pytest.mark.parametrize(
    ("loss_at", "want"),
    [
        (lambda u: 9 - u + u * u / 4, 2.0),  # the least of a parabola
        (lambda u: 9 - u + u * u / 4 if u < 2.5 else 9.0, 2.0),  # halved as long as that is less
        (lambda u: 9 - u if u <= 0.5 else math.nan, 0.125),
        (lambda u: 9 - u, 8.0),
        (lambda u: math.inf, 8.0 ** (1 - 8)),  # nothing helps
    ],
)
def test_a_step_is_shortened_until_the_loss_falls_by_a_tenth_of_what_its_slope_says(loss_at, want):
    assert descent.searched(8.0, 1.0, 9.0, loss_at) == pytest.approx(want, rel=1e-12)


def test_a_gradient_that_is_not_finite_is_no_step():
    model = tiny_llama()
    view, position = moved_view(model)
    with torch.no_grad():
        model.net.model.norm.weight[0] = float("nan")
    taken = descend_projected(model, view, position, EPOCH, [batch_of()], units=1e3, clip=0.0)
    assert (taken.steps, taken.loss) == (0, float("inf"))
    assert not taken.moved.any()


UNIFORMS_SHA = "945a3071fc154ed9e69079299f3d57b1490e9511c61233166ae9a1676c56d139"
DRAWS = [
    (1, 1024, "3d3d64b58e1d0bdb9ab84b9804fe8f487ba9c48e2a3ea155129f3f2e67549499"),
    (2**64 - 1, 1000, "f442a9b6702c766eaeb1a301155b7e59ad8575c5beb88c5b09f32e7262ea9a18"),
]


def sha(a: np.ndarray) -> str:
    return hashlib.sha256(a.astype(a.dtype.newbyteorder("<")).tobytes()).hexdigest()


def test_uniforms_never_change_and_are_a_function_of_key_and_domain():
    u = uniforms(0x0123456789ABCDEF, "walk", 1001)
    assert sha(u) == UNIFORMS_SHA
    k = noise.derive(0x0123456789ABCDEF, "walk")
    word = noise.philox4x32([[250, 0, 0, 0]], [k & 0xFFFFFFFF, k >> 32])[0, 0]
    assert u[1000] == int(word) / 2**32
    u = uniforms(7, "walk", 100)
    for count in (0, 1, 4, 5, 99):
        assert np.array_equal(uniforms(7, "walk", count), u[:count])
    for other in (uniforms(8, "walk", 100), uniforms(7, "rounding", 100), uniforms(7 + 2**32, "walk", 100)):
        assert len(np.intersect1d(u, other)) == 0


@pytest.mark.parametrize(("key", "pool", "want"), DRAWS)
def test_draws_never_change(key, pool, want):
    k = draw(key, 500, pool)
    assert sha(k) == want
    assert k.dtype == np.int64
    assert (k == np.floor(uniforms(key, "walk", 500) * pool)).all()


def test_draws_follow_their_probabilities():
    n, pool = 1 << 17, 64
    p = np.exp(np.linspace(-3, 1, pool)).astype(np.float32)
    p[10] = 0.0
    p /= p.sum()
    k = draw(5, n, pool, p)
    want = n * p.astype(float) / p.sum(dtype=float)
    counts = np.bincount(k, minlength=pool)
    assert counts[10] == 0
    some = want > 0
    chi2 = float(((counts - want)[some] ** 2 / want[some]).sum())
    assert abs(chi2 - (pool - 2)) < 4 * math.sqrt(2 * (pool - 2))
    assert (draw(5, 1000, pool, p * np.float32(3)) == k[:1000]).all()  # only the ratios count
    even = draw(5, 5000, pool, np.full(pool, 1 / pool, np.float32))
    assert (even == draw(5, 5000, pool)).mean() > 0.99


def test_direction_ids_hold_the_epoch_above_the_member():
    assert pool_ids(3, np.array([0, 1023])).tolist() == [3 << 32, 3 << 32 | 1023]
    assert pool_ids(2**31, np.array([1])).dtype == np.uint64
    assert pool_ids(2**32 - 1, np.array([1])).tolist() == [2**64 - 2**32 + 1]
