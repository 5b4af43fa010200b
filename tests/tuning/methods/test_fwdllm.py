"""FwdLLM: scalars, forward gradient, gate and ranking against the published vector arithmetic in float64."""

import math
from typing import Any

import contract_harness as harness
import numpy as np
import pytest

from fleetune import adapters, models
from fleetune.data import Batches, Example
from fleetune.data.encode import encode_rows
from fleetune.evaluation import objectives
from fleetune.evaluation.losses import pad_id
from fleetune.seeds import noise
from fleetune.tuning import methods
from fleetune.tuning.exchange.messages import Message, MessageError, Payload, check
from fleetune.tuning.methods import Reply, fwdllm
from fleetune.tuning.methods.fwdllm import Method, State, descent
from law_definition import hadamard

SIZES = {"a.weight": (40, 60), "b.weight": (25, 40)}  # an adapter of 3,400 numbers, for what needs no model


def directions(seed: int, id: int) -> np.ndarray:
    """A direction over `SIZES` as one float64 vector: tensors in name order, each from a multiple of 4096 on."""
    parts, start = [], 0
    for shape in SIZES.values():
        parts.append(noise.normals(fwdllm.run_key(seed), id, start, math.prod(shape)).astype(np.float64))
        start += 4096
    return np.concatenate(parts)


def flat(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tensors[n].reshape(-1) for n in SIZES]).astype(np.float64)


def named(vector: np.ndarray) -> dict[str, np.ndarray]:
    cuts = np.split(vector, np.cumsum([math.prod(s) for s in SIZES.values()])[:-1])
    return {n: c.reshape(s).astype(np.float32) for (n, s), c in zip(SIZES.items(), cuts, strict=True)}


def start(seed: int = 11, **changes: Any) -> State:
    none, ids = np.zeros(0), np.zeros(0, np.uint64)
    w = np.random.default_rng(3).normal(size=sum(map(math.prod, SIZES.values())))
    state = State(named(w), {}, ids, ids, none, none, 0, 0, 0, seed)
    return state._replace(**changes)


def replies(state: State, method: Method, g: np.ndarray, rows: Any = 8, round: int = 0) -> list[Reply]:
    rows = np.broadcast_to(rows, len(g)).tolist()
    return [
        Reply(c, 1000 * round + c, Payload({"g": row.astype(np.float32)}, {"n": n, "loss": 1.0}))
        for c, (row, n) in enumerate(zip(g, rows, strict=True))
    ]


def published_variance(gradients: list[np.ndarray]) -> float:
    """The code's test: the unbiased variance of the two half means of one tensor's g v, averaged over elements."""
    half = len(gradients) // 2
    means = np.stack([np.mean(gradients[:half], axis=0), np.mean(gradients[half:], axis=0)])
    return float(means.var(axis=0, ddof=1).mean())


@pytest.mark.parametrize("n", [2, 8, 30])
def test_the_gate_is_the_published_variance_exactly_for_orthogonal_signs(n):
    """|sum of g_k v_k over a half|^2 is then d sum g_k^2, so nothing is left to chance."""
    g = np.random.default_rng(n).normal(size=n) * 3
    vectors = [x * v for x, v in zip(g, hadamard(32), strict=False)]
    _, variance = descent(np.arange(n, dtype=np.uint64), g, np.full(n, 8.0))
    assert variance == pytest.approx(published_variance(vectors), rel=1e-12)


def test_a_direction_that_two_devices_tried_has_both_shares_of_the_mean_and_one_of_the_variance():
    ids = np.array([5, 9, 5, 2], np.uint64)
    g, rows = np.array([1.0, 2.0, 3.0, 4.0]), np.array([8.0, 8.0, 24.0, 8.0])
    shares = {5: (8 * 1 + 24 * 3) / 48, 9: 8 * 2 / 48, 2: 8 * 4 / 48}
    total, variance = descent(ids, g, rows)
    assert variance == pytest.approx(2 * sum(a * a for a in shares.values()), rel=1e-12)
    assert dict(zip(total.ids.tolist(), total.tables[:, 0].tolist(), strict=True)) == {
        id: round(-a * 2**20) for id, a in shares.items()
    }


