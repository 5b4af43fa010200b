"""GKD's divergence: the formula in float64."""

import pytest
import torch
from gkd_harness import END, direct, formula, pair, rows, whole
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config

from fleetune import models
from fleetune.compression import distillation
from fleetune.data.encode import MASKED, Batch, collate
from fleetune.evaluation.losses import predictors
from fleetune.models import Model
from tiny_families import TOKENS, sizes

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
    small = sizes(32, 40, 2, 4, 2, head_dim=8, final_logit_softcapping=0.5, sliding_window=8)
    config = Gemma2Config(**small | TOKENS)
    torch.manual_seed(0)
    student = models.tiny_llama()
    student.net = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    batch = collate(rows(1, 3), END)
    Q, P = whole(student, batch), whole(teacher, batch)
    assert Q.abs().max() <= 0.5
    scored = batch.labels[:, 1:] != MASKED
    want = formula(Q[:, :-1][scored], P[:, :-1][scored][:, :264], 0.5)
    found = between(student, teacher, batch, 0.5, chunk=4)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-6)
