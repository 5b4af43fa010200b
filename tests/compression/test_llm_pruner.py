# SPDX-License-Identifier: Apache-2.0
"""LLM-Pruner: groups and their importance, what stays, that the rest computes what it should, recovery."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gkd_harness import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pruner_harness import IDS, gradients, importance, logits, pruner, stop_at, tiny
from torch import Tensor

from fleetune import models
from fleetune.compression.pruning.importance import Shares, estimate
from fleetune.compression.pruning.importance import AGGREGATES, choose, count_kept
from fleetune.data import Encoded
from fleetune.errors import DataError, FleetuneError, Interrupted, StorageError, UsageError
from fleetune.models import Model, digest, named_tensors
from fleetune.models.families.widths import KeptUnits, block_widths, cut

# --- importance -----------------------------------------------------------------------------------------------


def by_hand(model: Model, data: list[Encoded], kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Each group's importance in q, k, v, o and in gate, up, down, one group and one row or column at a time."""
    grads, at = gradients(model, data), f"model.layers.{block}."
    found: dict[str, Tensor] = {}
    for name, p in model.net.named_parameters():
        if name.startswith(at):
            found[name.removeprefix(at)] = importance(kind, p, grads[name])
    c = model.net.config
    n_rep, d = c.num_attention_heads // c.num_key_value_heads, c.head_dim
    heads, channels = (
        torch.zeros(4, c.num_key_value_heads).double(),
        torch.zeros(3, c.intermediate_size).double(),
    )
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


@pytest.mark.parametrize("kind", ["magnitude", "first", "second", "mixed"])
@pytest.mark.parametrize("family", ["llama", "biased llama", "qwen2", "qwen3"])
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
    assert all(
        p.grad is None and not p.requires_grad and not p._post_accumulate_grad_hooks
        for p in model.net.parameters()
    )


def test_a_head_is_credited_to_the_key_head_that_it_reads(tmp_path: Path) -> None:
    """9 query heads on 3 key heads: by h // 3 the first key head matters least, by h % 3 the second."""
    model = tiny()
    scale = torch.tensor([9.0, 1, 1, 5, 5, 5, 6, 2, 6])
    assert scale.view(3, 3).sum(1).argmin() == 0
    assert scale.view(3, 3).sum(0).argmin() == 1
    for block in model.net.model.layers:
        for name, p in block.self_attn.named_parameters():
            p.fill_(1.0) if name != "q_proj.weight" else p.copy_(
                scale.repeat_interleave(4)[:, None].expand_as(p)
            )
    pruner(importance="magnitude").prune(model, rows(0, 2), tmp_path)
    kept = json.loads((tmp_path / "kept.json").read_text())["blocks"]
    assert kept["1"]["heads"] == kept["2"]["heads"] == [1, 2]


# --- what stays -----------------------------------------------------------------------------------------------


def test_counts_are_rounded_to_multiples() -> None:
    assert [count_kept(1536, 1536 * 0.8, step) for step in (1, 32, 128, 1024, 2000)] == [
        1229,
        1216,
        1280,
        1024,
        1536,
    ]
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
    assert {name: f(shares).tolist() for name, f in AGGREGATES.items()} == {
        "sum": [5, 4, 1.5],
        "mean": [2.5, 2, 0.75],
        "max": [4, 2, 1],
        "prod": [4, 4, 0.5],
    }
    model = tiny()
    blocks, flat = model.net.model.layers, torch.arange(40).double()
    heads = torch.tensor([[6.0, 4, 5], [0, 4, 0.1], [0, 4, 0], [0, 4, 0]]).double()
    shares_of = {i: Shares(heads, flat.expand(3, 40)) for i in (1, 2)}
    assert pruner(aggregate="max").select(blocks, shares_of)[1].heads == [0, 2]
    assert pruner(aggregate="sum").select(blocks, shares_of)[1].heads == [0, 1]