def test_the_server_keeps_the_adapter_and_asks_until_the_directions_agree():
    """Three rounds of 4 devices: variances 2 sum g^2 / n^2 fall to the threshold, then all twelve count."""
    method = Method(threshold=0.2, decay=0, lr=0.5, discriminative=False, h=1e-3)
    state, all_g, all_v = start(), [], []
    for round_ in range(3):
        g = np.full((4, 1), 1.0) * [[1], [-1], [1], [-1]]
        answers = replies(state, method, g, round=round_)
        all_v += [directions(11, int(method.directions(None, r.key)[0])) for r in answers]
        all_g += g[:, 0].tolist()
        new = method.aggregate(state, iter(answers))
        n = 4 * (round_ + 1)
        report = method.report(new)
        assert report["n"] == n
        assert report["variance"] == pytest.approx(2 / n)
        if 2 / n > 0.2:
            assert report["moved"] == 0
            assert new.tensors is state.tensors  # kept
            assert method.broadcast(new).int("batch") == 0  # the same rows again
        state = new
    assert (state.moved, state.batch, state.asked, len(state.ids)) == (1, 1, 0, 0)
    expected = flat(start().tensors) - 0.5 * np.mean(
        [x * v for x, v in zip(all_g, all_v, strict=True)], axis=0
    )
    np.testing.assert_allclose(flat(state.tensors), expected, atol=3e-6)


def test_patience_ends_a_batch_and_with_none_every_round_moves():
    g = np.full((3, 2), 50.0)
    for changes, moves in (({"patience": 3}, [0, 0, 1, 0, 0, 1]), ({"patience": 1}, [1] * 6)):
        method, state, seen = Method(P=2, discriminative=False, **changes), start(), []
        for round_ in range(6):
            state = method.aggregate(state, iter(replies(state, method, g, round=round_)))
            seen.append(state.moved)
            assert bool(method.stays(method.report(state))[0]) == (not state.moved)
        assert seen == moves


def test_no_reply_keeps_what_is_known_of_the_batch():
    method = Method(threshold=1e-6)
    state = method.aggregate(start(), iter(replies(start(), method, np.ones((3, 1)))))
    idle = method.aggregate(state, iter(()))
    assert idle.round == state.round + 1
    assert harness.equal_states(idle._replace(round=state.round, moved=state.moved), state)


def test_more_rows_weigh_more_in_the_gradient():
    method = Method(P=2, patience=1, decay=0, lr=0.1, discriminative=False)
    g = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    rows = [8, 2, 5]
    answers = replies(start(), method, g, rows)
    moved = flat(method.aggregate(start(), iter(answers)).tensors)
    gradient, weight = np.zeros(len(moved)), 0.0
    for answer, row, n in zip(answers, g.astype(np.float64), rows, strict=True):
        for id, x in zip(method.directions(None, answer.key).tolist(), row, strict=True):
            gradient, weight = gradient + n * x * directions(11, id), weight + n
    np.testing.assert_allclose(moved, flat(start().tensors) - 0.1 * gradient / weight, atol=1e-6)


def test_no_slope_counts_more_than_the_clip():
    method = Method(P=2, patience=1, decay=0, lr=0.1, discriminative=False, clip=1.5)
    g = np.array([[0.5, -3e38], [3e38, 1.0]], np.float32)
    moved = method.aggregate(start(), iter(replies(start(), method, g, [4, 4])))
    cut = method.aggregate(start(), iter(replies(start(), method, np.clip(g, -1.5, 1.5), [4, 4])))
    assert harness.equal_states(moved, cut)
    assert np.abs(flat(moved.tensors) - flat(start().tensors)).max() < 1


def test_the_rate_falls_linearly_to_nothing():
    method = Method(lr=0.2, decay=50)
    assert [method.rate(r) for r in (0, 10, 25, 50, 60)] == pytest.approx([0.2, 0.16, 0.1, 0.0, 0.0])
    assert Method(lr=0.2, decay=0).rate(10**6) == 0.2
    assert method.broadcast(start(round=25)).float("rate") == pytest.approx(0.1)


