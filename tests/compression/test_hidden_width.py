# SPDX-License-Identifier: Apache-2.0
"""LLM-Pruner's mode=hidden: the residual stream's groups and their importance, what stays, that it computes the same."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gkd_harness import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pruner_harness import IDS, importance, logits, pruner, tiny
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from command_line import call_json as call
from command_line import ok
from fleetune import models
from fleetune.compression.pruning import hidden_width
from fleetune.data import Encoded
from fleetune.models import Model, digest, named_tensors

FAMILIES = ["llama", "biased llama", "qwen2", "qwen3"]
READS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
WRITES = ("o_proj", "down_proj", "input_layernorm", "post_attention_layernorm", "model.norm")


def model_of(family: str, tied: bool = True, **sizes: Any) -> Model:
    """36 channels wide, two blocks."""
    sizes = {"num_hidden_layers": 2, "tie_word_embeddings": tied} | sizes
    return tiny(family.split()[-1], biases=family.startswith("biased"), **sizes)


def narrower(**values: Any) -> Any:
    return pruner(**{"mode": "hidden", "first": 4, "last": 2, "round_to": 1, "ratio": 0.25} | values)


def channel(name: str, value: Tensor, c: int) -> Tensor | None:
    """What channel c of the residual stream has in a parameter, as the paper's figure says; None for nothing."""
    layer, _, part = name.rpartition(".")
    if layer.endswith(READS) and part == "weight":
        return value[:, c]
    return value[c] if layer.endswith(WRITES) else None


def by_hand(model: Model, data: list[Encoded], kind: str) -> Tensor:
    """Each channel's importance in every layer, float64 [layers, 36], from autograd on whole logits in float64."""
    net = copy.deepcopy(model.net).double().requires_grad_(True)
    names, parameters = zip(*net.named_parameters(), strict=True)
    per_row: dict[str, list[Tensor]] = {name: [] for name in names}
    for row in data:
        ids = torch.from_numpy(row.ids.astype("int64"))
        loss = F.cross_entropy(net(ids[None]).logits[0, row.n_prompt - 1 : -1], ids[row.n_prompt :])
        for name, g in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            per_row[name].append(g)
    layers: dict[str, Tensor] = {}
    for name, p in zip(names, parameters, strict=True):
        found = importance(kind, p.detach(), per_row[name])
        parts = [channel(name, found, c) for c in range(36)]
        if parts[0] is not None:
            layer = name.rpartition(".")[0]
            sums = torch.stack([part.sum() for part in parts if part is not None])
            layers[layer] = layers.get(layer, torch.zeros(36).double()) + sums
    return torch.stack(list(layers.values()))


@pytest.mark.parametrize(
    ("kind", "family", "tied"),
    [
        ("magnitude", "llama", True),
        ("first", "biased llama", True),
        ("first", "qwen2", False),
        ("second", "qwen3", True),
        ("mixed", "biased llama", False),
    ],
)
def test_importance_is_the_papers(kind: str, family: str, tied: bool) -> None:
    model, asked = model_of(family, tied), []
    before = digest(named_tensors(model.net))
    mine = hidden_width.estimate(model, rows(1, 3), kind, lambda row, all_: asked.append((row, all_)))
    theirs = by_hand(model, rows(1, 3), kind)
    assert asked == ([] if kind == "magnitude" else [(1, 3), (2, 3), (3, 3)])
    assert mine.dtype == torch.float64
    assert mine.shape == theirs.shape == (1 + 2 * 9 + 1 + (not tied), 36)
    torch.testing.assert_close(mine.sort(0).values, theirs.sort(0).values, rtol=2e-4, atol=5e-7)
    assert digest(named_tensors(model.net)) == before
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.net.parameters())


def test_one_ranking_of_all_members() -> None:
    shares = torch.tensor([[6.0, 4, 5, 9], [0, 4, 0.1, 9], [0, 4, 0, 9]]).double()
    assert hidden_width.select(shares, "max", 0.25, 1) == [0, 2, 3]
    assert hidden_width.select(shares, "sum", 0.5, 1) == hidden_width.select(shares, "mean", 0.5, 1) == [1, 3]
    assert hidden_width.select(shares, "sum", 0.2, 2) == [0, 1, 2, 3]
    assert hidden_width.select(torch.ones(2, 4).double(), "sum", 0.5, 1) == [0, 1]


def test_a_product_of_hundreds_of_shares_does_not_vanish() -> None:
    shares = torch.full((300, 5), 1e-5).double() * torch.tensor([1, 3, 2, 5, 4])
    assert float(shares.prod(0).max()) == 0
    assert hidden_width.select(shares, "prod", 0.6, 1) == [3, 4]
    shares[7, 3] = 0
    assert hidden_width.select(shares, "prod", 0.6, 1) == [1, 4]


def test_a_llama_keeps_a_multiple_of_its_heads() -> None:
    llama, qwen = model_of("llama").net.config, model_of("qwen3").net.config
    assert [hidden_width.width_step(llama, n) for n in (1, 2, 6, 32)] == [9, 18, 18, 288]
    assert [hidden_width.width_step(qwen, n) for n in (1, 2, 6, 32)] == [1, 2, 6, 32]
    four = model_of("llama", num_attention_heads=4, num_key_value_heads=2).net.config
    assert [hidden_width.width_step(four, n) for n in (1, 8)] == [4, 8]


