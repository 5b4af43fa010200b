# SPDX-License-Identifier: Apache-2.0
"""Evaluation against references computed by hand: float64 softmax, one-shot perplexity, an argmax loop."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from fleetune.data.encode import Batch, Encoded, collate, encode_all, prompt_ids
from fleetune.data.examples import Example
from fleetune.errors import DataError, RecipeError
from fleetune.evaluation import answers as answers_module
from fleetune.evaluation import losses as losses_module
from fleetune.evaluation.answers import (
    answer_ids,
    exact_match,
    generate,
    generate_from_ids,
    label_accuracy,
    rouge_l,
    stop_ids,
    token_f1,
)
from fleetune.evaluation.losses import (
    batch_loss,
    eval_mode,
    perplexity,
    response_loss,
    row_losses,
    token_losses,
)
from fleetune.evaluation.measures import TASKS, check_tasks, evaluate
from fleetune.models import Model, named_tensors, tiny_llama
from fleetune.seeds.noise import passes
from fleetune.seeds.view import View

CHUNK_BYTES = "fleetune.evaluation.head_loss.CHUNK_BYTES"
VOCAB = 264


@pytest.fixture(scope="module")
def tiny() -> Model:
    return tiny_llama(seed=3)


def _examples(count: int) -> list[Example]:
    draw = random.Random(5)
    words = ["river", "stone", "apple", "cloud", "lamp", "wind"]
    made = []
    for i in range(count):
        ask, say = draw.choices(words, k=1 + 3 * i % 7), draw.choices(words, k=1 + 2 * i % 5)
        made.append(Example((("user", " ".join(ask)),), " ".join(say), {"client": f"site {i}"}))
    return made


def _rows(model: Model, count: int = 7) -> list[Encoded]:
    return encode_all(_examples(count), model.tokenizer, 256)[0]


def _by_hand(net: nn.Module, batch: Batch) -> list[tuple[int, float]]:
    """(row, cross-entropy) of each scored token, one at a time in float64 from the full logits."""
    with torch.no_grad():
        logits = net(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    found = []
    for b, t in (batch.labels != -100).nonzero().tolist():
        if t > 0:
            scores = logits[b, t - 1].double().numpy()
            top = scores.max()
            log_sum = top + math.log(np.exp(scores - top).sum())
            found.append((b, log_sum - scores[int(batch.labels[b, t])]))
    return found


def _odd_batch() -> Batch:
    """Ragged rows: one scored from its first token, one not at all, one with gaps in its labels."""
    draw = np.random.default_rng(0)
    rows = [(9, 0), (4, 4), (12, 5), (7, 6)]
    made = [Encoded(draw.integers(0, 256, n).astype(np.int32), prompt) for n, prompt in rows]
    batch = collate(made, 257)
    batch.labels[2, 7:9] = -100
    return batch


def _same_losses(net: nn.Module, batch: Batch) -> None:
    expected = _by_hand(net, batch)
    with eval_mode(net):
        losses, rows = token_losses(net, batch)
    assert rows.tolist() == [row for row, _ in expected]
    np.testing.assert_allclose(losses.numpy(), [loss for _, loss in expected], rtol=0, atol=5e-6)


# --- losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_token_losses_are_the_cross_entropies(
    tiny: Model, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * chunk)
    _same_losses(tiny.net, _odd_batch())


def test_row_sums_and_batch_mean(tiny: Model) -> None:
    batch = _odd_batch()
    expected = _by_hand(tiny.net, batch)
    sums, counts = row_losses(tiny, batch)
    assert counts.tolist() == [8, 0, 5, 1]
    assert sums.dtype == np.float64
    for row in range(4):
        assert sums[row] == pytest.approx(sum(loss for r, loss in expected if r == row), abs=1e-5)
    assert batch_loss(tiny, batch) == pytest.approx(sum(loss for _, loss in expected) / 14, abs=1e-6)


def test_a_batch_without_labels_has_no_loss(tiny: Model) -> None:
    batch = _odd_batch()
    batch.labels[:] = -100
    assert math.isnan(batch_loss(tiny, batch))
    row = Encoded(np.arange(5, dtype=np.int32), 5)
    with pytest.raises(DataError, match="no response tokens to score in 2 row"):
        response_loss(tiny, [row, row])
    with pytest.raises(DataError, match="0 row"):
        response_loss(tiny, [])


def test_response_loss_is_weighted_by_tokens(tiny: Model) -> None:
    rows = _rows(tiny)
    losses = [loss for row in rows for _, loss in _by_hand(tiny.net, collate([row], 257))]
    assert len(losses) == sum(len(row.ids) - row.n_prompt for row in rows)
    assert response_loss(tiny, rows) == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    per_row = np.mean([response_loss(tiny, [row]) for row in rows])
    assert abs(per_row - response_loss(tiny, rows)) > 1e-4  # so the test above can tell the two means apart


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_response_loss_does_not_depend_on_the_batch_size(tiny: Model, batch_size: int) -> None:
    rows = _rows(tiny)
    assert response_loss(tiny, rows, batch_size=batch_size) == pytest.approx(
        response_loss(tiny, rows), abs=1e-6
    )


def test_row_order_survives_sorting_by_length(tiny: Model) -> None:
    rows = _rows(tiny)
    sums, counts = losses_module.all_row_losses(tiny, rows, 3)
    for i, row in enumerate(rows):
        alone, n = row_losses(tiny, collate([row], 257))
        assert (counts[i], sums[i]) == (n[0], pytest.approx(alone[0], abs=1e-5))


def test_the_head_sees_only_scored_positions_and_few_at_a_time(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * 4)
    head, seen = tiny.net.lm_head, _head_calls(tiny)
    assert seen == [0, 4, 4, 4, 2]  # at first none, to see whether the model changes its logits afterwards
    assert not head._forward_hooks
    assert not head._forward_pre_hooks


@contextmanager
def _noisy_head(head: nn.Module) -> Iterator[None]:
    """Hooks of somebody else: the input shifted, the output scaled."""
    hooks = [
        head.register_forward_pre_hook(lambda module, args: (args[0] + 0.25,)),
        head.register_forward_hook(lambda module, args, out: out * 1.5),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("chunk", [2, 1000])
def test_other_hooks_on_the_head_work_once(tiny: Model, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * chunk)
    plain = batch_loss(tiny, _odd_batch())
    with _noisy_head(tiny.net.lm_head):
        _same_losses(tiny.net, _odd_batch())
        assert abs(batch_loss(tiny, _odd_batch()) - plain) > 1e-3


@pytest.mark.parametrize("chunk", [2, 1000])
def test_a_model_that_caps_its_logits_after_the_head(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.05,
        pad_token_id=257,
        bos_token_id=256,
        eos_token_id=257,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Gemma2ForCausalLM(config).eval()
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * chunk)
    _same_losses(net, _odd_batch())
    ours = [loss for _, loss in _by_hand(net, _odd_batch())]
    net.config.final_logit_softcapping = None
    uncapped = [loss for _, loss in _by_hand(net, _odd_batch())]
    assert np.abs(np.subtract(ours, uncapped)).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "name", "value"), [("granite", "logits_scaling", 3.0), ("cohere", "logit_scale", 0.2)]
)
def test_a_model_that_scales_its_logits_after_the_head_is_read_in_pieces(
    kind: str, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = CONFIG_MAPPING[kind](
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=257,
        bos_token_id=256,
        eos_token_id=257,
        **{name: value},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = AutoModelForCausalLM.from_config(made).eval()
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * 4)
    _same_losses(net, _odd_batch())
    handed: list[int] = []
    net.lm_head.register_forward_hook(lambda module, args, out: handed.append(out.shape[1]))
    with eval_mode(net):
        token_losses(net, _odd_batch())
    assert max(handed) <= 4, "no array of all tokens"


def test_a_model_that_no_longer_changes_its_logits_is_read_in_pieces_again(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a net did once must not change the rounding of later measurements."""
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * 4)
    before = _head_calls(tiny)
    plain = type(tiny.net).forward

    def scaled(self: Any, *args: Any, **more: Any) -> Any:
        out = plain(self, *args, **more)
        out.logits = out.logits / 2.0
        return out

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny.net), "forward", scaled)
        assert _head_calls(tiny) == [0, 14]  # run again, with all of them
        assert _head_calls(tiny) == [14]
    assert _head_calls(tiny)[1:] == before[1:] == [4, 4, 4, 2]
    assert _head_calls(tiny) == before


