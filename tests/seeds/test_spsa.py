# SPDX-License-Identifier: Apache-2.0
"""The two-point estimate against back-propagation, descent step by step, and the draws both sides make."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.data.encode import Batch, collate, encode_all
from fleetune.data.examples import Example
from fleetune.evaluation.objectives import get
from fleetune.models import Model, digest, named_tensors, tiny_llama
from fleetune.seeds import noise
from fleetune.seeds.descent import Position, Steps, descend, two_point, uniforms
from fleetune.seeds.noise import passes, probe
from fleetune.seeds.view import View
from fleetune.tuning.methods._zeroth import draw, pool_ids
from law_definition import slow_places

KEY, K, GRID = 0x5EED, 64, float(np.float32(1e-6))


@pytest.fixture(scope="module")
def tiny() -> Model:
    return tiny_llama(seed=2)


def batch_of(model: Model) -> Batch:
    examples = [Example((("user", f"what is {i}?"),), "a number" if i % 2 else "yes", {}) for i in range(4)]
    return collate(encode_all(examples, model.tokenizer, 64)[0], 257)


@pytest.fixture
def view(tiny: Model) -> Any:
    made = view_of(tiny)
    yield made
    made.remove()


def view_of(model: Model, law: str = "hashed") -> View:
    return View(named_tensors(model.net), model.net, run_key=KEY, law=law, grid=GRID)


def z_of(view: View, id: int) -> dict[str, np.ndarray]:
    """The direction, by tensor, from its definition: float64 of the tensor's shape."""
    found = {}
    for slot in view.slots:
        n = slot.tensor.numel()
        if view.law == "gaussian":
            z = noise.normals(KEY, id, slot.start, n).astype(float)
        else:
            z = noise.signs(KEY, id >> 32 if view.law == noise.POOL else id, slot.start, n).astype(float)
        if view.law == noise.POOL:
            H = np.array([[(-1) ** bin(i & j).count("1") for j in range(K)] for i in range(K)])
            z *= H[slow_places(K, slot.start, n), id & 0xFFFFFFFF]
        found[slot.name] = z.reshape(slot.tensor.shape)
    return found


# --- the estimate -------------------------------------------------------------------------------------------


def gradient(model: Model, batch: Batch) -> dict[str, np.ndarray]:
    """Back-propagation in float64."""
    net: Any = copy.deepcopy(model.net).double().requires_grad_(True)
    net.model.embed_tokens.padding_idx = None  # which would leave the pad row's gradient out
    net(**batch._asdict()).loss.backward()
    return {name: tensor.grad.numpy() for name, tensor in named_tensors(net)}


@pytest.mark.parametrize("law", noise.LAWS)
def test_the_slope_is_the_gradient_along_z(tiny, law):
    """Fails for a wrong sign, a wrong factor, one-sided differences and points that are 3 eps apart (-2 eps)."""
    batch, objective = batch_of(tiny), get("loss")
    grads = gradient(tiny, batch)
    length = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    view = view_of(tiny, law)
    errors: dict[float, list[float]] = {3e-3: [], 1e-3: [], 2e-4: []}
    slopes = []
    for id in range(6):
        z = z_of(view, id)
        slopes.append(sum(float((grads[n] * z[n]).sum()) for n in z))
        for eps, found in errors.items():
            plus, minus = two_point(view, probe(law, K, id), eps, lambda: objective(tiny, batch))
            found.append((plus - minus) / (2 * eps) - slopes[-1])
    view.remove()
    assert max(map(abs, slopes)) > length / 2
    rough, fine, finest = (math.sqrt(np.mean(np.square(e))) / length for e in errors.values())
    assert finest < 1e-3  # relative to the gradient's length: the usual size of a slope
    assert 7 < rough / fine < 11  # a central difference: the error falls with eps squared, 9 times


def linear(view: View, weights: dict[str, np.ndarray]) -> float:
    """sum a * w at the view's point, in float64: its slope along z is z . a whatever eps is."""
    return sum(float((t.double().numpy() * weights[n]).sum()) for n, t in view.tensors())


