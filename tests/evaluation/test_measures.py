"""Measures by name: what the parts give."""

import random

import numpy as np
import pytest
import torch
from losses_harness import TEXT, examples_of

from fleetune.data.encode import encode_all
from fleetune.data.read_rows import Example
from fleetune.errors import RecipeError
from fleetune.evaluation.answers import generate, rouge_l, token_f1
from fleetune.evaluation.losses import eval_mode, perplexity, response_loss
from fleetune.evaluation.measures import TASKS, check_tasks, evaluate
from fleetune.models import Model, tiny_llama


def test_the_model_is_left_as_it_was(tiny: Model) -> None:
    model = tiny_llama(seed=2)
    model.net.train()
    model.net.model.layers[1].eval()
    before = {name: module.training for name, module in model.net.named_modules()}
    seen: list[tuple[bool, bool]] = []
    hook = model.net.model.register_forward_pre_hook(
        lambda module, args: seen.append((module.training, torch.is_inference_mode_enabled()))
    )
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    python_state = random.getstate()
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
        "fleetune.evaluation.answers.generate",
        lambda model, rows, **options: made.append(len(rows)) or answers[: len(rows)],
    )
    tasks = ["loss", "rouge", "f1", "em", "ppl"]
    got = evaluate(tiny, examples, tasks, max_new_tokens=6, texts=[TEXT], answer_rows=3).values
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