LAST = np.random.default_rng(8).normal(size=3400)
U = LAST / np.linalg.norm(LAST)


def test_the_best_tenth_of_the_candidates_is_offered_in_order():
    method, state = Method(), start(last=named(LAST), round=6)
    seeds = method.rank(state, 3)
    assert len(seeds) == 3 * fwdllm.SPARE
    ids = [(7 << 32) + i for i in range(10 * len(seeds))]
    v = np.stack([directions(11, id) for id in ids])
    cosine = v @ U / np.linalg.norm(v, axis=1)
    order = np.argsort(-cosine)[: len(seeds)]
    assert seeds.tolist() == [ids[i] for i in order]


def test_only_odd_batches_are_ranked():
    method = Method(P=4, patience=1, lr=0.1, decay=0)
    state, gradient = start(), np.random.default_rng(2).normal(size=3400)
    for batch in range(4):
        assert bool(len(state.seeds)) == (batch % 2 == 1)
        assert ("seeds" in method.broadcast(state).arrays) == (batch % 2 == 1)
        keys = [7 * batch + c for c in range(3)]
        ids = [method.directions(state.seeds, key) for key in keys]
        g = [np.array([directions(11, int(i)) @ gradient for i in row], np.float32) for row in ids]
        answers = [
            Reply(c, k, Payload({"g": x}, {"n": 8, "loss": 1.0}))
            for c, (k, x) in enumerate(zip(keys, g, strict=True))
        ]
        state = method.aggregate(state, iter(answers))
        report = method.report(state)
        assert (report["batch"], report["moved"]) == (batch + 1, 1)
    off = Method(P=4, patience=1, discriminative=False)
    state = start()
    for batch in range(3):
        state = off.aggregate(state, iter(replies(state, off, np.ones((3, 4)), round=batch)))
        assert not len(state.seeds)


def test_devices_draw_different_seeds_of_the_offer_and_the_server_knows_which():
    method, seeds = Method(P=6), np.arange(100, 140, dtype=np.uint64)
    drawn = [method.directions(seeds, key).tolist() for key in range(50)]
    assert all(len(set(ids)) == 6 and set(ids) <= set(seeds.tolist()) for ids in drawn)
    assert drawn == [method.directions(seeds, key).tolist() for key in range(50)]
    assert len({id for ids in drawn for id in ids}) == 40  # all of the offer is used
    assert len({tuple(method.directions(None, key).tolist()) for key in range(50)}) == 50


SIZELESS = {"targets": "query-value", "r": 8, "alpha": 16}  # the defaults, which are all that bitfit takes
BAD_SEEDS = [np.zeros(shape, np.uint64) for shape in ((1 << 26, 0), (2, 2), (1 << 20) + 1)]
BAD_SEEDS += [np.zeros(4, np.int64), np.full(4, np.nan)]


@pytest.mark.parametrize("seeds", BAD_SEEDS, ids=lambda seeds: f"{seeds.dtype}{list(seeds.shape)}")
def test_seeds_of_another_form_are_refused(seeds):
    model, method = models.tiny_llama(), quick()
    sent = method.broadcast(method.init(model, 5))
    batches = Batches(harness.rows(model), pad_id(model), 1)
    with pytest.raises(MessageError, match="uint64 of one axis"):
        method.local(model, Payload({**sent.arrays, "seeds": seeds}, sent.scalars), batches, 77, {})


def quick(**changes: Any) -> Method:
    made = methods.make("fwdllm", harness.QUICK["fwdllm"] | changes)
    assert isinstance(made, Method)
    return made