@given(id=st.integers(0, K - 1), epoch=st.integers(0, 3), eps=st.sampled_from([0.5, 1e-1, 1e-2, 1e-3]))
@settings(max_examples=12)
def test_a_linear_function_has_its_exact_slope(tiny, id, epoch, eps):
    view = view_of(tiny)
    try:
        rng = np.random.default_rng(id)
        a = {s.name: rng.normal(size=tuple(s.tensor.shape)) for s in view.slots}
        direction = epoch << 32 | id
        plus, minus = two_point(view, probe("hashed", K, direction), eps, lambda: linear(view, a))
        z = z_of(view, direction)
        want = sum(float((a[n] * z[n]).sum()) for n in z)
        here = linear(view, a)
        assert (plus - minus) / (2 * eps) == pytest.approx(
            want, abs=3e-5 / eps
        )  # float32 rounding of w +- eps z
        assert plus - here == pytest.approx(eps * want, abs=6e-5)  # each of the two by itself
        assert minus - here == pytest.approx(-eps * want, abs=6e-5)
    finally:
        view.remove()


def test_plus_comes_first_and_the_view_is_left_clean(tiny, view):
    view.place(passes("hashed", K, np.array([3], np.uint64), np.array([9])))
    before, calls = digest(view.tensors()), []

    def loss() -> float:
        assert view.direction is not None
        calls.append((view.direction[0], float(view.direction[1][0])))
        return float(len(calls))

    assert two_point(view, probe("hashed", K, 7 << 32), 0.25, loss) == (1.0, 2.0)
    assert calls == [(7, 0.25), (7, -0.25)]
    assert view.direction is None
    assert digest(view.tensors()) == before


@pytest.mark.parametrize("at", [1, 2])
def test_the_view_is_clean_after_an_objective_that_raises(tiny, view, at):
    before, calls = digest(view.tensors()), []

    def loss() -> float:
        calls.append(1)
        if len(calls) == at:
            raise ValueError("no")
        return 1.0

    with pytest.raises(ValueError, match="no"):
        two_point(view, probe("hashed", K, 7), 0.25, loss)
    assert len(calls) == at
    assert view.direction is None
    assert digest(view.tensors()) == before == tiny.digest


# --- position -----------------------------------------------------------------------------------------------


def test_a_position_is_the_sum_of_its_moves(tiny, view):
    position = Position("hashed", K, np.array([1, 5], np.uint64), np.array([10, -20], np.int64))
    position.move(5, 7)
    position.move(9, 0)  # no move at all
    position.move(3 << 32 | 1, 4)
    assert (position.ids, position.coefficients) == ([1, 5, 5, 3 << 32 | 1], [10, -20, 7, 4])
    position.place(view)
    view_digest = digest(view.tensors())
    view.place(passes("hashed", K, np.array([3 << 32 | 1, 5, 1], np.uint64), np.array([4, -13, 10])))
    assert digest(view.tensors()) == view_digest
    assert view_digest != tiny.digest
    Position("hashed", K, np.zeros(0, np.uint64), np.zeros(0, np.int64)).place(view)
    assert digest(view.tensors()) == tiny.digest


def test_a_position_takes_64_bit_directions(tiny):
    view = view_of(tiny, "rademacher")
    Position("rademacher", 1, np.array([2**64 - 1], np.uint64), np.array([500])).place(view)
    moved = dict(view.tensors())
    view.remove()
    for slot in view.slots:
        z = noise.signs(KEY, 2**64 - 1, slot.start, slot.tensor.numel()).astype(np.float32)
        want = slot.tensor.numpy().reshape(-1) + np.float32(GRID) * (np.float32(500) * z)
        assert np.array_equal(moved[slot.name].numpy().reshape(-1), want)


# --- descent ------------------------------------------------------------------------------------------------


def walk(
    model: Model,
    losses: Sequence[float] | Callable[[View], float],
    *,
    steps: int,
    eps: float = 0.5,
    clip: float = 0.0,
    to_units: Callable[[int, float], int] = lambda step, g: round(-g * 100),
) -> tuple[Steps, Position]:
    """`descend` from the base with an objective that is a list of answers, or a function of the view."""
    view = view_of(model)
    position = Position("hashed", K, np.zeros(0, np.uint64), np.zeros(0, np.int64))
    answers = iter(losses) if isinstance(losses, Sequence) else None
    objective = (lambda m, b: next(answers)) if answers is not None else (lambda m, b: losses(view))
    try:
        batches = [batch_of(model)] * steps
        found = descend(
            model,
            view,
            position,
            list(range(steps)),
            batches,
            objective,
            eps=eps,
            clip=clip,
            to_units=to_units,
        )
        assert view.direction is None
        here = digest(view.tensors())
        position.place(view)
        assert digest(view.tensors()) == here  # the view stands where the steps led
    finally:
        view.remove()
    return found, position


