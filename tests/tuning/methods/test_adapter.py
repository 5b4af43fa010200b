"""The adapter methods: FedProx, SCAFFOLD and server rules by the formulas in float64; steps in backward; signs.

The formulas' devices train a toy: two tensors in double precision whose loss is a quadratic of the rows, so that
every step can be written down by hand.  The code under test is all but that loss.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fleetune import adapters, models
from fleetune.adapters.attachment import Attachment
from fleetune.data import Encoded
from fleetune.data.encode import Batch, Batches
from fleetune.errors import MessageError
from fleetune.evaluation.losses import pad_id
from fleetune.evaluation.objectives import loss_tensor
from fleetune.models.net.layers import by_layer
from fleetune.tuning import methods
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.exchange.messages import Message, Payload, check, decode, encode
from fleetune.tuning.methods import Reply, _adapter, fedit, fedpetuning
from fleetune.tuning.methods._adapter import State
from fleetune.tuning.rounds.local_work import Memories, work

Tensors = dict[str, Any]
SIZES = {"a": (2, 2), "b": (3,)}
CURVATURE = {"a": np.array([[0.5, 2.0], [1.0, 3.0]]), "b": np.array([4.0, 0.1, 1.0])}


def pole(name: str, token: float) -> np.ndarray:
    """Where a row pulls a tensor to."""
    return np.sin(token + np.arange(math.prod(SIZES[name]))).reshape(SIZES[name])


def quadratic(model: Any, batch: Batch) -> torch.Tensor:
    """mean over rows of sum_n 1/2 C (w - pole)^2, float64."""
    total = torch.zeros((), dtype=torch.float64)
    for token in batch.input_ids[:, 0].tolist():
        for name, w in model.attachment.parameters.items():
            away = w - torch.from_numpy(pole(name, token))
            total = total + 0.5 * (torch.from_numpy(CURVATURE[name]) * away**2).sum()
    return total / len(batch.input_ids)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(_adapter, "loss_tensor", quadratic)
    parameters = {n: nn.Parameter(torch.zeros(s, dtype=torch.float64)) for n, s in SIZES.items()}
    attached = Attachment(spec=None, parameters=parameters, parts=())  # type: ignore[arg-type]
    return SimpleNamespace(attachment=attached, net=nn.Module(), device="cpu", room=lambda: 0)


def batches(tokens: list[int]) -> Batches:
    """A device whose every step sees all its rows, so that their order does not matter."""
    return Batches([Encoded(np.array([t, 1], np.int32), 1) for t in tokens], 0, 3)


def start() -> Tensors:
    rng = np.random.default_rng(1)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in SIZES.items()}


@dataclass
class AdamW:
    """Loshchilov and Hutter 2019, Algorithm 2, with torch's usual betas and eps; one object a round."""

    m: dict[str, Any]
    v: dict[str, Any]
    t: int = 0

    def step(self, y: dict[str, Any], g: dict[str, Any], eta: float, decay: float) -> dict[str, Any]:
        self.t += 1
        new = {}
        for n in y:
            self.m[n] = 0.9 * self.m[n] + 0.1 * g[n]
            self.v[n] = 0.999 * self.v[n] + 0.001 * g[n] ** 2
            mhat, vhat = self.m[n] / (1 - 0.9**self.t), self.v[n] / (1 - 0.999**self.t)
            new[n] = y[n] - eta * decay * y[n] - eta * mhat / (np.sqrt(vhat) + 1e-8)
        return new


def device(w: Tensors, tokens: list[int], how: fedit.Method, correction: Tensors | None = None) -> Tensors:
    """A device's round as the papers write it: FedProx's gradient, clipping, AdamW, SCAFFOLD's correction."""
    count = how.epochs
    y = {n: x.astype(np.float64) for n, x in w.items()}
    adam = AdamW(dict.fromkeys(y, 0.0), dict.fromkeys(y, 0.0))
    for t in range(count):
        falling = (count - t) / (count - how.warmup) if how.decay else 1.0
        eta = how.lr * min((t + 1) / (how.warmup + 1), falling if t >= how.warmup else 1.0)
        g = {n: CURVATURE[n] * np.mean([y[n] - pole(n, k) for k in tokens], axis=0) for n in y}
        g = {n: g[n] + how.mu * (y[n] - w[n]) for n in y}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        scale = min(1.0, how.clip / (norm + 1e-6)) if how.clip else 1.0
        y = adam.step(y, {n: scale * x for n, x in g.items()}, eta, how.weight_decay)
        y = {n: x - eta * correction[n].astype(np.float64) for n, x in y.items()} if correction else y
    return y


