# SPDX-License-Identifier: Apache-2.0
"""GKD: who answers which batch, the students, training and its resumption, bad settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gkd_harness import END, direct, pair, rows, trainer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from fleetune import models
from fleetune.compression.methods import gkd
from fleetune.compression.pruning import depth
from fleetune.data.encode import MASKED, Encoded, collate
from fleetune.errors import FleetuneError, Interrupted, RecipeError, StorageError, UsageError
from fleetune.evaluation import answers
from fleetune.evaluation.losses import pad_id
from fleetune.models import digest, named_tensors

# --- who answers ----------------------------------------------------------------------------------------------


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


def test_the_share_of_batches_that_the_student_answers() -> None:
    student, teacher = pair()
    for lmbda in (0.0, 0.3, 1.0):
        both, data = trainer(lmbda=lmbda, seq_kd=True), trainer(lmbda=lmbda)
        asked = [both.writer(student, teacher, 1, t) for t in range(1000)]
        assert all(m is student or m is teacher for m in asked)
        share = sum(m is student for m in asked) / 1000
        assert share == pytest.approx(lmbda, abs=0 if lmbda in (0, 1) else 0.04)
        other = [data.writer(student, teacher, 2, t) for t in range(1000)]
        assert all(m is student or m is None for m in other)
        if lmbda == 0.3:
            assert [m is student for m in asked] != [m is student for m in other]


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
    assert answers_of(cold.answered(student, teacher, batch, 0, 5)) == answers_of(
        cold.answered(student, teacher, batch, 9, 7)
    )


def test_nothing_after_the_first_end_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair()
    data = [
        Encoded(np.array([256, 65, 70, END, 71, END], np.int32), 2),
        Encoded(np.array([256, 65, 70, 71], np.int32), 2),
    ]
    found = trainer(lmbda=0).answered(student, teacher, collate(data, END), 0, 0)
    assert answers_of(found) == [[70, END], [70, 71]]
    assert found.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    written = [[END, 80, END], [80, 81, 82]]
    monkeypatch.setattr(answers, "_continued", lambda *_: written)
    found = trainer(lmbda=1).answered(student, teacher, collate(data, END), 0, 0)
    assert answers_of(found) == [[END], [80, 81, 82]]
    assert found.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_empty_answers_do_not_divide_by_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    student, teacher = pair()
    before = digest(named_tensors(student.net))
    monkeypatch.setattr(
        gkd, "sample_from_ids", lambda m, prompts, **_: [np.zeros(0, np.int32) for _ in prompts]
    )
    losses: list[float] = []
    trainer(lmbda=1, steps=2).train(
        student, teacher, rows(0, 4), 0, tmp_path / "p", lambda s, n, x, _: losses.append(x)
    )
    assert losses == [0.0, 0.0]
    assert digest(named_tensors(student.net)) == before


# --- the student ----------------------------------------------------------------------------------------------


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


# --- training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "lmbda"),
    [
        (0.5, 0.5),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((0.0, 0.0), (0.5, 1.0), (1.0, 1.0))),
    ],
)
def test_the_student_comes_close_to_the_teacher(beta: float, lmbda: float, tmp_path: Path) -> None:
    student, teacher = pair()
    taught = digest(named_tensors(teacher.net))
    t = trainer(beta=beta, lmbda=lmbda, steps=80, batch_size=8, lr=1e-2, max_new_tokens=12, temperature=1.0)
    held = rows(99, 16)
    before = t.distance(student, teacher, held)
    t.train(student, teacher, rows(0, 64), 0, tmp_path / "p")
    after = t.distance(student, teacher, held)
    assert after < 0.6 * before, (before, after)
    assert digest(named_tensors(teacher.net)) == taught
    assert not any(p.requires_grad or p.grad is not None for p in student.net.parameters())


def test_distance_is_the_mean_over_tokens() -> None:
    student, teacher = pair()
    held = rows(4, 7)
    want = direct(student, teacher, collate(held, pad_id(student)), 0.5)
    for size in (1, 3, 8):
        assert trainer(batch_size=size).distance(student, teacher, held) == pytest.approx(
            want.mean().item(), rel=1e-5
        )


Stop = Callable[[int, int, float, float | None], None]


def run(folder: Path, on_step: Stop, **values: Any) -> str:
    student, teacher = pair()
    trainer(**{"save_every": 2, "steps": 8} | values).train(student, teacher, rows(0, 7), 3, folder, on_step)
    return digest(named_tensors(student.net))


@pytest.mark.parametrize("error", [Interrupted, RuntimeError])
def test_a_stopped_training_goes_on_bit_for_bit(error: type[Exception], tmp_path: Path) -> None:
    """Interrupted keeps the step it comes in; a crash falls back to the last that was kept."""
    whole: list[float] = []
    want = run(tmp_path / "whole", lambda s, n, loss, _: whole.append(loss))
    assert run(tmp_path / "again", lambda *_: None) == want
    seen: dict[int, float] = {}

    def stop(step: int, steps: int, loss: float, mean: float | None) -> None:
        seen[step] = loss
        if step == 5:
            raise error("now")

    with pytest.raises(error):
        run(tmp_path / "p", stop)
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["state.safetensors"]
    more: dict[int, float] = {}
    got = run(tmp_path / "p", lambda step, n, loss, _: more.update({step: loss}))
    assert got == want
    assert min(more) == (6 if error is Interrupted else 5)
    assert [(seen | more)[s] for s in range(1, 9)] == whole
    assert run(tmp_path / "p", lambda *_: pytest.fail("all is done already")) == want
    assert run(tmp_path / "other", lambda *_: None, lmbda=1.0) != want


def test_what_is_kept_of_another_training_or_damaged_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "p", lambda *_: None)
    with pytest.raises(UsageError, match="other weights, rows or settings"):
        run(tmp_path / "p", lambda *_: None, lr=2e-3)
    assert "weight/model.norm.weight" in load_file(tmp_path / "p" / "state.safetensors")
    (tmp_path / "p" / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(StorageError, match="damaged"):
        run(tmp_path / "p", lambda *_: None)


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(tmp_path: Path) -> None:
    student, teacher = pair()
    teacher.net.model.norm.weight[0] = math.nan
    before = digest(named_tensors(student.net))
    with pytest.raises(FleetuneError, match="the loss is nan in step 1"):
        trainer(lmbda=0).train(student, teacher, rows(0, 4), 0, tmp_path / "p")
    assert digest(named_tensors(student.net)) == before
    assert not any(p.requires_grad for p in student.net.parameters())


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [trainer(steps=10, warmup=0.2, lr=1.0).rate(t) for t in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert trainer(steps=3, warmup=0, lr=1.0).rate(0) == 1.0
    assert trainer(steps=2, warmup=1, lr=1.0).rate(1) == 1.0


def test_clip_bounds_the_gradient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    norms: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW) -> None:
        grads = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        real(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for clip in (0.0, 1e-3):
        student, teacher = pair()
        trainer(clip=clip, steps=1).train(student, teacher, rows(0, 4), 0, tmp_path / str(clip))
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


# --- bad input ------------------------------------------------------------------------------------------------

BAD = {
    "no teacher": ({"teacher": ""}, "no teacher is given"),
    "beta": ({"beta": 1.5}, "beta = 1.5 is not between 0 and 1"),
    "lmbda": ({"lmbda": -0.1}, "lmbda = -0.1"),
    "temperature": ({"temperature": 0}, "temperature = 0.0 must be positive"),
    "steps": ({"steps": 0}, "steps = 0 is below 1"),
    "a batch": ({"batch_size": 0}, "batch_size = 0"),
    "lr": ({"lr": "inf"}, "lr = inf"),
    "clip": ({"clip": -1}, "cannot be negative"),
    "a misspelling": ({"lambda": 1}, "Did you mean 'lmbda'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case: str) -> None:
    values, text = BAD[case]
    with pytest.raises(RecipeError, match=text):
        trainer(**values)


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
