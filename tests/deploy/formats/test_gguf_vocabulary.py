"""Tokenizers as GGUF metadata."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from deploy_harness import TEMPLATE, piece_tokenizer, split, tiny, tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from fleetune import models
from fleetune.deploy import llamacpp
from fleetune.deploy.export import write as export
from fleetune.deploy.formats import _gguf_vocabulary
from fleetune.errors import ModelError, UsageError
from fleetune.models.gguf.convert import MARKS, RULES, WHOLE, _step

NONE = SimpleNamespace()
KIND = gguf.TokenType
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read(words: Any, folder: Path, rows: int = 264, config: Any = NONE) -> _gguf_vocabulary.Vocabulary:
    words.save_pretrained(folder)
    return _gguf_vocabulary.read(folder, rows, config)


def test_bytes_merges_marks_and_unused_rows(tmp_path: Path) -> None:
    words = tokenizer()
    words.add_tokens(["<tool>", "<|extra|>"])
    found = read(words, tmp_path)
    assert (found.model, found.pre, found.notes) == ("gpt2", "smollm", ())
    assert list(found.merges) == ["h e", "l l", "he ll"]
    texts = ["he", "hell", "<|endoftext|>", "<tool>", "<|extra|>"]
    assert [found.tokens[i] for i in (256, 258, 259, 262, 263)] == texts
    kinds = ["NORMAL", "NORMAL", "CONTROL", "CONTROL", "USER_DEFINED", "CONTROL"]
    assert [KIND(found.types[i]).name for i in (0, 258, 259, 261, 262, 263)] == kinds
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
        (split(), "qwen2"),
        (split(LLAMA3), "smaug-bpe"),
        (split(LLAMA3, "removed", invert=True), "smaug-bpe"),
        (split(LLAMA3, "merged_with_previous"), "default"),
        (split(r"\p{L}+"), "default"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "default"),
        (pre_tokenizers.Digits(individual_digits=False), "default"),
    ],
)
def test_the_splitting_rule_is_named_by_what_it_does(tmp_path: Path, pre: Any, name: str) -> None:
    found = read(tokenizer(pre), tmp_path)
    assert found.pre == name
    assert any("no name" in note for note in found.notes) == (name == "default")
    assert not any("merges words" in note for note in found.notes)


def test_pieces_get_scores_in_the_order_of_merges(tmp_path: Path) -> None:
    found = read(piece_tokenizer(), tmp_path, 288)
    at = {text: i for i, text in enumerate(found.tokens)}
    assert (found.model, found.pre, list(found.merges)) == ("llama", "default", [])
    kinds = ["UNKNOWN", "CONTROL", "BYTE", "BYTE", "NORMAL"]
    assert [KIND(found.types[i]).name for i in (0, 1, 3, 258, at["▁"])] == kinds
    scores = {"▁h": 0, "ll": -1, "▁hello": -5, "h": -6, "<s>": 0, "<0x00>": 0}
    assert {text: found.scores[at[text]] for text in scores} == scores
    assert (found.add_bos, found.add_eos, found.space_prefix) == (True, False, True)


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


CORPUS = """He's said: "HELLO, I'll've 12345 items"; they'D re-read x/y//z\n/\n  end.\r\n\tÜberGröße naïve ÉCOLE café's ΑΒγδ 你好世界 42nd\t
print(foo_bar1234[0])  #  a   comment    with     spaces\n\n\nMcDonald isN'T iPhone12 don't DON'T  éé  ½ ²³ ١٢٣"""
MARKED = " cafe\u0301s e\u0301"
PIECE = st.sampled_from(re.findall(r"(?s).{1,4}", CORPUS))


def trained(name: str) -> PreTrainedTokenizerFast:
    """Merges that were learned without any rule, so that they go over every border that the rule draws."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False, max_token_length=4)
    backend.train_from_iterator([CORPUS + MARKED] * 3, trainer)
    backend.pre_tokenizer = pre_tokenizers.Sequence([_step(step) for step in RULES[name]])
    backend.model.ignore_merges = name in WHOLE
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE)


@pytest.fixture(scope="module", params=RULES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not llamacpp.available():
        pytest.skip("llama.cpp is not installed")
    folder, words = tmp_path_factory.mktemp("rule"), trained(request.param)
    net = tiny(vocab_size=704).net
    models.save(net, words, folder / "m")
    report = export(folder / "m", "gguf:f16", folder / "x.gguf")
    said = [note for note in report.notes if "rounded" not in note]
    parts = f"llama.cpp's rule '{request.param}' parts a letter from a combining mark that follows"
    assert said == ([parts] if request.param in MARKS else [])
    with llamacpp.opened(report.path, 1) as opened:
        yield words, opened


@settings(max_examples=40, deadline=None)
@example(pieces=[CORPUS])
@given(pieces=st.lists(PIECE, max_size=12))
def test_llama_cpp_splits_any_text_in_the_same_way(engine: Any, pieces: list[str]) -> None:
    same(*engine, "".join(pieces))


def test_combining_marks_are_parted_by_rules_that_say_so(engine: Any, request: pytest.FixtureRequest) -> None:
    parted = request.node.callspec.params["engine"] in MARKS
    with pytest.raises(AssertionError) if parted else contextlib.nullcontext():
        same(*engine, MARKED)


def same(words: PreTrainedTokenizerFast, opened: Any, text: str) -> None:
    raw, ids = text.encode(), opened._ffi.new("llama_token[]", 4096)
    vocab = opened._lib.llama_model_get_vocab(opened._model)
    count = opened._lib.llama_tokenize(vocab, raw, len(raw), ids, 4096, False, False)
    assert list(ids[0:count]) == words(text).input_ids
