"""GKD: who answers which batch, training, what does not fit, students of some blocks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gkd_harness import END, direct, pair, rows, trainer
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from fleetune import models
from fleetune.compression.methods import gkd
from fleetune.data.encode import MASKED, Encoded, collate
from fleetune.errors import FleetuneError, RecipeError
from fleetune.evaluation import answers
from fleetune.evaluation.losses import pad_id
from fleetune.models import digest, named_tensors
from tiny_families import TOKENS, sizes


def answers_of(batch: Any) -> list[list[int]]:
    return [[int(t) for t in row if t != MASKED] for row in batch.labels]


def test_who_answers() -> None:
    """lmbda=1 the student; 0 the data or, with seq_kd, the teacher; the prompts stay."""
    student, teacher = pair()
    batch = collate(rows(0, 3), END)
    prompts, own = gkd.split(batch)
    assert answers_of(trainer(lmbda=0).answered(student, teacher, batch, 0, 0)) == [r.tolist() for r in own]
    draw = {
        "student": trainer(lmbda=1).answered(student, teacher, batch, 0, 0),
        "teacher": trainer(lmbda=0, seq_kd=True).answered(student, teacher, batch, 0, 0),
        "both": trainer(lmbda=1, seq_kd=True).answered(student, teacher, batch, 0, 0),
    }
    assert answers_of(draw["student"]) == answers_of(draw["both"]) != answers_of(draw["teacher"])
    for found in draw.values():
        for row, prompt in zip(found.input_ids.tolist(), prompts, strict=True):
            assert row[: len(prompt)] == prompt.tolist()
        assert all(1 <= len(a) <= 6 for a in answers_of(found))
    swapped = trainer(lmbda=1).answered(teacher, student, batch, 0, 0)
    assert answers_of(swapped) == answers_of(draw["teacher"])


def test_answers_are_a_function_of_seed_and_step() -> None:
    student, teacher = pair()
    batch, t = collate(rows(0, 3), END), trainer(lmbda=1)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = answers_of(t.answered(student, teacher, batch, 0, 5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert answers_of(t.answered(student, teacher, batch, 0, 5)) == first
    assert answers_of(t.answered(student, teacher, batch, 0, 6)) != first
    assert answers_of(t.answered(student, teacher, batch, 1, 5)) != first
    cold = trainer(lmbda=1, temperature=1e-4)  # the same whatever the draw: greedy
    one, other = (answers_of(cold.answered(student, teacher, batch, *at)) for at in ((0, 5), (9, 7)))
    assert one == other


def test_nothing_after_the_first_end_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair()
    data = [Encoded(np.array(row, np.int32), 2) for row in ([256, 65, 70, END, 71, END], [256, 65, 70, 71])]
    found = trainer(lmbda=0).answered(student, teacher, collate(data, END), 0, 0)
    assert answers_of(found) == [[70, END], [70, 71]]
    assert found.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    written = [[END, 80, END], [80, 81, 82]]
    monkeypatch.setattr(answers, "_continued", lambda *_: written)
    found = trainer(lmbda=1).answered(student, teacher, collate(data, END), 0, 0)
    assert answers_of(found) == [[END], [80, 81, 82]]
    assert found.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_distance_is_the_mean_over_tokens() -> None:
    student, teacher = pair()
    held = rows(4, 7)
    want = direct(student, teacher, collate(held, pad_id(student)), 0.5)
    for size in (1, 3, 8):
        found = trainer(batch_size=size).distance(student, teacher, held)
        assert found == pytest.approx(want.mean().item(), rel=1e-5)


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(tmp_path: Path) -> None:
    student, teacher = pair()
    teacher.net.model.norm.weight[0] = math.nan
    before = digest(named_tensors(student.net))
    with pytest.raises(FleetuneError, match="the loss is nan in step 1"):
        trainer(lmbda=0).train(student, teacher, rows(0, 4), 0, tmp_path / "p")
    assert digest(named_tensors(student.net)) == before
    assert not any(p.requires_grad for p in student.net.parameters())


def test_all_that_does_not_fit_is_said_at_once() -> None:
    model, teacher = pair()
    trainer().check(model, teacher, 100)
    trainer(keep_layers=2).check(models.tiny_llama(layers=3), teacher, 100)
    with pytest.raises(RecipeError, match="nothing to learn from itself"):
        trainer().check(model, model, 10)
    trainer(lmbda=0, max_new_tokens=999).check(model, teacher, 1024)  # nothing is written
    teacher.tokenizer.add_tokens(["another"])
    with pytest.raises(RecipeError) as caught:
        trainer(keep_layers=2, max_new_tokens=999).check(model, teacher, 100)
    problems = "\n".join(caught.value.problems)
    assert "keep_layers = 2 of 2 blocks" in problems
    assert "another vocabulary (259 tokens) than tiny-llama (258)" in problems
    assert "answers of 999 go beyond the context of 1024" in problems
    with pytest.raises(RecipeError, match="is an encoder"):
        trainer().check(model, models.tiny_bert(), 10)


def test_kept_blocks_are_evenly_spaced_with_both_ends() -> None:
    assert gkd.evenly_spaced(30, 15) == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27, 29]
    assert gkd.evenly_spaced(5, 3) == [0, 2, 4]
    assert gkd.evenly_spaced(7, 2) == [0, 6]
    for whole in range(2, 40):
        for keep in range(2, whole + 1):
            kept = gkd.evenly_spaced(whole, keep)
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
    kinds = [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full", "sliding")]
    small = sizes(32, 40, 5, 4, 2, layer_types=kinds, sliding_window=4, use_sliding_window=True)
    config = Qwen2Config(**small | TOKENS)
    torch.manual_seed(0)
    model = models.tiny_llama()
    model.net = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    cut = gkd.shallow(model.net, 3)
    assert cut.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert model.net.config.layer_types == kinds
    models.save(cut, model.tokenizer, tmp_path / "m")
    back = models.load(str(tmp_path / "m"))
    ids = torch.arange(60, 80)[None]
    assert torch.equal(back.net(input_ids=ids).logits, cut(input_ids=ids).logits)
    here, there = ([getattr(b, "attention_type", None) for b in n.model.layers] for n in (back.net, cut))
    assert here == there
