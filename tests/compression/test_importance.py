"""What the loss would rise by without a group, against autograd in float64, and which groups stay."""

import pytest
import torch
from gkd_harness import rows
from pruner_harness import gradients, importance, pruner, stop_at, tiny
from torch import Tensor

from fleetune.compression.importance import AGGREGATES, Shares, choose, count_kept, estimate
from fleetune.data import Encoded
from fleetune.errors import Interrupted
from fleetune.models import Model, digest, named_tensors


def by_hand(model: Model, data: list[Encoded], kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Each group's importance in q, k, v, o and in gate, up, down, one group and one row or column at a time."""
    grads, at = gradients(model, data), f"model.layers.{block}."
    found: dict[str, Tensor] = {}
    for name, p in model.net.named_parameters():
        if name.startswith(at):
            found[name.removeprefix(at)] = importance(kind, p, grads[name])
    c = model.net.config
    n_rep, d = c.num_attention_heads // c.num_key_value_heads, c.head_dim
    heads = torch.zeros(4, c.num_key_value_heads).double()
    channels = torch.zeros(3, c.intermediate_size).double()
    for h in range(c.num_attention_heads):
        for i in range(h * d, (h + 1) * d):
            heads[0, h // n_rep] += found["self_attn.q_proj.weight"][i].sum()
            heads[3, h // n_rep] += found["self_attn.o_proj.weight"][:, i].sum()
            if "self_attn.q_proj.bias" in found:
                heads[0, h // n_rep] += found["self_attn.q_proj.bias"][i]
    for g in range(c.num_key_value_heads):
        for i in range(g * d, (g + 1) * d):
            for number, part in ((1, "k"), (2, "v")):
                heads[number, g] += found[f"self_attn.{part}_proj.weight"][i].sum()
                if f"self_attn.{part}_proj.bias" in found:
                    heads[number, g] += found[f"self_attn.{part}_proj.bias"][i]
    for i in range(c.intermediate_size):
        for number, part in enumerate(("gate", "up")):
            channels[number, i] += found[f"mlp.{part}_proj.weight"][i].sum()
            if f"mlp.{part}_proj.bias" in found:
                channels[number, i] += found[f"mlp.{part}_proj.bias"][i]
        channels[2, i] += found["mlp.down_proj.weight"][:, i].sum()
    return heads, channels


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("magnitude", "qwen2"),
        ("first", "biased llama"),
        ("first", "qwen2"),
        ("second", "llama"),
        ("mixed", "qwen3"),
    ],
)
def test_importance_is_the_papers(kind: str, family: str) -> None:
    """Against autograd in float64 on whole logits; rows of different lengths tell mean losses from mean tokens."""
    model = tiny(family.split()[-1], biases=family.startswith("biased"))
    data = rows(1, 3)
    asked: list[tuple[int, int]] = []
    found = estimate(model, data, kind, [1, 2], lambda row, all_: asked.append((row, all_)))
    assert asked == ([] if kind == "magnitude" else [(1, 3), (2, 3), (3, 3)])
    assert sorted(found) == [1, 2]
    for block, shares in found.items():
        for mine, theirs in zip(shares, by_hand(model, data, kind, block), strict=True):
            assert mine.dtype == torch.float64
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=1e-9)


def test_estimation_leaves_the_model_as_it_was() -> None:
    model = tiny()
    before = digest(named_tensors(model.net))
    with pytest.raises(Interrupted):
        estimate(model, rows(1, 3), "mixed", [1], stop_at(2))
    estimate(model, rows(1, 3), "mixed", [1, 2])
    assert digest(named_tensors(model.net)) == before
    for p in model.net.parameters():
        assert (p.grad, p.requires_grad, bool(p._post_accumulate_grad_hooks)) == (None, False, False)


def test_counts_are_rounded_to_multiples() -> None:
    counts = {1: 1229, 32: 1216, 128: 1280, 1024: 1024, 2000: 1536}
    assert {step: count_kept(1536, 1536 * 0.8, step) for step in counts} == counts
    assert count_kept(10, 10 * (1 - 0.8), 1) == 2  # int(10 (1 - 0.8)) is 1
    assert count_kept(3, 0.1, 1) == 1
    assert count_kept(100, 95, 32) == 96
    assert count_kept(100, 99, 64) == 100  # 128 there are not


SCORES = {
    1: torch.tensor([5.0, 1, 4, 2, 3, 9]).double(),
    2: torch.tensor([0.5, 0.1, 0.4, 0.2, 0.3, 8]).double(),
}


def test_local_and_global_choices() -> None:
    assert choose(SCORES, 0.5, 1, False) == {1: [0, 2, 5], 2: [0, 2, 5]}
    assert choose(SCORES, 0.5, 2, False) == {1: [0, 2, 4, 5], 2: [0, 2, 4, 5]}
    assert choose(SCORES, 0.5, 1, True) == {1: [0, 2, 3, 4, 5], 2: [5]}
    assert choose(SCORES, 0.5, 2, True) == {1: [0, 1, 2, 3, 4, 5], 2: [0, 5]}
    none = {1: SCORES[1] + 100, 2: SCORES[2]}
    assert choose(none, 0.5, 1, True) == {1: [0, 1, 2, 3, 4, 5], 2: [5]}  # one stays everywhere
    assert choose({1: torch.ones(4).double()}, 0.5, 1, False) == {1: [0, 1]}


def test_aggregates() -> None:
    shares = torch.tensor([[1.0, 2.0, 0.5], [4.0, 2.0, 1.0]]).double()
    want = {"sum": [5, 4, 1.5], "mean": [2.5, 2, 0.75], "max": [4, 2, 1], "prod": [4, 4, 0.5]}
    assert {name: f(shares).tolist() for name, f in AGGREGATES.items()} == want
    model = tiny()
    blocks, flat = model.net.model.layers, torch.arange(40).double()
    heads = torch.tensor([[6.0, 4, 5], [0, 4, 0.1], [0, 4, 0], [0, 4, 0]]).double()
    shares_of = {i: Shares(heads, flat.expand(3, 40)) for i in (1, 2)}
    assert pruner(aggregate="max").select(blocks, shares_of)[1].heads == [0, 2]
    assert pruner(aggregate="sum").select(blocks, shares_of)[1].heads == [0, 1]
