"""Tokens and masks against apply_chat_template itself, cuts, dropped rows, batches fixed by their key."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fleetune import models
from fleetune.data import Batches, Encoded, Example, collate, keyed_order, stop_ids
from fleetune.data.encode import begun, count_cut, encode, encode_all, encode_rows, prompt_ids, split_text
from fleetune.errors import DataError
from fleetune.evaluation.answers import generate
from fleetune.evaluation.losses import response_loss
from fleetune.models.net.model import Model

CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # no marker of its own: the prompt ends with [/INST]
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI = (  # ends the turn with one token and the text with another
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (  # strips, refuses a system turn, and its end of turn is not the end-of-text token
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINK = (  # writes an empty thought before the last answer only, as Qwen 3 does
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REWRITES = (  # the turns before the answer are written in another way once it is there
    "{% for m in messages %}{{ m.role + ('*' if messages[-1].role == 'assistant' else '') + ': ' }}"
    "{{ m.content | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
OPEN = (  # no token ends a turn
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
DATED = (
    "{% if not date_string %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    + CHATML
)

ASK = Example((("user", "What is 2+2?"),), "It is 4.")
TALK = Example(
    (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Who are you?")),
    "A small model.",
)


def tokenizer(template: str | None = CHATML, *, eos: str | None = "<|im_end|>", starts: bool = False):
    """Byte-level BPE with one merge (two line breaks), special tokens of several families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ĊĊ"])}
    core = Tokenizer(BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    names = ["<s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if starts:
        sides = [("<s>", core.token_to_id("<s>")), ("<|im_end|>", core.token_to_id("<|im_end|>"))]
        core.post_processor = processors.TemplateProcessing(single="<s> $A <|im_end|>", special_tokens=sides)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos)
    fast.chat_template = template
    return fast


def turns(example: Example, *, answer: bool = True) -> list[dict[str, str]]:
    listed = [{"role": role, "content": content} for role, content in example.messages]
    return [*listed, {"role": "assistant", "content": example.response}] if answer else listed


def halves(row: Encoded, tok) -> tuple[str, str]:
    return tok.decode(row.ids[: row.n_prompt]), tok.decode(row.ids[row.n_prompt :])


@pytest.mark.parametrize("example", [ASK, TALK])
@pytest.mark.parametrize(
    ("template", "eos", "after_end"),
    [
        (CHATML, "<|im_end|>", 1),
        (LLAMA2, "<|im_end|>", 0),
        (PHI, "<|endoftext|>", 2),
        (THINK, "<|im_end|>", 1),
    ],
)
def test_tokens_are_those_of_the_chat_template(example, template, eos, after_end):
    tok = tokenizer(template, eos=eos)
    prompt = tok.apply_chat_template(turns(example, answer=False), add_generation_prompt=True)["input_ids"]
    whole = tok.apply_chat_template(turns(example))["input_ids"]
    row = encode(example, tok, 10_000)
    assert row.ids.dtype == np.int32
    assert row.n_prompt == len(prompt)
    assert row.ids.tolist() == whole[: len(whole) - after_end]  # what follows the end of turn is left out
    assert prompt_ids(example, tok, 10_000).tolist() == prompt


@pytest.mark.parametrize(
    ("template", "eos", "answer", "stops"),
    [
        (CHATML, "<|im_end|>", "It is 4.<|im_end|>", {"<|im_end|>"}),
        (LLAMA2, "<|im_end|>", " It is 4. <|im_end|>", {"<|im_end|>"}),
        (PHI, "<|endoftext|>", "It is 4.<|end|>", {"<|end|>", "<|endoftext|>"}),
        (GEMMA, "<|endoftext|>", "It is 4.<|end|>", {"<|end|>", "<|endoftext|>"}),
        (THINK, "<|im_end|>", "<think>\n\n</think>\n\nIt is 4.<|im_end|>", {"<|im_end|>"}),
        (REWRITES, "<|end|>", "It is 4.<|end|>", {"<|end|>"}),
        (OPEN, "<|endoftext|>", "It is 4.\n<|endoftext|>", {"<|endoftext|>"}),
        (OPEN, None, "It is 4.\n", set()),
        (None, "<|im_end|>", "It is 4.<|im_end|>", {"<|im_end|>"}),
        (None, None, "It is 4.", set()),
    ],
)
def test_the_answer_ends_with_one_end_of_turn(template, eos, answer, stops):
    tok = tokenizer(template, eos=eos)
    assert halves(encode(ASK, tok, 1000), tok)[1] == answer
    assert stop_ids(tok) == tuple(sorted(tok.convert_tokens_to_ids(list(stops))))


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_token_that_grows_over_the_seam_is_split(template):
    # "assistant\n" + "\nFour" holds the token "\n\n": the prompt's tokens must stay those of generate().
    tok = tokenizer(template)
    example = Example(ASK.messages, "\nFour")
    prompt = prompt_ids(example, tok, 1000).tolist()
    rendered = tok.decode(prompt)
    assert tok(rendered + "\nFour", add_special_tokens=False)["input_ids"][: len(prompt)] != prompt
    row = encode(example, tok, 1000)
    assert row.ids[: row.n_prompt].tolist() == prompt
    assert halves(row, tok)[1] == "\nFour<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_keeps_the_prompt_of_generate():
    tok = tokenizer(REWRITES, eos="<|end|>")
    example = Example((("user", "Hi"),), " two\nlines ")
    row = encode(example, tok, 1000)
    assert halves(row, tok) == ("user: Hi<|end|>assistant: ", "two\nlines<|end|>")


def test_plain_layout_without_a_template():
    tok = tokenizer(None, starts=True)  # this one puts <s> before and the end token after a text
    prompt, answer = halves(encode(TALK, tok, 1000), tok)
    assert prompt == "<s>Be brief.\nHi\nHello!\nWho are you?\n"
    assert answer == "A small model.<|im_end|>"
    assert tok.decode(prompt_ids(TALK, tok, 1000)) == prompt
    bare = tokenizer(None)
    assert halves(encode(ASK, bare, 1000), bare)[0] == "What is 2+2?\n"
    curly = Example((("user", "{braces} {0}"),), "{}")
    assert halves(encode(curly, bare, 1000), bare)[1] == "{}<|im_end|>"


def test_a_template_with_the_date_does_not_depend_on_the_day():
    tok = tokenizer(DATED)
    assert halves(encode(ASK, tok, 1000), tok)[0].startswith("26 Jul 2024<|im_start|>")


def test_a_refusing_template_is_a_clear_error():
    tok = tokenizer(GEMMA)
    with pytest.raises(DataError, match=r"row 2: .*System role not supported") as caught:
        encode_all([ASK, TALK], tok, 100)
    assert "system turn" in (caught.value.hint or "")


def test_a_long_answer_leaves_the_prompt_a_quarter_and_loses_its_end():
    tok = tokenizer(None)
    row = encode(Example((("user", "A" * 100),), "x" * 100), tok, 40)
    prompt, answer = halves(row, tok)
    assert (len(row.ids), row.n_prompt) == (40, 10)
    assert prompt == "AAAAAAAAA\n"
    assert answer == "x" * 30  # no end of turn: the model must not learn to stop there
    assert row.lost == 71  # 70 letters and the end of the turn
    row = encode(Example((("user", "A"),), "x" * 100), tok, 200)
    assert (row.n_prompt, len(row.ids), row.lost) == (2, 2 + 101, 0)
    assert encode(Example((("user", "A" * 300),), "x" * 100), tok, 200).lost == 0  # the prompt alone is cut


@settings(max_examples=100)
@given(asked=st.integers(1, 60), said=st.integers(1, 60), max_length=st.integers(2, 150))
def test_cuts_fit_and_keep_the_ends(asked, said, max_length):
    tok = TOKENIZER
    example = Example((("user", "".join(chr(97 + i % 26) for i in range(asked))),), "z" * said)
    full, row = encode(example, tok, 10_000), encode(example, tok, max_length)
    n = len(full.ids) - full.n_prompt
    kept = len(row.ids) - row.n_prompt
    assert len(row.ids) == min(max_length, len(full.ids))
    assert kept == min(n, max_length - min(full.n_prompt, max(1, max_length // 4)))
    assert row.ids[row.n_prompt :].tolist() == full.ids[full.n_prompt :][:kept].tolist()
    prompt = full.ids[: full.n_prompt].tolist()
    head = row.n_prompt if row.n_prompt == full.n_prompt else row.n_prompt // 2
    assert row.ids[: row.n_prompt].tolist() == prompt[:head] + prompt[len(prompt) - (row.n_prompt - head) :]
    asked_ids = prompt_ids(example, tok, max_length)
    assert len(asked_ids) == min(max_length, full.n_prompt)
    assert asked_ids[-1] == prompt[-1]


TOKENIZER = tokenizer(None)


def test_rows_without_a_token_of_their_answer_are_dropped_and_counted(caplog):
    known = {token: i for i, token in enumerate("FWahortu</>s")}  # characters it does not know vanish
    core = Tokenizer(BPE(vocab=known, merges=[]))
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    four, end = tok("Four")["input_ids"], tok.eos_token_id
    examples = [Example((("user", "What"),), answer) for answer in ("Four", "???", "Four Four", "!!!")]
    with caplog.at_level(logging.WARNING):
        rows, kept = encode_all(examples, tok, 100)
    assert kept.tolist() == [0, 2]
    assert kept.dtype == np.int64
    assert [row.ids[row.n_prompt :].tolist() for row in rows] == [[*four, end], [*four, *four, end]]
    assert "2 of 4 rows dropped" in caplog.text
    with pytest.raises(DataError, match="no token of the answer"):
        encode(examples[1], tok, 100)


def test_an_unknown_token_is_no_end_of_turn():
    known = {token: i for i, token in enumerate(["<unk>", "</s>", *"abc"])}
    core = Tokenizer(BPE(vocab=known, merges=[], unk_token="<unk>"))
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    row = encode(Example((("user", "a"),), "ab?"), tok, 100)
    assert row.ids[row.n_prompt :].tolist() == [2, 3, 0, 1]


def test_encode_all_equals_encode_across_chunks(monkeypatch):
    monkeypatch.setattr("fleetune.data.encode.CHUNK", 3)
    tok = tokenizer()
    examples = [Example((("user", "q" * i),), "a" * (i + 1)) for i in range(1, 9)]
    rows, kept = encode_all(examples, tok, 90)
    assert kept.tolist() == list(range(8))
    for example, row in zip(examples, rows, strict=True):
        one = encode(example, tok, 90)
        assert (row.ids.tolist(), row.n_prompt) == (one.ids.tolist(), one.n_prompt)
    assert encode_all([], tok, 90)[0] == []


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_max_length_below_two_is_refused(max_length):
    for call in (encode, prompt_ids):
        with pytest.raises(DataError, match="at least 2 tokens"):
            call(ASK, TOKENIZER, max_length)


def row(*ids: int, n_prompt: int = 1) -> Encoded:
    return Encoded(np.array(ids, dtype=np.int32), n_prompt)


def test_collate_pads_right_and_masks_prompt_and_padding():
    batch = collate([row(5, 6, 7, 8, n_prompt=2), row(9, 3, n_prompt=1)], pad_id=3)
    assert all(tensor.dtype == torch.int64 for tensor in batch[:3])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 3, 3, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    # a real token equal to pad counts
    assert batch.labels.tolist() == [[-100, -100, 7, 8], [-100, 3, -100, -100]]


def firsts(batches) -> list[list[int]]:
    return [batch.input_ids[:, 0].tolist() for batch in batches]


ROWS = [row(i, 100 + i) for i in range(10)]


@settings(max_examples=60)
@given(n=st.integers(1, 12), size=st.integers(1, 15), count=st.integers(0, 20), key=st.integers(0, 2**64 - 1))
def test_steps_take_every_row_once_a_pass_in_the_keyed_order(n, size, count, key):
    taken = firsts(Batches(ROWS[:n] if n <= 10 else [row(i, 1) for i in range(n)], 0, key).steps(count, size))
    assert [len(batch) for batch in taken] == [min(size, n)] * count
    flat = [i for batch in taken for i in batch]
    passes = [keyed_order(key, p, n).tolist() for p in range(len(flat) // n + 1)]
    assert flat == [i for one in passes for i in one][: len(flat)]
    assert max(Counter(flat).values(), default=0) - min((flat.count(i) for i in range(n)), default=0) <= 1


@settings(max_examples=40)
@given(n=st.integers(1, 10), size=st.integers(1, 15), number=st.integers(0, 8), key=st.integers(0, 2**64 - 1))
def test_a_held_batch_is_the_same_in_every_round(n, size, number, key):
    batches = Batches(ROWS[:n], 0, key)
    one, *again = firsts(batches.repeat_batch(number, size, 3))
    assert again == [one, one] == firsts(Batches(ROWS[:n], 0, key + 1).repeat_batch(number, size, 2))
    walk = [firsts(batches.repeat_batch(b, size, 1))[0] for b in range(number + 1)]
    plain = firsts(Batches(ROWS[:n], 0, 0).steps(number + 1, size))
    assert [i for batch in walk for i in batch] == [i for batch in plain for i in batch]


def test_a_held_batch_takes_the_order_of_a_pass_once(monkeypatch):
    made = []
    monkeypatch.setattr("fleetune.data.encode.keyed_order", lambda *k: made.append(k) or keyed_order(*k))
    (batch,) = firsts(Batches(ROWS, 0, 7).repeat_batch(3, 8, 1))
    assert (len(batch), made) == (8, [(0, 2, 10), (0, 3, 10)])


def test_epochs_take_every_row_once():
    batches = Batches(ROWS, 0, key=7)
    assert batches.n == 10
    epochs = firsts(batches.epochs(3, 4))
    assert [len(batch) for batch in epochs] == [4, 4, 2] * 3
    by_epoch = [[*epochs[i], *epochs[i + 1], *epochs[i + 2]] for i in (0, 3, 6)]
    assert all(sorted(one) == list(range(10)) for one in by_epoch)
    assert len({tuple(one) for one in by_epoch}) == 3


def test_batches_are_fixed_by_the_key():
    golden = firsts(Batches(ROWS, 0, key=7).steps(3, 4))
    assert golden == firsts(Batches(ROWS, 0, key=7).steps(3, 4)) == GOLDEN_STEPS
    assert golden != firsts(Batches(ROWS, 0, key=8).steps(3, 4))
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.random.get_rng_state()
    assert firsts(Batches(ROWS, 0, key=7).steps(3, 4)) == golden
    assert torch.equal(before, torch.random.get_rng_state())


GOLDEN_STEPS = [[8, 4, 1, 6], [3, 2, 7, 5], [9, 0, 2, 5]]


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="no rows for a client"):
        Batches([], 0, key=1)


TALE = "Once upon a time there was a small fox who lived by the sea."
ASKED = Example((("user", "what is it?"),), "it is a fox")


@pytest.fixture(scope="module")
def model() -> Model:
    return models.tiny_llama()


def test_every_token_but_the_first_bears_the_loss_once() -> None:
    for length in (1, 2, 3, 4, 5, 7, 8, 9, 50):
        ids = list(range(length))
        for most in (2, 3, 4, 8):
            rows = list(split_text(ids, most))
            assert max(map(len, rows)) <= most
            assert Counter(t for row in rows for t in row[1:]) == Counter(ids[1:])
            assert all(list(row) == list(range(row[0], row[-1] + 1)) for row in rows), "in order"


def test_a_text_is_its_tokens_without_template_up_to_an_end(model: Model) -> None:
    words = model.tokenizer
    rows, kept = encode_all([Example((), TALE)], words, 512)
    assert kept.tolist() == [0]
    own = words(TALE)["input_ids"]
    whole = own if own[-1] == words.eos_token_id else [*own, words.eos_token_id]
    assert rows[0].ids.tolist() == whole
    assert rows[0].n_prompt == 1
    assert "<|im_start|>" not in words.decode(rows[0].ids)


def test_a_long_text_is_cut_into_rows_and_none_of_it_is_lost(model: Model) -> None:
    (whole,), _ = encode_all([Example((), TALE)], model.tokenizer, 512)
    rows, kept = encode_all([ASKED, Example((), TALE), ASKED], model.tokenizer, 16)
    assert kept.tolist() == [0, *[1] * (len(rows) - 2), len(rows) and 2]
    texts = rows[1:-1]
    assert len(texts) > 2
    assert np.concatenate([texts[0].ids, *(row.ids[1:] for row in texts[1:])]).tolist() == whole.ids.tolist()
    assert all(row.n_prompt == 1 and not row.left and not row.lost for row in texts)
    assert np.isfinite(response_loss(model, texts))


def test_beside_texts_conversations_are_as_alone(model: Model) -> None:
    alone, _ = encode_all([ASKED], model.tokenizer, 64)
    mixed, _ = encode_all([Example((), TALE), ASKED, Example((), "b c")], model.tokenizer, 64)
    assert mixed[1].ids.tolist() == alone[0].ids.tolist()
    assert mixed[1].n_prompt == alone[0].n_prompt


def test_a_begin_of_a_text_is_what_the_model_continues(model: Model) -> None:
    start = begun(Example((), TALE, {"client": "x"}))
    assert start == Example(
        (("text", "Once upon a time there was a"),), " small fox who lived by the sea.", {"client": "x"}
    )
    assert begun(start) is start
    assert begun(ASKED) is ASKED
    ids = prompt_ids(Example((), TALE), model.tokenizer, 512)
    assert model.tokenizer.decode(ids, skip_special_tokens=True) == "Once upon a time there was a"
    (whole,), _ = encode_all([Example((), TALE)], model.tokenizer, 512)
    assert ids[:4].tolist() == whole.ids[:4].tolist()
    assert len(generate(model, [Example((), TALE), Example((), "a"), ASKED], max_new_tokens=2)) == 3
    assert len(begun(Example((), "long " * 500)).messages[0][1]) <= 200


def test_an_encoder_needs_labels() -> None:
    with pytest.raises(DataError, match="a plain text has no label"):
        encode_rows(models.tiny_bert(labels=("a", "b")), [Example((), TALE)], 64)


def test_what_is_cut_is_counted(model: Model) -> None:
    long = "word " * 60
    cut = [Example((("user", long),), "it"), Example((("user", "a"),), long)]
    rows, _ = encode_all([ASKED, *cut, Example((), "t " * 60)], model.tokenizer, 80)
    found = count_cut(rows)
    assert (found.longer, found.prompts, found.answers) == (2, 1, 1)
    whole, _ = encode_all(cut, model.tokenizer, 999)
    assert found.longest == max(len(row.ids) for row in whole)
    said = (
        f"2 of {len(rows)} rows are longer than max_length=80 and are cut: the prompt of 1, the answer of 1;"
    )
    assert found.told(80).startswith(said)
    assert count_cut(whole).told(999) == ""


def test_texts_of_an_encoder_that_are_cut_are_counted() -> None:
    model = models.tiny_bert(labels=("a", "b"))
    examples = [Example((("user", "x"),), "a", texts=(text,)) for text in ("short", "word " * 80)]
    rows, _ = encode_rows(model, examples, 16)
    found = count_cut(rows)
    assert (found.longer, found.prompts, found.answers, len(rows[1].ids)) == (1, 1, 0, 16)
    assert found.longest == len(model.tokenizer("word " * 80, verbose=False)["input_ids"])
