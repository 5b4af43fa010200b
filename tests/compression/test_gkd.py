# SPDX-License-Identifier: Apache-2.0
"""GKD: who answers which batch, training, rewards, zeros that stay, what it takes of memory and disk."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gkd_harness import END, direct, pair, rows, trainer

from fleetune import models
from fleetune.compression.methods import gkd
from fleetune.data.encode import MASKED, Encoded, collate
from fleetune.errors import FleetuneError, Interrupted, RecipeError, UsageError
from fleetune.evaluation import answers
from fleetune.evaluation.losses import pad_id
from fleetune.models import Model, digest, named_tensors


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


def test_distance_is_the_mean_over_tokens() -> None:
    student, teacher = pair()
    held = rows(4, 7)
    want = direct(student, teacher, collate(held, pad_id(student)), 0.5)
    for size in (1, 3, 8):
        assert trainer(batch_size=size).distance(student, teacher, held) == pytest.approx(
            want.mean().item(), rel=1e-5
        )


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


OWN = """
import math
seen = []
def keep(prompt, answer, reference):
    seen.append((prompt, answer, reference))
    return float(len(seen) % 3)
def plain(prompt, answer, reference):
    return sum(c < chr(128) for c in answer) / max(1, len(answer))
def raises(prompt, answer, reference):
    return 1 / 0
def ends(prompt, answer, reference):
    raise SystemExit(0)
def nan(prompt, answer, reference):
    return math.nan
def text(prompt, answer, reference):
    return "good"
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "rewards.py"
    file.write_text(OWN)
    return file


def seen_by(own: Path) -> list[Any]:
    found: list[Any] = next(
        vars(m)["seen"] for m in sys.modules.values() if vars(m).get("__file__") == str(own)
    )
    return found


