"""A model without a chat template is asked by every runtime as it was tuned: each turn a line."""

from pathlib import Path

import gguf as package
import pytest
from deploy_harness import compressed, piece_tokenizer, tiny, tokenizer
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fleetune import models
from fleetune.data import Example
from fleetune.data.encode import encode_all, prompt_ids
from fleetune.deploy.export import write as export
from fleetune.deploy.formats import _gguf_vocabulary
from fleetune.models import Model
from fleetune.models.net import chat_template

pytestmark = pytest.mark.usefixtures("own_cache")

TALKS = (
    (("user", "hello"),),
    (("system", " be  brief "), ("user", "hell\no 12\n"), ("assistant", "he's. "), ("user", "<s> ▁é{}\n")),
)
LONG = 1 << 20
ANSWER = "hell. 1\n he"


def bytes_only() -> PreTrainedTokenizerBase:
    """No chat template, nothing in front of a text."""
    made = tokenizer()
    made.chat_template = None
    return made


def bytes_with_start() -> PreTrainedTokenizerBase:
    """No chat template, a mark in front of every text."""
    made = bytes_only()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 260)]
    )
    return made


WORDS = {"bytes": bytes_only, "bytes with a start": bytes_with_start, "pieces": piece_tokenizer}


def speechless(words: PreTrainedTokenizerBase) -> Model:
    ids = {f"{mark}_token_id": getattr(words, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    model = tiny(vocab_size=288, **ids)
    model.tokenizer = words
    return model


def lines(words: PreTrainedTokenizerBase, talk: tuple[tuple[str, str], ...]) -> list[int]:
    """What the module says, by hand: the tokens of one text."""
    ids: list[int] = words("".join(content + "\n" for _, content in talk))["input_ids"]
    return ids


def tuned_on(talk: tuple[tuple[str, str], ...], answer: str, words: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a row: the prompt, the answer, the end-of-text token."""
    (row,), _ = encode_all([Example(talk, answer, {})], words, LONG)
    ids: list[int] = row.ids.tolist()
    assert ids == [*words("".join(text + "\n" for _, text in talk) + answer)["input_ids"], words.eos_token_id]
    return ids


def turns(talk: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in talk]


@pytest.mark.parametrize("kind", WORDS)
def test_llama_cpp_reads_from_the_file_the_tokens_that_it_was_tuned_on(tmp_path: Path, kind: str) -> None:
    """llama.cpp renders the template, takes a start mark away that it wrote, and makes tokens as of any text."""
    own = WORDS[kind]()
    compressed(speechless(own), tmp_path / "m")
    path = export(tmp_path / "m", "gguf", tmp_path / "x.gguf").path
    fields = {key: field.contents() for key, field in package.GGUFReader(path).fields.items()}
    starts = fields["tokenizer.ggml.add_bos_token"]
    assert starts == (kind != "bytes")
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = jinja.from_string(fields["tokenizer.chat_template"])
    marks = {"bos_token": own.bos_token, "eos_token": own.eos_token}
    for talk in TALKS:
        text = template.render(messages=turns(talk), add_generation_prompt=True, **marks)
        if starts:
            assert text.startswith(own.bos_token)
            text = text[len(own.bos_token) :]
        assert own(text)["input_ids"] == lines(own, talk)
        assert prompt_ids(Example(talk, "", {}), own, LONG).tolist() == lines(own, talk)
        answered = turns((*talk, ("assistant", ANSWER)))
        whole = template.render(messages=answered, add_generation_prompt=False, **marks)
        assert own(whole[len(own.bos_token) if starts else 0 :])["input_ids"] == tuned_on(talk, ANSWER, own)


@pytest.mark.parametrize("kind", WORDS)
def test_the_file_read_back_has_the_same_rows_and_the_same_digest(tmp_path: Path, kind: str) -> None:
    own = WORDS[kind]()
    compressed(speechless(own), tmp_path / "m")
    back = models.load(str(export(tmp_path / "m", "gguf", tmp_path / "x.gguf").path))
    assert back.tokenizer.chat_template in chat_template.TEMPLATES
    examples = [Example(talk, "hell. 1\n", {}) for talk in TALKS]
    mine, read = (encode_all(examples, words, LONG)[0] for words in (own, back.tokenizer))
    assert [(row.ids.tolist(), row.n_prompt) for row in mine] == [
        (row.ids.tolist(), row.n_prompt) for row in read
    ]
    assert {row.ids[-1] for row in mine} == {own.eos_token_id}
    own.chat_template = back.tokenizer.chat_template
    with_it = models.tokenizer_digest(own)
    own.chat_template = None
    assert models.tokenizer_digest(own) == with_it
    own.chat_template = "{{ messages[0]['content'] }}"
    assert models.tokenizer_digest(own) != with_it


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("to", ["hf", "gptq"])
def test_a_directory_is_asked_by_transformers_in_the_same_tokens(tmp_path: Path, kind: str, to: str) -> None:
    own = WORDS[kind]()
    compressed(speechless(own), tmp_path / "m")
    report = export(tmp_path / "m", to, tmp_path / "x")
    assert not [note for note in report.notes if "template" in note]
    there = AutoTokenizer.from_pretrained(tmp_path / "x")
    for talk in TALKS:
        ids = there.apply_chat_template(turns(talk), add_generation_prompt=True, return_dict=False)
        assert ids == lines(own, talk)
        assert prompt_ids(Example(talk, "", {}), there, LONG).tolist() == ids
        whole = there.apply_chat_template(turns((*talk, ("assistant", ANSWER))), return_dict=False)
        assert whole == tuned_on(talk, ANSWER, own)
        assert tuned_on(talk, ANSWER, there) == whole


def test_where_a_template_would_give_other_tokens_there_is_a_note_and_none(tmp_path: Path) -> None:
    """A space goes in front of a text alone, so none after the mark that a template writes."""
    words = piece_tokenizer()
    words.backend_tokenizer.normalizer = normalizers.Sequence([])
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    compressed(speechless(words), tmp_path / "m")
    report = export(tmp_path / "m", "hf", tmp_path / "x")
    assert _gguf_vocabulary.NO_TEMPLATE in report.notes
    assert AutoTokenizer.from_pretrained(tmp_path / "x").chat_template is None