def test_spared_blocks_and_widths(tmp_path: Path) -> None:
    model = tiny()
    before = copy.deepcopy(model.net)
    pruned = pruner().prune(model, rows(0, 4), tmp_path / "a")
    assert [tuple(w) for w in block_widths(pruned.net.config)] == [
        (9, 3, 40),
        (6, 2, 28),
        (6, 2, 28),
        (9, 3, 40),
    ]
    for i in (0, 3):
        for (name, p), (_, q) in zip(
            pruned.net.model.layers[i].named_parameters(),
            before.model.layers[i].named_parameters(),
            strict=True,
        ):
            assert torch.equal(p, q), name
    assert pruned.digest == digest(named_tensors(pruned.net)) != digest(named_tensors(before))
    whole = pruner(scope="global").prune(tiny(), rows(0, 4), tmp_path / "b")
    widths = block_widths(whole.net.config)[1:3]
    assert sum(w.num_key_value_heads for w in widths) == 4
    assert all(w.intermediate_size % 4 == 0 for w in widths)


def test_depth_takes_the_least_important_blocks(tmp_path: Path) -> None:
    model = tiny(num_hidden_layers=6)
    for i, scale in enumerate((0.01, 1.0, 0.2, 3.0, 0.1, 0.01)):
        for module in model.net.model.layers[i].modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(scale)
    whole = copy.deepcopy(model.net)
    made = pruner(mode="depth", ratio=0.5, importance="magnitude")
    pruned = made.prune(model, rows(0, 2), tmp_path)
    assert len(pruned.net.model.layers) == pruned.net.config.num_hidden_layers == 4
    for mine, theirs in zip(pruned.net.model.layers, (0, 1, 3, 5), strict=True):
        assert torch.equal(mine.mlp.up_proj.weight, whole.model.layers[theirs].mlp.up_proj.weight)
    assert [layer.self_attn.layer_idx for layer in pruned.net.model.layers] == [0, 1, 2, 3]


# --- what is left computes what it should ---------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data(), st.sampled_from(["llama", "qwen2", "qwen3"]))
def test_a_cut_net_is_the_whole_one_without_what_those_groups_add(data: st.DataObject, family: str) -> None:
    """The columns of o and down that are cut, set to zero in the whole net, give the same function."""
    model = tiny(family, num_hidden_layers=2)
    whole, kept = copy.deepcopy(model.net), []
    for block in whole.model.layers:
        heads = sorted(data.draw(st.sets(st.integers(0, 2), min_size=1)))
        channels = sorted(data.draw(st.sets(st.integers(0, 39), min_size=1, max_size=39)))
        kept.append(KeptUnits(heads, channels))
        for g in {0, 1, 2} - set(heads):
            block.self_attn.o_proj.weight[:, g * 12 : (g + 1) * 12] = 0
        for c in set(range(40)) - set(channels):
            block.mlp.down_proj.weight[:, c] = 0
    cut(model.net, kept)
    torch.testing.assert_close(logits(model.net), logits(whole), rtol=1e-4, atol=1e-5)


def zeroed(family: str) -> Model:
    """A model with a key head and every tenth channel of zeros in its middle blocks."""
    model = tiny(family)
    for i in (1, 2):
        a, f = model.net.model.layers[i].self_attn, model.net.model.layers[i].mlp
        for part, own in ((a.q_proj, slice(12, 24)), (a.k_proj, slice(4, 8)), (a.v_proj, slice(4, 8))):
            part.weight[own] = 0
            if part.bias is not None:
                part.bias[own] = 0
        a.o_proj.weight[:, 12:24] = 0
        f.gate_proj.weight[3::10] = 0
        f.up_proj.weight[3::10] = 0
        f.down_proj.weight[:, 3::10] = 0
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["magnitude", "first", "second", "mixed"])
def test_groups_of_zeros_go_first_and_change_nothing(family: str, kind: str, tmp_path: Path) -> None:
    model = zeroed(family)
    before = logits(model.net)
    pruned = pruner(ratio=0.2, round_to=36, importance=kind).prune(model, rows(3, 3), tmp_path)
    kept = json.loads((tmp_path / "kept.json").read_text())["blocks"]
    for i in ("1", "2"):
        assert kept[i] == {"heads": [0, 2], "channels": [c for c in range(40) if c % 10 != 3]}
    torch.testing.assert_close(logits(pruned.net), before, rtol=1e-5, atol=1e-5)