def test_only_what_the_student_writes_is_rewarded(
    own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of its answers once, with its own prompt and the data's answer; others not at all."""
    student, teacher = pair()
    data = rows(0, 7)
    t = trainer(reward=f"{own}:keep", alpha=0.5, reward_samples=2, lmbda=0.5, steps=6, lr=1e-30, seq_kd=True)
    writers = [t.writer(student, teacher, 3, step) is student for step in range(6)]
    assert len(set(writers)) == 2
    want, means = [], list[float | None]()
    batches = gkd.Batches(data, END, 3, "cpu").steps(6, 3)
    for step, batch in enumerate(batches):
        if writers[step]:
            written = gkd.split(t.answered(student, teacher, batch, 3, step))[1]
            prompts, references = gkd.split(batch)
            for i in range(3):
                for k in (0, 1):
                    texts = (prompts[i][1:], written[2 * i + k], references[i])
                    want.append(tuple(answers.decode_answer(student, x.tolist()) for x in texts))
            assert any(written[2 * i].tolist() != written[2 * i + 1].tolist() for i in range(3))
    with caplog.at_level(logging.INFO, "fleetune"):
        t.train(student, teacher, data, 3, tmp_path / "p", lambda step, n, loss, mean: means.append(mean))
    assert means == [1.0 if writes else None for writes in writers]
    assert seen_by(own) == want
    assert len(want) == 6 * sum(writers)
    told = [r.getMessage() for r in caplog.records if "mean reward" in r.getMessage()]
    assert told[0] == f"step {1 + writers.index(True)}: mean reward 1.0000 of 6 answers"
    assert len(told) == sum(writers)


Stop = Callable[[int, int, float, float | None], None]


def run(folder: Path, on_step: Stop = lambda *_: None, **values: Any) -> str:
    student, teacher = pair()
    trainer(**{"save_every": 2, "steps": 6} | values).train(student, teacher, rows(0, 7), 3, folder, on_step)
    return digest(named_tensors(student.net))


def test_with_alpha_1_a_reward_changes_no_bit(tmp_path: Path) -> None:
    told: list[list[float]] = [[], []]
    plain = run(tmp_path / "a", lambda s, n, loss, _: told[0].append(loss))
    assert run(tmp_path / "b", lambda s, n, loss, _: told[1].append(loss), reward="f1", alpha=1) == plain
    assert told[0] == told[1]
    less: list[float] = []
    assert run(tmp_path / "c", lambda s, n, loss, _: less.append(loss), reward="f1", alpha=0.9) != plain
    assert less[0] == told[0][0]  # what is told is the divergence, whatever its weight


def test_a_training_keeps_its_reward_and_goes_on_with_no_other(own: Path, tmp_path: Path) -> None:
    """A file that is edited meanwhile: nothing changes in this training, and the next one notices."""
    given = {"reward": f"{own}:plain", "alpha": 0.5, "lmbda": 1}
    want, other = run(tmp_path / "whole", **given), OWN.replace("sum(", "-sum(")

    def edit(*_: Any) -> None:
        own.write_text(other)

    assert run(tmp_path / "edited", edit, **given) == want
    assert run(tmp_path / "other", **given) != want

    def stop(step: int, *_: Any) -> None:
        raise Interrupted("now")

    with pytest.raises(Interrupted):
        run(tmp_path / "p", stop, **given)
    own.write_text(OWN)
    with pytest.raises(UsageError, match="is of a training with other"):
        run(tmp_path / "p", **given)
    own.write_text(other)
    run(tmp_path / "p", **given)


@pytest.mark.parametrize(
    ("function", "says"), [("raises", "failed: ZeroDivisionError: division by zero"), ("nan", "returned nan")]
)
def test_a_reward_that_fails_shows_the_row_and_moves_nothing(
    function: str, says: str, own: Path, tmp_path: Path
) -> None:
    student, teacher = pair()
    before = digest(named_tensors(student.net))
    t = trainer(reward=f"{own}:{function}", alpha=0.5, lmbda=1)
    with pytest.raises(RecipeError, match=says) as caught:
        t.train(student, teacher, rows(0, 1), 0, tmp_path / "p")
    row = rows(0, 1)[0]
    prompt = student.tokenizer.decode(row.ids[1 : row.n_prompt].tolist())
    assert f"reward '{own}:{function}', on the answer " in caught.value.message
    assert f"to {prompt!r}," in caught.value.message
    assert caught.value.hint
    assert digest(named_tensors(student.net)) == before
    assert not any(p.requires_grad for p in student.net.parameters())


def pruned() -> tuple[Model, Model]:
    """A student without the smaller half of each linear layer's weights, and its teacher."""
    student, teacher = pair()
    for name, weight in named_tensors(student.net):
        if "_proj" in name:
            weight.masked_fill_(weight.abs() < weight.abs().median(), 0.0)
    return student, teacher


@pytest.mark.parametrize("keep", [True, False])
def test_zeros_stay_where_it_is_asked_for(keep: bool, tmp_path: Path) -> None:
    student, teacher = pruned()
    before = {name: weight.clone() for name, weight in named_tensors(student.net)}
    t = trainer(keep_zeros=keep, steps=20, batch_size=8, lr=1e-2, lmbda=0)
    apart = t.distance(student, teacher, rows(9, 8))
    t.train(student, teacher, rows(0, 16), 0, tmp_path / "p")
    assert t.distance(student, teacher, rows(9, 8)) < apart
    for name, weight in named_tensors(student.net):
        zero = before[name] == 0
        if keep:
            assert torch.equal(weight == 0, zero), name
        elif "_proj" in name:
            assert (weight[zero] == 0).sum() < 0.1 * zero.sum(), name
        assert (weight[~zero] != before[name][~zero]).float().mean() > 0.5, name


def test_a_vector_of_zeros_is_no_hole(tmp_path: Path) -> None:
    student, teacher = pruned()
    norm = student.net.model.norm.weight
    norm[0] = 0.0
    trainer(keep_zeros=True, steps=1).train(student, teacher, rows(0, 4), 0, tmp_path / "p")
    assert norm[0] != 0
