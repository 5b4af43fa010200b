# SPDX-License-Identifier: Apache-2.0
"""Plain texts: the loss is on the whole text, in as many rows as it takes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fleetune import models
from fleetune.data.encode import begun, count_cut, encode_all, encode_rows, prompt_ids, split_text
from fleetune.data.forms import Example
from fleetune.errors import DataError
from fleetune.evaluation.answers import generate
from fleetune.evaluation.losses import response_loss
from fleetune.models.net.model import Model

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
            assert all(list(row) == list(range(row[0], row[-1] + 1)) for row in rows), (
                "as they follow one another"
            )


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
    rows, _ = encode_all(
        [
            ASKED,
            Example((("user", "word " * 60),), "it"),
            Example((("user", "a"),), "word " * 60),
            Example((), "t " * 60),
        ],
        model.tokenizer,
        80,
    )
    found = count_cut(rows)
    assert (found.longer, found.prompts, found.answers) == (2, 1, 1)
    whole, _ = encode_all(
        [Example((("user", "a"),), "word " * 60), Example((("user", "word " * 60),), "it")],
        model.tokenizer,
        999,
    )
    assert found.longest == max(len(row.ids) for row in whole)
    assert found.told(80).startswith(
        f"2 of {len(rows)} rows are longer than max_length=80 and are cut: the prompt of 1, the answer of 1;"
    )
    assert count_cut(whole).told(999) == ""


def test_texts_of_an_encoder_that_are_cut_are_counted() -> None:
    model = models.tiny_bert(labels=("a", "b"))
    examples = [Example((("user", "x"),), "a", texts=(text,)) for text in ("short", "word " * 80)]
    rows, _ = encode_rows(model, examples, 16)
    found = count_cut(rows)
    assert (found.longer, found.prompts, found.answers, len(rows[1].ids)) == (1, 1, 0, 16)
    assert found.longest == len(model.tokenizer("word " * 80, verbose=False)["input_ids"])
