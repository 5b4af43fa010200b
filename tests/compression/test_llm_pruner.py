"""LLM-Pruner: what stays, that the rest computes what it should, recovery."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gkd_harness import END, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pruner_harness import IDS, gradients, importance, logits, pruner, stop_at, tiny
from torch import Tensor

from fleetune import adapters, models
from fleetune.compression.methods.llm_pruner import AGGREGATES, Shares, choose, count_kept, estimate
from fleetune.data import Batches, Encoded
from fleetune.errors import FleetuneError, Interrupted
from fleetune.models import Model, digest, named_tensors
from fleetune.models.families.widths import KeptUnits, block_widths, cut


def test_a_head_is_credited_to_the_key_head_that_it_reads() -> None:
    """9 query heads on 3 key heads: by h // 3 the first key head matters least, by h % 3 the second."""
    model = tiny()
    scale = torch.tensor([9.0, 1, 1, 5, 5, 5, 6, 2, 6])
    assert scale.view(3, 3).sum(1).argmin() == 0
    assert scale.view(3, 3).sum(0).argmin() == 1
    heads = scale.repeat_interleave(4)[:, None]
    for block in model.net.model.layers:
        for name, p in block.self_attn.named_parameters():
            p.copy_(heads.expand_as(p)) if name == "q_proj.weight" else p.fill_(1.0)
    kept = pruner().select(model.net.model.layers, estimate(model, rows(0, 2), "magnitude", [1, 2]))
    assert kept[1].heads == kept[2].heads == [1, 2]


def test_spared_blocks_and_widths() -> None:
    model = tiny()
    before = copy.deepcopy(model.net)
    pruned = pruner().prune(model, rows(0, 4))
    found = [tuple(w) for w in block_widths(pruned.net.config)]
    assert found == [(9, 3, 40), (6, 2, 28), (6, 2, 28), (9, 3, 40)]
    for i in (0, 3):
        own = dict(before.model.layers[i].named_parameters())
        for name, p in pruned.net.model.layers[i].named_parameters():
            assert torch.equal(p, own.pop(name)), name
        assert not own
    assert pruned.digest == digest(named_tensors(pruned.net)) != digest(named_tensors(before))
    whole = pruner(scope="global").prune(tiny(), rows(0, 4))
    widths = block_widths(whole.net.config)[1:3]
    assert sum(w.num_key_value_heads for w in widths) == 4
    assert all(w.intermediate_size % 4 == 0 for w in widths)


@settings(max_examples=20)
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


def test_alike_blocks_make_a_plain_directory(tmp_path: Path) -> None:
    """transformers itself loads it, to the same outputs; one that it cannot hold is refused there and loaded here."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    plain = pruner(first=0, last=0).prune(tiny(), rows(0, 3))
    models.save(plain.net, plain.tokenizer, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    sizes = ("model_type", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")
    assert [config[name] for name in sizes] == ["llama", 6, 2, 28, 4]
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(net), logits(plain.net))
    pruner().prune(tiny(), rows(0, 3)).save(tmp_path / "odd")
    with pytest.raises(ValueError, match="fleetune_llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "odd")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(tmp_path / "odd")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_blocks_of_different_widths_are_saved_and_loaded(family: str, tmp_path: Path) -> None:
    whole = tiny(family)
    models.save(whole.net, whole.tokenizer, tmp_path / "whole")
    odd = pruner().prune(whole, rows(0, 3))
    models.save(odd.net, odd.tokenizer, tmp_path / "odd")
    again = models.load(str(tmp_path / "odd"), device="cpu")
    assert again.digest == odd.digest
    assert again.tokenizer_digest == models.load(str(tmp_path / "whole"), device="cpu").tokenizer_digest
    assert torch.equal(logits(again.net), logits(odd.net))
    assert torch.equal(again.net.generate(IDS, max_new_tokens=6), odd.net.generate(IDS, max_new_tokens=6))
    models.save(again.net, again.tokenizer, tmp_path / "twice")
    once, twice = ((tmp_path / name / "config.json").read_bytes() for name in ("odd", "twice"))
    assert twice == once
    assert models.load(str(tmp_path / "twice"), device="cpu").digest == odd.digest


def test_importance_that_is_no_number_is_an_error() -> None:
    model = tiny()
    model.net.model.norm.weight.fill_(math.inf)
    with pytest.raises(FleetuneError, match="importance in block 1 is not finite"):
        pruner().prune(model, rows(0, 2))


LORA = {"recover": "lora", "lr": 1e-2, "steps": 12, "r": 4, "batch_size": 4}


def recovered(values: dict[str, Any], folder: Path, on: Any = lambda *_: None, seed: int = 322) -> Model:
    made = pruner(**values)
    return made.train(made.prune(tiny(), rows(0, 8)), rows(0, 8), seed, folder, on)


def test_lora_is_trained_as_the_formulas_say(tmp_path: Path) -> None:
    """AdamW on A and B of W + (alpha / r) B A in float64: the clipped gradient of the responses' loss, rates up and down."""
    values = LORA | {"dropout": 0.0, "steps": 4, "warmup": 0.5, "r": 2}
    pruned = pruner(**values).prune(tiny(), rows(0, 8))
    adapters.attach(pruned, adapters.Lora(2, 16.0), seed=322)
    start = {n: torch.from_numpy(a).double().requires_grad_() for n, a in adapters.export(pruned).items()}
    adapters.detach(pruned)
    net, m, v = copy.deepcopy(pruned.net).double(), dict.fromkeys(start, 0.0), dict.fromkeys(start, 0.0)
    base = dict(net.named_parameters())

    def merged() -> dict[str, Tensor]:
        moves = {f"{x}.weight": 8 * start[b] @ start[a] for x, (b, a) in adapters.pairs(start).items()}
        return base | {name: base[name] + move for name, move in moves.items()}

    losses, norms = [], []
    for t, batch in enumerate(Batches(rows(0, 8), END, 322).steps(4, 4)):
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        out = torch.func.functional_call(net, merged(), kwargs=inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), batch.labels[:, 1:].flatten())
        found = dict(zip(start, torch.autograd.grad(loss, list(start.values())), strict=True))
        norm = sum(float(g.square().sum()) for g in found.values()) ** 0.5
        for n, p in start.items():
            g = found[n] * min(1, 1 / norm)
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g * g
            step = (m[n] / (1 - 0.9 ** (t + 1))) / ((v[n] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            p.data -= 1e-2 * [0.5, 1, 1, 0.5][t] * step
        losses.append(loss.item())
        norms.append(norm)
    assert max(norms) > 1.5 * min(norms) > 1.5
    told: list[float] = []
    model = recovered(values, tmp_path / "r", lambda step, steps, loss: told.append(loss))
    assert told == pytest.approx(losses, rel=1e-4)
    after, theirs = dict(named_tensors(model.net)), {n: w.detach() for n, w in merged().items()}
    for layer in adapters.pairs(start):
        name = f"{layer}.weight"
        moved = (theirs[name] - base[name]).norm()
        assert float((after[name].double() - theirs[name]).norm() / moved) < 0.01


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