@pytest.mark.parametrize(
    ("warmup", "decay", "rates"),
    [
        (0, False, [0.6, 0.6, 0.6, 0.6]),
        (0, True, [0.6, 0.45, 0.3, 0.15]),
        (2, False, [0.2, 0.4, 0.6, 0.6]),
        (2, True, [0.2, 0.4, 0.6, 0.3]),
        (5, True, [0.1, 0.2, 0.3, 0.4]),  # never done rising
    ],
)
def test_the_rate_rises_first_and_falls_then(warmup, decay, rates):
    how = fedit.Method(lr=0.6, epochs=2, batch_size=4, warmup=warmup, decay=decay)
    np.testing.assert_allclose(how.rates(7), rates)
    np.testing.assert_allclose(fedit.Method(lr=0.6, steps=4, warmup=warmup, decay=decay).rates(7), rates)
    np.testing.assert_allclose(how.walked(7), (sum(rates), math.hypot(*rates)))
    assert all(map(math.isfinite, how.walked(2**31 - 1)))  # at once, without a list of so many steps


@pytest.mark.parametrize("method", [fedit, fedpetuning])
@pytest.mark.parametrize(
    ("steps", "smaller", "warmup"), [(4, 4, 3), (4, 9, 3), (4, 3, 1), (0, 4, 2), (0, 8, 3)]
)
def test_a_round_made_shorter_has_a_shorter_warmup_and_no_other(method, steps, smaller, warmup):
    how = method.Method(steps=steps, warmup=3).sized(smaller, 8)
    assert (how.steps, how.warmup) == (smaller, warmup)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["clip", "weight_decay", "mu"])
def test_what_no_strength_can_be_is_said(name, value):
    with pytest.raises(ValueError, match=f"{name} = {value}.*must be 0 or a positive number"):
        fedit.Method(**{name: value})


@pytest.mark.parametrize(
    "how",
    [
        fedit.Method(lr=0.1, epochs=5),
        fedit.Method(lr=0.1, epochs=5, decay=True),
        fedit.Method(lr=0.1, epochs=5, mu=3.0),
        fedit.Method(lr=0.05, epochs=7, weight_decay=0.3, clip=0.5, mu=0.7, decay=True),
        fedit.Method(lr=0.1, epochs=6, warmup=2),
        fedit.Method(lr=0.1, epochs=6, warmup=3, decay=True),
    ],
)
@pytest.mark.parametrize("pulled", [False, True])
def test_a_devices_round_is_the_papers(toy, how, pulled):
    w, rng = start(), np.random.default_rng(2)
    correction = {n: rng.normal(size=s).astype(np.float32) for n, s in SIZES.items()} if pulled else {}
    for name, parameter in toy.attachment.parameters.items():
        parameter.data = torch.from_numpy(w[name]).double()
    how.train(toy, batches([1, 4]), 0, correction)
    want = device(w, [1, 4], how, correction)
    for name, parameter in toy.attachment.parameters.items():
        np.testing.assert_allclose(parameter.detach().numpy(), want[name], rtol=0, atol=1e-12)


