"""How sensitive predictions are to errors of outputs: against the divergence that errors cause, and autograd."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from mixture_harness import activated, downs, experts_of, gates_and_ups, matrices, mixture
from pruner_harness import tiny
from torch import Tensor

from fleetune.compression.layerwise import driver, sensitivity
from fleetune.compression.layerwise.activations import HiddenStates
from fleetune.compression.layerwise.experts import Experts
from fleetune.models import Model

NAMES = ("model.layers.1.self_attn.v_proj", "model.layers.2.mlp.down_proj")


def drawn(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


def lively(kind: str = "llama", **sizes: object) -> Model:
    """A model whose predictions depend on its layers, so that gradients are not noise."""
    model = tiny(kind, **sizes)
    with torch.no_grad():
        for p in model.net.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    return model


def log_p(model: Model, windows: Tensor) -> Tensor:
    """Log-probabilities [tokens, V] in float64."""
    with torch.no_grad():
        return model.net(input_ids=windows).logits.double().log_softmax(-1).flatten(0, 1)


def caused(model: Model, windows: Tensor, weight: Tensor, E: Tensor) -> float:
    """The divergence that an error of a weight causes."""
    before = log_p(model, windows)
    with torch.no_grad():
        weight.add_(E)
        after = log_p(model, windows)
        weight.sub_(E)
    return float((before.exp() * (before - after)).sum(1).mean())


@pytest.mark.parametrize("tied", [True, False])
def test_predicted_divergence_is_the_one_that_small_errors_cause(tied: bool) -> None:
    """1/2 sum F_i (E_i H E_i') against the KL divergence in float64, for random errors of a layer, the head or the table."""
    model = lively(tie_word_embeddings=tied)
    windows = drawn(48, 24)
    head = model.net.get_output_embeddings()
    found = sensitivity.measure(model, windows, list(NAMES), 3)
    states = HiddenStates(model, windows)
    inputs = {}
    with torch.inference_mode():
        for number, (_, linears) in enumerate(driver.linears_of(model)):
            inputs |= {n: h / (2 * windows.numel()) for n, h in states.hessians(number, linears).items()}
            states.advance(number)
        last = states.head_hessian() / (2 * windows.numel())
    g = torch.Generator().manual_seed(1)
    for name in NAMES:
        weight = model.net.get_submodule(name).weight
        E = 1e-2 * torch.randn(weight.shape, generator=g)
        predicted = 0.5 * float(found.rows[name] @ ((E @ inputs[name]) * E).sum(1).double())
        assert predicted == pytest.approx(caused(model, windows, weight, E), rel=0.25)
    E = 1e-3 * torch.randn(head.weight.shape, generator=g)
    as_head = 0.5 * float(found.head @ ((E @ last) * E).sum(1).double())
    as_table = 0.5 * float(found.shares @ ((E.double() @ found.table) * E).sum(1))
    if tied:
        assert as_head + as_table == pytest.approx(caused(model, windows, head.weight, E), rel=0.25)
    else:
        assert as_head == pytest.approx(caused(model, windows, head.weight, E), rel=0.1)
        table = model.net.get_input_embeddings().weight
        assert as_table == pytest.approx(caused(model, windows, table, E), rel=0.25)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("granite", {"logits_scaling": 8.0}), ("gemma3_text", {}), ("cohere", {"logit_scale": 0.25})],
)
def test_factors_on_embedding_and_logits_are_counted(kind: str, sizes: dict[str, float]) -> None:
    """Gemma multiplies what is looked up, Granite and Cohere the logits."""
    model = lively(kind, tie_word_embeddings=False, **sizes)
    windows = drawn(24, 24)
    found = sensitivity.measure(model, windows, [], 3)
    states = HiddenStates(model, windows)
    with torch.inference_mode():
        for number in range(len(states.blocks)):
            states.advance(number)
        last = states.head_hessian() / (2 * windows.numel())
    g = torch.Generator().manual_seed(1)
    table, head = model.net.get_input_embeddings().weight, model.net.get_output_embeddings().weight
    for weight in [table] if table is head else [table, head]:
        E = 1e-4 * torch.randn(weight.shape, generator=g) * weight.std()
        predicted = 0.0
        if weight is head:
            predicted += 0.5 * float(found.head @ ((E @ last) * E).sum(1).double())
        if weight is table:
            predicted += 0.5 * float(found.shares @ ((E.double() @ found.table) * E).sum(1))
        assert predicted == pytest.approx(caused(model, windows, weight, E), rel=0.35)


def test_sensitivity_of_the_head_is_the_variance_of_each_tokens_indicator() -> None:
    model, windows = lively(), drawn(3, 16)
    found = sensitivity.measure(model, windows, [], 0)
    p = log_p(model, windows[:, :-1]).exp()
    torch.testing.assert_close(found.head, (p * (1 - p)).sum(0) / windows.numel(), rtol=1e-4, atol=1e-9)
    counts = torch.bincount(windows.flatten(), minlength=264).double()
    torch.testing.assert_close(found.shares, counts / windows.numel())


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = lively()
    sensitivity.measure(model, drawn(1, 8), list(NAMES), 0)
    assert not any(p.requires_grad or p.grad is not None for p in model.net.parameters())
    assert not any(m._forward_hooks for m in model.net.modules())


pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
FAMILIES = ["mixtral", "granitemoeshared", "ernie4_5_moe", "gpt_oss"]


@contextmanager
def squares_by_autograd(experts: list[Experts]) -> Iterator[dict[str, Tensor]]:
    """Let experts run one at a time, and sum the squared gradients by what each matrix returns as autograd has them."""
    sums = {n: torch.zeros(W.shape[:2]).double() for each in experts for n, W in matrices(each).items()}

    def add(to: Tensor, g: Tensor) -> None:
        to += g.double().square().sum(0)

    def forward(each: Experts) -> Any:
        def run(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            names = list(each.parameters)

            def see(of: Tensor, name: str, number: int) -> None:
                if of.requires_grad:
                    of.register_hook(lambda g: add(sums[name][number], g))

            for number in range(len(each.module.gate_up_proj)):
                token, slot = torch.where(chosen == number)
                z = gates_and_ups(each, number, x[token])
                y = downs(each, number, activated(each, z))
                see(z, names[0], number)
                see(y, names[1], number)
                out = out.index_add(0, token, y * weights[token, slot, None].to(y.dtype))
            return out

        return run

    for each in experts:
        each.module.forward = forward(each)
    try:
        yield sums
    finally:
        for each in experts:
            del each.module.forward


@pytest.mark.parametrize("family", FAMILIES)
def test_squared_gradients_are_those_of_autograd(family: str) -> None:
    model, windows = mixture(family), drawn(3, 24)
    experts = experts_of(model)
    with squares_by_autograd(experts) as want:
        sensitivity.measure(model, windows, [], 3)
    found = sensitivity.measure(model, windows, [], 3, experts=experts)
    assert set(found.experts) == set(want)
    for name, of in found.experts.items():
        assert of.count_nonzero() > 0
        torch.testing.assert_close(of * windows.numel(), want[name], rtol=1e-3, atol=1e-9)
