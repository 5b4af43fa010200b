"""A model with fewer of its blocks: which, that it computes what they do, and what its configuration says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from gkd_harness import END, trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from fleetune import models
from fleetune.compression import depth
from fleetune.evaluation import answers
from fleetune.models import digest, named_tensors


def test_kept_blocks_are_evenly_spaced_with_both_ends() -> None:
    assert depth.evenly_spaced(30, 15) == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27, 29]
    assert depth.evenly_spaced(5, 3) == [0, 2, 4]
    assert depth.evenly_spaced(7, 2) == [0, 6]
    for whole in range(2, 40):
        for keep in range(2, whole + 1):
            kept = depth.evenly_spaced(whole, keep)
            assert len(set(kept)) == keep
            assert kept == sorted(kept)
            assert (kept[0], kept[-1]) == (0, whole - 1)


def test_a_student_of_some_blocks_saves_loads_and_runs(tmp_path: Path) -> None:
    model = models.tiny_llama(layers=5)
    student = trainer(keep_layers=3).student(model)
    blocks, own = model.net.model.layers, student.net.model.layers
    assert len(blocks) == model.net.config.num_hidden_layers == 5
    assert len(own) == student.net.config.num_hidden_layers == 3
    for mine, i in zip(own, (0, 2, 4), strict=True):
        for (name, a), (_, b) in zip(mine.named_parameters(), blocks[i].named_parameters(), strict=True):
            assert torch.equal(a, b), name
            assert a.data_ptr() != b.data_ptr()
    assert [block.self_attn.layer_idx for block in own] == [0, 1, 2]
    assert [block.self_attn.layer_idx for block in blocks] == [0, 1, 2, 3, 4]
    models.save(student.net, student.tokenizer, tmp_path / "m")
    back = models.load(str(tmp_path / "m"))
    assert back.digest == digest(named_tensors(student.net))
    prompt = [np.array([256, 65, 66], np.int32)]
    told = [answers.generate_from_ids(m, prompt, max_new_tokens=8) for m in (student, back)]
    assert told[0] == told[1]
    ids = torch.tensor([[256, 65, 66, 67]])
    hidden = model.net.model.embed_tokens(ids)
    places = model.net.model.rotary_emb(hidden, torch.arange(4)[None])
    mask = torch.full((4, 4), -math.inf).triu(1)[None, None]
    for i in (0, 2, 4):
        out = blocks[i](hidden, attention_mask=mask, position_embeddings=places)
        hidden = out if isinstance(out, Tensor) else out[0]
    want = model.net.lm_head(model.net.model.norm(hidden))
    torch.testing.assert_close(back.net(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)


def test_what_a_configuration_says_of_each_block_is_cut_too(tmp_path: Path) -> None:
    kinds = [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
    config = Qwen2Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=kinds,
        sliding_window=4,
        use_sliding_window=True,
        pad_token_id=END,
        eos_token_id=END,
        bos_token_id=256,
    )
    torch.manual_seed(0)
    model = models.tiny_llama()
    model.net = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    cut = depth.shallow(model.net, 3)
    assert cut.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert model.net.config.layer_types == kinds
    models.save(cut, model.tokenizer, tmp_path / "m")
    back = models.load(str(tmp_path / "m"))
    ids = torch.arange(60, 80)[None]
    assert torch.equal(back.net(input_ids=ids).logits, cut(input_ids=ids).logits)
    assert [getattr(b, "attention_type", None) for b in back.net.model.layers] == [
        getattr(b, "attention_type", None) for b in cut.model.layers
    ]