def test_fedproxs_gradient_is_that_of_the_loss_with_the_pull():
    rng = np.random.default_rng(3)
    w, origin = (torch.from_numpy(rng.normal(size=6)) for _ in range(2))
    mu, plain, whole = 0.37, nn.Parameter(w.clone()), nn.Parameter(w.clone())
    plain.cos().sum().backward()
    _adapter.prox_(plain, origin, mu)
    (whole.cos().sum() + mu / 2 * ((whole - origin) ** 2).sum()).backward()
    assert plain.grad is not None
    assert whole.grad is not None
    torch.testing.assert_close(plain.grad, whole.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "how", [fedit.Method(lr=0.1, epochs=4), fedit.Method(lr=0.2, epochs=3, decay=True, clip=2)]
)
def test_scaffold_by_hand(toy, how):
    """Two rounds of devices 0 and 1, then one of 1 and a newcomer 2 (Algorithm 1, option II)."""
    how = replace(how, scaffold=True)
    rows = {0: [1, 2, 3], 1: [7], 2: [5, 6]}
    walked = sum(how.lr * ((how.epochs - t) / how.epochs if how.decay else 1) for t in range(how.epochs))
    state, memories = State(start(), 1), {k: {} for k in rows}  # type: ignore[var-annotated]
    w = {n: x.astype(np.float64) for n, x in start().items()}
    zero = {n: np.zeros(s) for n, s in SIZES.items()}
    c, c_k = zero, {}  # type: ignore[var-annotated]
    for taking in ([0, 1], [0, 1], [1, 2]):
        replies, ends = [], {}
        for k in taking:
            payload = how.broadcast(state)
            reply = how.trained(toy, payload, batches(rows[k]), 0, memories[k])
            assert reply.arrays.keys() == SIZES.keys()  # nothing more goes up
            replies.append(Reply(k, 0, reply))
            own = c_k.get(k, zero)
            ends[k] = device(w, rows[k], how, {n: c[n] - own[n] for n in w})
            c_k[k] = {n: own[n] - c[n] + (w[n] - ends[k][n]) / walked for n in w}
        state = how.aggregate(state, iter(replies))
        c = {n: sum(own[n] for own in c_k.values()) / len(c_k) for n in w}
        size = sum(len(rows[k]) for k in taking)
        w = {n: sum(len(rows[k]) * ends[k][n] for k in taking) / size for n in w}
        for n in w:
            np.testing.assert_allclose(state.tensors[n], w[n], rtol=0, atol=3e-6)
            np.testing.assert_allclose(state.c[n], c[n], rtol=0, atol=3e-5)  # a difference of w over 0.4
            for k, own in c_k.items():
                np.testing.assert_allclose(memories[k][f"c/{n}"], own[n], rtol=0, atol=3e-5)
        assert state.seen.tolist() == sorted(c_k)


def test_only_scaffolds_mean_goes_down_and_it_is_refused_going_up(toy):
    how = fedit.Method(lr=0.1, scaffold=True)
    state = State(start(), 1)
    assert how.broadcast(state).arrays.keys() == SIZES.keys()  # nobody has a variate yet
    reply = how.trained(toy, how.broadcast(state), batches([1]), 0, {})
    state = how.aggregate(state, [Reply(0, 0, reply)])
    down = how.broadcast(state)
    assert down.arrays.keys() == SIZES.keys() | {f"c/{n}" for n in SIZES}
    check(Message(1, b"", reply), how.expects(state), round=1, base=b"")
    with pytest.raises(Exception, match="c/a"):
        check(Message(1, b"", down), how.expects(state), round=1, base=b"")


def test_a_walk_that_ran_away_leaves_no_variate(toy):
    memory: dict[str, Any] = {}
    with np.errstate(all="ignore"):
        how = fedit.Method(lr=1e300, epochs=3, scaffold=True)
        how.trained(toy, Payload(start(), {"seed": 1}), batches([1]), 0, memory)
    assert memory == {}


