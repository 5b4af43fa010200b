"""FedKSeed: a device's walk and the server's step in float64, Pro's weights, mixed fleets."""

import math
from contextlib import closing
from dataclasses import replace
from typing import Any, Self

import contract_harness as harness
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fleetune import models
from fleetune.data.encode import Batch, Batches
from fleetune.errors import MessageError
from fleetune.seeds import noise
from fleetune.seeds.ledger import Ledger
from fleetune.seeds.weights import layout
from fleetune.tuning.exchange.aggregation import Spool, parse
from fleetune.tuning.exchange.messages import LogCode, Message, Payload, check
from fleetune.tuning.methods import Reply, fedkseed
from fleetune.tuning.methods._zeroth import UNITS, draw
from fleetune.tuning.methods.fedkseed import Method, State, pro_weights
from law_definition import hadamard, slow_places

K = 64


def tiny(**changes: Any) -> Method:
    return Method(**({"K": K, "tau": 6, "lr": 2e-3, "eps": 1e-3, "batch_size": 5} | changes))


def begun(method: Method) -> tuple[models.Model, State]:
    model = models.tiny_llama()
    return model, method.init(model, harness.key())


class Norm(torch.nn.Module):
    """x / rms(x) * w in the type it is given; the library's norm goes through float32."""

    def __init__(self, weight: torch.nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class Reference:
    """The tiny model in float64 at w0 + sum_k x_k z_k, with every z_k written out."""

    def __init__(self, run_key: int, epoch: int = 0) -> None:
        self.net = models.tiny_llama().net.double()
        self.net.get_input_embeddings().padding_idx = None  # else its token has no gradient, unlike a slope
        for name, module in list(self.net.named_modules()):
            if name.endswith("norm"):
                self.net.set_submodule(name, Norm(module.weight, module.variance_epsilon))
        self.base = {n: t.detach().clone() for n, t in models.named_tensors(self.net)}
        self.z = {
            slot.name: directions(run_key, epoch, slot.start, slot.tensor.numel())
            for slot in layout(models.named_tensors(models.tiny_llama().net))
        }

    def at(self, x: np.ndarray) -> Self:
        with torch.no_grad():
            for name, tensor in models.named_tensors(self.net):
                moved = torch.from_numpy(self.z[name] @ x).view_as(tensor)
                tensor.copy_(self.base[name] + moved)
        return self

    def loss(self, b: Batch) -> torch.Tensor:
        out = self.net(input_ids=b.input_ids, attention_mask=b.attention_mask).logits
        return F.cross_entropy(out[:, :-1].flatten(0, 1), b.labels[:, 1:].flatten(), ignore_index=-100)

    def slopes(self, x: np.ndarray, b: Batch) -> np.ndarray:
        self.at(x)
        for _, tensor in models.named_tensors(self.net):
            tensor.grad = None
            tensor.requires_grad_(True)
        self.loss(b).backward()
        return sum(self.z[n].T @ t.grad.numpy().ravel() for n, t in models.named_tensors(self.net))

    def two_point(self, x: np.ndarray, k: int, eps: float, b: Batch) -> float:
        step = eps * np.eye(K)[k]
        with torch.inference_mode():
            return (self.at(x + step).loss(b).item() - self.at(x - step).loss(b).item()) / (2 * eps)


def directions(run_key: int, epoch: int, start: int, count: int) -> np.ndarray:
    """float64 [count, K]: z_k[i] = D[i] H[place(i), k]."""
    D = noise.signs(run_key, epoch, start, count).astype(np.float64)
    return D[:, None] * hadamard(K)[slow_places(K, start, count)]


def batches(model: models.Model, count: int, size: int, key: int, client: int) -> list[Batch]:
    fleet = harness.fleet(model, tiny())
    return list(Batches(fleet.clients[client], fleet.pad_id, key, client=client).steps(count, size))


@pytest.mark.parametrize("changes", [{}, {"pro": True}, {"clip": 0.3}])
def test_a_devices_walk_is_algorithm_1_in_float64(changes):
    """a_k <- a_k - g / (K p_k) along drawn directions, rounded to a level of a byte, from a point that is not the base."""
    method = tiny(**changes)
    model, state = begun(method)
    rng = np.random.default_rng(1)
    state = state._replace(
        ledger=state.ledger.append(np.arange(K, dtype=np.uint64), rng.integers(-300, 300, K), 1),
        round=1,
        size=rng.uniform(0.0, 4.0, K),
        seen=np.ones(K, np.int64),
    )
    reply = harness.reply(harness.fleet(model, method), method, state, client=1, round=2)
    drawn = method.probabilities(state)
    p = np.full(K, 1 / K) if drawn is None else drawn
    assert (p.max() > 1.5 * p.min()) == method.pro
    reference, unit = Reference(state.ledger.head.run_key), method.lr
    x, moved = unit / UNITS * state.ledger.coefficients.astype(np.float64), np.zeros(K)
    picks, taken = draw(reply.key, method.tau, K, drawn), LogCode.decode(reply.payload.array("codes")) / UNITS
    steps = zip(picks, taken, batches(model, method.tau, method.batch_size, reply.key, 1), strict=True)
    for k, step, b in steps:
        g = reference.two_point(x + unit * moved, int(k), method.eps, b)
        g = max(-0.3, min(0.3, g)) if method.clip else g
        assert step == pytest.approx(-g / (K * p[k]), rel=1 / 8, abs=2 / UNITS)  # the next level at most
        moved[k] += step
    assert np.abs(moved).max() > 0.2
    assert np.array_equal(method.walk(reply, drawn)[0], np.rint(moved * UNITS))


@pytest.mark.parametrize(("rate", "cut"), [(0.002, 1), (0.5, 11)])
def test_a_device_that_back_propagates_walks_by_projected_gradients_in_float64(rate, cut):
    """A rate that is too high is cut: by the loss over the slope in each step, and in the first by the loss after it."""
    method = tiny(backprop=1.0, backprop_lr=rate, backprop_steps=3)
    model, state = begun(method)
    reply = harness.reply(harness.fleet(model, method), method, state, client=1)
    reference, a, most = Reference(state.ledger.head.run_key), np.zeros(K), rate
    for step, b in enumerate(batches(model, 3, method.batch_size, reply.key, 1)):
        p, loss = reference.slopes(a, b), reference.at(a).loss(b).item()
        eta = min(most, 0.5 * loss * K / (p @ p))
        while step == 0:
            fall, after = eta * (p @ p) / K, reference.at(a - eta / K * p).loss(b).item()
            if after <= 1.01 * loss - fall / 10:
                most = eta
                break
            eta *= min(0.5, fall / 2 / (after - loss + fall))
        a -= eta / K * p
    assert rate / most == pytest.approx(cut, rel=0.1)
    sent = LogCode.decode(reply.payload.array("projected")) * method.lr / UNITS
    assert np.abs(a).max() > 20 * method.lr / UNITS
    np.testing.assert_allclose(sent, a, rtol=1 / 8, atol=2 * method.lr / UNITS)


def test_the_mean_two_point_step_is_the_projected_gradient():
    """(1/K) sum_k g_k z_k over a whole pool, on one batch, is one step of a device that back-propagates."""
    model, state = begun(tiny())
    (b,) = batches(model, 1, 5, 1, 0)
    reference = Reference(state.ledger.head.run_key)
    x = np.random.default_rng(0).normal(size=K) * 0.01
    two_point = np.array([reference.two_point(x, k, 1e-5, b) for k in range(K)])
    assert np.abs(two_point).max() > 10
    np.testing.assert_allclose(two_point, reference.slopes(x, b), rtol=0, atol=2e-5)


def of_round(ledger: Ledger, number: int) -> np.ndarray:
    """float64 [K]: the coefficients of a round, in units of lr."""
    at, out = ledger.rounds == number, np.zeros(K)
    out[(ledger.ids[at] & np.uint64(0xFFFFFFFF)).astype(int)] = ledger.coefficients[at] / UNITS
    return out


@pytest.mark.parametrize("lr", [0.0, 0.5, 64.0])
def test_the_servers_step_is_the_weighted_mean_in_float64(lr):
    method = tiny(backprop=1.0, server_lr=lr)
    _, state = begun(method)
    rng, rows = np.random.default_rng(3), [3, 1, 6]
    for number in range(1, 5):
        codes = [rng.integers(0, 120, K).astype(np.uint8) for _ in rows]
        replies = [
            Reply(c, c, Payload({"projected": code}, {"n": n, "loss": 1.0}))
            for c, (code, n) in enumerate(zip(codes, rows, strict=True))
        ]
        state = method.aggregate(state, replies)
        mean = sum(n * LogCode.decode(code) for n, code in zip(rows, codes, strict=True)) / sum(rows) / UNITS
        expected = (lr or 1.0) * mean
        np.testing.assert_allclose(of_round(state.ledger, number), expected, rtol=0, atol=0.5 / UNITS + 1e-6)


def test_pro_probabilities_are_the_softmax_of_scaled_sizes():
    """Section 3.3 by hand: unseen directions count as the median, an outlier as the 95 % quantile."""
    method = tiny(pro=True)
    _, state = begun(method)
    np.testing.assert_array_equal(method.probabilities(state), np.full(K, 1 / K, np.float32))
    size, seen = np.arange(K, dtype=np.float64), np.full(K, 2)
    size[0], seen[0] = 0.0, 0
    size[63] = 1e6
    mean = [s / 2 for s in size]
    mean[0] = sorted(mean[1:])[31]
    ordered = sorted(mean)
    top = ordered[59] + 0.85 * (ordered[60] - ordered[59])  # 0.95 of the way along 63 gaps
    mean = [min(m, top) for m in mean]
    scaled = [(m - min(mean)) / (max(mean) - min(mean)) for m in mean]
    expected = [math.exp(s) / sum(map(math.exp, scaled)) for s in scaled]
    p = method.probabilities(state._replace(size=size, seen=seen))
    np.testing.assert_allclose(p, expected, rtol=1e-5)
    assert p.max() / p.min() == pytest.approx(math.e, rel=1e-5)


def test_the_weights_of_pro_make_the_mean_step_that_of_uniform_drawing():
    rng = np.random.default_rng(7)
    p = np.exp(rng.random(K)).astype(np.float32)
    p, g = p / p.sum(), rng.normal(size=K) + 1.0
    exact = float((p.astype(np.float64) * pro_weights(p, K) * g).sum())
    assert exact == pytest.approx(g.mean(), rel=1e-6)


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_pro_learns_the_sizes_of_the_slopes_that_devices_saw(rule, tmp_path):
    """The weight 1/(K p_k) is taken off again: a size is the |g| that a device measured."""
    method = tiny(pro=True, tau=4)
    _, state = begun(method)
    state = state._replace(size=np.linspace(1.0, 3.0, K), seen=np.ones(K, np.int64), round=1)
    p = method.probabilities(state).astype(np.float64)
    key = next(k for k in range(50) if len(set(draw(k, 4, K, p).tolist())) == 4)
    picks, g = draw(key, 4, K, p), np.array([0.5, -2.0, 8.0, -0.25])
    codes = LogCode.encode(-g * UNITS / (K * p[picks]), np.zeros(4))
    replies = [Reply(0, key, Payload({"codes": codes}, {"n": 3, "loss": 1.0}))]
    with closing(Spool(tmp_path, 1 << 10)) as spool:
        new = method.aggregate(state, replies, replace(parse(rule), spool=spool))
    np.testing.assert_allclose((new.size - state.size)[picks], np.abs(g), rtol=0.13)
    assert (new.seen - state.seen)[picks].tolist() == [1] * 4
    assert (new.seen - state.seen).sum() == 4
    assert set(np.flatnonzero(of_round(new.ledger, 2))) == set(picks.tolist())


@pytest.mark.parametrize(
    "p", [np.ones(K - 1), np.ones((K, 1)), np.zeros(K), np.full(K, -0.1), np.full(K, np.nan)]
)
def test_a_device_refuses_what_is_no_probability_of_each_direction(p):
    method = tiny(pro=True)
    model, state = begun(method)
    sent, fleet = method.broadcast(state), harness.fleet(model, method)
    payload = Payload({**sent.arrays, "p": p.astype(np.float32)}, sent.scalars)
    mine = Batches(fleet.clients[0], fleet.pad_id, 1, client=0)
    with pytest.raises(MessageError, match="probabilities are not of 64 directions"):
        method.local(model, payload, mine, 1, {})
    with pytest.raises(MessageError, match="'p' is missing"):
        method.local(model, tiny().broadcast(state), mine, 1, {})


def test_the_share_that_back_propagates_is_spread_over_the_clients():
    for percent in (0, 1, 10, 25, 29, 50, 57, 75, 100):  # 0.29 and 0.57 are not exact in binary
        method = tiny(backprop=percent / 100)
        kinds = [method.kind_of(c) for c in range(400)]
        assert all(sum(kinds[: 100 * n]) == percent * n for n in (1, 2, 4))
        _, state = begun(method)
        found = method.kinds(state)
        assert len(found) == len(method.kind_names) == 1 + (percent > 0)
        assert ["projected" in spec.arrays for _, spec in found] == [False, True][: len(found)]
        assert [(sent.scalars.get(fedkseed.MARK) is True) for sent, _ in found] == [False, True][: len(found)]
    assert [tiny(backprop=0.5).kind_of(c) for c in range(4)] == [0, 1, 0, 1]


def test_a_client_may_not_send_what_the_other_kind_sends():
    method = tiny(backprop=0.5, backprop_lr=0.05)
    model, state = begun(method)
    fleet, base = harness.fleet(model, method), harness.base_of(model)
    specs = [spec for _, spec in method.kinds(state)]
    for client in (0, 1):
        message = Message(1, base, harness.reply(fleet, method, state, client=client).payload)
        check(message, specs[client], round=1, base=base)
        with pytest.raises(MessageError, match="agreed"):
            check(message, specs[1 - client], round=1, base=base)


@pytest.mark.parametrize("tau", [50, 400])
@pytest.mark.parametrize("steps", [1, 20])
def test_how_far_a_reply_goes_is_in_the_same_units_for_both_kinds(tau, steps):
    """A gradient's slopes z_k . g along 4 d directions, from either kind: their mean size, whatever the steps."""
    method = tiny(K=1024, tau=tau, backprop=0.5, backprop_steps=steps, backprop_lr=0.02)
    state = method.init(models.tiny_llama(), 7)
    slopes = np.random.default_rng(3).normal(scale=5.0, size=1024)
    walk = {"codes": LogCode.encode(slopes[draw(77, tau, 1024)] * UNITS, np.full(tau, 0.5))}
    moved = slopes / 1024 * steps * UNITS * method.backprop_lr / method.lr
    projected = {"projected": LogCode.encode(moved, np.full(1024, 0.5))}
    replies = [
        Reply(0, 77, Payload(walk, {"n": 9, "loss": 1.0})),
        Reply(1, 78, Payload(projected, {"n": 9, "loss": 1.0})),
    ]
    far = [method.distance(state, Payload({}), reply) / UNITS for reply in replies]
    assert far[0] == pytest.approx(5.0, rel=0.35)
    assert far[1] == pytest.approx(5.0, rel=0.1)


def test_a_walk_weighs_by_its_precision():
    """One over the variance of a gradient's estimate, d (1/K + (1 - 1/K)/n) |g|^2; n is infinite for all directions."""
    n, method = 12, tiny(backprop=0.5, tau=12)
    walk = Payload({"codes": np.zeros(n, np.uint8)}, {"n": 10, "loss": 1.0})
    assert method.weight(Payload({"projected": np.zeros(K, np.uint8)}, {"n": 10, "loss": 1.0})) == 10
    assert method.weight(walk) / 10 == pytest.approx((1 / K) / (1 / K + (1 - 1 / K) / n), rel=1e-12)


def test_both_kinds_enter_one_ledger_by_precision():
    method = tiny(backprop=0.5)
    _, state = begun(method)
    rng = np.random.default_rng(5)
    codes = rng.integers(1, 120, K).astype(np.uint8)
    walk, summed = Payload({"codes": codes[:6]}, {"n": 30, "loss": 1.0}), np.zeros(K)
    for k, c in zip(draw(77, 6, K), LogCode.decode(codes[:6]), strict=True):
        summed[k] += c
    other = Payload({"projected": codes}, {"n": 20, "loss": 1.0})
    new = method.aggregate(state, [Reply(0, 77, walk), Reply(1, 78, other)])
    w = 30 / (1 + (K - 1) / 6)
    expected = (w * summed + 20 * LogCode.decode(codes)) / (w + 20)
    np.testing.assert_allclose(of_round(new.ledger, 1) * UNITS, expected, rtol=0, atol=0.5 + 1e-9)


def test_the_pool_is_larger_where_clients_back_propagate_and_as_stated_where_it_is():
    assert Method().K == 1024
    assert Method(backprop=0.1).K == 4096
    assert Method(K=256, backprop=0.1).K == 256
