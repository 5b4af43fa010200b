"""Labelled rows: their forms are told by their fields, and an encoder reads the texts as its tokenizer joins them."""

from pathlib import Path
from typing import Any

import pytest
from tables import write

from fleetune import models
from fleetune.data import Example, read
from fleetune.data.encode import collate, encode_rows, encode_texts, positions
from fleetune.errors import DataError

QNLI = {"question": "Who?", "sentence": "It was she.", "label": "entailment"}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("labels", [("entailment", "not_entailment"), (0, 1), ("0", "1")])
def test_qnli_reads_the_same_whatever_the_file_and_labels(tmp_path: Path, suffix: str, labels: tuple) -> None:
    rows = [QNLI | {"label": label, "idx": i} for i, label in enumerate(labels)]
    found = read(write(tmp_path / f"dev{suffix}", rows))
    asked = "Question: Who?\nSentence: It was she.\nDoes the sentence contain the answer to the question, yes or no?"
    assert found == [
        Example((("user", asked),), said, {"label": str(label), "idx": str(i)}, ("Who?", "It was she."))
        for i, (label, said) in enumerate(zip(labels, ("yes", "no"), strict=True))
    ]


FIELDS = ["premise hypothesis", "question1 question2", "sentence1 sentence2", "sentence", "text"]


@pytest.mark.parametrize("fields", FIELDS)
def test_other_forms_are_told_by_their_fields(tmp_path: Path, fields: str) -> None:
    texts = fields.split()
    row = {name: f"the {name}" for name in texts} | {"label": 2, "topic": "birds"}
    (example,) = read(write(tmp_path / "a.jsonl", [row]))
    assert example.texts == tuple(f"the {name}" for name in texts)
    assert (example.response, example.meta) == ("2", {"label": "2", "topic": "birds"})
    ((role, prompt),) = example.messages
    assert role == "user"
    assert all(text in prompt for text in example.texts)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (QNLI | {"label": -1}, r"a\.jsonl:2: field 'label' is -1: the row has no label"),
        (QNLI | {"label": None}, r"a\.jsonl:2: field 'label' is null"),
        (QNLI | {"label": ""}, r"a\.jsonl:2: field 'label' is empty"),
        (QNLI | {"label": [1]}, r"a\.jsonl:2: field 'label' is a list"),
        (QNLI | {"label": 0.5}, r"a\.jsonl:2: field 'label' is .*0\.5.*not text"),
        (QNLI | {"sentence": " "}, r"a\.jsonl:2: field 'sentence' is empty"),
        (QNLI | {"question": 3}, r"a\.jsonl:2: field 'question' is .*3.*not text"),
        ({"question": "Who?", "label": 1}, r"a\.jsonl:2: field 'sentence' is missing"),
        ({"text": "t", "label": 1}, r"a\.jsonl:2: is in labelled text form, but .*:1 is in QNLI form"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_field(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(write(tmp_path / "a.jsonl", [QNLI, row]))


def example(*texts: str, answer: str = "yes") -> Example:
    return Example((("user", "unused"),), answer, {}, texts)


def test_bert_marks_a_pair_with_segments_and_roberta_without() -> None:
    examples = [example("ab", "c"), example("d", answer="no")]
    rows, kept = encode_rows(models.tiny_bert(), examples, 64)
    letters = {c: models.tiny_bert().tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "abcd"}
    start, end = 256, 257
    a, b, c, d = (letters[x] for x in "abcd")
    assert kept.tolist() == [0, 1]
    assert rows[0].ids.tolist() == [start, a, b, end, c, end]
    assert rows[0].segments.tolist() == [0, 0, 0, 0, 1, 1]
    assert [row.target for row in rows] == [1, 0]  # of the label words no, yes
    assert rows[1].ids.tolist() == [start, d, end]
    rows, _ = encode_rows(models.tiny_roberta(), examples, 64)
    assert rows[0].ids.tolist() == [start, a, b, end, end, c, end]
    assert rows[0].segments is None


def test_rows_keep_their_order_among_single_texts_and_pairs() -> None:
    model = models.tiny_bert()
    examples = [example(*([f"t{i}"] * (1 + i % 2))) for i in range(9)] + [
        Example((("system", "be kind"), ("user", "hi")), "yes")  # no texts: its turns, a line each
    ]
    encoded = encode_texts(model, examples, 64)
    made = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in encoded]
    assert made == [f"t{i}" * (1 + i % 2) for i in range(9)] + ["be kind\nhi"]


def test_a_long_row_loses_the_end_of_its_longer_text_and_none_is_dropped() -> None:
    model = models.tiny_bert()
    rows, kept = encode_rows(model, [example("a" * 100, "bcde"), example("x" * 500)], 16)
    assert kept.tolist() == [0, 1]
    assert model.tokenizer.decode(rows[0].ids) == "[CLS]" + "a" * 9 + "[SEP]bcde[SEP]"
    assert model.tokenizer.decode(rows[1].ids) == "[CLS]" + "x" * 14 + "[SEP]"


def test_the_models_positions_bound_a_row() -> None:
    bert, roberta = models.tiny_bert(), models.tiny_roberta()
    roberta.tokenizer.model_max_length = 1 << 30  # as where a tokenizer does not say
    assert positions(bert) == 128
    assert positions(roberta) == 387 - 259  # RoBERTa's first position is the padding's id and one
    for model in (bert, roberta):
        (row,), _ = encode_rows(model, [example("y" * 999)], 4096)
        assert len(row.ids) == 128
        batch = collate([row], 258)
        assert model.net(batch.input_ids, batch.attention_mask).logits.shape == (1, 2)
    roberta.tokenizer.model_max_length = 100
    assert positions(roberta) == 100


def test_batches_pad_texts_and_segments_and_hold_one_target_a_row() -> None:
    rows, _ = encode_rows(models.tiny_bert(), [example("ab", "c"), example("d", answer="no")], 64)
    batch = collate(rows, 258)
    assert batch.input_ids[1].tolist()[3:] == [258] * 3
    assert batch.attention_mask.tolist() == [[1] * 6, [1] * 3 + [0] * 3]
    assert batch.labels.tolist() == [1, 0]
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6]


def test_an_answer_that_is_no_label_word_is_refused() -> None:
    with pytest.raises(DataError, match="the answer 'perhaps' is not one of the label words no, yes"):
        encode_rows(models.tiny_bert(), [example("a", answer="perhaps")], 64)