@pytest.mark.parametrize("name", ["fedit", "fedpetuning"])
@pytest.mark.parametrize("rule", aggregation.ETA)
@pytest.mark.parametrize("lr", [0.0, 0.05])
def test_a_methods_server_takes_the_rules_steps(name, rule, lr):
    """Those that `test_aggregation.py` holds against the papers, of the mean weighted by rows."""
    chosen, rng = methods.make(name, {"server": rule, "server_lr": lr}), np.random.default_rng(4)
    state, want, moments = State(start(), 1), {n: w.astype(np.float64) for n, w in start().items()}, {}
    eta = lr or (1.0 if rule in ("avg", "avgm") else 1e-3)
    for _ in range(3):
        sent = {k: {n: rng.normal(size=s).astype(np.float32) for n, s in SIZES.items()} for k in (0, 1)}
        mean = {n: (5 * sent[0][n].astype(np.float64) + 3 * sent[1][n]) / 8 for n in SIZES}
        delta = {n: mean[n] - state.tensors[n] for n in SIZES}
        want, moments = aggregation.server_step(rule, want, delta, moments, lr=eta)
        replies = [Reply(k, 0, Payload(sent[k], {"n": rows, "loss": 1.0})) for k, rows in ((0, 5), (1, 3))]
        state = chosen.aggregate(state, iter(replies))
        for n in SIZES:
            np.testing.assert_allclose(state.tensors[n], want[n], rtol=0, atol=2e-6)
            assert state.tensors[n].dtype == np.float32


ROWS = [Encoded(np.arange(5 + i, 25 + 2 * i, dtype=np.int32), 1) for i in range(6)]


def with_lora() -> models.Model:
    model = models.tiny_llama(layers=3)
    adapters.attach(model, adapters.Lora(r=4, alpha=8, dropout=0.1), seed=3)
    return model


def after_backward(model: models.Model, key: int, how: fedit.Method, correction: dict[str, Any]) -> None:
    """The reference: one AdamW over all parameters, a step when all gradients are there."""
    parameters = adapters.trainable(model)
    origin = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=how.weight_decay)
    batches = Batches(ROWS, pad_id(model), key).epochs(how.epochs, how.batch_size)
    with adapters.training(model, key), by_layer(model.net, small=0):
        for batch, rate in zip(batches, how.rates(len(ROWS)), strict=True):
            loss_tensor(model, batch).backward()  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items():
                parameter.grad.add_(parameter.detach() - origin[name], alpha=how.mu)
            if how.clip:
                nn.utils.clip_grad_norm_(parameters.values(), how.clip)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, away in correction.items():
                    parameters[name].sub_(torch.from_numpy(away), alpha=rate)


DECAYED = {"weight_decay": 0.3, "warmup": 1, "decay": True}


@pytest.mark.parametrize("more", [{}, {"mu": 0.5}, DECAYED, {"clip": 0.1, "mu": 0.5}, {"scaffold": True}])
def test_they_are_the_steps_after_backward(more, monkeypatch):
    monkeypatch.setattr(_adapter, "by_layer", lambda net, room: by_layer(net, small=0, room=room))
    how = fedit.Method(**({"lr": 0.01, "epochs": 3, "batch_size": 2} | more))
    one, other = with_lora(), with_lora()
    rng = np.random.default_rng(5)
    correction = {n: rng.normal(size=p.shape).astype(np.float32) for n, p in adapters.trainable(one).items()}
    correction = correction if how.scaffold else {}
    before = adapters.export(one)
    how.train(one, Batches(ROWS, pad_id(one), 9), 9, correction)
    after_backward(other, 9, how, correction)
    ours, theirs = adapters.export(one), adapters.export(other)
    assert all(np.array_equal(ours[n], theirs[n]) for n in before)
    assert not any(np.array_equal(ours[n], before[n]) for n in before)
    assert not any(p._post_accumulate_grad_hooks for p in adapters.trainable(one).values())


def steps_of(parameters: list[nn.Parameter], loss: Tensor, how: fedit.Method) -> None:
    steps = _adapter.AdamSteps(parameters, how, "cpu")
    with steps.in_backward():
        loss.backward()  # type: ignore[no-untyped-call]
        steps.after_backward()


def test_a_parameter_that_is_used_twice_takes_one_step_of_its_whole_gradient():
    torch.manual_seed(0)
    one = nn.Linear(6, 6)
    other, x = copy.deepcopy(one), torch.randn(4, 6)
    steps_of(list(one.parameters()), one(one(x).sin()).square().sum(), fedit.Method(lr=0.1))
    optimizer = torch.optim.AdamW(other.parameters(), 0.1, weight_decay=0.0)
    other(other(x).sin()).square().sum().backward()
    optimizer.step()
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