def test_alike_blocks_make_a_plain_directory(tmp_path: Path) -> None:
    """transformers itself loads it, to the same outputs; one that it cannot hold is refused there and loaded here."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    plain = pruner(first=0, last=0).prune(tiny(), rows(0, 3), tmp_path / "p")
    models.save(plain.net, plain.tokenizer, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    sizes = ("model_type", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")
    assert [config[name] for name in sizes] == ["llama", 6, 2, 28, 4]
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(net), logits(plain.net))
    odd = pruner().prune(tiny(), rows(0, 3), tmp_path / "o")
    models.save(odd.net, odd.tokenizer, tmp_path / "odd")
    with pytest.raises(ValueError, match="fleetune_llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "odd")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(tmp_path / "odd")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_blocks_of_different_widths_are_saved_and_loaded(family: str, tmp_path: Path) -> None:
    whole = tiny(family)
    models.save(whole.net, whole.tokenizer, tmp_path / "whole")
    odd = pruner().prune(whole, rows(0, 3), tmp_path / "o")
    models.save(odd.net, odd.tokenizer, tmp_path / "odd")
    again = models.load(str(tmp_path / "odd"), device="cpu")
    assert again.digest == odd.digest
    assert again.tokenizer_digest == models.load(str(tmp_path / "whole"), device="cpu").tokenizer_digest
    assert torch.equal(logits(again.net), logits(odd.net))
    assert torch.equal(again.net.generate(IDS, max_new_tokens=6), odd.net.generate(IDS, max_new_tokens=6))
    models.save(again.net, again.tokenizer, tmp_path / "twice")
    assert (tmp_path / "twice" / "config.json").read_bytes() == (
        tmp_path / "odd" / "config.json"
    ).read_bytes()
    assert models.load(str(tmp_path / "twice"), device="cpu").digest == odd.digest


def test_heads_that_do_not_divide_the_hidden_size_have_widths_of_their_own(tmp_path: Path) -> None:
    """transformers takes no llama 32 wide with 3 heads, whatever `head_dim`; other families it does."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    for family, key in (("llama", True), ("qwen2", False)):
        pruned = pruner(first=0, last=0, ratio=0.25).prune(
            tiny(family, **sizes), rows(0, 2), tmp_path / family
        )
        assert hasattr(pruned.net.config, "fleetune_widths") == key
        models.save(pruned.net, pruned.tokenizer, tmp_path / f"{family}-saved")
        again = models.load(str(tmp_path / f"{family}-saved"), device="cpu")
        assert torch.equal(logits(again.net), logits(pruned.net))


def test_the_width_of_a_head_is_said_where_it_was_not(tmp_path: Path) -> None:
    """A Qwen2 configuration need not have it; with fewer heads it would be taken for another one."""
    model = tiny("qwen2")
    del model.net.config.head_dim
    pruned = pruner(first=0, last=0).prune(model, rows(0, 2), tmp_path / "p")
    models.save(pruned.net, pruned.tokenizer, tmp_path / "saved")
    again = models.load(str(tmp_path / "saved"), device="cpu")
    assert again.net.config.head_dim == 4
    assert torch.equal(logits(again.net), logits(pruned.net))


