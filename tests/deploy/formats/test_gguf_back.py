"""Our own GGUF files as models again: tokens of any text, logits and configuration are what they were; Gemma as well."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_harness import LLAMA3, MARKS, piece_tokenizer, split, tiny, tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fleetune import models
from fleetune.deploy.export import write as export
from fleetune.models import Model
from fleetune.models.gguf import convert as gguf_tokens
from tiny_families import drawn, sizes

IDS = torch.tensor([[0, 12, 200, 7, 256, 258, 31, 90, 3, *range(40, 80)]])


def without_unknown(pre: Any, **model: Any) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer as Qwen's and Llama 3's: no unknown token."""
    with_it = tokenizer(pre)
    rules = json.loads(with_it.backend_tokenizer.to_str())
    rules["model"] |= model
    backend = Tokenizer.from_str(json.dumps(rules))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **MARKS, chat_template=with_it.chat_template)


def llama3() -> PreTrainedTokenizerBase:
    """With Llama 3's rule, whole words taken as they are, a start mark in front and a word added later."""
    rule = split(gguf_tokens.RULES["llama-bpe"][0])
    vocab = tokenizer().backend_tokenizer.get_vocab(with_added_tokens=False)
    made = without_unknown(rule, ignore_merges=True, vocab=vocab | {"os": 259})  # no merge makes "os"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 261)]
    )
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    return made


def pieces(prefix: bool) -> PreTrainedTokenizerBase:
    made = piece_tokenizer()
    if not prefix:
        made.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return made


WORDS = {
    "smollm": lambda: tokenizer(),
    "smollm without unknown": lambda: without_unknown(None),
    "gpt2 without unknown": lambda: without_unknown(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "qwen2 without unknown": lambda: without_unknown(split()),
    "llama 3": llama3,
    "pieces": lambda: pieces(True),
    "pieces without a space in front": lambda: pieces(False),
}
SIZES = {"pieces": 288, "pieces without a space in front": 288}


@pytest.fixture(scope="module", params=WORDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model with a tokenizer of each kind, and what its GGUF file loads as."""
    folder = tmp_path_factory.mktemp("back")
    model = tiny(vocab_size=SIZES.get(request.param, 264), bos_token_id=1, eos_token_id=2, pad_token_id=None)
    model.tokenizer = WORDS[request.param]()
    models.save(model.net, model.tokenizer, folder / "m")
    file = export(folder / "m", "gguf:f32", folder / "x.gguf").path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETUNE_HOME", str(folder / "home"))
        return model, models.load(str(file))


TEXTS = st.text(alphabet="hel o\n\t 12é🚀▁<>'S.s|", max_size=24) | st.text(max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(" hello hell os")
@example("os")
@given(TEXTS)
def test_any_text_has_the_same_tokens(both: tuple[models.Model, models.Model], text: str) -> None:
    own, back = both
    ids = own.tokenizer(text).input_ids
    assert back.tokenizer(text).input_ids == ids
    assert back.tokenizer.decode(ids) == own.tokenizer.decode(ids)
    chat = f"<|im_start|>{text}<|im_end|><s>{text}</s><tool>"
    assert back.tokenizer(chat).input_ids == own.tokenizer(chat).input_ids


def test_pieces_join_by_score_not_by_id() -> None:
    joined = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "x": 6, "xy": 7}
    scores = [-9.0, -9.0, -9.0, -2.0, -1.0, -1.0, 0.0, 0.0]
    assert gguf_tokens._merges(joined, scores) == [("b", "c"), ("a", "bc"), ("ab", "c"), ("a", "b")]


def test_marks_template_and_logits(both: tuple[models.Model, models.Model]) -> None:
    own, back = both
    assert torch.equal(back.net(IDS).logits, own.net(IDS).logits)
    if own.tokenizer.unk_token != "<|endoftext|>":  # transformers' reader, which takes unused rows for tokens
        assert len(back.tokenizer) == len(own.tokenizer)
    if own.tokenizer.chat_template is not None:  # `test_chat_templates.py` has the others
        assert back.tokenizer.chat_template == own.tokenizer.chat_template
    for mark in ("bos", "eos", "unk"):
        assert getattr(back.tokenizer, f"{mark}_token") == getattr(own.tokenizer, f"{mark}_token")
    texts = [m.tokenizer.decode([260, 12], skip_special_tokens=True) for m in both]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("changes", [{}, {"factor": 3.0, "low_freq_factor": 2.0}, {"rope_theta": 500000.0}])
def test_rescaled_frequencies_come_back(tmp_path: Path, own_cache: None, changes: dict[str, Any]) -> None:
    rescaled = LLAMA3 | changes
    tiny(head_dim=32, rope_parameters=rescaled).save(tmp_path / "m")
    path = export(tmp_path / "m", "gguf:f32", tmp_path / "x.gguf").path
    back = models.load(str(path))
    own = models.load(str(tmp_path / "m"), device="cpu")
    assert dict(back.net.config.rope_parameters) == rescaled
    assert torch.equal(back.net(IDS).logits, own.net(IDS).logits)
    assert models.load_config(str(path)).rope_parameters == rescaled


BEYOND_WINDOWS = torch.tensor([[1, *range(262, 287), *range(40, 70)]])  # longer than the windows
LOCAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}


def gemma(kind: str, **changes: Any) -> Model:
    """With pieces as Gemma has them: no space in front of a text, runs of spaces and lines among the added words."""
    words = piece_tokenizer()
    words.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    words.add_tokens([AddedToken(t, normalized=False) for t in ("\n\n", "<unused0>")])
    layers = 7 if kind == "gemma3_text" else 2  # the sixth looks at everything
    given = sizes(64, 128, layers, 4, 2, vocab_size=288, head_dim=32, max_position_embeddings=1024)
    given |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    if kind != "gemma":
        given |= {"query_pre_attn_scalar": 32, "sliding_window": 8}
    config = AutoConfig.for_model(kind, **given | changes)
    return drawn(config, words, kind, 0, 0.2, lambda tensor: False, attn_implementation="eager")


CASES: list[tuple[str, dict[str, Any]]] = [
    ("gemma", {}),
    ("gemma", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("gemma2", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    ("gemma3_text", {}),
    ("gemma3_text", {"rope_parameters": LOCAL}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_a_gemma_loads_back_to_the_same_logits_and_tokens(tmp_path, own_cache, kind, changes):
    model = gemma(kind, **changes)
    models.save(model.net, model.tokenizer, tmp_path / "m")
    report = export(tmp_path / "m", "gguf:f32", tmp_path / "x.gguf")
    assert (report.exact, report.types, report.notes) == (report.tensors, {"F32": report.tensors}, ())
    back = models.load(str(report.path))
    back.net.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(back.net(BEYOND_WINDOWS).logits, model.net(BEYOND_WINDOWS).logits)
    want, found = model.net.config.to_dict(), back.net.config.to_dict()
    for key in want.keys() - {"transformers_version", "dtype", "_name_or_path", "architectures"}:
        assert found[key] == want[key], key
    for text in ("hello hell", "  hel lo\n\n\nx", "<unused0>hello\n\n", "é 🚀 xhello", "", " "):
        assert back.tokenizer(text).input_ids == model.tokenizer(text).input_ids, text
        texts = [m.tokenizer.decode(m.tokenizer(text).input_ids) for m in (back, model)]
        assert texts[0] == texts[1]