@pytest.mark.parametrize(("clip", "most"), [(0.0, 1), (1.0, 8)])
def test_without_a_clip_one_gradient_exists_at_a_time(clip, most):
    layers = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(8)))
    parameters, alive = list(layers.parameters()), []
    for parameter in parameters:  # before the steps' own
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in parameters))
        )
    steps_of(parameters, layers(torch.randn(4, 6)).square().sum(), fedit.Method(lr=0.1, clip=clip))
    assert max(alive) == most
    assert all(p.grad is None for p in parameters)


BASE = b"12345678"
FAST: dict[str, Any] = {"lr": 1e-2, "batch_size": 3, "dropout": 0.0, "r": 2, "targets": "query-value"}
CASES = [
    ("fedit", FAST),
    ("fedit", FAST | {"start": "orthogonal"}),  # drawn by a math library: the server sends it
    ("fedit", FAST | {"variant": "sb", "start": "gradient", "r": 8}),  # so are the factors that stay
    ("fedit", FAST | {"server": "adam"}),
    ("fedpetuning", {"module": "bitfit", "batch_size": 3}),  # starts at the base's weights
]


def rows(seed: int) -> list[Encoded]:
    random = np.random.default_rng(seed)
    return [Encoded(random.integers(0, 250, 12).astype(np.int32), 4) for _ in range(3)]


class Devices:
    def __init__(self, method: Any, folder: Path) -> None:
        self.method, self.memories = method, Memories(folder)
        self.had: dict[int, dict[str, np.ndarray]] = {}  # client -> the module that it trained last

    def reply(self, state: Any, r: int, client: int, payload: Payload) -> Reply:
        model = models.tiny_llama()
        sent, own = decode(encode(Message(r, BASE, payload))), Batches(rows(client), 0, client, "cpu", client)
        raw = work(self.method, model, own, client, sent, self.memories, lambda client, step: None)
        sent = self.method.broadcast(state)
        reply = Reply(client, client, check(decode(raw), self.method.expects(state), round=r, base=BASE))
        (change,) = self.method.moved(sent, reply).values()
        trained = adapters.export(model)  # the model is what was sent
        layout = methods._adapter.Layout.of(trained)
        self.had[client] = layout.tensors(layout.flat(trained) - change)
        return reply


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.allclose(a[n], b[n], rtol=0, atol=1e-6) for n in a)


@pytest.mark.parametrize(("name", "values"), CASES)
def test_whatever_a_device_missed_it_has_the_servers_module(name, values, tmp_path):
    method = methods.make(name, values | {"wire": "sign"})
    state = method.init(models.tiny_llama(), 7)
    devices = Devices(method, tmp_path)
    asked: Sequence[Sequence[int]] = [(0, 1), (0,), (0, 1, 2), ()]
    for r, clients in enumerate(asked, 1):
        replies, kept = [], devices.memories.kept()
        whole = [*state.tensors, *(f"start/{n}" for n in state.start)] if "start" in values else []
        for client in clients:
            known = kept.get(client, (0, 0))[0]
            payload = method.news(state, known, 0)
            missed = r - 1 if not known else r - known
            assert payload.arrays.keys() == set(whole if whole and not known else ("bits", "scales"))
            if "bits" in payload.arrays:
                assert len(payload.array("scales")) == methods._adapter.PLANES * missed
            replies.append(devices.reply(state, r, client, payload))
            layout = methods._adapter.Layout.of(state.tensors)
            memory = devices.memories.of(client)["module"]
            np.testing.assert_array_equal(memory, layout.flat(state.tensors))  # to the bit
            assert equal(devices.had[client], state.tensors)
        new = method.aggregate(state, replies)
        assert new.round == r
        if not clients:
            assert all(np.array_equal(new.tensors[n], t) for n, t in state.tensors.items())
        elif values.get("server") is None:  # what was not sent is not lost
            moves = [
                (x.payload.int("n"), *method.moved(method.broadcast(state), x).values()) for x in replies
            ]
            mean = sum(n * m.astype(np.float64) for n, m in moves) / sum(n for n, _ in moves)
            was = layout.flat(state.tensors) + state.left
            np.testing.assert_allclose(layout.flat(new.tensors) + new.left, was + mean, atol=1e-6)
        state = new