def silence(net: Any, dead: set[int], reads: bool) -> None:
    """Zeros wherever these channels are written (a tied embedding is read too), and `reads`: where they are read."""
    for name, p in net.named_parameters():
        layer = name.rpartition(".")[0]
        if layer.endswith(("embed_tokens", "o_proj", "down_proj")) or reads:
            for c in dead:
                part = channel(name, p.data, c)
                if part is not None:
                    part.zero_()


@settings(max_examples=20)
@given(st.sets(st.integers(0, 35), min_size=1, max_size=36), st.sampled_from(FAMILIES), st.booleans())
def test_a_narrow_net_is_the_whole_one_without_what_those_channels_carry(
    kept: set[int], family: str, tied: bool
) -> None:
    """Channels that nothing writes, in a whole net, are as good as gone: its norms' means are over 36 for ours over less."""
    model = model_of(family, tied, rms_norm_eps=1e-12)
    whole, narrow = copy.deepcopy(model.net).double(), copy.deepcopy(model.net).double()
    silence(whole, set(range(36)) - kept, reads=False)
    hidden_width.narrow(narrow, sorted(kept))
    # transformers computes a norm in fp32 whatever the net is in: of two channels left, its rounding is 2e-5 of a logit
    torch.testing.assert_close(logits(narrow), logits(whole), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("family", "tied"), [("biased llama", True), ("qwen2", False), ("qwen3", True)])
def test_the_parts_are_the_wholes(family: str, tied: bool) -> None:
    """Every parameter has the kept channels' numbers, norms of the residual times sqrt(36 / 27), the rest as it was."""
    model = model_of(family, tied)
    before = dict(copy.deepcopy(model.net).named_parameters())
    kept = narrower()._hidden_channels(model, rows(0, 3), lambda *_: None)
    pruned = narrower().prune(model, rows(0, 3))
    after = dict(pruned.net.named_parameters())
    assert len(kept) == pruned.net.config.hidden_size == 27
    assert after.keys() == before.keys()
    assert ("lm_head.weight" in after) != tied
    for name, p in after.items():
        whole = before[name]
        if channel(name, whole, 0) is not None:
            whole = whole[:, kept] if name.rpartition(".")[0].endswith(READS) else whole[kept]
        if name.endswith("norm.weight") and name.split(".")[-2] not in ("q_norm", "k_norm"):
            whole = whole * math.sqrt(36 / 27)
        torch.testing.assert_close(p, whole, rtol=1e-6, atol=0)
    for module in pruned.net.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
    assert pruned.net.model.embed_tokens.embedding_dim == pruned.net.lm_head.in_features == 27
    assert (pruned.net.lm_head.weight is pruned.net.model.embed_tokens.weight) == tied
    assert pruned.net is model.net
    assert pruned.digest == digest(named_tensors(pruned.net))


@pytest.mark.parametrize(("family", "tied"), [("biased llama", True), ("qwen2", False), ("qwen3", True)])
def test_transformers_loads_it(family: str, tied: bool, tmp_path: Path) -> None:
    pruned = narrower().prune(model_of(family, tied), rows(0, 3))
    models.save(pruned.net, pruned.tokenizer, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    names = ("model_type", "hidden_size", "head_dim", "num_attention_heads", "tie_word_embeddings")
    assert [config[name] for name in names] == [family.split()[-1], 27, 4, 9, tied]
    assert "fleetune_widths" not in config
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(net), logits(pruned.net))
    assert torch.equal(net.generate(IDS, max_new_tokens=6), pruned.net.generate(IDS, max_new_tokens=6))
    assert (net.lm_head.weight is net.model.embed_tokens.weight) == tied
    assert models.load(str(tmp_path / "saved"), device="cpu").digest == pruned.digest


def test_a_narrow_model_goes_everywhere(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pruned, evaluated, exported to a plain directory and to a GGUF file that reads back as the same model."""
    tiny(bos_token_id=257, eos_token_id=258, pad_token_id=258).save(at / "whole")
    words = json.loads((at / "whole" / "tokenizer.json").read_text())
    words["model"]["vocab"]["he"], words["model"]["merges"] = 256, [["h", "e"]]  # llama.cpp wants some
    for mark in words["added_tokens"]:
        mark["id"] += 1
    (at / "whole" / "tokenizer.json").write_text(json.dumps(words))
    base = ["compress", "whole", "--method", "llm-pruner", "--text", "text.txt", "--length", "64"]
    only = ["--set", "mode=hidden", "--set", "recover=none", "--eval-text", "text.txt"]
    code, said, _ = call(capsys, *base, *only)
    assert code == 2
    assert (
        "in steps of 288 (of round_to = 32 and of the 9 heads); round_to=8 makes steps of 72"
        in json.dumps(said[-1])
    )
    assert not (at / "runs").exists()
    code, done, err = call(capsys, *base, *only, "--set", "round_to=1")
    assert code == 0, err
    assert "4 blocks with 3 key heads and 40 channels, 27 wide" in err
    assert done[1]["hidden_size"] == 27
    made = models.load(str(at / done[-1]["folder"] / "model"), device="cpu")
    assert made.digest == done[-1]["digest"]
    for to in ("hf", "gguf:f32"):
        seen = ok(capsys, "export", "latest", "--to", to)
        seen = ok(capsys, "eval", seen[-1]["path"], "--text", "text.txt", "--tasks", "perplexity")
        assert seen[-1]["perplexity"] == pytest.approx(done[-1]["after"]["perplexity"], rel=1e-4)