def test_a_step_is_the_integer_that_was_taken(tiny):
    seen = []

    def to_units(step: int, g: float) -> int:
        seen.append((step, g))
        return round(-g * 100)

    found, position = walk(tiny, [2.0, 1.0, 1.0, 1.5, 3.0, 3.0], steps=3, eps=0.25, to_units=to_units)
    assert seen == [(0, 2.0), (1, -1.0), (2, 0.0)]  # (l+ - l-) / (2 eps)
    assert found.coefficients.tolist() == [-200, 100, 0]
    assert found.coefficients.dtype == np.int64
    assert found.loss == np.mean([1.5, 1.25, 3.0])
    assert found.skipped == 0
    assert (position.ids, position.coefficients) == ([0, 1], [-200, 100])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_slope_that_is_not_finite_is_no_step(tiny, bad):
    asked = []

    def to_units(step: int, g: float) -> int:
        asked.append(step)
        return 5

    found, position = walk(tiny, [1.0, bad, bad, 1.0, bad, bad, 4.0, 2.0], steps=4, to_units=to_units)
    assert found.coefficients.tolist() == [0, 0, 0, 5]
    assert found.skipped == 3
    assert found.loss == 3.0
    assert asked == [3]
    assert position.ids == [3]


def test_no_finite_step_at_all_is_an_infinite_loss(tiny):
    found, position = walk(tiny, [math.nan] * 4, steps=2)
    assert (found.coefficients.tolist(), found.loss, found.skipped) == ([0, 0], math.inf, 2)
    assert position.ids == []
    empty, _ = walk(tiny, [], steps=0)
    assert (empty.coefficients.tolist(), empty.loss, empty.skipped) == ([], math.inf, 0)


@pytest.mark.parametrize(
    ("clip", "want"), [(0.0, [-900, 700, -10]), (3.0, [-300, 300, -10]), (0.05, [-5, 5, -5])]
)
def test_clip_cuts_the_slope_on_both_sides(tiny, clip, want):
    found, _ = walk(tiny, [9.0, 0.0, 0.0, 7.0, 0.1, 0.0], steps=3, clip=clip)
    assert found.coefficients.tolist() == want


def test_each_step_starts_where_the_last_one_ended(tiny):
    seen: list[str] = []

    def loss(view: View) -> float:
        seen.append(digest(view.tensors()))
        return float(len(seen) % 2)

    found, position = walk(tiny, loss, steps=3, eps=0.5, to_units=lambda step, g: 1000 * (step + 1))
    assert found.coefficients.tolist() == [1000, 2000, 3000]
    view, want = view_of(tiny), []
    for step in range(3):
        done = np.arange(step, dtype=np.uint64)
        view.place(passes("hashed", K, done, 1000 * (done.astype(np.int64) + 1)))
        for eps in (0.5, -0.5):
            view.probe(probe("hashed", K, step), eps)
            want.append(digest(view.tensors()))
    view.remove()
    assert seen == want
    assert position.ids == [0, 1, 2]


def test_descent_descends(tiny):
    """Fails for a wrong sign or size anywhere between the loss and the replay.

    On a bowl, the mean of (w - 0.3)^2, a move of t along z changes the loss by g t + t^2 exactly.
    """
    slopes = []

    def bowl(view: View) -> float:
        return sum(float((t.double() - 0.3).square().sum()) for _, t in view.tensors()) / tiny.n_params

    def to_units(step: int, g: float) -> int:
        slopes.append(g)
        return round(-0.4 * g / GRID)

    view = view_of(tiny)
    start = bowl(view)
    view.remove()
    found, position = walk(tiny, bowl, steps=24, eps=1e-2, to_units=to_units)
    view = view_of(tiny)
    position.place(view)
    end = bowl(view)
    view.remove()
    assert start - end == pytest.approx((0.4 - 0.4**2) * sum(g * g for g in slopes), rel=0.01)
    assert start - end > 5e-5
    assert found.loss == pytest.approx(start, rel=0.02)