@pytest.mark.parametrize(
    "module",
    [{"module": "lora"}, {"module": "adapter", "targets": "query-value"}, {"module": "bitfit", **SIZELESS}],
    ids=lambda m: m["module"],
)
def test_scalars_are_central_differences_and_near_the_gradients_own(module):
    """Weights moved by hand, in plain torch; and <grad, v> by back-propagation at a small h."""
    model, method = models.tiny_llama(), quick(**module, P=3, h=2e-3)
    state = method.init(model, harness.key())
    rng = np.random.default_rng(4)
    w = {n: (t + rng.normal(size=t.shape) * 0.05).astype(np.float32) for n, t in state.tensors.items()}
    batches = Batches(harness.rows(model), pad_id(model), 1)
    reply = method.local(model, method.broadcast(state._replace(tensors=w)), batches, 77, {})
    (batch,) = batches.repeat_batch(0, 10, 1)
    adapters.load_(model, w)
    with adapters.training(model, 0):
        objectives.loss_tensor(model, batch).backward()
        grads = {
            n: p.grad.double().numpy() for n, p in adapters.trainable(model).items() if p.grad is not None
        }
    for id, g in zip(method.directions(None, 77).tolist(), reply.array("g"), strict=True):
        v, first = {}, 0
        for n in sorted(w):
            v[n] = noise.normals(fwdllm.run_key(state.seed), id, first, w[n].size).reshape(w[n].shape)
            first += -(-w[n].size // 4096) * 4096
        sides = []
        for sign in (1, -1):
            adapters.load_(model, {n: (t + np.float32(sign * 2e-3) * v[n]) for n, t in w.items()})
            sides.append(objectives.get("loss")(model, batch))
        assert g == pytest.approx((sides[0] - sides[1]) / 4e-3, rel=2e-3, abs=2e-3)
        assert g == pytest.approx(sum((grads[n] * v[n]).sum() for n in grads), rel=0.02, abs=0.02)


def test_more_directions_are_asked_on_the_same_rows(monkeypatch):
    model, method, seen = models.tiny_llama(), quick(P=1, batch_size=4), []

    def watched(model: Any, batch: Any) -> float:
        seen.append(batch.input_ids.numpy().tobytes())
        return float(len(seen))

    monkeypatch.setattr(objectives, "get", lambda name: watched)
    state = method.init(model, harness.key())
    for key, number in ((1, 0), (2, 0), (3, 1)):
        payload = method.broadcast(state._replace(batch=number))
        method.local(model, payload, Batches(harness.rows(model), pad_id(model), key), key, {})
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert seen[4] == seen[5] != seen[0]


def test_a_loss_that_is_not_finite_is_no_step_and_none_at_all_is_refused(monkeypatch):
    model, method = models.tiny_llama(), quick(P=3)
    values = iter([1.0, 0.5, math.nan, 1.0, 2.0, math.inf] + [math.nan] * 6)
    monkeypatch.setattr(objectives, "get", lambda name: lambda model, batch: next(values))
    state = method.init(model, harness.key())

    def answer() -> Payload:
        batches = Batches(harness.rows(model), pad_id(model), 1)
        return method.local(model, method.broadcast(state), batches, 1, {})

    first = answer()
    np.testing.assert_allclose(first.array("g"), [0.5 / 0.02, 0, 0], rtol=1e-6)
    assert first.float("loss") == 0.75
    with pytest.raises(MessageError, match="loss"):
        check(Message(1, b"", answer()), method.expects(state), round=1, base=b"")


def test_accuracy_needs_no_gradient():
    """An encoder's share of right rows moves its head: what it reports are differences of such shares."""
    model, method = models.tiny_bert(), quick(P=4, h=0.5, objective="accuracy", batch_size=8)
    examples = [
        Example((("user", c),), "yes" if c in "aeiou" else "no", {}, (c,)) for c in "abcdefghijklmnop"
    ]
    rows, _ = encode_rows(model, examples, 32)
    state = method.init(model, 5)
    assert {"classifier.bias", "classifier.weight"} < state.tensors.keys()
    g = method.local(model, method.broadcast(state), Batches(rows, 258, 1), 1, {}).array("g")
    assert np.any(g)
    np.testing.assert_allclose(g * 8, np.rint(g * 8), atol=1e-5)  # eighths / (2 h), h = 1/2
