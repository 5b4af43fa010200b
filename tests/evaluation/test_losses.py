"""Losses and perplexity against references computed by hand: float64 softmax, one-shot perplexity."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_harness import CHUNK_BYTES, TEXT, VOCAB, by_hand, odd_batch, rows_of, same_losses
from peft import PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fleetune.data.encode import Batch, Encoded, collate
from fleetune.errors import DataError, RecipeError
from fleetune.evaluation import losses as losses_module
from fleetune.evaluation.losses import batch_loss, eval_mode, perplexity, response_loss, token_losses
from fleetune.models import Model, named_tensors, tiny_llama
from fleetune.seeds.noise import passes
from fleetune.seeds.view import View
from tiny_families import TOKENS, sizes


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_token_losses_are_cross_entropies(tiny: Model, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * chunk)
    same_losses(tiny.net, odd_batch())


def test_row_sums_and_batch_mean(tiny: Model) -> None:
    batch = odd_batch()
    expected = by_hand(tiny.net, batch)
    sums, counts = losses_module.row_losses(tiny, batch)
    assert counts.tolist() == [8, 0, 5, 1]
    assert sums.dtype == np.float64
    for row in range(4):
        assert sums[row] == pytest.approx(sum(loss for r, loss in expected if r == row), abs=1e-5)
    assert batch_loss(tiny, batch) == pytest.approx(sum(loss for _, loss in expected) / 14, abs=1e-6)


def test_response_loss_is_weighted_by_tokens(tiny: Model) -> None:
    rows = rows_of(tiny)
    losses = [loss for row in rows for _, loss in by_hand(tiny.net, collate([row], 257))]
    assert len(losses) == sum(len(row.ids) - row.n_prompt for row in rows)
    assert response_loss(tiny, rows) == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    per_row = np.mean([response_loss(tiny, [row]) for row in rows])
    assert abs(per_row - response_loss(tiny, rows)) > 1e-4  # so the test above can tell the two means apart


def test_row_order_survives_sorting_by_length(tiny: Model) -> None:
    rows = rows_of(tiny)
    sums, counts = losses_module.all_row_losses(tiny, rows, 3)
    for i, row in enumerate(rows):
        alone, n = losses_module.row_losses(tiny, collate([row], 257))
        assert (counts[i], sums[i]) == (n[0], pytest.approx(alone[0], abs=1e-5))


def test_the_head_sees_scored_positions_few_at_a_time(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * 4)
    head, seen = tiny.net.lm_head, list[int]()
    watch = head.register_forward_hook(lambda module, args, out: seen.append(out[..., 0].numel()))
    batch_loss(tiny, odd_batch())
    watch.remove()
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
    plain = batch_loss(tiny, odd_batch())
    with _noisy_head(tiny.net.lm_head):
        same_losses(tiny.net, odd_batch())
        assert abs(batch_loss(tiny, odd_batch()) - plain) > 1e-3


CAPPED = ("final_logit_softcapping", 0.05)
SCALED = {"granite": ("logits_scaling", 3.0), "cohere": ("logit_scale", 0.2), "gemma2": CAPPED}


@pytest.mark.parametrize("kind", SCALED)
def test_a_model_that_scales_its_logits_is_read_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = SCALED[kind]
    made = CONFIG_MAPPING[kind](**sizes(16, 32, 2, 2, 1, **{name: value}) | TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = AutoModelForCausalLM.from_config(made).eval()
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * 4)
    same_losses(net, odd_batch())
    handed: list[int] = []
    net.lm_head.register_forward_hook(lambda module, args, out: handed.append(out.shape[1]))
    with eval_mode(net):
        token_losses(net, odd_batch())
    assert max(handed) <= 4, "no array of all tokens"


def test_a_head_that_is_no_module(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * 3)
    monkeypatch.setattr(tiny.net, "get_output_embeddings", lambda: None)
    same_losses(tiny.net, odd_batch())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT itself
def test_a_soft_prompt_moves_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(seed=4), odd_batch()
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


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 5), (9, 1), (20, 19), (500, 3)])
def test_strided_perplexity_follows_the_guide(tiny: Model, window: int, stride: int) -> None:
    ids = torch.tensor([tiny.tokenizer(TEXT)["input_ids"]])
    total, count, scored_to = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        piece, new = ids[:, begin:end], end - scored_to
        labels = piece.clone()
        labels[:, : piece.shape[1] - new] = -100
        losses = by_hand(tiny.net, Batch(piece, torch.ones_like(piece), labels))
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
def test_windows_score_each_token_once_with_context(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    ids = np.arange(length, dtype=np.int32)
    scored: list[int] = []
    for row in losses_module._windows(ids, window, stride):
        assert len(row.ids) <= window
        assert row.n_prompt >= (1 if row.ids[0] == 0 else window - stride)
        scored += row.ids[row.n_prompt :].tolist()
    assert scored == list(range(1, length))


def test_a_beginning_token_is_context_and_not_scored() -> None:
    model = tiny_llama(seed=3)
    start = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 256)])
    model.tokenizer.backend_tokenizer.post_processor = start
    ids = np.array([256, *TEXT[:9].encode()], np.int32)
    assert model.tokenizer(TEXT[:9])["input_ids"][0] == 256
    plain = model.tokenizer(TEXT[:9], add_special_tokens=False)["input_ids"]
    row = Encoded(np.array([256, *plain], np.int32), 1)
    assert len(row.ids) == len(ids)
    assert perplexity(model, [TEXT[:9]]) == pytest.approx(math.exp(response_loss(model, [row])), rel=1e-9)
    assert perplexity(model, ["t"]) > 1  # one token, scored after the beginning


# blocks that divide the vocabulary, do not, hold it all
@pytest.mark.parametrize("block", [1, 5, 70, 1000])
@pytest.mark.parametrize("chunk", [1, 3, 1000])  # tokens at a time
def test_a_streamed_head_has_the_same_losses(chunk: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(seed=3), odd_batch()
    base = by_hand(model.net, batch)
    monkeypatch.setattr("fleetune.seeds.weights.CHUNK", block * model.net.config.hidden_size)
    monkeypatch.setattr(CHUNK_BYTES, 4 * VOCAB * chunk)
    view = View(named_tensors(model.net), model.net, run_key=9, law="hashed", grid=1e-5)
    view.place(passes("hashed", 16, np.arange(16, dtype=np.uint64), np.arange(1, 17) * 50))
    expected = by_hand(model.net, batch)
    assert max(abs(a - b) for (_, a), (_, b) in zip(base, expected, strict=True)) > 1e-3
    same_losses(model.net, batch)
    view.remove()
    same_losses(model.net, batch)


def test_nothing_to_score_is_refused(tiny: Model) -> None:
    batch = odd_batch()
    batch.labels[:] = -100
    assert math.isnan(batch_loss(tiny, batch))
    for rows in ([], [Encoded(np.arange(5, dtype=np.int32), 5)] * 2):
        with pytest.raises(DataError, match="no response tokens"):
            response_loss(tiny, rows)
    with pytest.raises(DataError, match="no token"):
        perplexity(tiny, ["", "a"])
    for window, stride in [(8, 8), (1, 1), (8, -1)]:
        with pytest.raises(RecipeError, match="stride"):
            perplexity(tiny, [TEXT], window=window, stride=stride)
