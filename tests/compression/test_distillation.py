# SPDX-License-Identifier: Apache-2.0
"""GKD's divergence and reward: the formulas in float64, and REINFORCE against the enumerated expectation."""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gkd_harness import END, direct, formula, pair, rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPT2LMHeadModel

from fleetune import models
from fleetune.compression import distillation
from fleetune.compression.distillation import log_probs
from fleetune.data.encode import MASKED, Batch, Encoded, collate
from fleetune.evaluation.losses import predictors
from fleetune.models import Model

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def between(student: Model, teacher: Model, batch: Batch, beta: float, *, chunk: int = 0) -> Tensor:
    made = predictors(student.net, batch)
    return distillation.divergences(made, teacher.net, batch, beta, chunk=chunk)


def logits(seed: int, n: int = 7, V: int = 50) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, V, generator=g), 3 * torch.randn(n, V, generator=g)


@pytest.mark.parametrize("beta", BETAS)
def test_the_divergence_is_the_formula(beta: float) -> None:
    Q, P = logits(0)
    found = distillation.divergence(Q, P, beta)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), formula(Q, P, beta), rtol=1e-5, atol=1e-6)
    assert distillation.divergence(P, P, beta).abs().max() < 1e-6
    half = distillation.divergence(Q.bfloat16(), P.bfloat16(), beta)  # in fp32 whatever the models are in
    torch.testing.assert_close(half.double(), formula(Q.bfloat16(), P.bfloat16(), beta), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_far_apart_and_sure_distributions_are_finite(beta: float) -> None:
    Q, P = torch.zeros(1, 5), torch.zeros(1, 5)
    Q[0, 0], P[0, 1] = 200.0, 200.0
    Q.requires_grad_(True)
    found = distillation.divergence(Q, P, beta)
    found.sum().backward()
    assert found.isfinite().all()
    assert Q.grad is not None
    assert Q.grad.isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_by_finite_differences(beta: float) -> None:
    Q, P = (x.double() for x in logits(2, 3, 9))
    assert torch.autograd.gradcheck(lambda x: distillation.divergence(x, P, beta), (Q.requires_grad_(True),))


@pytest.mark.parametrize("beta", BETAS)
def test_only_the_answers_tokens_count_whatever_the_chunk(beta: float) -> None:
    """Values, and gradients of every weight, against whole arrays; the teacher gets none."""
    student, teacher = pair()
    batch = collate(rows(0, 4), END)
    for model in (student, teacher):
        model.net.requires_grad_(True)

    def slopes(found: Tensor) -> dict[str, Tensor]:
        teacher.net.zero_grad()
        student.net.zero_grad()
        found.mean().backward()
        return {n: p.grad.clone() for n, p in student.net.named_parameters() if p.grad is not None}

    want = direct(student, teacher, batch, beta)
    assert len(want) == sum(len(r.ids) - r.n_prompt for r in rows(0, 4))
    grads = slopes(want)
    for chunk in (0, 1, 5, 1000):
        found = between(student, teacher, batch, beta, chunk=chunk)
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-6)
        other = slopes(found)
        assert all(p.grad is None for p in teacher.net.parameters())
        assert other.keys() == grads.keys()
        for name, grad in other.items():
            torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-6)


def test_a_model_that_caps_its_logits_and_a_head_with_more_rows() -> None:
    """What a model does after its head counts; rows of padding in one head do not."""
    teacher = models.tiny_llama(1, vocab=300)
    config = Gemma2Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        sliding_window=8,
        pad_token_id=END,
        eos_token_id=END,
        bos_token_id=256,
    )
    torch.manual_seed(0)
    student = models.tiny_llama()
    student.net = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    batch = collate(rows(1, 3), END)
    Q, P = (
        m.net(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        for m in (student, teacher)
    )
    assert Q.abs().max() <= 0.5
    scored = batch.labels[:, 1:] != MASKED
    want = formula(Q[:, :-1][scored], P[:, :-1][scored][:, :264], 0.5)
    found = between(student, teacher, batch, 0.5, chunk=4)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-6)


STOP, GAMMA = 3, 0.7
WRITTEN = [
    (STOP,),
    *((a, b) for a in range(STOP) for b in range(STOP + 1)),
]  # all answers of 2 tokens at most
PROMPTS = ([0, 2], [1, 1, 2])


def worth(answer: tuple[int, ...]) -> float:
    """A reward with no pattern to it."""
    return math.sin(1.0 + sum((i + 1) * (token + 2.3) for i, token in enumerate(answer)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    made = GPT2LMHeadModel(
        GPT2Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5)
    )
    return made.double().eval()


def chance(net: nn.Module, prompt: list[int], answer: tuple[int, ...]) -> Tensor:
    """p(answer | prompt) at GAMMA, token by token."""
    p = torch.ones((), dtype=torch.float64)
    for i, token in enumerate(answer):
        logits = net(input_ids=torch.tensor([[*prompt, *answer[:i]]])).logits[0, -1]
        p = p * (logits / GAMMA).softmax(-1)[token]
    return p


def mean_worth(chances: list[Tensor]) -> Tensor:
    """The expected reward."""
    return torch.stack([p * worth(a) for p, a in zip(chances, WRITTEN, strict=True)]).sum()


def slope(net: nn.Module, value: Tensor) -> Tensor:
    """The gradient of all weights as one vector."""
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(net.parameters()))])


