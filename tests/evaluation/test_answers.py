"""Greedy answers against an argmax loop, scores and label words by hand."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from losses_harness import CHUNK_BYTES, VOCAB, by_hand, examples_of, labelled, odd_batch, same_losses, says
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fleetune.data.encode import Encoded, collate, prompt_ids
from fleetune.data.read_rows import Example
from fleetune.errors import DataError
from fleetune.evaluation import answers as answers_module
from fleetune.evaluation.answers import generate, generate_from_ids, label_accuracy, rouge_l, token_f1
from fleetune.evaluation.losses import batch_loss
from fleetune.models import Model, tiny_llama


def _argmax_loop(model: Model, prompt: np.ndarray, count: int) -> str:
    """Greedy decoding without cache, padding or `generate`."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    made: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            token = int(model.net(input_ids=ids).logits[0, -1].argmax())
            if token in answers_module.stop_ids(model):
                break
            made.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return str(model.tokenizer.decode(made, skip_special_tokens=True)).strip()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT itself
@pytest.mark.filterwarnings("ignore:.*tied layer:UserWarning")  # an adapter on the head is the hard case
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_peft_layers_take_part(task_type: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(seed=4)
    batch, prompts = odd_batch(), [np.array([65, 66, 67], np.int32)]
    plain = batch_loss(model, batch), generate_from_ids(model, prompts, max_new_tokens=8)
    layers = ["q_proj", "down_proj", "lm_head"]
    config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False, task_type=task_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.net = get_peft_model(model.net, config)
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * 4)
    model.net.eval()
    same_losses(model.net, batch)
    tuned = batch_loss(model, batch), generate_from_ids(model, prompts, max_new_tokens=8)
    assert abs(tuned[0] - plain[0]) > 1e-3
    assert tuned[1] != plain[1]
    assert tuned[1] == [_argmax_loop(model, prompts[0], 8)]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_greedy_answers_are_the_argmax_whatever_the_padding(tiny: Model, batch_size: int) -> None:
    examples = examples_of(6)
    prompts = [prompt_ids(example, tiny.tokenizer, 256) for example in examples]
    assert len({len(prompt) for prompt in prompts}) > 3
    expected = [_argmax_loop(tiny, prompt, 12) for prompt in prompts]
    assert len(set(expected)) > 3
    assert generate(tiny, examples, max_new_tokens=12, batch_size=batch_size) == expected


def _chooses(order: list[int]) -> Any:
    """A head hook: after token order[i] the model says order[i + 1], whatever the context."""

    def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        state["step"] += 1
        made = torch.zeros_like(out)
        made[..., order[min(state["step"], len(order)) - 1]] = 1.0
        return made

    state = {"step": 0}
    return hook


@pytest.mark.parametrize(("eos", "expected"), [(257, "abc"), (98, "a")])
def test_answers_stop_at_the_end(eos: int, expected: str) -> None:
    model = tiny_llama()
    a, b, c = model.tokenizer("abc")["input_ids"]
    ends = {257: 257, 98: b}[eos]
    model.net.generation_config.eos_token_id = [ends, 263]
    calls: list[int] = []
    hook = _chooses([a, b, c, 257, a, a])
    model.net.lm_head.register_forward_hook(lambda m, i, o: calls.append(1) or hook(m, i, o))
    assert answers_module.stop_ids(model) == {257, ends, 263}
    assert generate(model, examples_of(1), max_new_tokens=20) == [expected]
    assert len(calls) == len(expected) + 1


def test_own_sampling_takes_no_part(tiny: Model, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(tiny, examples_of(2), max_new_tokens=10)
    model = tiny_llama(seed=3)
    own = model.net.generation_config
    odd: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_p": 0.5, "top_k": 7, "min_p": 0.05}
    odd |= {"num_beams": 3, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "penalty_alpha": 0.5}
    odd |= {"max_length": 3, "suppress_tokens": list(range(32, 127)), "min_new_tokens": 2}
    for name, value in odd.items():
        setattr(own, name, value)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert generate(model, examples_of(2), max_new_tokens=10) == expected
    assert caplog.records == []
    assert model.net.generation_config is own


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat on the mat", "the cat sat on the mat", 1000 / 11),  # LCS 5 of 5 and 6
        ("b a", "a b", 50.0),  # order counts
        ("The Cat, sat!", "the cat sat", 100.0),  # case and punctuation do not
        ("jumping ads", "jumped ad", 50.0),  # stems are compared, of words over 3 letters
        ("jumping", "jumped", 100.0),
        ("", "a b", 0.0),
        ("x", "", 0.0),
    ],
)
def test_rouge_l_by_hand(answer: str, reference: str, expected: float) -> None:
    assert rouge_l([answer], [reference]) == pytest.approx(expected)


