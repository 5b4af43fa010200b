# SPDX-License-Identifier: Apache-2.0
"""What a byte budget rests on: how sensitive outputs are, what a grid costs, and the choice that costs least."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruner_harness import tiny
from torch import Tensor

from fleetune.compression.layerwise import sensitivity
from fleetune.compression.layerwise import costs
from fleetune.compression.layerwise import costs
from fleetune.compression.layerwise.costs import CANDIDATES, Candidate, Option, Term
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.activations import HiddenStates
from fleetune.compression.layerwise.grids import Grid
from fleetune.models import Model

NAMES = ("model.layers.1.self_attn.v_proj", "model.layers.2.mlp.down_proj")
A = CANDIDATES[0]


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


# Sensitivity ----------------------------------------------------------------------------------------


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
    before = log_p(model, windows)
    g = torch.Generator().manual_seed(1)

    def caused(weight: Tensor, E: Tensor) -> float:
        with torch.no_grad():
            weight.add_(E)
            after = log_p(model, windows)
            weight.sub_(E)
        return float((before.exp() * (before - after)).sum(1).mean())

    for name in NAMES:
        weight = model.net.get_submodule(name).weight
        E = 1e-2 * torch.randn(weight.shape, generator=g)
        predicted = 0.5 * float(found.rows[name] @ ((E @ inputs[name]) * E).sum(1).double())
        assert predicted == pytest.approx(caused(weight, E), rel=0.25)
    E = 1e-3 * torch.randn(head.weight.shape, generator=g)
    as_head = 0.5 * float(found.head @ ((E @ last) * E).sum(1).double())
    as_table = 0.5 * float(found.shares @ ((E.double() @ found.table) * E).sum(1))
    if tied:
        assert as_head + as_table == pytest.approx(caused(head.weight, E), rel=0.25)
    else:
        assert as_head == pytest.approx(caused(head.weight, E), rel=0.1)
        assert as_table == pytest.approx(caused(model.net.get_input_embeddings().weight, E), rel=0.25)


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
    before, g = log_p(model, windows), torch.Generator().manual_seed(1)
    table, head = model.net.get_input_embeddings().weight, model.net.get_output_embeddings().weight
    for weight in [table] if table is head else [table, head]:
        E = 1e-4 * torch.randn(weight.shape, generator=g) * weight.std()
        predicted = 0.0
        if weight is head:
            predicted += 0.5 * float(found.head @ ((E @ last) * E).sum(1).double())
        if weight is table:
            predicted += 0.5 * float(found.shares @ ((E.double() @ found.table) * E).sum(1))
        with torch.no_grad():
            weight.add_(E)
            after = log_p(model, windows)
            weight.sub_(E)
        caused = float((before.exp() * (before - after)).sum(1).mean())
        assert predicted == pytest.approx(caused, rel=0.35)


def test_sensitivity_of_the_head_is_the_variance_of_each_tokens_indicator() -> None:
    model, windows = lively(), drawn(3, 16)
    found = sensitivity.measure(model, windows, [], 0)
    p = log_p(model, windows[:, :-1]).exp()
    torch.testing.assert_close(found.head, (p * (1 - p)).sum(0) / windows.numel(), rtol=1e-4, atol=1e-9)
    counts = torch.bincount(windows.flatten(), minlength=264).double()
    torch.testing.assert_close(found.shares, counts / windows.numel())


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = lively()
    model.net.train()
    for p in model.net.parameters():
        p.requires_grad_(True)
    sensitivity.measure(model, drawn(1, 8), list(NAMES), 0)
    assert model.net.training
    assert all(p.requires_grad and p.grad is None for p in model.net.parameters())
    assert not any(m._forward_hooks for m in model.net.modules())


# Costs ----------------------------------------------------------------------------------------------


def test_a_cost_is_the_weighted_error_of_rounding() -> None:
    g = torch.Generator().manual_seed(2)
    W, F, c = (
        torch.randn(6, 64, generator=g),
        torch.rand(6, generator=g).double(),
        torch.rand(64, generator=g),
    )
    for option in costs.of_matrix(W, [Term(F, c)]):
        grid = Grid(option.candidate.grid, option.candidate.bits)
        parts = []
        for at in (slice(0, 32), slice(32, 64)):
            scale, zero = grid.find(W[:, at], c[at])
            codes = grid.codes(W[:, at], scale, zero)
            steps = codes - zero[:, None] if grid.levels is None else grid.levels.float()[codes.int()]
            parts.append(steps * scale[:, None])
        error = (W - torch.cat(parts, 1)).double()
        assert option.cost == pytest.approx(float(F @ (error.square() @ c.double())) / 2, rel=1e-5)


def test_super_blocks_are_offered_where_they_fit() -> None:
    terms = [Term(torch.ones(2).double(), torch.ones(256))]
    kinds = {o.candidate.kind: o.bytes for o in costs.of_matrix(torch.randn(2, 256), terms)}
    assert kinds["Q6_K"] == 2 * 210 + 28  # in steps of 32
    assert kinds["Q8_0"] == 2 * 8 * 34
    narrow = costs.of_matrix(torch.randn(2, 96), [Term(torch.ones(2).double(), torch.ones(96))])
    assert {o.candidate.kind for o in narrow} == {"Q4_0", "IQ4_NL", "Q5_0", "Q8_0"}


def test_a_pruned_matrix_gets_a_grid_with_a_zero() -> None:
    W = torch.randn(4, 256) * (torch.rand(4, 256, generator=torch.Generator().manual_seed(0)) > 0.5)
    found = costs.of_matrix(W, [Term(torch.ones(4).double(), torch.ones(256))])
    assert {o.candidate.kind for o in found} == {"Q4_0", "Q5_0", "Q8_0", "Q6_K", "Q3_K"}


# The choice -----------------------------------------------------------------------------------------

options = st.lists(
    st.builds(lambda size, cost: Option(A, size, float(cost)), st.integers(1, 9), st.integers(0, 20)),
    min_size=1,
    max_size=4,
)


@given(st.lists(options, min_size=1, max_size=4), st.integers(0, 40))
def test_no_choice_of_as_many_bytes_costs_less(each: list[list[Option]], spare: int) -> None:
    """While every step fits: optimal for the bytes used; always within the budget, and no further step of a hull fits."""
    table = {str(i): found for i, found in enumerate(each)}
    budget = sum(min(o.bytes for o in found) for found in each) + spare
    chosen = costs.choose(table, budget)
    used, cost = (sum(getattr(o, n) for o in chosen.values()) for n in ("bytes", "cost"))
    assert used <= budget
    for name, option in chosen.items():
        later = [o for o in costs.hull(table[name]) if o.bytes > option.bytes]
        assert not later or later[0].bytes - option.bytes > budget - used
    best = min(
        sum(o.cost for o in found)
        for found in itertools.product(*each)
        if sum(o.bytes for o in found) <= budget
    )
    largest = max((b.cost - a.cost for found in each for a in found for b in found), default=0.0)
    assert best <= cost <= best + largest, "off by one matrix's step at most"


@given(options)
def test_a_hull_is_convex_and_has_the_cheapest(found: list[Option]) -> None:
    hull = costs.hull(found)
    assert hull[0].bytes == min(o.bytes for o in found)
    assert hull[-1].cost == min(o.cost for o in found)
    gains = [(a.cost - b.cost) / (b.bytes - a.bytes) for a, b in itertools.pairwise(hull)]
    assert all(gain > 0 for gain in gains)
    assert all(a > b for a, b in itertools.pairwise(gains))


def test_the_smallest_of_each_must_fit() -> None:
    table = {"a": [Option(A, 5, 1.0), Option(A, 7, 0.0)], "b": [Option(A, 4, 1.0)]}
    assert costs.choose(table, 9)["a"].bytes == 5
    assert costs.choose(table, 11)["a"].bytes == 7
    with pytest.raises(ValueError, match="too few"):
        costs.choose(table, 8)


def test_a_step_that_does_not_fit_leaves_its_bytes_to_others() -> None:
    table = {"large": [Option(A, 1, 9.0), Option(A, 9, 0.0)], "small": [Option(A, 1, 1.0), Option(A, 3, 0.0)]}
    chosen = costs.choose(table, 5)
    assert (chosen["large"].bytes, chosen["small"].bytes) == (1, 3)


def test_bytes_of_a_candidate_are_a_multiple_of_32() -> None:
    assert Candidate("iq4_nl", 4, "IQ4_NL").bytes(3, 64) == 128  # 108