def _head_calls(model: Model) -> list[int]:
    """The tokens that the head of a model is handed, call by call, while the odd batch is measured."""
    seen: list[int] = []
    watch = model.net.lm_head.register_forward_hook(
        lambda module, args, out: seen.append(out.shape[0] * out.shape[1])
    )
    try:
        batch_loss(model, _odd_batch())
    finally:
        watch.remove()
    return seen


def test_a_head_that_is_no_module(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * 3)
    monkeypatch.setattr(tiny.net, "get_output_embeddings", lambda: None)
    _same_losses(tiny.net, _odd_batch())


@pytest.mark.parametrize("chunk", [3, 1000])
def test_token_losses_can_be_back_propagated(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(seed=1), _odd_batch()
    model.net.requires_grad_(True)
    batch.labels[:, 0] = -100
    model.net(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.net.named_parameters()}
    model.net.zero_grad()
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * chunk)
    token_losses(model.net, batch)[0].mean().backward()
    for name, p in model.net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


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
    examples = [*_examples(3), Example((("user", "river"),), "stone", {})]
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


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT itself
@pytest.mark.filterwarnings("ignore:.*tied layer:UserWarning")  # an adapter on the head is the hard case
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_peft_layers_take_part(task_type: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(seed=4)
    batch, prompts = _odd_batch(), [np.array([65, 66, 67], np.int32)]
    plain = batch_loss(model, batch), generate_from_ids(model, prompts, max_new_tokens=8)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False, task_type=task_type
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.net = get_peft_model(model.net, config)
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * 4)
    model.net.eval()
    _same_losses(model.net, batch)
    tuned = batch_loss(model, batch), generate_from_ids(model, prompts, max_new_tokens=8)
    assert abs(tuned[0] - plain[0]) > 1e-3
    assert tuned[1] != plain[1]
    assert tuned[1] == [_argmax_loop(model, prompts[0], 8)]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT itself
