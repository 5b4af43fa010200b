"""FedPepTAO: measurements and the choice of layers, the server's steps against the formulas in float64, and personal prompts."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fleetune import adapters
from fleetune.common.hearing import hearing
from fleetune.data import Encoded, Example
from fleetune.data.encode import Batch, Batches, collate, encode_all
from fleetune.errors import FleetError
from fleetune.models import Model, tiny_bert, tiny_llama
from fleetune.models.net.layers import layers_of
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.exchange.messages import Payload
from fleetune.tuning.methods import Reply, fedpeptao
from fleetune.tuning.methods.fedpeptao import Method, Spectrum

PAD = 257


def tiny(**changes: Any) -> Method:
    return Method(**({"tokens": 1, "epochs": 1, "batch_size": 4, "lanczos": 2, "lr": 0.05} | changes))


@pytest.fixture(scope="module")
def rows() -> list[Encoded]:
    asked = [(("user", f"say {'so ' * n}{n}"),) for n in range(8)]
    examples = [Example(user, "yes" if n % 2 else "a number", {}) for n, user in enumerate(asked)]
    return encode_all(examples, tiny_llama().tokenizer, 64)[0]


def test_the_warm_up_is_fedavg_and_its_means_choose_the_layers():
    model, chosen, rng = tiny_llama(layers=4), tiny(warmup=2), np.random.default_rng(2)
    state = chosen.init(model, 8)
    told = [  # n, scores, kept
        [(10, [1.0, 5.0, 2.0, 0.0], 0.3), (30, [2.0, 1.0, 4.0, 0.0], 0.6)],
        [(60, [0.0, 1.0, 3.0, 2.0], 0.5)],
    ]
    for number, taking in enumerate(told):
        assert chosen.broadcast(state).int("warmup") == 2 - number
        replies = []
        for k, (n, scores, kept) in enumerate(taking):
            w = {name: rng.normal(size=t.shape).astype(np.float32) for name, t in state.tensors.items()}
            sent = Payload(w | {"scores": np.array(scores)}, {"n": n, "loss": 1.0, "kept": kept})
            replies.append(Reply(k, 0, sent))
        n = [what[0] for what in taking]
        name = "model.layers.2.self_attn.prefix.key"
        want = np.average([r.payload.array(name) for r in replies], axis=0, weights=n)
        state = chosen.aggregate(state, iter(replies))
        np.testing.assert_allclose(state.tensors[name], want, rtol=0, atol=1e-7)
    # Means by rows: scores 0.7, 1.4, 3.2, 1.2; kept 0.51, of four layers: 2.04, so 3.
    assert state.layers.tolist() == [1, 2, 3]
    assert {fedpeptao.layer_of(n) for n in state.tensors} == {1, 2, 3}
    assert chosen.report(state)["layers"] == 3
    for rule, layers in (("half", [1, 2]), ("1", [2]), ("9", [0, 1, 2, 3])):
        assert fedpeptao.choose_layers(state.scores, rule, state.kept / state.rows).tolist() == layers
    all_at_once = replace(chosen, layers_rule="all").init(model, 8)
    assert (all_at_once.warmup, all_at_once.layers.tolist()) == (0, [0, 1, 2, 3])


def test_only_chosen_prompts_exist_and_travel_afterwards(rows):
    model, chosen = tiny_llama(layers=4), tiny(layers_rule="half")
    state = chosen.init(model, 8)
    sizes = []
    for round_ in (1, 2):
        payload = chosen.broadcast(state)
        reply = chosen.local(model, payload, Batches(rows, PAD, round_), 1, {})
        sizes.append(sum(a.nbytes for a in payload.arrays.values()))
        state = chosen.aggregate(state, [Reply(0, 0, reply)])
    assert sizes[1] * 2 == sizes[0] == 4 * 2 * 16 * 4  # layers, key and value, 16 wide, 4 bytes
    chosen.apply(model, state)
    assert {fedpeptao.layer_of(n) for n in adapters.trainable(model)} == set(state.layers.tolist())


class Paper:
    """The server of section 4.2 in float64, one device at a time, written from the formulas alone."""

    def __init__(self, w: np.ndarray, eta: float) -> None:
        self.w, self.eta = w, eta
        self.v, self.c, self.c_k = np.zeros_like(w), np.zeros_like(w), {}  # type: ignore[var-annotated]
        self.eta_s, self.t = 0.05, 0

    def round(self, sent: dict[int, tuple[int, np.ndarray]], batch_size: int, epochs: int) -> None:
        p = {k: n / sum(m for m, _ in sent.values()) for k, (n, _) in sent.items()}
        K = {k: epochs * math.ceil(n / batch_size) for k, (n, _) in sent.items()}
        wbar = sum(p[k] * w_k for k, (_, w_k) in sent.items())
        D = self.w - wbar
        changes = {}
        for k, (_, w_k) in sent.items():
            rates = [self.eta * (K[k] - s) / K[k] for s in range(K[k])]
            old = self.c_k.get(k, self.c)
            self.c_k[k] = old - self.c + (self.w - w_k) / sum(rates)
            changes[k] = self.c_k[k] - old
        rho = len(sent) / len(self.c_k)
        self.c = self.c + rho * sum(K[k] / sum(K.values()) * changes[k] for k in sent)
        if self.t == 0:
            self.w = wbar
        else:
            self.eta_s = max(0.99 * self.eta_s, 1e-4)
            v_k = {k: 0.9 * self.v + 0.1 * D + (self.c - self.c_k[k]) for k in sent}
            u_k = {k: wbar - self.eta_s * v_k[k] for k in sent}
            self.w = sum(p[k] * u_k[k] for k in sent)
            self.v = sum(p[k] * v_k[k] for k in sent)
        self.t += 1


def test_the_servers_rounds_are_the_papers():
    """Five rounds of changing devices of unlike size: momentum, variates, correction, decaying step."""
    chosen = tiny(layers_rule="all", epochs=2)
    model, rng = tiny_llama(), np.random.default_rng(6)
    state = chosen.init(model, 4)
    names = sorted(state.tensors)
    papers = {n: Paper(state.tensors[n].astype(np.float64), 0.05) for n in names}
    for taking in ({0: 9, 1: 4}, {1: 4, 2: 17}, {0: 9, 1: 4, 2: 17}, {3: 1}, {0: 9, 3: 1}):
        replies = []
        for k, n in taking.items():
            w_k = {
                x: state.tensors[x] + rng.normal(size=t.shape).astype(np.float32)
                for x, t in state.tensors.items()
            }
            replies.append(Reply(k, 0, Payload(w_k, {"n": n, "loss": 1.0})))
        for name, paper in papers.items():
            sent = {r.client: (taking[r.client], r.payload.array(name).astype(np.float64)) for r in replies}
            paper.round(sent, 4, 2)
            paper.w = paper.w.astype(np.float32).astype(np.float64)  # what travels
        state = chosen.aggregate(state, iter(replies))
        for name, paper in papers.items():
            np.testing.assert_allclose(state.tensors[name], paper.w, rtol=0, atol=1e-6)
            np.testing.assert_allclose(state.v[name], paper.v, rtol=0, atol=1e-4)
            np.testing.assert_allclose(state.c[name], paper.c, rtol=0, atol=1e-4)
            for k, own in paper.c_k.items():
                np.testing.assert_allclose(state.c_k[f"{k}/{name}"], own, rtol=0, atol=1e-4)
    assert state.eta_s == pytest.approx(0.05 * 0.99**4)


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "norm-clip"])
def test_variates_do_not_add_up_under_a_rule_that_leaves_numbers_out(name, tmp_path):
    """Where all answer, the step is that of the momentum alone; what a median left out used to pile up in c_k."""
    chosen, rng = tiny(layers_rule="all"), np.random.default_rng(6)
    state = chosen.init(tiny_llama(), 4)
    rule = replace(aggregation.parse(name), spool=(spool := aggregation.Spool(tmp_path)))
    v = {x: np.zeros(t.shape) for x, t in state.tensors.items()}
    for number in range(4):
        replies, combined = [], rule.combining(state.tensors)
        for k in range(3):
            w_k = {x: t + rng.normal(k, 1, t.shape).astype(np.float32) for x, t in state.tensors.items()}
            combined.add(1, w_k)
            replies.append(Reply(k, 0, Payload(w_k, {"n": 8, "loss": 1.0})))
        wbar = combined.tensors()
        v = {x: 0.9 * v[x] + 0.1 * (state.tensors[x] - wbar[x]) if number else v[x] for x in v}
        state = chosen.aggregate(state, iter(replies), rule)
        for x in v:
            np.testing.assert_allclose(state.v[x], v[x], atol=1e-6)
            np.testing.assert_allclose(state.tensors[x], wbar[x] - state.eta_s * v[x], atol=1e-5)
    spool.close()


def test_the_servers_step_shrinks_to_its_floor_and_zero_is_fedavg():
    chosen, model = tiny(layers_rule="all", server_lr=1.01e-4), tiny_llama()
    plain = replace(chosen, server_lr=0.0)
    state, rng = chosen.init(model, 4), np.random.default_rng(0)
    other = state._replace(eta_s=0.0)
    for _ in range(4):
        w = {n: rng.normal(size=t.shape).astype(np.float32) for n, t in state.tensors.items()}
        replies = [Reply(0, 0, Payload(w, {"n": 3, "loss": 1.0}))]
        state, other = chosen.aggregate(state, iter(replies)), plain.aggregate(other, iter(replies))
        assert all(np.array_equal(other.tensors[n], w[n]) for n in w)
    assert state.eta_s == 1e-4


def test_a_curvature_that_is_not_finite_is_the_devices_failure(rows):
    model, method = tiny_llama(), tiny(lr=1e30, lanczos=50)
    with pytest.raises(FleetError, match="the curvature of the loss is not finite"):
        method.local(model, method.broadcast(method.init(model, 8)), Batches(rows, PAD, 1), 1, {})


def test_a_classifiers_head_travels_with_the_prompts():
    model, chosen = tiny_bert(), tiny(layers_rule="1")
    texts = [
        Encoded(np.array([256, 97 + n, 257], np.int32), 3, np.zeros(3, np.int32), n % 2) for n in range(6)
    ]
    state = chosen.init(model, 8)
    for round_ in (1, 2):
        reply = chosen.local(model, chosen.broadcast(state), Batches(texts, 258, round_), 1, {})
        state = chosen.aggregate(state, [Reply(0, 0, reply)])
    inside = {fedpeptao.layer_of(n) for n in state.tensors}
    assert None in inside
    assert len(inside) == 2
    assert len(layers_of(model.net)) == 2


@pytest.fixture(scope="module")
def batch(rows: list[Encoded]) -> Batch:
    return collate(rows[:4], PAD)


def slow_score(texts: Sequence[np.ndarray]) -> float:
    """The published formula on unpadded outputs [T_i, d] of the rows, cosine by cosine."""
    S = np.eye(len(texts))
    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            both = min(len(a), len(b))
            S[i, j] = (a[:both] * b[:both]).sum() / math.sqrt((a**2).sum() * (b**2).sum())
    eigenvalues = np.linalg.eigvalsh(S).clip(min=0) + 1e-5
    return float(sum(math.log(x) + 1 / x for x in eigenvalues))


def test_a_score_is_the_formulas_and_blind_to_padding():
    rng = np.random.default_rng(1)
    outputs = rng.normal(size=(5, 7, 3))
    lengths = [7, 3, 5, 7, 2]
    mask = np.array([[t < n for t in range(7)] for n in lengths], np.float64)
    want = slow_score([outputs[i, :n] for i, n in enumerate(lengths)])
    assert fedpeptao.score(torch.from_numpy(outputs), torch.from_numpy(mask)) == pytest.approx(want, rel=1e-9)


def test_every_layer_of_a_model_is_scored_by_what_it_hands_on(rows):
    model = tiny_llama(layers=3)
    # One row at a time, unpadded; the layers called by hand on what came before.
    seen: list[list[np.ndarray]] = [[], [], []]
    for row in rows[:3]:
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        with torch.no_grad():
            h = model.net.model.embed_tokens(ids)
            turn = model.net.model.rotary_emb(h, torch.arange(ids.shape[1])[None])
            for n, layer in enumerate(model.net.model.layers):
                h = layer(h, position_embeddings=turn)
                seen[n].append(h[0].double().numpy())
    found = fedpeptao.layer_scores(model, collate(rows[:3], PAD))
    np.testing.assert_allclose(found, [slow_score(texts) for texts in seen], rtol=1e-3)


def symmetric(size: int, seed: int = 0) -> np.ndarray:
    A = np.random.default_rng(seed).normal(size=(size, size))
    return (A + A.T) / 2


def test_lanczos_over_everything_is_exact():
    H = symmetric(12)
    theta, share = fedpeptao.ritz(*fedpeptao.subspace(lambda v: H @ v, np.ones(12), 12))
    np.testing.assert_allclose(theta, np.linalg.eigh(H)[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(share, 1 / 12)


def test_a_few_lanczos_steps_give_the_ends_and_the_moments():
    """m steps are the m-point Gauss rule of the density: exact for powers below 2 m, and its ends are H's."""
    H, m = symmetric(60, 3), 20
    values, vectors = np.linalg.eigh(H)
    start = np.where(np.arange(60) % 3 == 0, 1.0, -1.0)
    theta, share = fedpeptao.ritz(*fedpeptao.subspace(lambda v: H @ v, start, m))
    assert share.sum() == pytest.approx(1.0, abs=1e-12)
    weight = (vectors.T @ start) ** 2 / 60
    scale = np.abs(values).max()
    for power in range(2 * m):
        want = (weight * (values / scale) ** power).sum()
        assert (share * (theta / scale) ** power).sum() == pytest.approx(want, abs=1e-10)
    assert theta[-1] == pytest.approx(values[-1], rel=1e-2)
    assert theta[0] == pytest.approx(values[0], rel=1e-2)


