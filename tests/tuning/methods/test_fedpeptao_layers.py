# SPDX-License-Identifier: Apache-2.0
"""FedPepTAO's measurements: the score of a layer, the spectrum of the Hessian, and the two rules for how many layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fleetune import adapters
from fleetune.data import Encoded, Example
from fleetune.data.encode import Batch, Batches, collate, encode_all
from fleetune.models import Model, tiny_llama
from fleetune.tuning.methods import fedpeptao
from fleetune.tuning.methods.fedpeptao import Method, Spectrum

PAD = 257


@pytest.fixture(scope="module")
def rows() -> list[Encoded]:
    examples = [
        Example((("user", f"say {'so ' * n}{n}"),), "yes" if n % 2 else "a number", {}) for n in range(8)
    ]
    return encode_all(examples, tiny_llama().tokenizer, 64)[0]


@pytest.fixture(scope="module")
def batch(rows: list[Encoded]) -> Batch:
    return collate(rows[:4], PAD)


# --- the score of a layer ---------------------------------------------------------------------------------


def slow_score(texts: Sequence[np.ndarray]) -> float:
    """The published formula on unpadded outputs [T_i, d] of the rows, cosine by cosine."""
    S = np.eye(len(texts))
    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            both = min(len(a), len(b))
            S[i, j] = (a[:both] * b[:both]).sum() / math.sqrt((a**2).sum() * (b**2).sum())
    eigenvalues = np.linalg.eigvalsh(S).clip(min=0) + 1e-5
    return float(sum(math.log(x) + 1 / x for x in eigenvalues))


def test_a_score_is_the_formulas_and_blind_to_padding() -> None:
    rng = np.random.default_rng(1)
    outputs = rng.normal(size=(5, 7, 3))
    lengths = [7, 3, 5, 7, 2]
    mask = np.array([[t < n for t in range(7)] for n in lengths], np.float64)
    want = slow_score([outputs[i, :n] for i, n in enumerate(lengths)])
    assert fedpeptao.score(torch.from_numpy(outputs), torch.from_numpy(mask)) == pytest.approx(want, rel=1e-9)


def test_every_layer_of_a_model_is_scored_by_what_it_hands_on(rows: list[Encoded]) -> None:
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


# --- the spectrum of the Hessian ---------------------------------------------------------------------------


def symmetric(size: int, seed: int = 0) -> np.ndarray:
    A = np.random.default_rng(seed).normal(size=(size, size))
    return (A + A.T) / 2


def test_lanczos_over_everything_is_exact() -> None:
    H = symmetric(12)
    theta, share = fedpeptao.ritz(*fedpeptao.subspace(lambda v: H @ v, np.ones(12), 12))
    np.testing.assert_allclose(theta, np.linalg.eigh(H)[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(share, 1 / 12)


def test_a_few_lanczos_steps_give_the_ends_and_the_moments() -> None:
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


def test_lanczos_stops_where_nothing_new_is_found() -> None:
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


def with_prompts(seed: int) -> Model:
    model = tiny_llama()
    adapters.attach(model, adapters.Prefix(tokens=1), seed=seed)
    return model


def test_the_models_spectrum_and_change_are_the_explicit_hessians(batch: Batch) -> None:
    """All R = 64 prompt numbers of a tiny llama: eigenvalues, and the norm of H's change on the way from P to P + D."""
    model, rng = with_prompts(3), np.random.default_rng(1)
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


# --- how many layers --------------------------------------------------------------------------------------


def test_the_lipschitz_rule_on_a_worked_example() -> None:
    """Eigenvalues 0, 1, 2, 7, 8, 20 with L = 1: the first gap over 4 is 2 -> 7, so m = 3 of R = 6 may go."""
    spectrum = Spectrum(np.array([0.0, 1, 2, 7, 8, 20]), np.full(6, 1 / 6))
    assert fedpeptao.share_by_gap(spectrum, 1.0) == pytest.approx(1 - 3 / 6)
    assert fedpeptao.share_by_gap(spectrum, 1.25) == pytest.approx(1 - 5 / 6)  # 5 is not over 5; 8 -> 20 is
    assert fedpeptao.share_by_gap(spectrum, 3.0) == 1.0  # no gap over 12: nothing may go
    shares = Spectrum(spectrum.theta, np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.05]))
    assert fedpeptao.share_by_gap(shares, 1.0) == pytest.approx(1 - 0.8)


def test_shares_become_layers_that_are_enough() -> None:
    assert [fedpeptao.layer_count(x, 12) for x in (0.0, 0.01, 1 / 12, 0.5, 0.51, 1.0)] == [1, 1, 1, 6, 7, 12]


def test_a_score_is_of_few_rows_and_a_stop_is_heard_before_each_layers(rows: list[Encoded]) -> None:
    heard, sizes, model = list[int](), list[int](), tiny_llama()
    fedpeptao.layer_scores(model, collate(rows[:4], PAD), lambda: heard.append(1))
    assert len(heard) == 2
    chosen = Method(tokens=1, steps=1, batch_size=1000, layers_rule="half")
    many = Batches(rows * (400 // len(rows) + 1), PAD, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedpeptao, "layer_scores", lambda model, batch, heard: sizes.append(len(batch.labels)))
        patch.setattr(Method, "train", stopped)
        with pytest.raises(InterruptedError):
            chosen.local(model, chosen.broadcast(chosen.init(model, 8)), many, 77, {})
    assert sizes == [fedpeptao.SCORED] == [256]


def stopped(*asked: object) -> float:
    raise InterruptedError


# --- a device's reply --------------------------------------------------------------------------------------


def test_a_device_measures_what_the_formulas_say(rows: list[Encoded]) -> None:
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
