# SPDX-License-Identifier: Apache-2.0
"""The loss of an output head in pieces: values and gradients of the plain formula, for each kind of head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fleetune.evaluation import head_loss
from fleetune.evaluation.head_loss import head_nll

N, H, V = 11, 6, 37


def made(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A head that is not trained, inputs, targets, and a weight for each token's loss."""
    draw = torch.Generator().manual_seed(3)
    head = nn.Linear(H, V).to(dtype).requires_grad_(False)
    for p in head.parameters():
        p.copy_(torch.randn(p.shape, generator=draw))
    rows = torch.randn(N, H, generator=draw).to(dtype).requires_grad_()
    return head, rows, torch.randint(V, (N,), generator=draw), torch.rand(N, generator=draw)


def by_formula(head: nn.Linear, rows: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of their weighted sum, in float64: (softmax(W x + b) - onehot) W."""
    W, b, x = head.weight.double(), head.bias.double(), rows.detach().double()
    p = torch.softmax(x @ W.T + b, -1)
    onehot = nn.functional.one_hot(targets, V).double()
    return -(p * onehot).sum(1).log(), weights.double()[:, None] * ((p - onehot) @ W)


@pytest.fixture(params=[1, 4, 1000])
def tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens whose logits are alive together where a gradient is wanted."""
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 4 * V * request.param * head_loss.GRADIENT_SHARE)
    return int(request.param)


def test_a_head_that_is_not_trained_runs_once_and_its_gradient_is_exact(tokens: int) -> None:
    head, rows, targets, weights = made()
    seen: list[int] = []
    head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    losses = head_nll(head, rows, targets, V)
    (losses * weights).sum().backward()
    expected, gradient = by_formula(head, rows, targets, weights)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad.double(), gradient, rtol=1e-5, atol=1e-6)
    assert sum(seen) == N
    assert max(seen) <= tokens


def test_the_pieces_change_no_bit_of_16_bit_rounding(tokens: int) -> None:
    head, rows, targets, weights = made(torch.bfloat16)
    (head_nll(head, rows, targets, V) * weights).sum().backward()
    plain = made(torch.bfloat16)[1]
    (nn.functional.cross_entropy(head(plain).float(), targets, reduction="none") * weights).sum().backward()
    assert rows.grad is not None
    assert plain.grad is not None
    assert rows.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rows.grad, plain.grad, rtol=0.05, atol=0.02)  # bf16 has 8 bits


def test_it_can_be_differentiated_twice(tokens: int) -> None:
    head, rows, targets, weights = made()
    v = torch.randn(N, H, generator=torch.Generator().manual_seed(5))
    (g,) = torch.autograd.grad((head_nll(head, rows, targets, V) * weights).sum(), rows, create_graph=True)
    (found,) = torch.autograd.grad((g * v).sum(), rows)
    W, p = head.weight.double(), torch.softmax(head(rows.detach()).double(), -1)
    u = v.double() @ W.T  # the Hessian of a token's loss is W' (diag(p) - p p') W
    expected = weights.double()[:, None] * ((p * u - p * (p * u).sum(1, keepdim=True)) @ W)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_trained_has_its_gradient_too(tokens: int) -> None:
    head, rows, targets, weights = made()
    head.requires_grad_(True)
    (head_nll(head, rows, targets, V) * weights).sum().backward()
    _, gradient = by_formula(head, rows, targets, weights)
    p = torch.softmax(head(rows).double(), -1) - nn.functional.one_hot(targets, V)
    assert rows.grad is not None
    assert head.weight.grad is not None
    torch.testing.assert_close(rows.grad.double(), gradient, rtol=1e-5, atol=1e-6)
    own = (weights.double()[:, None] * p).T @ rows.double()
    torch.testing.assert_close(head.weight.grad.double(), own, rtol=1e-5, atol=1e-6)


def test_what_others_hook_to_a_head_takes_part(tokens: int) -> None:
    head, rows, targets, weights = made()
    head.register_forward_hook(lambda module, args, out: 1.5 * out)
    (head_nll(head, rows, targets, V) * weights).sum().backward()
    scaled, plain, *_ = made()
    scaled.weight.mul_(1.5)
    scaled.bias.mul_(1.5)
    _, gradient = by_formula(scaled, plain, targets, weights)
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad.double(), gradient, rtol=1e-5, atol=1e-6)


def test_without_a_gradient_the_losses_are_the_same(tokens: int) -> None:
    head, rows, targets, weights = made()
    with torch.inference_mode():
        found = head_nll(head, rows, targets, V)
    torch.testing.assert_close(
        found.double(), by_formula(head, rows, targets, weights)[0], rtol=1e-6, atol=1e-6
    )
