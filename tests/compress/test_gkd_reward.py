# SPDX-License-Identifier: Apache-2.0
"""GKD's reward: REINFORCE against the enumerated expectation, what is rewarded, what alpha means, what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
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
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fleetune import answers, models
from fleetune.compress import gkd, reward
from fleetune.compress.divergence import log_probs
from fleetune.data.encode import MASKED, Batch, Encoded, collate
from fleetune.errors import DataError, Interrupted, RecipeError, UsageError
from fleetune.losses import predictors
from fleetune.models import digest, named_tensors

# --- the gradient, in float64 over all that can be written ------------------------------------------------------

STOP, GAMMA = 3, 0.7
WRITTEN = [
    (STOP,),
    *((a, b) for a in range(STOP) for b in range(STOP + 1)),
]  # all answers of 2 tokens at most
PROMPTS = ([0, 2], [1, 1, 2])


def worth(answer: tuple[int, ...]) -> float:
    """A reward with no pattern to it."""
    return math.sin(1.0 + sum((i + 1) * (token + 2.3) for i, token in enumerate(answer)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    made = GPT2LMHeadModel(
        GPT2Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5)
    )
    return made.double().eval()


def chance(net: nn.Module, prompt: list[int], answer: tuple[int, ...]) -> Tensor:
    """p(answer | prompt) at GAMMA, token by token."""
    p = torch.ones((), dtype=torch.float64)
    for i, token in enumerate(answer):
        logits = net(input_ids=torch.tensor([[*prompt, *answer[:i]]])).logits[0, -1]
        p = p * (logits / GAMMA).softmax(-1)[token]
    return p


def mean_worth(chances: list[Tensor]) -> Tensor:
    """The expected reward."""
    return torch.stack([p * worth(a) for p, a in zip(chances, WRITTEN, strict=True)]).sum()


def slope(net: nn.Module, value: Tensor) -> Tensor:
    """The gradient of all weights as one vector."""
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(net.parameters()))])


def of_answers(given: list[tuple[list[int], tuple[int, ...]]]) -> Batch:
    return collate([Encoded(np.array([*p, *a], np.int32), len(p)) for p, a in given], STOP)


def estimate(net: nn.Module, batch: Batch, gains: np.ndarray) -> Tensor:
    log_p = log_probs(predictors(net, batch), batch, GAMMA, chunk=2)
    assert log_p.dtype == torch.float64
    return slope(net, reward.reinforced(log_p, batch, gains))


def test_the_expected_estimate_is_the_gradient_of_the_expected_reward(net: nn.Module) -> None:
    for prompt in PROMPTS:
        chances = [chance(net, prompt, a) for a in WRITTEN]
        assert sum(p.item() for p in chances) == pytest.approx(1, abs=1e-14)
        want = slope(net, mean_worth(chances))
        found = torch.zeros_like(want)
        for p, answer in zip(chances, WRITTEN, strict=True):
            found += p.item() * estimate(net, of_answers([(prompt, answer)]), np.array([worth(answer)]))
        assert want.norm() > 1e-2
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("samples", [1, 2])
def test_the_baseline_does_not_move_the_expectation_and_makes_it_steadier(
    samples: int, net: nn.Module
) -> None:
    """Two answers to one prompt, or one each to two: over all pairs the gradient of the mean expected reward."""
    asked = (PROMPTS[0], PROMPTS[0] if samples == 2 else PROMPTS[1])
    chances = [[chance(net, prompt, a) for a in WRITTEN] for prompt in asked]
    want = slope(net, (mean_worth(chances[0]) + mean_worth(chances[1])) / 2)
    found, spread = torch.zeros_like(want), [0.0, 0.0]
    for i, j in itertools.product(range(len(WRITTEN)), repeat=2):
        p = float(chances[0][i].detach() * chances[1][j].detach())
        batch = of_answers([(asked[0], WRITTEN[i]), (asked[1], WRITTEN[j])])
        raw = np.array([worth(WRITTEN[i]), worth(WRITTEN[j])]) + 5.0  # far from 0, as a reward may be
        got = estimate(net, batch, reward.gains(raw, samples))
        found += p * got
        spread[0] += p * float((got - want).square().sum())
        spread[1] += p * float((estimate(net, batch, raw) - want).square().sum())
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    assert spread[0] < 0.2 * spread[1]


def test_an_estimate_is_the_closed_form() -> None:
    """d/dlogits of gain log softmax(logits / T)[token] / rows: (1[token] - p) gain / (T rows), for scored tokens."""
    batch = collate(
        [Encoded(np.array([5, 6, 7, 8], np.int32), 2), Encoded(np.array([5, 9, 4], np.int32), 1)], END
    )
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 12, generator=g, dtype=torch.float64).requires_grad_(True)
    gains = np.array([0.3, -2.0])
    log_p = log_probs((logits, lambda rows: rows), batch, GAMMA, chunk=3)
    reward.reinforced(log_p, batch, gains).backward()
    tokens, own = torch.tensor([7, 8, 9, 4]), torch.tensor([0.3, 0.3, -2.0, -2.0], dtype=torch.float64)
    want = (torch.eye(12)[tokens] - (logits / GAMMA).softmax(-1)) * own[:, None] / (GAMMA * 2)
    torch.testing.assert_close(logits.grad, want.detach())


def test_gains_are_apart_from_the_others() -> None:
    r = np.array([1.0, 0.0, 0.5, 4.0])
    np.testing.assert_allclose(reward.gains(r, 1), [1 - 4.5 / 3, 0 - 5.5 / 3, 0.5 - 5 / 3, 4 - 1.5 / 3])
    np.testing.assert_allclose(reward.gains(r, 2), [1, -1, -3.5, 3.5])
    np.testing.assert_allclose(reward.gains(r, 4), reward.gains(r, 1))
    assert reward.gains(np.full(7, 0.1), 1).tolist() == [0.0] * 7
    assert reward.gains(np.array([0.7]), 1).tolist() == [0.7]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_step_goes_down_the_divergence_and_up_the_reward(alpha: float) -> None:
    """Equation 5 from whole arrays of logits: the answers' tokens alone, each from what stands before it."""
    student, teacher = pair()
    student.net.requires_grad_(True)
    t = trainer(reward="f1", alpha=alpha, lmbda=1, temperature=GAMMA)
    batch, gains = t.answered(student, teacher, collate(rows(3, 3), END), 0, 0), np.array([0.5, -1.0, 2.0])
    loss, D = t.loss(student, teacher, batch, gains)
    logits = student.net(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    want_D = direct(student, teacher, batch, t.beta).mean()
    worth = torch.zeros((), dtype=torch.float64)
    for b, row in enumerate(batch.labels.tolist()):
        for place, token in enumerate(row):
            if token != MASKED:
                log_p = (logits[b, place - 1].double() / GAMMA).log_softmax(-1)[token]
                worth = worth + gains[b] * log_p / 3
    want = alpha * want_D - (1 - alpha) * worth
    assert D.item() == pytest.approx(want_D.item(), rel=1e-4)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    torch.testing.assert_close(slope(student.net, loss), slope(student.net, want), rtol=1e-3, atol=1e-5)
    plain, _ = t.loss(student, teacher, batch, None)  # not written by the student: no reward, the same weight
    assert plain.item() == pytest.approx(alpha * want_D.item(), rel=1e-4)


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
    want = []
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
        t.train(student, teacher, data, 3, tmp_path / "p")
    assert seen_by(own) == want
    assert len(want) == 6 * sum(writers)
    told = [r.getMessage() for r in caplog.records if "mean reward" in r.getMessage()]
    assert told[0] == f"step {1 + writers.index(True)}: mean reward 1.0000 of 6 answers"
    assert len(told) == sum(writers)


def test_built_in_rewards() -> None:
    for name, same, half in (("exact_match", 1, 0), ("f1", 1, 2 / 3), ("rouge_l", 1, 2 / 3)):
        found = reward.get(name)
        assert found("what", "red fox", "red fox") == pytest.approx(same)
        assert found("what", "red", "red fox") == pytest.approx(half)


Stop = Callable[[int, int, float], None]


def run(folder: Path, on_step: Stop = lambda *_: None, **values: Any) -> str:
    student, teacher = pair()
    trainer(**{"save_every": 2, "steps": 6} | values).train(student, teacher, rows(0, 7), 3, folder, on_step)
    return digest(named_tensors(student.net))


def test_with_alpha_1_a_reward_changes_no_bit(tmp_path: Path) -> None:
    told: list[list[float]] = [[], []]
    plain = run(tmp_path / "a", lambda s, n, loss: told[0].append(loss))
    assert run(tmp_path / "b", lambda s, n, loss: told[1].append(loss), reward="f1", alpha=1) == plain
    assert told[0] == told[1]
    less: list[float] = []
    assert run(tmp_path / "c", lambda s, n, loss: less.append(loss), reward="f1", alpha=0.9) != plain
    assert less[0] == told[0][0]  # what is told is the divergence, whatever its weight


def test_a_stopped_training_with_a_reward_goes_on_bit_for_bit(own: Path, tmp_path: Path) -> None:
    given = {"reward": f"{own}:plain", "alpha": 0.5, "reward_samples": 2}
    want = run(tmp_path / "whole", **given)

    def stop(step: int, steps: int, loss: float) -> None:
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

    def edit(step: int, steps: int, loss: float) -> None:
        own.write_text(other)

    assert run(tmp_path / "edited", edit, **given) == want
    assert run(tmp_path / "other", **given) != want

    def stop(step: int, steps: int, loss: float) -> None:
        raise Interrupted("now")

    with pytest.raises(Interrupted):
        run(tmp_path / "p", stop, **given)
    own.write_text(OWN)
    with pytest.raises(UsageError, match="is of a training with other"):
        run(tmp_path / "p", **given)
    own.write_text(other)
    run(tmp_path / "p", **given)


def test_what_a_reward_is_known_by(own: Path) -> None:
    assert reward.source("f1", reward.get("f1")) == ""
    name = f"{own}:plain"
    assert reward.source(name, reward.get(name)) == hashlib.sha256(OWN.encode()).hexdigest()
    held = f"{own}:held"
    own.write_text(
        own.read_text() + "class Held:\n    def __call__(self, *texts): return 1.0\nheld = Held()\n"
    )
    assert reward.source(held, reward.get(held)) == hashlib.sha256(own.read_bytes()).hexdigest()
    assert reward.source("math:fsum", math.fsum) == ""  # type: ignore[arg-type]


def test_the_reward_rises_and_the_divergence_holds_it(own: Path, tmp_path: Path) -> None:
    """The teacher is what the student was: without the divergence nothing keeps it there."""
    held, apart = rows(99, 32), {}
    for alpha in (0.0, 0.5):
        student, teacher = models.tiny_llama(0), models.tiny_llama(0)
        t = trainer(
            reward=f"{own}:plain", alpha=alpha, lmbda=1, reward_samples=4, steps=30, batch_size=4, lr=3e-2,
            max_new_tokens=4, temperature=1.0,
        )  # fmt: skip
        found = []
        for train in (True, False):
            batch = dataclasses.replace(t, reward_samples=1).answered(
                student, teacher, collate(held, END), 9, 9
            )
            prompts, written = gkd.split(batch)
            worth = reward.get(t.reward)
            found.append(reward.rewards(t.reward, worth, student, prompts, written, written).mean())
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
        reward.rewards("mine", refuse, models.tiny_llama(), ids, ids, ids)


BAD = {
    "nothing written": ({"reward": "f1", "lmbda": 0}, "a reward with lmbda = 0"),
    "alpha": ({"reward": "f1", "alpha": 1.5}, "alpha = 1.5 is not between 0 and 1"),
    "alpha alone": ({"alpha": 0.5}, "alpha = 0.5 without a reward"),
    "samples alone": ({"reward_samples": 4}, "reward_samples = 4 without a reward"),
    "samples": ({"reward": "f1", "reward_samples": 0}, "reward_samples = 0 is below 1"),
    "batches that teach nothing": ({"reward": "f1", "alpha": 0}, "alpha = 0 with lmbda = 0.5"),
    "no such reward": ({"reward": "blue"}, "unknown reward 'blue'"),
    "no such file": ({"reward": "none.py:f"}, "reward 'none.py:f': no file none.py"),
    "no such package": ({"reward": "no_such_package_here:f"}, "reward 'no_such_package_here:f' cannot be imported"),
}  # fmt: skip


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