# --- draws --------------------------------------------------------------------------------------------------

UNIFORMS_SHA = "945a3071fc154ed9e69079299f3d57b1490e9511c61233166ae9a1676c56d139"
DRAWS = [
    (1, 1024, "3d3d64b58e1d0bdb9ab84b9804fe8f487ba9c48e2a3ea155129f3f2e67549499"),
    (2**64 - 1, 1000, "f442a9b6702c766eaeb1a301155b7e59ad8575c5beb88c5b09f32e7262ea9a18"),
]


def sha(a: np.ndarray) -> str:
    return hashlib.sha256(a.astype(a.dtype.newbyteorder("<")).tobytes()).hexdigest()


def test_uniforms_never_change():
    u = uniforms(0x0123456789ABCDEF, "walk", 1001)
    assert sha(u) == UNIFORMS_SHA
    k = noise.derive(0x0123456789ABCDEF, "walk")
    word = noise.philox4x32([[250, 0, 0, 0]], [k & 0xFFFFFFFF, k >> 32])[0, 0]
    assert u[1000] == int(word) / 2**32


def test_uniforms_are_a_function_of_key_and_domain():
    u = uniforms(7, "walk", 100)
    assert u.dtype == np.float64
    for count in (0, 1, 3, 4, 5, 99):
        assert (uniforms(7, "walk", count) == u[:count]).all()
        assert len(uniforms(7, "walk", count)) == count
    for other in (uniforms(8, "walk", 100), uniforms(7, "rounding", 100), uniforms(7 + 2**32, "walk", 100)):
        assert len(np.intersect1d(u, other)) == 0


def test_uniforms_are_uniform():
    n, bins = 1 << 18, 256
    u = uniforms(3, "test", n)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, bins, (0, 1))[0]
    chi2 = float(((counts - n / bins) ** 2 / (n / bins)).sum())
    assert abs(chi2 - (bins - 1)) < 4 * math.sqrt(2 * (bins - 1))
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(n)
    words = (u * 2**32).astype(np.uint64)
    for bit in range(32):  # every bit counts
        assert abs(((words >> np.uint64(bit)) & np.uint64(1)).mean() - 0.5) < 4 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize(("key", "pool", "want"), DRAWS)
def test_draws_never_change(key, pool, want):
    k = draw(key, 500, None, pool)
    assert sha(k) == want
    assert k.dtype == np.int64
    assert (k == np.floor(uniforms(key, "walk", 500) * pool)).all()
    assert k.min() >= 0
    assert k.max() < pool


def test_draws_are_even():
    n, pool = 1 << 17, 100
    counts = np.bincount(draw(5, n, None, pool), minlength=pool)
    chi2 = float(((counts - n / pool) ** 2 / (n / pool)).sum())
    assert abs(chi2 - (pool - 1)) < 4 * math.sqrt(2 * (pool - 1))


def test_draws_follow_their_probabilities():
    n, pool = 1 << 17, 64
    p = np.exp(np.linspace(-3, 1, pool)).astype(np.float32)
    p[10] = 0.0
    p /= p.sum()
    k = draw(5, n, p, pool)
    want = n * p.astype(float) / p.sum(dtype=float)
    counts = np.bincount(k, minlength=pool)
    assert counts[10] == 0
    some = want > 0
    chi2 = float(((counts - want)[some] ** 2 / want[some]).sum())
    assert abs(chi2 - (pool - 2)) < 4 * math.sqrt(2 * (pool - 2))
    assert (draw(5, 1000, p * np.float32(3), pool) == k[:1000]).all()  # only the ratios count
    assert (draw(5, 100, np.eye(1, pool, 7, dtype=np.float32)[0], pool) == 7).all()
    even = draw(5, 5000, np.full(pool, 1 / pool, np.float32), pool)
    assert (even == draw(5, 5000, None, pool)).mean() > 0.99


def test_direction_ids_hold_the_epoch_above_the_member():
    assert pool_ids(0, np.array([0, 5])).tolist() == [0, 5]
    assert pool_ids(3, np.array([0, 1023])).tolist() == [3 << 32, 3 << 32 | 1023]
    assert pool_ids(2**31, np.array([1])).dtype == np.uint64
    assert pool_ids(2**32 - 1, np.array([1])).tolist() == [2**64 - 2**32 + 1]