def test_lanczos_stops_where_nothing_new_is_found():
    H = np.diag([3.0] * 5 + [-1.0] * 25)
    theta, share = fedpeptao.ritz(*fedpeptao.subspace(lambda v: H @ v, np.ones(30), 10))
    np.testing.assert_allclose(theta, [-1, 3], atol=1e-9)
    np.testing.assert_allclose(share, [25 / 30, 5 / 30], atol=1e-9)


def explicit_hessian(model: Model, batch: Batch) -> np.ndarray:
    """[R, R] in the model's prompts: row after row the gradient of the gradient of plain cross-entropy of the answer."""
    parameters = list(adapters.trainable(model).values())
    with fedpeptao.eager(model.net), torch.enable_grad():
        logits = model.net(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)
        g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, parameters, create_graph=True)])
        rows = [torch.autograd.grad(x, parameters, retain_graph=True) for x in g]
    return np.stack([torch.cat([x.flatten() for x in row]).double().numpy() for row in rows])


def test_the_models_spectrum_and_change_are_the_explicit_hessians(batch):
    """All R = 64 prompt numbers of a tiny llama: eigenvalues, and the norm of H's change on the way from P to P + D."""
    model, rng = tiny_llama(), np.random.default_rng(1)
    adapters.attach(model, adapters.Prefix(tokens=1), seed=3)
    before = adapters.export(model)
    came = {n: rng.normal(size=a.shape).astype(np.float32) for n, a in before.items()}
    found, L = fedpeptao.spectrum_and_change(model, batch, came, lanczos=64, key=1)
    assert all(np.array_equal(before[n], a) for n, a in adapters.export(model).items())  # put back
    H = explicit_hessian(model, batch)
    values = np.linalg.eigh(H)[0]
    np.testing.assert_allclose(found.theta, values, rtol=0, atol=1e-5 * np.abs(values).max())  # float32 model
    few, _ = fedpeptao.spectrum_and_change(model, batch, came, lanczos=16, key=1)
    assert few.theta[-1] == pytest.approx(values[-1], rel=1e-3)
    assert few.share.sum() == pytest.approx(1)
    adapters.load_(model, came)
    moved = explicit_hessian(model, batch)
    assert pytest.approx(np.linalg.norm(H - moved, 2), rel=1e-4) == L


