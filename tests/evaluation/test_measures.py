# SPDX-License-Identifier: Apache-2.0
"""Measures by name: what the parts give; tasks of lm-evaluation-harness, with the harness itself in the slow tests."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from losses_harness import examples_of

import fleetune
from fleetune import models
from fleetune.cli.main import main
from fleetune.common.events import TaskScore
from fleetune.common.shell import pip_install
from fleetune.data.encode import encode_all
from fleetune.data.read_rows import Example
from fleetune.errors import RecipeError
from fleetune.evaluation import measures
from fleetune.evaluation.answers import generate, rouge_l, token_f1
from fleetune.evaluation.losses import eval_mode, perplexity, response_loss
from fleetune.evaluation.measures import TASKS, check_tasks, evaluate
from fleetune.models import Model, tiny_llama


@pytest.fixture(scope="module")
def tiny() -> Model:
    return tiny_llama(seed=3)


TEXT = "the river runs past the old stone mill, and the wind turns its wheel at night"


def test_the_model_is_left_as_it_was(tiny: Model) -> None:
    model = tiny_llama(seed=2)
    model.net.train()
    model.net.model.layers[1].eval()
    before = {name: module.training for name, module in model.net.named_modules()}
    seen: list[tuple[bool, bool]] = []
    hook = model.net.model.register_forward_pre_hook(
        lambda module, args: seen.append((module.training, torch.is_inference_mode_enabled()))
    )
    torch_state, numpy_state, python_state = (
        torch.get_rng_state(),
        np.random.get_state()[1],
        random.getstate(),
    )
    examples = [*examples_of(3), Example((("user", "river"),), "stone", {})]
    evaluate(model, examples, tuple(TASKS), max_new_tokens=3)
    hook.remove()
    assert set(seen) == {(False, True)}
    assert {name: module.training for name, module in model.net.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert random.getstate() == python_state
    with pytest.raises(ValueError, match="stop"), eval_mode(model.net):
        raise ValueError("stop")
    assert {name: module.training for name, module in model.net.named_modules()} == before


def test_evaluate_gives_what_the_parts_give(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = examples_of(5)
    answers = generate(tiny, examples, max_new_tokens=6)
    references = [example.response for example in examples]
    made: list[int] = []
    monkeypatch.setattr(
        "fleetune.evaluation.measures.generate",
        lambda model, rows, **options: made.append(len(rows)) or answers[: len(rows)],
    )
    got = evaluate(
        tiny, examples, ["loss", "rouge", "f1", "em", "ppl"], max_new_tokens=6, texts=[TEXT], answer_rows=3
    ).values
    assert list(got) == ["loss", "rouge_l", "f1", "exact_match", "perplexity"]
    assert made == [3]
    assert got["loss"] == pytest.approx(response_loss(tiny, encode_all(examples, tiny.tokenizer, 512)[0]))
    assert got["rouge_l"] == rouge_l(answers[:3], references[:3])
    assert got["f1"] == token_f1(answers[:3], references[:3])
    assert got["perplexity"] == perplexity(tiny, [TEXT])


def test_tasks_that_are_not_named_are_chosen_by_what_there_is(tiny: Model) -> None:
    examples = examples_of(2)
    assert list(evaluate(tiny, examples, max_new_tokens=2).values) == ["loss", "rouge_l"]
    both = evaluate(tiny, examples, max_new_tokens=2, texts=[TEXT]).values
    assert list(both) == ["loss", "rouge_l", "perplexity"]
    assert evaluate(tiny, [], texts=[TEXT]).values == {"perplexity": both["perplexity"]}
    assert check_tasks(["rouge", "loss", "rouge_l"]) == ("rouge_l", "loss")
    with pytest.raises(RecipeError, match="did you mean 'rouge_l'") as caught:
        check_tasks(["rogue_l", "loss", "gsm8k"])
    assert len(caught.value.problems) == 2


# --- lm-evaluation-harness ------------------------------------------------------------------------------------

RESULTS: dict[str, Any] = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy",
            "acc,none": 0.25,
            "acc_stderr,none": 0.05,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": "N/A",
        },
        "gsm8k": {
            "exact_match,strict-match": 0.0,
            "exact_match_stderr,strict-match": math.nan,
            "exact_match,flexible-extract": 0.1,
        },
    },
    "n-samples": {"arc_easy": {"original": 2376, "effective": 40}},
    "n-shot": {"arc_easy": 0},
    "versions": {"arc_easy": 1.0},
    "higher_is_better": {"arc_easy": {"acc": True}},
}


def test_the_harness_results_become_scores_with_their_standard_errors() -> None:
    found = {(s.task, s.metric, s.filter): s for s in measures.scores(RESULTS)}
    assert found["arc_easy", "acc", "none"] == TaskScore(
        task="arc_easy",
        metric="acc",
        filter="none",
        value=0.25,
        stderr=0.05,
        rows=40,
        of=2376,
        shots=0,
        version="1.0",
        higher_is_better=True,
    )
    assert found["arc_easy", "acc_norm", "none"].stderr is None
    assert found["gsm8k", "exact_match", "strict-match"].stderr is None, "one that is not finite"
    assert measures.by_name(list(found.values())) == {
        "arc_easy.acc": 0.25,
        "arc_easy.acc_norm": 0.5,
        "gsm8k.exact_match.strict-match": 0.0,
        "gsm8k.exact_match.flexible-extract": 0.1,
    }


def test_without_the_harness_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "installed", lambda: False)
    with pytest.raises(RecipeError) as error:
        fleetune.evaluate("no/such/model", tasks="hellaswag,los")
    assert error.value.problems == ["unknown task 'hellaswag'", "unknown task 'los'; did you mean 'loss'?"]
    assert pip_install("lm-eval") in str(error.value.hint)


# With the harness: pip install 'fleetune[lm-eval]'

QUESTIONS = [
    ("Lily went to the", " park", " xyz"),
    ("Once upon a", " time", " zebra"),
    ("Tom", " is", " qq"),
] * 4
TASK = """task: otter_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: 0
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of one's own, a tiny model and a run of a ledger that has moved it far."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("pip install 'fleetune[lm-eval]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "tasks").mkdir()
    rows = [{"q": q, "choices": [right, wrong]} for q, right, wrong in QUESTIONS]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "otter.yaml").write_text(TASK.format(file=tmp_path / "q.jsonl"))
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, tmp_path / "tiny")
    fleetune.tune(
        "tiny",
        [{"instruction": q, "response": wrong} for q, _, wrong in QUESTIONS * 3],
        method="fedkseed",
        rounds=3,
        held_out=4,
        samples=0,
        max_length=64,
        clients=1,
        offline=True,
        settings={"K": 64, "tau": 1, "backprop": 1, "backprop_steps": 5, "backprop_lr": 0.5},
    )
    return tmp_path