def test_a_soft_prompt_moves_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(seed=4), _odd_batch()
    plain = batch_loss(model, batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
        model.net = get_peft_model(model.net, config).eval()
    prompt = model.net.get_prompt(len(batch.labels)).detach()
    words = model.net.get_input_embeddings()(batch.input_ids)
    with torch.no_grad():
        mask = torch.cat([torch.ones(prompt.shape[:2], dtype=torch.int64), batch.attention_mask], 1)
        full = model.net.base_model(inputs_embeds=torch.cat([prompt, words], 1), attention_mask=mask).logits
    chances = full[:, 5:-1].double().log_softmax(-1)
    scored = batch.labels[:, 1:] != -100
    expected = -chances[scored].gather(1, batch.labels[:, 1:][scored][:, None]).mean()
    for chunk in (3, 1000):
        monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * chunk)
        assert batch_loss(model, batch) == pytest.approx(float(expected), abs=1e-5)
    assert abs(plain - float(expected)) > 1e-3


# --- perplexity -------------------------------------------------------------------------------------------

TEXT = "the river runs past the old stone mill, and the wind turns its wheel at night"


def test_perplexity_of_one_window_is_the_one_shot_value(tiny: Model) -> None:
    ids = np.array(tiny.tokenizer(TEXT)["input_ids"])
    losses = [loss for _, loss in _by_hand(tiny.net, collate([Encoded(ids.astype(np.int32), 1)], 257))]
    assert len(losses) == len(ids) - 1
    assert perplexity(tiny, [TEXT]) == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 5), (9, 1), (20, 19), (500, 3)])
