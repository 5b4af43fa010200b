# SPDX-License-Identifier: Apache-2.0
"""A byte budget on a mixture: how sensitive experts are, what a grid costs each of their tensors, and how halves are solved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from family_harness import build
from torch import Tensor
from torch.nn import functional as F

from fleetune import compression, models
from fleetune.compression.budget import costs, sensitivity
from fleetune.compression.budget.costs import CANDIDATES, Term
from fleetune.compression.jobs import budget
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.driver import Plan, experts_in, linears_of
from fleetune.compression.layerwise.experts import Experts
from fleetune.models import Model, artefact, tiny_tokenizer
from fleetune.models.artefact import Quantised
from fleetune.models.net import layers
from fleetune.models.shapes import shape_of
from fleetune.planning import compression_cost
from fleetune.runs.listener import Silent

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "granitemoeshared",
    "ernie4_5_moe",
    "gpt_oss",
]


def mixture(family: str, **changes: Any) -> Model:
    """A random mixture, whose predictions depend on its experts."""
    net = build(family, **changes).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if "experts." in name and p.dim() == 3:
            p.mul_(2.0)
    words = tiny_tokenizer()
    return Model(
        net,
        words,
        family,
        Path(family),
        models.digest(models.named_tensors(net)),
        models.tokenizer_digest(words),
        "fp32",
        "cpu",
    )


def drawn(count: int, length: int) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))


def experts_of(model: Model) -> list[Experts]:
    return [each for inside in experts_in(model) for each in inside]


def matrices(each: Experts) -> dict[str, Tensor]:
    """Each parameter as [E, out, in]: gpt-oss's are [E, in, out]."""
    return {n: p.mT if "gate_up_proj_bias" in dir(each.module) else p for n, p in each.parameters.items()}


def gates_and_ups(each: Experts, number: int, x: Tensor) -> Tensor:
    """What an expert's first matrix returns [n, 2 F], in the type of x."""
    W = each.module.gate_up_proj[number].to(x)
    if "gate_up_proj_bias" in dir(each.module):  # gpt-oss
        return x @ W + each.module.gate_up_proj_bias[number].to(x)
    return x @ W.T


def inputs_of_downs(each: Experts, z: Tensor) -> Tensor:
    """What an expert's second matrix reads [n, F]."""
    if "gate_up_proj_bias" in dir(each.module):
        gate, up = z[:, ::2].clamp(max=7), z[:, 1::2].clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = z.chunk(2, -1)
    return F.silu(gate) * up


def downs(each: Experts, number: int, a: Tensor) -> Tensor:
    """What it returns [n, H]."""
    W = each.module.down_proj[number]
    if "gate_up_proj_bias" in dir(each.module):
        return a @ W + each.module.down_proj_bias[number]
    return a @ W.T


def log_p(model: Model, windows: Tensor) -> Tensor:
    """Log-probabilities [tokens, V] in float64."""
    with torch.no_grad():
        return model.net(input_ids=windows).logits.double().log_softmax(-1).flatten(0, 1)


# ---------------------------------------------------------------- sensitivity


@contextmanager
def squares_by_autograd(experts: list[Experts]) -> Iterator[dict[str, Tensor]]:
    """Let experts run one at a time, and sum the squared gradients by what each matrix returns as autograd has them."""
    sums = {
        n: torch.zeros(W.shape[:2], dtype=torch.float64)
        for each in experts
        for n, W in matrices(each).items()
    }

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
                y = downs(each, number, inputs_of_downs(each, z))
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
    assert found.estimated == []
    assert set(found.experts) == set(want)
    for name, of in found.experts.items():
        assert of.count_nonzero() > 0
        torch.testing.assert_close(of * windows.numel(), want[name], rtol=1e-3, atol=1e-9)