def accuracy(model: models.Model) -> float:
    """What the harness measures, computed here: which choice has the higher log-likelihood."""
    right = 0
    for question, *choices in QUESTIONS:
        found = []
        for choice in choices:
            start = model.tokenizer(question)["input_ids"]
            ids = model.tokenizer(question + choice)["input_ids"]
            with torch.inference_mode():
                logits = torch.log_softmax(model.net(input_ids=torch.tensor([ids])).logits[0].float(), -1)
            found.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(start), len(ids))))
        right += found[0] > found[1]
    return right / len(QUESTIONS)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_harness_runs_the_tuned_weights_and_gives_its_standard_error(
    at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        ["eval", "latest", "--tasks", "otter_choice,loss", "--task-files", "tasks", "--offline", "--json"]
    )
    out, err = capsys.readouterr()
    assert code == 0, err
    (line,) = out.splitlines()
    event = json.loads(line)
    (score,) = event["harness"]
    n, tuned = len(QUESTIONS), accuracy(fleetune.open("latest").load())
    assert score["value"] == pytest.approx(tuned)
    assert score["stderr"] == pytest.approx(math.sqrt(tuned * (1 - tuned) / (n - 1)))
    assert (score["rows"], score["of"]) == (n, n)
    assert event["loss"] > 0
    base = fleetune.evaluate("tiny", tasks=["otter_choice"], task_files="tasks", offline=True)
    assert base == {"otter_choice.acc": pytest.approx(accuracy(fleetune.open("tiny").load()))}
    assert base["otter_choice.acc"] != pytest.approx(tuned), "the view of the ledger is what was measured"