def test_the_lipschitz_rule_on_a_worked_example():
    """Eigenvalues 0, 1, 2, 7, 8, 20 with L = 1: the first gap over 4 is 2 -> 7, so m = 3 of R = 6 may go."""
    spectrum = Spectrum(np.array([0.0, 1, 2, 7, 8, 20]), np.full(6, 1 / 6))
    assert fedpeptao.share_by_gap(spectrum, 1.0) == pytest.approx(1 - 3 / 6)
    assert fedpeptao.share_by_gap(spectrum, 1.25) == pytest.approx(1 - 5 / 6)  # 5 is not over 5; 8 -> 20 is
    assert fedpeptao.share_by_gap(spectrum, 3.0) == 1.0  # no gap over 12: nothing may go
    shares = Spectrum(spectrum.theta, np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.05]))
    assert fedpeptao.share_by_gap(shares, 1.0) == pytest.approx(1 - 0.8)


def test_shares_become_layers_that_are_enough():
    assert [fedpeptao.layer_count(x, 12) for x in (0.0, 0.01, 1 / 12, 0.5, 0.51, 1.0)] == [1, 1, 1, 6, 7, 12]


def test_a_score_is_of_few_rows_and_a_stop_is_heard_before_each_layers(rows):
    heard, sizes, model = list[int](), list[int](), tiny_llama()
    with hearing(lambda: heard.append(1)):
        fedpeptao.layer_scores(model, collate(rows[:4], PAD))
    assert len(heard) == 2 + 2  # and before each layer runs

    def scored(model: Model, batch: Batch) -> None:
        sizes.append(len(batch.labels))
        raise InterruptedError

    chosen, model = Method(tokens=1, steps=1, batch_size=1000, layers_rule="half"), tiny_llama()
    many = Batches(rows * (400 // len(rows) + 1), PAD, 5)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(fedpeptao, "layer_scores", scored)
        chosen.local(model, chosen.broadcast(chosen.init(model, 8)), many, 77, {})
    assert sizes == [fedpeptao.SCORED] == [256]


def test_a_device_measures_what_the_formulas_say(rows):
    """Scores and kept share of a real device's reply, measured again here at the prompts that it sends."""
    model, chosen = tiny_llama(), Method(tokens=1, epochs=1, batch_size=4, lanczos=64, lr=1e-3)
    state = chosen.init(model, 8)
    reply = chosen.local(model, chosen.broadcast(state), Batches(rows, PAD, 5), 77, {})
    held = next(Batches(rows, PAD, 99).repeat_batch(0, 4, 1))  # the same rows in every round
    np.testing.assert_array_equal(reply.array("scores"), fedpeptao.layer_scores(tiny_llama(), held))
    other = tiny_llama()
    chosen.attach(other, state.seed, range(2))
    adapters.load_(other, {n: reply.array(n) for n in state.tensors})
    H = explicit_hessian(other, held)
    adapters.load_(other, state.tensors)
    L = np.linalg.norm(H - explicit_hessian(other, held), 2)
    gaps = np.flatnonzero(np.diff(np.linalg.eigvalsh(H)) > 4 * L)
    assert len(gaps)
    assert reply.scalars["kept"] == pytest.approx(1 - (gaps[0] + 1) / 64)
    assert 0 < float(reply.scalars["kept"]) < 1