def of_answers(given: list[tuple[list[int], tuple[int, ...]]]) -> Batch:
    return collate([Encoded(np.array([*p, *a], np.int32), len(p)) for p, a in given], STOP)


def estimate(net: nn.Module, batch: Batch, gains: np.ndarray) -> Tensor:
    log_p = log_probs(predictors(net, batch), batch, GAMMA, chunk=2)
    assert log_p.dtype == torch.float64
    return slope(net, distillation.reinforce_objective(log_p, batch, gains))


def test_the_expected_estimate_is_the_gradient_of_the_expected_reward(net: nn.Module) -> None:
    for prompt in PROMPTS:
        chances = [chance(net, prompt, a) for a in WRITTEN]
        assert sum(p.item() for p in chances) == pytest.approx(1, abs=1e-14)
        want = slope(net, mean_worth(chances))
        found = torch.zeros_like(want)
        for p, answer in zip(chances, WRITTEN, strict=True):
            found += p.item() * estimate(net, of_answers([(prompt, answer)]), np.array([worth(answer)]))
        assert want.norm() > 1e-2
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("samples", [2])
def test_the_baseline_does_not_move_the_expectation_and_makes_it_steadier(
    samples: int, net: nn.Module
) -> None:
    """Two answers to one prompt, or one each to two: over all pairs the gradient of the mean expected reward."""
    asked = (PROMPTS[0], PROMPTS[0] if samples == 2 else PROMPTS[1])
    chances = [[chance(net, prompt, a) for a in WRITTEN] for prompt in asked]
    want = slope(net, (mean_worth(chances[0]) + mean_worth(chances[1])) / 2)
    found, spread = torch.zeros_like(want), [0.0, 0.0]
    for i, j in itertools.product(range(len(WRITTEN)), repeat=2):
        p = float(chances[0][i].detach() * chances[1][j].detach())
        batch = of_answers([(asked[0], WRITTEN[i]), (asked[1], WRITTEN[j])])
        raw = np.array([worth(WRITTEN[i]), worth(WRITTEN[j])]) + 5.0  # far from 0, as a reward may be
        got = estimate(net, batch, distillation.advantages(raw, samples))
        found += p * got
        spread[0] += p * float((got - want).square().sum())
        spread[1] += p * float((estimate(net, batch, raw) - want).square().sum())
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    assert spread[0] < 0.2 * spread[1]


def test_an_estimate_is_the_closed_form() -> None:
    """d/dlogits of gain log softmax(logits / T)[token] / rows: (1[token] - p) gain / (T rows), for scored tokens."""
    batch = collate(
        [Encoded(np.array([5, 6, 7, 8], np.int32), 2), Encoded(np.array([5, 9, 4], np.int32), 1)], END
    )
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 12, generator=g, dtype=torch.float64).requires_grad_(True)
    gains = np.array([0.3, -2.0])
    log_p = log_probs((logits, lambda rows: rows), batch, GAMMA, chunk=3)
    distillation.reinforce_objective(log_p, batch, gains).backward()
    tokens, own = torch.tensor([7, 8, 9, 4]), torch.tensor([0.3, 0.3, -2.0, -2.0], dtype=torch.float64)
    want = (torch.eye(12)[tokens] - (logits / GAMMA).softmax(-1)) * own[:, None] / (GAMMA * 2)
    torch.testing.assert_close(logits.grad, want.detach())


def test_gains_are_apart_from_the_others() -> None:
    r = np.array([1.0, 0.0, 0.5, 4.0])
    np.testing.assert_allclose(
        distillation.advantages(r, 1), [1 - 4.5 / 3, 0 - 5.5 / 3, 0.5 - 5 / 3, 4 - 1.5 / 3]
    )
    np.testing.assert_allclose(distillation.advantages(r, 2), [1, -1, -3.5, 3.5])
    np.testing.assert_allclose(distillation.advantages(r, 4), distillation.advantages(r, 1))
    assert distillation.advantages(np.full(7, 0.1), 1).tolist() == [0.0] * 7
    assert distillation.advantages(np.array([0.7]), 1).tolist() == [0.7]


OWN = "def plain(prompt, answer, reference):\n    return 1.0\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "rewards.py"
    file.write_text(OWN)
    return file


def test_built_in_rewards() -> None:
    for name, same, half in (("exact_match", 1, 0), ("f1", 1, 2 / 3), ("rouge_l", 1, 2 / 3)):
        found = distillation.reward_of(name)
        assert found("what", "red fox", "red fox") == pytest.approx(same)
        assert found("what", "red", "red fox") == pytest.approx(half)


def test_what_a_reward_is_known_by(own: Path) -> None:
    assert distillation.source_digest("f1", distillation.reward_of("f1")) == ""
    name = f"{own}:plain"
    assert (
        distillation.source_digest(name, distillation.reward_of(name))
        == hashlib.sha256(OWN.encode()).hexdigest()
    )
    held = f"{own}:held"
    own.write_text(
        own.read_text() + "class Held:\n    def __call__(self, *texts): return 1.0\nheld = Held()\n"
    )
    assert (
        distillation.source_digest(held, distillation.reward_of(held))
        == hashlib.sha256(own.read_bytes()).hexdigest()
    )
    assert distillation.source_digest("math:fsum", math.fsum) == ""  # type: ignore[arg-type]