def test_scores_are_means_in_percent() -> None:
    assert rouge_l(["a b", "c"], ["a b", "d"]) == pytest.approx(50.0)
    # an F1 whose precision is 1/2 and recall 1/3 is 2/5
    assert rouge_l(["x y"], ["x p q"]) == pytest.approx(40.0)
    for score in (rouge_l, token_f1, answers_module.exact_match):
        with pytest.raises(DataError, match="no answers"):
            score([], [])
        with pytest.raises(ValueError, match="zip"):
            score(["a"], ["a", "b"])


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "em"),
    [
        ("The  Eiffel tower.", "eiffel tower", 100.0, 100.0),
        ("in the Eiffel tower", "eiffel tower", 80.0, 0.0),  # precision 2/3, recall 1
        ("tower eiffel", "eiffel tower", 100.0, 0.0),
        ("b b", "b c", 50.0, 0.0),  # a word counts as often as both have it
        ("the", "an", 100.0, 100.0),  # nothing is left of either
        ("the", "x", 0.0, 0.0),
        ("x", "y", 0.0, 0.0),
    ],
)
def test_f1_and_exact_match_by_hand(answer: str, reference: str, f1: float, em: float) -> None:
    assert token_f1([answer], [reference]) == pytest.approx(f1)
    assert answers_module.exact_match([answer], [reference]) == pytest.approx(em)


def test_label_accuracy_of_a_rigged_model() -> None:
    model = tiny_llama()
    says(model, {"y": 0.4, "e": 0.2, "s": 0.2, "n": 0.1, "o": 0.1})
    examples = labelled("yes", "no", "no", "yes", "yes")
    assert label_accuracy(model, examples, ["no", "yes"]) == pytest.approx(60.0)
    assert label_accuracy(model, examples, batch_size=3) == pytest.approx(60.0)


def test_label_scores_are_conditional_on_the_prompt(tiny: Model) -> None:
    examples = labelled("yes", "no", "maybe")
    tokens = [answers_module.answer_ids(tiny, word) for word in ("yes", "no", "maybe")]
    prompts = [prompt_ids(example, tiny.tokenizer, 200) for example in examples]
    got = answers_module.answer_scores(tiny, prompts, tokens, batch_size=4)
    for i, prompt in enumerate(prompts):
        for j, answer in enumerate(tokens):
            row = Encoded(np.concatenate([prompt, answer]).astype(np.int32), len(prompt))
            losses = [loss for _, loss in by_hand(tiny.net, collate([row], 257))]
            assert got[i, j] == pytest.approx(-np.mean(losses), abs=1e-5)


def test_the_mean_decides_and_rows_that_do_not_fit_are_refused(tiny: Model) -> None:
    model = tiny_llama()
    says(model, {"a": 0.5, "b": 0.4})
    assert label_accuracy(model, labelled("aaaa", "b"), ["b", "aaaa"]) == pytest.approx(50.0)
    for rows, words in ((("yes", "maybe"), ["yes", "no"]), ([f"word {i}" for i in range(65)], []), ((), [])):
        with pytest.raises(DataError, match="label"):
            label_accuracy(tiny, labelled(*rows), words)


def test_a_long_prompt_leaves_room_for_the_answer(tiny: Model) -> None:
    lengths: list[int] = []
    hook = tiny.net.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(int(kwargs["position_ids"].max()) + 1), with_kwargs=True
    )
    generate(tiny, [Example((("user", "stone " * 400),), "x", {})], max_new_tokens=4)
    hook.remove()
    assert lengths[0] == 1020
    assert max(lengths) <= 1024
