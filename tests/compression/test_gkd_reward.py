# SPDX-License-Identifier: Apache-2.0
"""GKD's reward: what is rewarded, what alpha means, stop and resume, what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gkd_harness import END, pair, rows, trainer

from fleetune import models
from fleetune.compression import distillation
from fleetune.compression.methods import gkd
from fleetune.data.encode import collate
from fleetune.errors import DataError, Interrupted, RecipeError, UsageError
from fleetune.evaluation import answers
from fleetune.models import digest, named_tensors

# --- what is rewarded -------------------------------------------------------------------------------------------

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
def late(prompt, answer, reference):
    seen.append(answer)
    return math.inf if len(seen) > 9 else 0.5
NOT = 1
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


def test_built_in_rewards() -> None:
    for name, same, half in (("exact_match", 1, 0), ("f1", 1, 2 / 3), ("rouge_l", 1, 2 / 3)):
        found = distillation.get(name)
        assert found("what", "red fox", "red fox") == pytest.approx(same)
        assert found("what", "red", "red fox") == pytest.approx(half)


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


def test_a_stopped_training_with_a_reward_goes_on_bit_for_bit(own: Path, tmp_path: Path) -> None:
    given = {"reward": f"{own}:plain", "alpha": 0.5, "reward_samples": 2}
    want = run(tmp_path / "whole", **given)

    def stop(step: int, *_: Any) -> None:
        if step == 3:
            raise Interrupted("now")

    with pytest.raises(Interrupted):
        run(tmp_path / "p", stop, **given)
    steps: list[int] = []
    assert run(tmp_path / "p", lambda step, *_: steps.append(step), **given) == want
    assert steps == [4, 5, 6]


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


def test_what_a_reward_is_known_by(own: Path) -> None:
    assert distillation.source_digest("f1", distillation.get("f1")) == ""
    name = f"{own}:plain"
    assert distillation.source_digest(name, distillation.get(name)) == hashlib.sha256(OWN.encode()).hexdigest()
    held = f"{own}:held"
    own.write_text(
        own.read_text() + "class Held:\n    def __call__(self, *texts): return 1.0\nheld = Held()\n"
    )
    assert distillation.source_digest(held, distillation.get(held)) == hashlib.sha256(own.read_bytes()).hexdigest()
    assert distillation.source_digest("math:fsum", math.fsum) == ""  # type: ignore[arg-type]


def test_the_reward_rises_and_the_divergence_holds_it(own: Path, tmp_path: Path) -> None:
    """The teacher is what the student was: without the divergence nothing keeps it there."""
    held, apart = rows(99, 32), {}
    for alpha in (0.0, 0.5):
        student, teacher = models.tiny_llama(0), models.tiny_llama(0)
        t = trainer(
            reward=f"{own}:plain",
            alpha=alpha,
            lmbda=1,
            reward_samples=4,
            steps=30,
            batch_size=4,
            lr=3e-2,
            max_new_tokens=4,
            temperature=1.0,
        )
        found = []
        for train in (True, False):
            batch = dataclasses.replace(t, reward_samples=1).answered(
                student, teacher, collate(held, END), 9, 9
            )
            prompts, written = gkd.split(batch)
            worth = distillation.get(t.reward)
            found.append(distillation.rewards(t.reward, worth, student, prompts, written, written).mean())
            if train:
                t.train(student, teacher, rows(0, 32), 0, tmp_path / str(alpha))
        assert found[1] > found[0] + 0.3, (alpha, found)
        apart[alpha] = t.distance(student, teacher, held)
    assert apart[0.5] < 0.5 * apart[0.0], apart


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("raises", "failed: ZeroDivisionError: division by zero"),
        ("ends", "failed: it ended the process, SystemExit: 0"),
        ("nan", "returned nan"),
        ("text", "returned a str, not a float"),
    ],
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


def test_a_reward_that_fails_late_leaves_the_steps_before(own: Path, tmp_path: Path) -> None:
    given = {"reward": f"{own}:late", "alpha": 0.5, "lmbda": 1, "batch_size": 3, "save_every": 1}
    steps: list[int] = []
    with pytest.raises(RecipeError, match="returned inf"):
        run(tmp_path / "p", lambda step, *_: steps.append(step), **given)
    assert steps == [1, 2, 3]
    seen_by(own).clear()
    run(tmp_path / "p", lambda step, *_: steps.append(step), **given)
    assert steps == [1, 2, 3, 4, 5, 6]


def test_our_own_errors_pass_through() -> None:
    def refuse(*_: str) -> float:
        raise DataError("not this row")

    ids = [np.array([65], np.int32)]
    with pytest.raises(DataError, match="not this row"):
        distillation.rewards("mine", refuse, models.tiny_llama(), ids, ids, ids)


BAD = {
    "nothing written": ({"reward": "f1", "lmbda": 0}, "a reward with lmbda = 0"),
    "alpha": ({"reward": "f1", "alpha": 1.5}, "alpha = 1.5 is not between 0 and 1"),
    "alpha alone": ({"alpha": 0.5}, "alpha = 0.5 without a reward"),
    "samples alone": ({"reward_samples": 4}, "reward_samples = 4 without a reward"),
    "samples": ({"reward": "f1", "reward_samples": 0}, "reward_samples = 0 is below 1"),
    "batches that teach nothing": ({"reward": "f1", "alpha": 0}, "alpha = 0 with lmbda = 0.5"),
    "no such reward": ({"reward": "blue"}, "unknown reward 'blue'"),
    "no such file": ({"reward": "none.py:f"}, "reward 'none.py:f': no file none.py"),
    "no such package": (
        {"reward": "no_such_package_here:f"},
        "reward 'no_such_package_here:f' cannot be imported",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case: str) -> None:
    values, text = BAD[case]
    with pytest.raises(RecipeError, match=text) as caught:
        trainer(**values)
    assert caught.value.hint


def test_a_constant_is_no_reward(own: Path) -> None:
    with pytest.raises(RecipeError, match="NOT is a int, not a function") as caught:
        trainer(reward=f"{own}:NOT")
    assert "reward(prompt, answer, reference)" in str(caught.value.hint)