def test_strided_perplexity_follows_the_guide(tiny: Model, window: int, stride: int) -> None:
    ids = torch.tensor([tiny.tokenizer(TEXT)["input_ids"]])
    total, count, scored_to = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        piece, new = ids[:, begin:end], end - scored_to
        labels = piece.clone()
        labels[:, : piece.shape[1] - new] = -100
        losses = _by_hand(tiny.net, Batch(piece, torch.ones_like(piece), labels))
        total, count, scored_to = total + sum(loss for _, loss in losses), count + len(losses), end
        if end == ids.shape[1]:
            break
    assert count == ids.shape[1] - 1
    expected = math.exp(total / count)
    for batch_size in (1, 4):
        got = perplexity(tiny, [TEXT], window=window, stride=stride, batch_size=batch_size)
        assert got == pytest.approx(expected, rel=1e-6)


@settings(max_examples=200)
@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_windows_score_each_token_once_with_enough_context(
    length: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window - 1))
    ids = np.arange(length, dtype=np.int32)
    scored: list[int] = []
    for row in losses_module._windows(ids, window, stride):
        assert len(row.ids) <= window
        assert row.n_prompt >= (1 if row.ids[0] == 0 else window - stride)
        scored += row.ids[row.n_prompt :].tolist()
    assert scored == list(range(1, length))


def test_texts_are_separate_and_weighted_by_tokens(tiny: Model) -> None:
    both = perplexity(tiny, [TEXT, TEXT[:11]])
    n, m = len(TEXT) - 1, 10
    one, two = math.log(perplexity(tiny, [TEXT])), math.log(perplexity(tiny, [TEXT[:11]]))
    assert math.log(both) == pytest.approx((n * one + m * two) / (n + m), rel=1e-6)


def test_a_beginning_token_is_context_and_not_scored() -> None:
    model = tiny_llama(seed=3)
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 256)]
    )
    ids = np.array([256, *TEXT[:9].encode()], np.int32)
    assert model.tokenizer(TEXT[:9])["input_ids"][0] == 256
    row = Encoded(
        np.array([256, *model.tokenizer(TEXT[:9], add_special_tokens=False)["input_ids"]], np.int32), 1
    )
    assert len(row.ids) == len(ids)
    assert perplexity(model, [TEXT[:9]]) == pytest.approx(math.exp(response_loss(model, [row])), rel=1e-9)
    assert perplexity(model, ["t"]) > 1  # one token, scored after the beginning


def test_bad_perplexity_input(tiny: Model) -> None:
    with pytest.raises(DataError, match="no token to score in 2 text"):
        perplexity(tiny, ["", "a"])
    for window, stride in [(8, 8), (8, 9), (1, 1), (8, -1)]:
        with pytest.raises(RecipeError, match=f"window {window} and stride {stride}"):
            perplexity(tiny, [TEXT], window=window, stride=stride)


# --- answers ----------------------------------------------------------------------------------------------


