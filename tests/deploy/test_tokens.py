# SPDX-License-Identifier: Apache-2.0
"""Tokenizers as GGUF metadata."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from deploy_harness import TEMPLATE, piece_tokenizer, qwen_split, tokenizer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fleetune import models
from fleetune.deploy.formats import _gguf_vocabulary
from fleetune.errors import ModelError, UsageError

NONE = SimpleNamespace()
KIND = gguf.TokenType
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read(words: Any, folder: Path, rows: int = 264, config: Any = NONE) -> _gguf_vocabulary.Vocabulary:
    words.save_pretrained(folder)
    return _gguf_vocabulary.read(folder, rows, config)


def split(pattern: str) -> Any:
    steps = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


def test_bytes_merges_marks_and_unused_rows(tmp_path: Path) -> None:
    words = tokenizer()
    words.add_tokens(["<tool>", "<|extra|>"])
    found = read(words, tmp_path)
    assert (found.model, found.pre, found.notes) == ("gpt2", "smollm", ())
    assert list(found.merges) == ["h e", "l l", "he ll"]
    assert [found.tokens[i] for i in (256, 258, 259, 262, 263)] == [
        "he",
        "hell",
        "<|endoftext|>",
        "<tool>",
        "<|extra|>",
    ]
    assert [found.types[i] for i in (0, 258, 259, 261, 262, 263)] == [
        KIND.NORMAL, KIND.NORMAL, KIND.CONTROL, KIND.CONTROL, KIND.USER_DEFINED, KIND.CONTROL
    ]  # fmt: skip
    assert found.special == {"bos": 260, "eos": 261, "unk": 259, "pad": 261}
    assert (found.add_bos, found.add_eos, found.space_prefix) == (False, False, None)
    assert found.chat_template == TEMPLATE
    padded = _gguf_vocabulary.read(tmp_path, 266, NONE)
    assert list(padded.tokens[264:]) == ["[PAD264]", "[PAD265]"]
    assert list(padded.types[264:]) == [KIND.UNUSED] * 2


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (qwen_split(), "qwen2"),
        (split(LLAMA3), "llama-bpe"),
        (split(r"\p{L}+"), "default"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "default"),
        (pre_tokenizers.Digits(individual_digits=False), "default"),
    ],
)
def test_the_splitting_rule_is_named_by_what_it_does(tmp_path: Path, pre: Any, name: str) -> None:
    found = read(tokenizer(pre), tmp_path)
    assert found.pre == name
    assert any("no name" in note for note in found.notes) == (name == "default")
    assert any("merges words" in note for note in found.notes) == (name == "llama-bpe")


def test_normalisation_is_noted(tmp_path: Path) -> None:
    words = tokenizer()
    words.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert any("normalisation" in note for note in read(words, tmp_path).notes)


def test_pieces_get_scores_in_the_order_of_merges(tmp_path: Path) -> None:
    found = read(piece_tokenizer(), tmp_path, 288)
    at = {text: i for i, text in enumerate(found.tokens)}
    assert (found.model, found.pre, list(found.merges)) == ("llama", "default", [])
    assert [found.types[i] for i in (0, 1, 3, 258, at["▁"])] == [
        KIND.UNKNOWN, KIND.CONTROL, KIND.BYTE, KIND.BYTE, KIND.NORMAL
    ]  # fmt: skip
    assert [found.scores[at[t]] for t in ("▁h", "ll", "▁hello", "h", "<s>", "<0x00>")] == [
        0,
        -1,
        -5,
        -6,
        0,
        0,
    ]
    assert (found.add_bos, found.add_eos, found.space_prefix) == (True, False, True)


def test_marks_that_only_the_configuration_knows(tmp_path: Path) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    found = read(
        words, tmp_path, config=SimpleNamespace(eos_token_id=261, bos_token_id=None, pad_token_id=[1, 2])
    )
    assert found.special == {"eos": 261}


def test_what_gguf_has_no_place_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ids up to 261, the model 200 rows"):
        read(tokenizer(), tmp_path / "few", 200)
    with pytest.raises(UsageError, match="no merges") as caught:
        read(models.tiny_tokenizer(), tmp_path / "bytes")
    assert "--to hf" in (caught.value.hint or "")
    level = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")))
    with pytest.raises(UsageError, match="WordLevel model"):
        read(level, tmp_path / "words")
    (tmp_path / "few" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        _gguf_vocabulary.read(tmp_path / "few", 264, NONE)
