# SPDX-License-Identifier: Apache-2.0
"""GKD's reward: REINFORCE against the enumerated expectation, in float64, and a step of the whole loss."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from gkd_harness import END, direct, pair, rows, trainer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fleetune.compression import distillation
from fleetune.compression.distillation import log_probs
from fleetune.data.encode import MASKED, Batch, Encoded, collate
from fleetune.evaluation.losses import predictors

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


@pytest.mark.parametrize("samples", [1, 2])
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
    np.testing.assert_allclose(distillation.advantages(r, 1), [1 - 4.5 / 3, 0 - 5.5 / 3, 0.5 - 5 / 3, 4 - 1.5 / 3])
    np.testing.assert_allclose(distillation.advantages(r, 2), [1, -1, -3.5, 3.5])
    np.testing.assert_allclose(distillation.advantages(r, 4), distillation.advantages(r, 1))
    assert distillation.advantages(np.full(7, 0.1), 1).tolist() == [0.0] * 7
    assert distillation.advantages(np.array([0.7]), 1).tolist() == [0.7]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_step_goes_down_the_divergence_and_up_the_reward(alpha: float) -> None:
    """Equation 5 from whole arrays of logits: the answers' tokens alone, each from what stands before it."""
    student, teacher = pair()
    student.net.requires_grad_(True)
    t = trainer(reward="f1", alpha=alpha, lmbda=1, temperature=GAMMA)
    batch, gains = t.answered(student, teacher, collate(rows(3, 3), END), 0, 0), np.array([0.5, -1.0, 2.0])
    loss, D = t.loss(student, teacher, batch, gains)
    logits = student.net(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    want_D = direct(student, teacher, batch, t.beta).mean()
    worth = torch.zeros((), dtype=torch.float64)
    for b, row in enumerate(batch.labels.tolist()):
        for place, token in enumerate(row):
            if token != MASKED:
                log_p = (logits[b, place - 1].double() / GAMMA).log_softmax(-1)[token]
                worth = worth + gains[b] * log_p / 3
    want = alpha * want_D - (1 - alpha) * worth
    assert D.item() == pytest.approx(want_D.item(), rel=1e-4)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    torch.testing.assert_close(slope(student.net, loss), slope(student.net, want), rtol=1e-3, atol=1e-5)
    plain, _ = t.loss(student, teacher, batch, None)  # not written by the student: no reward, the same weight
    assert plain.item() == pytest.approx(alpha * want_D.item(), rel=1e-4)