def _argmax_loop(model: Model, prompt: np.ndarray, count: int) -> str:
    """Greedy decoding without cache, padding or `generate`."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    made: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            token = int(model.net(input_ids=ids).logits[0, -1].argmax())
            if token in stop_ids(model):
                break
            made.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return str(model.tokenizer.decode(made, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_greedy_answers_are_the_argmax_whatever_the_padding(tiny: Model, batch_size: int) -> None:
    examples = _examples(6)
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
    assert stop_ids(model) == {257, ends, 263}
    assert generate(model, _examples(1), max_new_tokens=20) == [expected]
    assert len(calls) == len(expected) + 1


def test_max_new_tokens_and_white_space() -> None:
    model = tiny_llama()
    space, a = model.tokenizer(" a")["input_ids"]
    model.net.lm_head.register_forward_hook(_chooses([space, a, a, a, space, space, a]))
    assert generate(model, _examples(1), max_new_tokens=5) == ["aaa"]


def test_the_checkpoints_own_sampling_takes_no_part(
    tiny: Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(tiny, _examples(2), max_new_tokens=10)
    model = tiny_llama(seed=3)
    own = model.net.generation_config
    for name, value in {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.05,
        "num_beams": 3,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "penalty_alpha": 0.5,
        "max_length": 3,
        "suppress_tokens": list(range(32, 127)),
        "min_new_tokens": 2,
    }.items():
        setattr(own, name, value)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert generate(model, _examples(2), max_new_tokens=10) == expected
    assert caplog.records == []
    assert model.net.generation_config is own


def test_a_long_prompt_leaves_room_for_the_answer(tiny: Model) -> None:
    lengths: list[int] = []
    hook = tiny.net.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(int(kwargs["position_ids"].max()) + 1), with_kwargs=True
    )
    try:
        generate(tiny, [Example((("user", "stone " * 400),), "x", {})], max_new_tokens=4)
    finally:
        hook.remove()
    assert lengths[0] == 1020
    assert max(lengths) <= 1024


# --- scores -----------------------------------------------------------------------------------------------


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
    for score in (rouge_l, token_f1, exact_match):
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
    assert exact_match([answer], [reference]) == pytest.approx(em)


# --- label words ------------------------------------------------------------------------------------------


def _says(model: Model, chances: dict[str, float]) -> None:
    """Rig the model: the chance of each character is the same at every place."""
    scores = torch.full((VOCAB,), -30.0)
    for char, chance in chances.items():
        scores[model.tokenizer(char)["input_ids"][0]] = math.log(chance)
    model.net.lm_head.register_forward_hook(lambda module, args, out: scores.expand(out.shape))


def _labelled(*labels: str) -> list[Example]:
    return [Example((("user", f"question {i}"),), label, {}) for i, label in enumerate(labels)]


def test_label_accuracy_of_a_rigged_model() -> None:
    model = tiny_llama()
    _says(model, {"y": 0.4, "e": 0.2, "s": 0.2, "n": 0.1, "o": 0.1})
    examples = _labelled("yes", "no", "no", "yes", "yes")
    assert label_accuracy(model, examples, ["no", "yes"]) == pytest.approx(60.0)
    assert label_accuracy(model, examples, batch_size=3) == pytest.approx(60.0)


def test_the_mean_decides_not_the_sum_and_not_the_end_of_turn() -> None:
    model = tiny_llama()
    _says(model, {"a": 0.5, "b": 0.4})
    assert label_accuracy(model, _labelled("aaaa", "b"), ["b", "aaaa"]) == pytest.approx(50.0)
    assert label_accuracy(model, _labelled("aaaa"), ["b", "aaaa"]) == pytest.approx(100.0)
    assert answer_ids(model, "ab").tolist() == model.tokenizer("ab")["input_ids"]


def test_label_scores_are_conditional_on_the_prompt(tiny: Model) -> None:
    examples = _labelled("yes", "no", "maybe")
    tokens = [answer_ids(tiny, word) for word in ("yes", "no", "maybe")]
    prompts = [prompt_ids(example, tiny.tokenizer, 200) for example in examples]
    got = answers_module.answer_scores(tiny, prompts, tokens, batch_size=4)
    for i, prompt in enumerate(prompts):
        for j, answer in enumerate(tokens):
            row = Encoded(np.concatenate([prompt, answer]).astype(np.int32), len(prompt))
            losses = [loss for _, loss in _by_hand(tiny.net, collate([row], 257))]
            assert got[i, j] == pytest.approx(-np.mean(losses), abs=1e-5)


def test_label_accuracy_refuses_rows_that_do_not_fit(tiny: Model) -> None:
    with pytest.raises(DataError, match=r"2 labels, .*'maybe'"):
        label_accuracy(tiny, _labelled("yes", "maybe"), ["yes", "no"])
    with pytest.raises(DataError, match=r"65 labels, "):
        label_accuracy(tiny, _labelled(*(f"word {i}" for i in range(65))))
    with pytest.raises(DataError, match="0 labels, "):
        label_accuracy(tiny, [])


# --- all together -----------------------------------------------------------------------------------------


def test_evaluate_gives_what_the_parts_give(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = _examples(5)
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


def test_a_text_is_measured_beside_the_rows_and_alone_without_any(tiny: Model) -> None:
    examples = _examples(2)
    assert list(evaluate(tiny, examples, max_new_tokens=2).values) == ["loss", "rouge_l"]
    both = evaluate(tiny, examples, max_new_tokens=2, texts=[TEXT]).values
    assert list(both) == ["loss", "rouge_l", "perplexity"]
    assert both["perplexity"] == perplexity(tiny, [TEXT])
    assert evaluate(tiny, [], texts=[TEXT]).values == {"perplexity": both["perplexity"]}


def test_unknown_tasks_are_all_named() -> None:
    with pytest.raises(RecipeError, match="'rogue_l'; did you mean 'rouge_l'") as caught:
        check_tasks(["rogue_l", "loss", "gsm8k"])
    assert len(caught.value.problems) == 2
    assert check_tasks(["rouge", "loss", "rouge_l"]) == ("rouge_l", "loss")


# --- a head whose weights are computed on the way ------------------------------------------------------------


def _viewed(model: Model) -> View:
    """The model as seen from a point that is not its base."""
    view = View(named_tensors(model.net), model.net, run_key=9, law="hashed", grid=1e-5)
    view.place(passes("hashed", 16, np.arange(16, dtype=np.uint64), np.arange(1, 17) * 50))
    return view


@pytest.mark.parametrize(
    "rows_of_head", [1, 5, 70, 1000]
)  # blocks that divide the vocabulary, do not, hold it all
@pytest.mark.parametrize("chunk", [1, 3, 1000])  # tokens at a time
def test_a_streamed_head_has_the_same_losses(
    chunk: int, rows_of_head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_llama(seed=3), _odd_batch()
    base = _by_hand(model.net, batch)
    monkeypatch.setattr("fleetune.seeds.weights.CHUNK", rows_of_head * model.net.config.hidden_size)
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * chunk)
    view = _viewed(model)
    expected = _by_hand(model.net, batch)
    assert max(abs(a - b) for (_, a), (_, b) in zip(base, expected, strict=True)) > 1e-3
    _same_losses(model.net, batch)
    view.remove()
    _same_losses(model.net, batch)


def test_a_streamed_head_computes_its_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(seed=3), _odd_batch()
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB)  # one token a time, were it not for the stream
    view, asked, piece = _viewed(model), list[tuple[str, int, int]](), View.piece
    monkeypatch.setattr(
        View, "piece", lambda self, slot, *at: asked.append((slot.name, *at[:2])) or piece(self, slot, *at)
    )
    with eval_mode(model.net):
        token_losses(model.net, batch)
    view.remove()
    head = model.net.lm_head.weight
    assert (
        asked.count(("lm_head.weight", 0, head.numel())) == 2
    )  # as the embedding, a small table, and as the head


def test_a_streamed_head_of_a_model_that_caps_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(seed=3), _odd_batch()
    view, plain = _viewed(model), type(model.net).forward

    def capped(self: Any, *args: Any, **more: Any) -> Any:
        out = plain(self, *args, **more)
        out.logits = 2.0 * torch.tanh(out.logits / 2.0)
        return out

    monkeypatch.setattr(type(model.net), "forward", capped)
    _same_losses(model.net, batch)
    view.remove()
