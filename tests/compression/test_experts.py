"""Experts: each matrix is solved with the tokens that its expert saw; few are said; runs resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_harness import activated, experts_of, gates_and_ups, read_by
from spy_harness import Spy, text
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import fleetune
from fleetune import compression, models
from fleetune.compression.layerwise import driver
from fleetune.compression.layerwise.driver import linears_of, place_weights, restored_weights
from fleetune.compression.layerwise.experts import Experts
from fleetune.models import Model, tiny_tokenizer
from fleetune.models.artefact import Master
from tiny_families import TOKENS, sizes

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about made-up sizes
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SIZES = (
    sizes(32, 64, 3, 4, 2, head_dim=8, max_position_embeddings=128, norm_topk_prob=True) | TOKENS | EXPERTS
)
FORMS = ["qwen3_moe", "gpt_oss"]


def model_of(family: str, **changes: Any) -> Model:
    """A mixture whose first expert is chosen by few tokens."""
    model = models.tiny_llama()
    config = AutoConfig.for_model(family, **SIZES | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() > 1 else p)
            if name.endswith(("mlp.gate.weight", "router.weight")):
                p[0] *= 0.05  # its score is near the middle of the others', and rarely among the two largest
    model.net = net
    return model


def folder_of(family: str, folder: Path, **changes: Any) -> Path:
    models.save(model_of(family, **changes).net, tiny_tokenizer(), folder)
    return folder


def inputs_of(model: Model, each: Experts, windows: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """For each expert, how many tokens chose it, and what its two matrices read: of these tokens, or of all if few."""
    (x, chosen), found = read_by(model, each, windows), []
    for number in range(len(each.module.gate_up_proj)):
        mine = (chosen == number).any(-1).nonzero()[:, 0]
        read = x, activated(each, gates_and_ups(each, number, x))
        found.append((len(mine), *(a[mine] if len(mine) >= a.shape[1] else a for a in read)))
    return found


class Unmoved(Spy):
    """A spy whose layers are solved in turn."""

    def correct(self, W: Tensor, H: Tensor, D: Tensor) -> Tensor:
        return W


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("in_turn", [False, True])
def test_hessians_are_of_the_tokens_that_an_expert_saw(family: str, in_turn: bool, tmp_path: Path) -> None:
    """In the compressed model: with its own block as it was, or up to this matrix."""
    model, spy, windows = model_of(family), Unmoved() if in_turn else Spy(), text(4, 24)
    before = {n: p.clone() for n, p in model.net.named_parameters()}
    parts = driver.run(model, spy, windows, tmp_path, experts=True)
    assert all(torch.equal(p, before[n]) for n, p in model.net.named_parameters())  # the model is as it was
    every, blocks, at, few = experts_of(model), linears_of(model), 0, 0
    own = {name: (i, j) for i, each in enumerate(every) for j, name in enumerate(each.parameters)}
    for block in parts.blocks:
        for matrix in block.matrices:
            if matrix.name not in own:
                at += 1
                continue
            number, part = own[matrix.name]
            done = dict(l for _, found in blocks[:number] for l in found.items())
            now = dict(blocks[number][1]) if in_turn else {}
            with restored_weights(done | now, every):
                place_weights(done, parts, every[:number])
                place_weights(now, parts)
                if in_turn and part:  # the gates and ups are in place, the downs not yet
                    name = f"{every[number].name}.gate_up_proj"
                    every[number].module.gate_up_proj.data = parts[name]
                want = inputs_of(model, every[number], windows)
            for tokens, *inputs in want:
                x, got = inputs[part], spy.seen[at].double()
                torch.testing.assert_close(got, 2 * x.T @ x, rtol=1e-4, atol=1e-4 * got.abs().max().item())
                few += tokens < x.shape[1]
                at += 1
    assert at == len(spy.seen)
    assert 0 < few < 3 * 2 * 4


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("method", ["rtn", "optq"])
def test_an_expert_is_solved_as_a_layer_is(method: str, family: str, tmp_path: Path) -> None:
    """The codes of each are those that the solver gives for its matrix and Hessian alone."""
    model, windows = model_of(family), text(8, 24)
    solver = compression.make(method, {"group": 16})
    parts = driver.run(model, solver, windows if solver.data else None, tmp_path, experts=True)
    each = experts_of(model)[0]
    for number, (_, x, down) in enumerate(inputs_of(model, each, windows)):
        for name, inputs in zip(each.parameters, (x, down), strict=True):
            W, q = each.parameters[name][number], parts[name]
            W = W.T.contiguous() if family == "gpt_oss" else W
            assert q.experts == 4
            H = (2 * inputs.T @ inputs).float()
            one = solver.solve(W, H).weight
            rows = slice(number * len(W), (number + 1) * len(W))
            same = (q.codes[rows] == one.codes).float().mean().item()
            assert same == 1.0 if method == "rtn" else same > 0.99  # the sums were added in another order


def test_experts_of_which_transformers_says_nothing_stay(tmp_path: Path) -> None:
    """Whether their matrices are [in, out], and what is between them."""
    changes = {"intermediate_size_mlp": 64, "attention_chunk_size": 64, "no_rope_layers": [1] * 3}
    assert driver.experts_left(model_of("llama4_text", **changes), taken=True) == 3
    assert driver.experts_left(model_of("qwen3_moe"), taken=True) == 0
    assert driver.experts_left(model_of("qwen3_moe"), taken=False) == 3
    assert driver.experts_left(models.tiny_llama(), taken=False) == 0
    folder = folder_of("llama4_text", tmp_path / "m", **changes)
    made = fleetune.compress(folder, method="rtn", settings={"group": 32}, out=tmp_path / "runs").folder
    assert Master(made / "model").head.experts == {}
