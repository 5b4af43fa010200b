# SPDX-License-Identifier: Apache-2.0
"""FedPepTAO: the choice of layers, the server's steps against the formulas in float64, and personal prompts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetune import adapters
from fleetune.data import Encoded, Example
from fleetune.data.encode import Batches, encode_all
from fleetune.errors import FleetError, RecipeError
from fleetune.models import tiny_bert, tiny_llama
from fleetune.models.net.layers import layers_of
from fleetune.tuning import methods
from fleetune.tuning.exchange import aggregation
from fleetune.tuning.exchange.messages import Payload
from fleetune.tuning.methods import Reply, fedpeptao
from fleetune.tuning.methods.fedpeptao import Method, State

PAD = 257


def tiny(**changes: Any) -> Method:
    return Method(**({"tokens": 1, "epochs": 1, "batch_size": 4, "lanczos": 2, "lr": 0.05} | changes))


@pytest.fixture(scope="module")
def rows() -> list[Encoded]:
    examples = [
        Example((("user", f"say {'so ' * n}{n}"),), "yes" if n % 2 else "a number", {}) for n in range(8)
    ]
    return encode_all(examples, tiny_llama().tokenizer, 64)[0]


# --- the warm-up and the choice ----------------------------------------------------------------------------


def warm_reply(state: State, client: int, n: int, scores: list[float], kept: float, rng: Any) -> Reply:
    w = {name: rng.normal(size=t.shape).astype(np.float32) for name, t in state.tensors.items()}
    return Reply(client, 0, Payload(w | {"scores": np.array(scores)}, {"n": n, "loss": 1.0, "kept": kept}))


def test_the_warm_up_is_fedavg_and_its_means_choose_the_layers() -> None:
    model, chosen, rng = tiny_llama(layers=4), tiny(warmup=2), np.random.default_rng(2)
    state = chosen.init(model, 8)
    told = [  # n, scores, kept
        [(10, [1.0, 5.0, 2.0, 0.0], 0.3), (30, [2.0, 1.0, 4.0, 0.0], 0.6)],
        [(60, [0.0, 1.0, 3.0, 2.0], 0.5)],
    ]
    for number, taking in enumerate(told):
        assert chosen.broadcast(state).int("warmup") == 2 - number
        replies = [warm_reply(state, k, *what, rng) for k, what in enumerate(taking)]
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


def test_only_chosen_prompts_exist_and_travel_afterwards(rows: list[Encoded]) -> None:
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


# --- adaptive optimization ---------------------------------------------------------------------------------


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


def test_the_servers_rounds_are_the_papers() -> None:
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
def test_variates_do_not_add_up_under_a_rule_that_leaves_numbers_out(name: str, tmp_path: Path) -> None:
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


def test_the_servers_step_shrinks_to_its_floor_and_zero_is_fedavg() -> None:
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


def test_a_curvature_that_is_not_finite_is_the_devices_failure(rows: list[Encoded]) -> None:
    model, method = tiny_llama(), tiny(lr=1e30, lanczos=50)
    with pytest.raises(FleetError, match="the curvature of the loss is not finite"):
        method.local(model, method.broadcast(method.init(model, 8)), Batches(rows, PAD, 1), 1, {})


# --- the rest ----------------------------------------------------------------------------------------------


def test_a_classifiers_head_travels_with_the_prompts() -> None:
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


def test_what_cannot_be_is_said_before_the_run() -> None:
    for settings, words in (
        ({"layers_rule": "halve"}, "lipschitz, half, all, nor a number"),
        ({"layers_rule": "0"}, "nor a number"),
        ({"beta": 1}, r"not in \[0, 1\)"),
        ({"tokens": 0}, "at least 1"),
        ({"lanczos": 1}, "lanczos at least 2"),
        ({"lr": 0}, "lr = 0.0 must be positive"),
    ):
        with pytest.raises(RecipeError, match=words):
            methods.make("fedpeptao", settings)
