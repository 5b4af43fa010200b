"""The loss of an output head in pieces: values and gradients of the plain formula, for each kind of head."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fleetune.evaluation import head_loss
from fleetune.evaluation.head_loss import LogitChange, head_nll

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
    log_p = torch.log_softmax(x @ W.T + b, -1)
    p, onehot = log_p.exp(), nn.functional.one_hot(targets, V).double()
    return -log_p.gather(1, targets[:, None])[:, 0], weights.double()[:, None] * ((p - onehot) @ W)


@pytest.fixture(params=[(1, 1), (4, 5), (1000, 1000)])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Tokens that are alive together, and rows of the head's matrix."""
    tokens, block = request.param
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 4 * min(V, block) * tokens)
    monkeypatch.setattr(head_loss, "BLOCK", H * block)
    return tokens, block


def test_a_fixed_head_has_a_pass_and_exact_gradients(pieces: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    head, rows, targets, weights = made()
    seen: list[tuple[int, ...]] = []
    product = torch.mm

    def mm(x: Tensor, W: Tensor, out: Tensor) -> Tensor:
        seen.append((len(x), W.shape[1]))
        return product(x, W, out=out)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "mm", mm)
        losses = head_nll(head, rows, targets, V)
        (losses * weights).sum().backward()
    assert sum(n * v for n, v in seen) == N * V  # each token with each row, once
    assert all(n * v <= pieces[0] * pieces[1] and v <= pieces[1] for n, v in seen)
    expected, gradient = by_formula(head, rows, targets, weights)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows.grad.double(), gradient, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_16_bit_head_is_as_near_as_its_bits_allow(pieces: tuple) -> None:
    head, rows, targets, weights = made(torch.bfloat16)
    (head_nll(head, rows, targets, V) * weights).sum().backward()
    plain = made(torch.bfloat16)[1]
    (nn.functional.cross_entropy(head(plain).float(), targets, reduction="none") * weights).sum().backward()
    assert plain.grad is not None
    assert rows.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rows.grad, plain.grad, rtol=0.05, atol=0.02)  # bf16 has 8 bits


def test_logits_far_apart_do_not_overflow(pieces: tuple) -> None:
    head, rows, targets, weights = made()
    head.weight.mul_(300)
    losses = head_nll(head, rows, targets, V)
    (losses * weights).sum().backward()
    expected, gradient = by_formula(head, rows, targets, weights)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(rows.grad.double(), gradient, rtol=1e-4, atol=1e-2)


def test_the_gradient_of_a_nearly_certain_token_does_not_cancel(pieces: tuple) -> None:
    head, rows, targets, weights = made()
    with torch.no_grad():
        rows.copy_(14 * head.weight[targets] / head.weight[targets].norm(dim=1, keepdim=True))
    (head_nll(head, rows, targets, V) * weights).sum().backward()
    losses, gradient = by_formula(head, rows, targets, weights)
    certain = losses < 1e-2
    assert certain.any()
    error = (rows.grad.double() - gradient)[certain].norm(dim=1) / gradient[certain].norm(dim=1)
    assert error.max() < 1e-5  # of W_y - p W_y in float32 nothing would be left


@pytest.mark.parametrize("few", [5, 36])
def test_logits_of_minus_infinity_are_harmless(few: int, pieces: tuple) -> None:
    head, rows, targets, weights = made()
    head.bias[:few] = -torch.inf  # a padded vocabulary
    targets = torch.full_like(targets, 36)
    (head_nll(head, rows, targets, V) * weights).sum().backward()
    expected, gradient = by_formula(head, rows, targets, weights)
    with torch.inference_mode():
        found = head_nll(head, rows, targets, V)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.grad.double(), gradient, rtol=1e-4, atol=1e-5)


CHANGES = {"final_logit_softcapping": 2.0, "logits_scaling": 0.7, "logit_scale": 0.3}
each_change = pytest.mark.parametrize("change", [LogitChange(*item) for item in CHANGES.items()])


def in_float64(head: Any, rows: Tensor, targets: Tensor, weights: Tensor, change: Any) -> tuple[Tensor, ...]:
    """Losses of the changed logits, and autograd's gradients of their weighted sum by the inputs and by the matrix."""
    W, x = (t.detach().double().requires_grad_() for t in (head.weight, rows))
    z = change(x @ W.T + head.bias.double())
    losses = nn.functional.cross_entropy(z, targets, reduction="none")
    back, own = torch.autograd.grad((losses * weights.double()).sum(), (x, W))
    return losses.detach(), back, own


class Streamed:
    """The rows of a matrix in blocks, as a view of a net gives them, and their gradients."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias, self.root = weight, bias, torch.zeros((), requires_grad=True)
        self.found = torch.zeros_like(weight)

    def __call__(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, V, 5):
            yield first, self.weight[first : first + 5]

    def gradient(self, first: int, of_block: Tensor) -> None:
        self.found[first : first + len(of_block)] += of_block


@each_change
@pytest.mark.parametrize("kind", ["fixed", "trained", "view"])
def test_changed_logits_have_their_loss_and_gradients(change: LogitChange, kind: str, pieces: tuple) -> None:
    head, rows, targets, weights = made()
    head.requires_grad_(kind == "trained")
    if kind == "view":
        nn.init.zeros_(head.bias)  # a view's rows have none
        head.__dict__["row_blocks"] = blocks = Streamed(head.weight, head.bias)
    expected, back, own = in_float64(head, rows, targets, weights, change)
    losses = head_nll(head, rows, targets, V, change)
    (losses * weights).sum().backward()
    with torch.inference_mode():
        measured = head_nll(head, rows, targets, V, change)
    for found in (losses, measured):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows.grad.double(), back, rtol=1e-5, atol=1e-6)
    if kind != "fixed":
        found = head.weight.grad if kind == "trained" else blocks.found
        torch.testing.assert_close(found.double(), own, rtol=1e-5, atol=1e-6)


@each_change
def test_changed_logits_can_be_differentiated_twice(change: LogitChange, pieces: tuple) -> None:
    head, rows, targets, weights = made()
    v = torch.randn(N, H, generator=torch.Generator().manual_seed(5))
    loss = (head_nll(head, rows, targets, V, change) * weights).sum()
    (g,) = torch.autograd.grad(loss, rows, create_graph=True)
    (found,) = torch.autograd.grad((g * v).sum(), rows)
    x = rows.detach().double().requires_grad_()
    z = change(x @ head.weight.double().T + head.bias.double())
    plain = (nn.functional.cross_entropy(z, targets, reduction="none") * weights.double()).sum()
    (g,) = torch.autograd.grad(plain, x, create_graph=True)
    (expected,) = torch.autograd.grad((g * v.double()).sum(), x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
