"""GKD: who answers which batch, training, what does not fit, students of some blocks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gkd_harness import END, direct, formula, pair, rows, trainer, whole
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config

from fleetune import models
from fleetune.compression.methods import gkd
from fleetune.data.encode import MASKED, Batch, Encoded, collate
from fleetune.errors import FleetuneError, RecipeError
from fleetune.evaluation import answers
from fleetune.evaluation.losses import pad_id, predictors
from fleetune.models import Model, digest, named_tensors
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
    for blocks in range(2, 40):
        for keep in range(2, blocks + 1):
            kept = gkd.evenly_spaced(blocks, keep)
            assert len(set(kept)) == keep
            assert kept == sorted(kept)
            assert (kept[0], kept[-1]) == (0, blocks - 1)


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


BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def between(student: Model, teacher: Model, batch: Batch, beta: float, *, chunk: int = 0) -> Tensor:
    made = predictors(student.net, batch)
    return gkd.divergences(made, teacher.net, batch, beta, chunk=chunk)


def logits(seed: int, n: int = 7, V: int = 50) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, V, generator=g), 3 * torch.randn(n, V, generator=g)


@pytest.mark.parametrize("beta", BETAS)
def test_the_divergence_is_the_formula(beta: float) -> None:
    Q, P = logits(0)
    found = gkd.divergence(Q, P, beta)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), formula(Q, P, beta), rtol=1e-5, atol=1e-6)
    assert gkd.divergence(P, P, beta).abs().max() < 1e-6
    half = gkd.divergence(Q.bfloat16(), P.bfloat16(), beta)  # in fp32 whatever the models are in
    torch.testing.assert_close(half.double(), formula(Q.bfloat16(), P.bfloat16(), beta), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_far_apart_and_sure_distributions_are_finite(beta: float) -> None:
    Q, P = torch.zeros(1, 5), torch.zeros(1, 5)
    Q[0, 0], P[0, 1] = 200.0, 200.0
    Q.requires_grad_(True)
    found = gkd.divergence(Q, P, beta)
    found.sum().backward()
    assert found.isfinite().all()
    assert Q.grad.isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_by_finite_differences(beta: float) -> None:
    Q, P = (x.double() for x in logits(2, 3, 9))
    assert torch.autograd.gradcheck(lambda x: gkd.divergence(x, P, beta), (Q.requires_grad_(True),))


@pytest.mark.parametrize("beta", BETAS)
def test_only_the_answers_tokens_count_whatever_the_chunk(beta: float) -> None:
    """Values, and gradients of every weight, against whole arrays; the teacher gets none."""
    student, teacher = pair()
    batch = collate(rows(0, 4), END)
    for model in (student, teacher):
        model.net.requires_grad_(True)

    def slopes(found: Tensor) -> dict[str, Tensor]:
        teacher.net.zero_grad()
        student.net.zero_grad()
        found.mean().backward()
        return {n: p.grad.clone() for n, p in student.net.named_parameters() if p.grad is not None}

    want = direct(student, teacher, batch, beta)
    assert len(want) == sum(len(r.ids) - r.n_prompt for r in rows(0, 4))
    grads = slopes(want)
    for chunk in (0, 1, 5, 1000):
        found = between(student, teacher, batch, beta, chunk=chunk)
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-6)
        other = slopes(found)
        assert all(p.grad is None for p in teacher.net.parameters())
        assert other.keys() == grads.keys()
        for name, grad in other.items():
            torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-6)


def test_a_model_that_caps_its_logits_and_a_head_with_more_rows() -> None:
    """What a model does after its head counts; rows of padding in one head do not."""
    teacher = models.tiny_llama(1, vocab=300)
    small = sizes(32, 40, 2, 4, 2, head_dim=8, final_logit_softcapping=0.5, sliding_window=8)
    config = Gemma2Config(**small | TOKENS)
    torch.manual_seed(0)
    student = models.tiny_llama()
    student.net = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    batch = collate(rows(1, 3), END)
    Q, P = whole(student, batch), whole(teacher, batch)
    assert Q.abs().max() <= 0.5
    scored = batch.labels[:, 1:] != MASKED
    want = formula(Q[:, :-1][scored], P[:, :-1][scored][:, :264], 0.5)
    found = between(student, teacher, batch, 0.5, chunk=4)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-6)