def test_activations_that_are_computed_again_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = mixture("qwen3_moe"), drawn(2, 24)
    found = []
    for small in (1 << 40, 0):
        monkeypatch.setattr(layers, "SMALL", small)
        found.append(sensitivity.measure(model, windows, [], 3, experts=experts_of(model)).experts)
    for name, of in found[0].items():
        torch.testing.assert_close(of, found[1][name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_predicted_divergence_is_the_one_that_small_errors_cause(family: str) -> None:
    """1/2 sum F_i (E_i H E_i') of the tokens of an expert, against the KL divergence in float64.

    In the last block: behind others a token may be sent to another expert, a jump that no gradient tells.
    """
    model, windows = mixture(family), drawn(48, 24)
    experts = experts_of(model)
    found = sensitivity.measure(model, windows, [], 3, experts=experts)
    inputs = inputs_of(model, experts[-1], windows)
    before, g = log_p(model, windows), torch.Generator().manual_seed(1)
    for name, weight in matrices(experts[-1]).items():
        E, predicted = torch.zeros_like(weight), 0.0
        for number in (0, 3):
            E[number] = 1e-2 * torch.randn(weight[number].shape, generator=g)
            x = inputs[name][number]
            outputs = (x @ E[number].double().T).square().mean(0)
            predicted += 0.5 * float(found.experts[name][number] @ outputs)
        with torch.no_grad():
            weight.add_(E)
            after = log_p(model, windows)
            weight.sub_(E)
        caused = float((before.exp() * (before - after)).sum(1).mean())
        assert predicted == pytest.approx(caused, rel=0.25)


@torch.no_grad()
def inputs_of(model: Model, each: Experts, windows: Tensor) -> dict[str, list[Tensor]]:
    """What the matrices of each expert read, float64 [its tokens, C], by parameter."""
    calls: list[tuple[Tensor, Tensor]] = []
    hook = each.module.register_forward_pre_hook(lambda module, args: calls.append((args[0], args[1])))
    for window in windows:
        model.net(input_ids=window[None], use_cache=False)
    hook.remove()
    x, chosen = torch.cat([a for a, _ in calls]).double(), torch.cat([b for _, b in calls])
    found: dict[str, list[Tensor]] = {name: [] for name in each.parameters}
    for number in range(len(each.module.gate_up_proj)):
        mine = x[(chosen == number).any(-1)]
        read = inputs_of_downs(each, gates_and_ups(each, number, mine))
        for name, of in zip(found, (mine, read), strict=True):
            found[name].append(of)
    return found


class Heard(Silent):
    """Keeps the remarks."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_experts_that_compute_in_another_way_are_said() -> None:
    model, windows, heard = mixture("qwen3_moe"), drawn(1, 24), Heard()
    module = experts_of(model)[2].module
    normed, plain = module.forward, module.forward
    module.forward = lambda *args: F.normalize(normed(*args), dim=-1)
    found = budget.measured(heard, model, windows, 0)
    assert heard.notes == [
        "how much the experts of 1 layer change the predictions is an estimate: they return something else than the sum of "
        "what each computes"
    ]
    assert len(found.options) == 4 * (4 + 2) + 2
    heard.notes.clear()
    module.forward = plain
    budget.measured(heard, model, windows, 0)
    assert heard.notes == []


def test_what_measuring_keeps_is_planned() -> None:
    """The sums of squares, and the inputs of each layer's experts from the pass forward on."""
    model, windows = mixture("ernie4_5_moe"), drawn(2, 24)  # the first block has none
    experts = experts_of(model)
    found = sensitivity.measure(model, windows, [], 3, experts=experts)
    kept = sum(of.numel() * of.element_size() for of in found.experts.values())
    entering = sum(4 * x.numel() for each in experts for x in whole_inputs(model, each, windows[:1]))
    size = compression_cost.CompressionSize(2, 24, size=4, budget=True)
    assert compression_cost._sensitivity(shape_of(model.net.config), size) == kept + entering
    assert compression_cost._sensitivity(shape_of(models.tiny_llama().net.config), size) == 0


# ---------------------------------------------------------------- costs


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_parameter_costs_what_its_experts_do(family: str) -> None:
    """Each with its own gradients and inputs; an expert that few tokens chose with the inputs of all."""
    model, windows = mixture(family), drawn(4, 24)
    experts = experts_of(model)
    found = sensitivity.measure(
        model, windows, [n for _, l in linears_of(model) for n in l], 3, experts=experts
    )
    got = costs.measure(model, windows, found)
    each, few = experts[0], 0  # behind the dense attention of the first block
    every = inputs_of(model, each, windows)
    whole = torch.cat(whole_inputs(model, each, windows))
    for name, weight in matrices(each).items():
        want = dict[Any, float]()
        for number in range(len(weight)):
            x, C = every[name][number], weight.shape[2]
            if len(x) < C:
                few += 1
                x = whole
                if name.endswith("down_proj"):
                    x = inputs_of_downs(each, gates_and_ups(each, number, whole))
            c = costs._curvature((x.T @ x / len(x)).float())
            for option in costs.of_matrix(weight[number], [Term(found.experts[name][number], c)]):
                want[option.candidate] = want.get(option.candidate, 0.0) + option.cost
        options = {option.candidate: option for option in got.options[name]}
        assert set(options) == set(want) == set(CANDIDATES[:4])
        for candidate, option in options.items():
            assert option.cost == pytest.approx(want[candidate], rel=1e-3)
            assert option.bytes == candidate.bytes(5 * weight.shape[1], weight.shape[2])
    assert few > 0


def whole_inputs(model: Model, each: Experts, windows: Tensor) -> list[Tensor]:
    calls: list[Tensor] = []
    hook = each.module.register_forward_pre_hook(lambda module, args: calls.append(args[0].double()))
    for window in windows:
        model.net(input_ids=window[None], use_cache=False)
    hook.remove()
    return calls


def test_one_pruned_expert_gives_all_of_its_layer_a_grid_with_a_zero() -> None:
    model, windows = (
        mixture("qwen3_moe", moe_intermediate_size=256, hidden_size=256, num_hidden_layers=2),
        drawn(1, 16),
    )
    each = experts_of(model)[1]
    each.module.gate_up_proj[3, 256:, :200] = 0.0  # of the ups
    before = costs.reach(
        mixture("qwen3_moe", moe_intermediate_size=256, hidden_size=256, num_hidden_layers=2)
    )
    names = [n for _, l in linears_of(model) for n in l]
    found = costs.measure(
        model, windows, sensitivity.measure(model, windows, names, 0, experts=experts_of(model))
    )
    gates_and_ups, downs = (
        {option.candidate.kind for option in found.options[name]} for name in each.parameters
    )
    assert downs == {candidate.kind for candidate in CANDIDATES}
    assert gates_and_ups == {"Q4_0", "Q5_0", "Q8_0", "Q6_K", "Q3_K"}
    q2, q3 = (next(c for c in CANDIDATES if c.kind == kind).bytes(5 * 256, 256) for kind in ("Q2_K", "Q3_K"))
    after = costs.reach(model)
    assert after.least == before.least - 2 * q2 + 2 * q3
    assert after.least == sum(min(o.bytes for o in options) for options in found.options.values())
    assert after.most == sum(max(o.bytes for o in options) for options in found.options.values())


# ---------------------------------------------------------------- solving


@pytest.mark.parametrize("method", ["optq", "qronos"])
def test_gates_with_ups_and_downs_on_grids_of_their_own_are_solved_as_alone(
    method: str, tmp_path: Path
) -> None:
    model, windows = mixture("qwen3_moe"), drawn(8, 32)
    solver: Any = compression.make(method, {"group": 32})
    both, first, second = (
        ("both", "iq4_nl", "ggml"),
        ("first", "iq4_nl", "iq4_nl"),
        ("second", "ggml", "ggml"),
    )
    found = {}
    for at, gates_and_ups, downs in (both, first, second):
        solvers = {f"{n}.weight": solver for _, linears in linears_of(model) for n in linears}
        for each in experts_of(model):
            of_both = zip(each.parameters, (gates_and_ups, downs), strict=True)
            solvers |= {name: dataclasses.replace(solver, grid=grid) for name, grid in of_both}
        found[at] = driver.run(model, solver, windows, tmp_path / at, plan=Plan(solvers, []), experts=True)
    # of the first block, whose inputs are the same in all; qronos gives the downs inputs from solved gates and ups
    gates_and_ups, downs = experts_of(model)[0].parameters
    got, want = found["both"][gates_and_ups], found["first"][gates_and_ups]
    assert isinstance(got, Quantised)
    assert isinstance(want, Quantised)
    assert (got.codebook, got.experts) == ("iq4_nl", 5)
    assert torch.equal(got.dense(), want.dense())
    other = found["both"][downs]
    assert isinstance(other, Quantised)
    assert (other.codebook, other.experts) == ("", 5)
    if method == "optq":
        assert torch.equal(other.dense(), artefact.dense(found["second"][downs]))