def test_a_pruned_model_is_pruned_again_and_made_shallow(tmp_path: Path) -> None:
    from fleetune.compression.pruning import depth

    odd = pruner().prune(tiny(), rows(0, 3), tmp_path / "a")
    again = pruner(first=1, last=2, ratio=0.5).prune(odd, rows(0, 3), tmp_path / "b")
    assert [tuple(w) for w in block_widths(again.net.config)] == [
        (9, 3, 40),
        (3, 1, 16),
        (6, 2, 28),
        (9, 3, 40),
    ]
    cut_down = depth.shallow(again.net, 3)
    assert [tuple(w) for w in block_widths(cut_down.config)] == [(9, 3, 40), (6, 2, 28), (9, 3, 40)]
    models.save(cut_down, odd.tokenizer, tmp_path / "shallow")
    assert torch.equal(logits(models.load(str(tmp_path / "shallow"), device="cpu").net), logits(cut_down))


DAMAGE: dict[str, Any] = {
    "no list": {"num_attention_heads": 9},
    "too short": {"num_attention_heads": [9, 6, 6]},
    "no numbers": {"intermediate_size": [40, "28", 28, 40]},
    "too many": {"intermediate_size": [40, 28, 28, 44]},
    "none": {"intermediate_size": [40, 0, 28, 40]},
    "other heads": {"num_attention_heads": [9, 5, 6, 9]},
}


@pytest.mark.parametrize("case", DAMAGE)
def test_widths_that_make_no_sense_are_refused(case: str, tmp_path: Path) -> None:
    odd = pruner().prune(tiny(), rows(0, 3), tmp_path / "o")
    models.save(odd.net, odd.tokenizer, tmp_path / "odd")
    file = tmp_path / "odd" / "config.json"
    config = json.loads(file.read_text())
    config["fleetune_widths"].update(DAMAGE[case])
    file.write_text(json.dumps(config))
    with pytest.raises(UsageError, match="fleetune_widths"):
        models.load(str(tmp_path / "odd"), device="cpu")


# --- what is kept ---------------------------------------------------------------------------------------------


def test_a_choice_that_is_made_is_not_made_again(tmp_path: Path) -> None:
    seen: list[int] = []
    data = rows(0, 5)
    first = pruner().prune(tiny(), data, tmp_path, lambda row, all_: seen.append(row))
    again = pruner(recover="lora", steps=9).prune(tiny(), data, tmp_path, lambda row, all_: seen.append(row))
    assert seen == [1, 2, 3, 4, 5]
    assert again.digest == first.digest
    for other in (
        lambda: pruner(ratio=0.5).prune(tiny(), data, tmp_path),
        lambda: pruner().prune(tiny(), rows(1, 5), tmp_path),
        lambda: pruner().prune(tiny(seed=1), data, tmp_path),
    ):
        with pytest.raises(UsageError, match="other weights, rows or settings"):
            other()
    (tmp_path / "kept.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        pruner().prune(tiny(), data, tmp_path)


def test_samples_are_spread_over_the_rows(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pruner(samples=3).prune(tiny(), rows(0, 9), tmp_path / "a", lambda row, all_: seen.append((row, all_)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    far = rows(0, 9)
    same = pruner(samples=3).prune(tiny(), [far[0], far[3], far[6]], tmp_path / "b")
    assert same.digest == pruner(samples=3).prune(tiny(), far, tmp_path / "c").digest
    empty = Encoded(np.array([256, 60, 61], np.int32), 3)
    assert (
        same.digest == pruner(samples=3).prune(tiny(), [empty, far[0], far[3], far[6]], tmp_path / "d").digest
    )
    with pytest.raises(DataError, match="none of 1 rows"):
        pruner().prune(tiny(), [empty], tmp_path / "e")


def test_importance_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    model = tiny()
    model.net.model.norm.weight.fill_(math.inf)
    with pytest.raises(FleetuneError, match="importance in block 1 is not finite"):
        pruner().prune(model, rows(0, 2), tmp_path)