@pytest.mark.parametrize("more", [{}, {"variant": "ffa", "start": "pissa"}])
def test_what_is_longer_than_the_module_is_sent_as_the_module_and_the_factors_that_it_stands_on(more):
    """A device may have lost what it remembered."""
    method = methods.make("fedit", FAST | {"wire": "sign"} | more)
    state = method.init(models.tiny_llama(), 7)
    whole = state.tensors | {f"start/{n}": t for n, t in state.start.items()}
    size = sum(t.nbytes for t in whole.values())
    for _ in range(40):
        state = method.aggregate(state, ())
        sent = method.broadcast(state)
        assert sum(a.nbytes for a in sent.arrays.values()) <= size
        assert len(method.news(state, state.round, 0).arrays["scales"]) == methods._adapter.PLANES
    assert sent.arrays.keys() == whole.keys()
    for known in (0, 1):
        sent = method.news(state, known, 0)
        assert sent.arrays.keys() == whole.keys()
        assert sent.scalars["known"] == 0
    assert method.news(state, state.round, 0).arrays.keys() == {"bits", "scales"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e12])
def test_a_scale_that_is_no_number_is_refused(bad):
    method = methods.make("fedit", FAST | {"wire": "sign"})
    state = method.init(models.tiny_llama(), 7)
    spec = method.expects(state)
    arrays = {n: np.zeros(shape, kind) for n, (kind, shape) in spec.arrays.items()}
    payload = Payload(arrays, {"n": 3, "loss": 1.0})
    check(Message(1, BASE, payload), spec, round=1, base=BASE)
    arrays["scales"][0, 1] = bad
    with pytest.raises(MessageError, match=r"'scales' holds"):
        check(Message(1, BASE, payload), spec, round=1, base=BASE)


def test_changes_of_another_module_are_refused():
    other = methods.make("fedit", FAST | {"wire": "sign", "r": 4})
    sent = other.broadcast(other.init(models.tiny_llama(), 7))
    batches = Batches(rows(0), 0, 1, "cpu", 0)
    with pytest.raises(MessageError, match="not of this model's module"):
        methods.make("fedit", FAST | {"wire": "sign"}).local(models.tiny_llama(), sent, batches, 1, {})


@pytest.mark.parametrize("change", ["groups", "bits"])
def test_changes_of_another_size_take_no_memory(change, monkeypatch):
    """Also in a secure sum, which asks how many numbers move, 2^27 by 8 bytes, only when they are known to be the module's."""
    method, model = methods.make("fedit", FAST | {"wire": "sign"}), models.tiny_llama()
    sent = method.broadcast(method.aggregate(method.init(model, 1), iter(())))
    if change == "groups":
        sent.scalars["groups"] = np.array([[1 << 27, 1]], np.uint32).tobytes()
    else:
        sent.arrays["bits"] = sent.arrays["bits"][:, :-1]
    began = Memories(), lambda *_: None, lambda *_: None
    monkeypatch.setattr(type(method), "begins", lambda *_: pytest.fail("asked before it was compared"))
    with pytest.raises(MessageError, match="the changes that came are not"):
        work(method, model, Batches(rows(0), 0, 1, "cpu", 0), 1, Message(1, BASE, sent), *began)


def test_a_device_that_forgot_the_module_says_so():
    method, model = methods.make("fedit", FAST | {"wire": "sign"}), models.tiny_llama()
    news = method.news(method.aggregate(method.init(model, 1), iter(())), 1, 0)
    with pytest.raises(MessageError, match="does not remember"):
        method.local(model, news, Batches(rows(0), 0, 0, "cpu", 0), 0, {})
