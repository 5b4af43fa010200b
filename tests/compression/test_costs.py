"""What a grid costs each matrix, and the choice that costs least within a budget."""

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixture_harness import activated, experts_of, gates_and_ups, inputs_of, matrices, mixture, read_by
from torch import Tensor

from fleetune.compression.jobs.budget import hull, solve_budget
from fleetune.compression.layerwise import costs, sensitivity
from fleetune.compression.layerwise.costs import CANDIDATES, Candidate, Option, Term
from fleetune.compression.layerwise.driver import linears_of
from fleetune.compression.layerwise.grids import Grid

A = CANDIDATES[0]


def test_a_cost_is_the_weighted_error_of_rounding() -> None:
    g = torch.Generator().manual_seed(2)
    W, F = torch.randn(6, 64, generator=g), torch.rand(6, generator=g).double()
    c = torch.rand(64, generator=g)
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


option = st.builds(lambda size, cost: Option(A, size, float(cost)), st.integers(1, 9), st.integers(0, 20))
options = st.lists(option, min_size=1, max_size=4)


@given(st.lists(options, min_size=1, max_size=4), st.integers(0, 40))
def test_no_choice_of_as_many_bytes_costs_less(each: list[list[Option]], spare: int) -> None:
    """While every step fits: optimal for the bytes used; always within the budget, and no further step of a hull fits."""
    table = {str(i): found for i, found in enumerate(each)}
    most = sum(min(o.bytes for o in found) for found in each) + spare
    chosen = solve_budget(table, most)
    used, cost = (sum(getattr(o, n) for o in chosen.values()) for n in ("bytes", "cost"))
    assert used <= most
    for name, option in chosen.items():
        later = [o for o in hull(table[name]) if o.bytes > option.bytes]
        assert not later or later[0].bytes - option.bytes > most - used
    best = min(sum(o.cost for o in found) for found in product(*each) if sum(o.bytes for o in found) <= most)
    largest = max((b.cost - a.cost for found in each for a in found for b in found), default=0.0)
    assert best <= cost <= best + largest, "off by one matrix's step at most"


@given(options)
def test_a_hull_is_convex_and_has_the_cheapest(found: list[Option]) -> None:
    corners = hull(found)
    assert corners[0].bytes == min(o.bytes for o in found)
    assert corners[-1].cost == min(o.cost for o in found)
    gains = [(a.cost - b.cost) / (b.bytes - a.bytes) for a, b in pairwise(corners)]
    assert all(gain > 0 for gain in gains)
    assert all(a > b for a, b in pairwise(gains))


def test_the_smallest_of_each_must_fit() -> None:
    table = {"a": [Option(A, 5, 1.0), Option(A, 7, 0.0)], "b": [Option(A, 4, 1.0)]}
    assert solve_budget(table, 9)["a"].bytes == 5
    assert solve_budget(table, 11)["a"].bytes == 7
    with pytest.raises(ValueError, match="too few"):
        solve_budget(table, 8)


def test_bytes_of_a_candidate_are_a_multiple_of_32() -> None:
    assert Candidate("iq4_nl", 4, "IQ4_NL").bytes(3, 64) == 128  # 108


pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes


def drawn(count: int, length: int) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))


def test_a_parameter_costs_what_its_experts_do() -> None:
    """Each with its own gradients and inputs; an expert that few tokens chose with the inputs of all."""
    model, windows = mixture("gpt_oss"), drawn(4, 24)
    experts = experts_of(model)
    names = [n for _, linears in linears_of(model) for n in linears]
    found = sensitivity.measure(model, windows, names, 3, experts=experts)
    got = costs.measure(model, windows, found)
    each, few = experts[0], 0  # behind the dense attention of the first block
    every = inputs_of(model, each, windows)
    whole = read_by(model, each, windows)[0]
    for name, weight in matrices(each).items():
        want = dict[Any, float]()
        for number in range(len(weight)):
            x, C = every[name][number], weight.shape[2]
            if len(x) < C:
                few += 1
                x = whole
                if name.endswith("down_proj"):
                    x = activated(each, gates_and_ups(each, number, whole))
            c = costs._curvature((x.T @ x / len(x)).float())
            for option in costs.of_matrix(weight[number], [Term(found.experts[name][number], c)]):
                want[option.candidate] = want.get(option.candidate, 0.0) + option.cost
        options = {option.candidate: option for option in got.options[name]}
        assert set(options) == set(want) == set(CANDIDATES[:4])
        for candidate, option in options.items():
            assert option.cost == pytest.approx(want[candidate], rel=1e-3)
            assert option.bytes == candidate.bytes(5 * weight.shape[1], weight.shape[2])
    assert few > 0


def test_one_pruned_expert_gives_all_of_its_layer_a_grid_with_a_zero() -> None:
    model = mixture("qwen3_moe", moe_intermediate_size=256, hidden_size=256, num_hidden_layers=1)
    before = costs.reach(model)
    experts_of(model)[0].module.gate_up_proj[3, 256:, :200] = 0.0  # of the ups
    after = costs.reach(model)
    q2, q3 = (next(c for c in CANDIDATES if c.kind == kind).bytes(5 * 256, 256) for kind in ("Q2_K", "Q3_K"))
    assert after.least == before.least - 2 * q2 + 2 * q3
    assert after.most == before.most


def test_a_sample_of_rows_stands_for_all_of_a_large_matrix(monkeypatch):
    g = torch.Generator().manual_seed(3)
    W = torch.randn(3000, 64, generator=g) * torch.rand(3000, 1, generator=g)
    F = torch.rand(3000, generator=g).double() ** 8  # a few rows bear most
    F[::7] = 0.0
    terms = [
        costs.Term(F, torch.rand(64, generator=g)),
        costs.Term(F.flip(0) / 3, torch.rand(64, generator=g)),
    ]
    some = costs.of_matrix(W, terms)
    monkeypatch.setattr(costs, "ROWS", 3000)
    for sampled, whole in zip(some, costs.of_matrix(W, terms), strict=True):
        assert sampled.cost == pytest.approx(whole.cost, rel=0.1)
        assert sampled._replace(cost=0.0) == whole._replace(cost=0.0)
