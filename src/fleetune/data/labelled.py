# SPDX-License-Identifier: Apache-2.0
"""Encode examples for an encoder that chooses among label words, and pick the encoding that a model needs.

A row is the example's text or pair of texts (`Example.texts`; else its turns, a line each), joined and marked by
the tokenizer itself: `[CLS] a [SEP] b [SEP]` with segments 0 and 1 for BERT,
`<s> a </s></s> b </s>` without segments for RoBERTa.  Its target is the index of the example's response
among the model's label words.

A row longer than `max_length`, or than the model has positions for, loses tokens from the end of its longer
text, one by one, until it fits; the marks stay, and no row is dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fleetune.data.encode import CHUNK, Encoded, encode_all
from fleetune.data.forms import Example
from fleetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fleetune.models.net.model import Model


def encode_rows(
    model: Model, examples: Sequence[Example], max_length: int
) -> tuple[list[Encoded], npt.NDArray[np.int64]]:
    """Return the examples as `model` reads them, and the index of each row's example (see `encode_all`)."""
    if not model.labels:
        return encode_all(examples, model.tokenizer, max_length)
    targets = [_target(example, model.labels) for example in examples]
    whole = text_lengths(model.tokenizer, examples)
    rows = [
        Encoded(ids, len(ids), segments, target, left=max(0, length - len(ids)))
        for (ids, segments), target, length in zip(
            encode_texts(model, examples, max_length), targets, whole, strict=True
        )
    ]
    return rows, np.arange(len(rows), dtype=np.int64)


def encode_texts(
    model: Model, examples: Sequence[Example], max_length: int
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32] | None]]:
    """Return the tokens of each example's texts, and their segments where the tokenizer has them: int32 [T] each."""
    limit = min(max_length, positions(model))
    for columns in _columns(examples):
        made = model.tokenizer(*columns, truncation=True, max_length=limit, verbose=False)
        segments = made.get("token_type_ids", itertools.repeat(None))
        for ids, segment in zip(made["input_ids"], segments, strict=False):
            yield np.array(ids, np.int32), None if segment is None else np.array(segment, np.int32)


def text_lengths(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Iterator[int]:
    """Yield how many tokens each example has before it is cut."""
    for columns in _columns(examples):
        yield from map(len, tokenizer(*columns, verbose=False)["input_ids"])


def _columns(examples: Sequence[Example]) -> Iterator[list[list[str]]]:
    """Yield the texts of examples as the tokenizer takes them at once: one list, or two of pairs."""
    texts = [
        example.texts or ("\n".join(content for _, content in example.messages),) for example in examples
    ]
    for start in range(0, len(texts), CHUNK):
        for _, run in itertools.groupby(texts[start : start + CHUNK], len):
            yield [list(column) for column in zip(*run, strict=True)]


def positions(model: Model) -> int:
    """Return how many tokens an encoder reads at most."""
    return positions_of(model.net, model.tokenizer)


def positions_of(net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens an encoder reads at most; `net` may be without weights.

    RoBERTa's positions begin after the padding's number.
    """
    reserved = 0
    for name, module in net.named_modules():
        if name.endswith(".position_embeddings") and getattr(module, "padding_idx", None) is not None:
            reserved = int(module.padding_idx) + 1
    table = int(getattr(net.config, "max_position_embeddings", 512))
    return min(int(tokenizer.model_max_length), table - reserved)


def check_answers(answers: Sequence[str], labels: Sequence[str], what: str, hint: str) -> None:
    """Raise DataError for an answer that is none of the label words, which `what` names."""
    known = set(labels)
    if odd := [(row, word) for row, word in enumerate(answers, 1) if word not in known]:
        row, word = odd[0]
        raise DataError(
            f"{what}: {len(odd):,} of {len(answers):,} rows have another answer, the first is row {row}: {word[:40]!r}",
            hint=hint,
        )


def _target(example: Example, labels: Sequence[str]) -> int:
    word = example.response.strip()
    if not example.messages:
        raise DataError(
            "a plain text has no label, and an encoder chooses among labels",
            hint="give rows with a field 'label'; a causal model can be trained on the texts",
        )
    if word not in labels:
        raise DataError(
            f"the answer {word[:40]!r} is none of the label words {', '.join(labels)}",
            hint="name all label words with --labels, or leave the option out to take them from the data",
        )
    return labels.index(word)
