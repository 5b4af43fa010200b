"""Build a tokenizer from GGUF metadata ("tokenizer.ggml.*"), with exactly the file's tokens, where transformers adds some.

gpt2    byte-level BPE: merges, and the rule that the file names
llama   pieces with scores: two pieces join where the result is a piece, the highest score first, so the merges
        are all such pairs in the order of falling scores; bytes for the rest
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

_SHORT: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = (_WORDS + r"\p{N}{1,3}" + _REST, "bytes")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(short: str, digits: str) -> tuple[str, ...]:
    """Return the steps of a rule that also splits a word where capitals follow small letters."""
    front = r"[^\r\n\p{L}\p{N}]?"
    words = f"{front}{_UPPER}*{_LOWER}+{short}|{front}{_UPPER}+{_LOWER}*{short}|"
    return (words + digits + _REST.replace(r"[\r\n]*", r"[\r\n/]*"), "bytes")


# llama.cpp's name for a rule (llama-vocab.cpp) -> the steps of the pre_tokenizer that does the same; a step is "digit" (one
# by one), "bytes", "bytes+words" (GPT-2's rule) or a regular expression
RULES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "gpt-2": ("bytes+words",),
        "smollm": ("digit", "bytes+words"),
        "llama-bpe": _LLAMA3,
        "smaug-bpe": _LLAMA3,
        "qwen2": (_WORDS + r"\p{N}" + _REST, "bytes"),
        "tekken": _cased("", r"\p{N}"),
        "gpt-4o": _cased(_SHORT + "?", r"\p{N}{1,3}"),
    }
)
# rules with which llama.cpp takes a word that is a token without merging
WHOLE: Final = ("llama-bpe", "tekken")
# rules with which llama.cpp parts a letter from a combining mark that follows
MARKS: Final = ("tekken", "gpt-4o")
# transformers' name -> the one in GGUF's key
SPECIAL: Final[Mapping[str, str]] = MappingProxyType(
    {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
)
UNKNOWN: Final = "tokenizer.ggml.unknown_token_id"
_JOINED: Final = (gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED)

Field = Callable[[str], Any]


def build_tokenizer(field: Field) -> PreTrainedTokenizerBase:
    """Return the tokenizer that metadata describe; `field` gives a value by its key, or None.

    ValueError for a kind that is neither; ValueError, KeyError or TypeError when the metadata make no sense.
    """
    kind = field("tokenizer.ggml.model")
    if kind not in KINDS:
        raise ValueError(f"tokenizer of kind {kind!r}; {' and '.join(KINDS)} are read")
    backend = KINDS[kind](field)
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    _add_marks(backend, tokens, types)
    special = {
        name: tokens[int(i)]
        for name, key in SPECIAL.items()
        if (i := field(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    _add_ends(backend, field, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=field("tokenizer.chat_template"),
        **{f"{name}_token": text for name, text in special.items()},
    )


def _used(field: Field) -> dict[str, int]:
    types = field("tokenizer.ggml.token_type")
    tokens = enumerate(field("tokenizer.ggml.tokens"))
    return {text: i for i, text in tokens if types[i] != gguf.TokenType.UNUSED}


def _bytes(field: Field) -> Tokenizer:
    name = field("tokenizer.ggml.pre")
    merges = [(left, right) for left, right in (m.split(" ", 1) for m in field("tokenizer.ggml.merges"))]
    vocab = _used(field)
    if as_transformers := field(UNKNOWN) is not None:
        vocab = {text: i for i, text in enumerate(field("tokenizer.ggml.tokens"))}
    model = BPE(vocab=vocab, merges=merges, ignore_merges=name in WHOLE)
    if as_transformers:  # its reader has such a vocabulary, with what is not used, to the same digest
        model.continuing_subword_prefix = model.end_of_word_suffix = ""
    backend = Tokenizer(model)
    if name not in RULES:
        log.warning("no rule for tokenizer '%s'; some text may be split differently", name)
    backend.pre_tokenizer = pre_tokenizers.Sequence([_step(s) for s in RULES.get(name, ("bytes+words",))])
    backend.decoder = decoders.ByteLevel()
    return backend


def _step(step: str) -> Any:
    if step == "digit":
        return pre_tokenizers.Digits(individual_digits=True)
    if step.startswith("bytes"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "bytes+words")
    return pre_tokenizers.Split(Regex(step), behavior="isolated", invert=False)


def _pieces(field: Field) -> Tokenizer:
    vocab, types = _used(field), field("tokenizer.ggml.token_type")
    scores = field("tokenizer.ggml.scores")
    joined = {text: i for text, i in vocab.items() if types[i] in _JOINED}
    unknown = next((text for text, i in vocab.items() if types[i] == gguf.TokenType.UNKNOWN), None)
    backend = Tokenizer(
        BPE(vocab=vocab, merges=_merges(joined, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = field("tokenizer.ggml.add_space_prefix") is not False
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(joined: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make a piece, by the piece's falling score and then its id."""
    found = []
    for text in sorted(joined, key=lambda text: (-scores[joined[text]], joined[text])):
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        found += [pair for pair in pairs if pair[0] in joined and pair[1] in joined]
    return found


def _add_marks(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Add special tokens and added words, in the order of their ids."""
    kinds = gguf.TokenType
    for text, kind in zip(tokens, types, strict=True):
        if kind in (kinds.CONTROL, kinds.UNKNOWN):
            backend.add_special_tokens([AddedToken(text, normalized=False)])
        elif kind == kinds.USER_DEFINED:
            backend.add_tokens([AddedToken(text, normalized=False)])


def _add_ends(backend: Tokenizer, field: Field, special: Mapping[str, str]) -> None:
    """Set what goes before and after every text: pieces have a start token unless the file says otherwise."""
    pieces = field("tokenizer.ggml.model") == "llama"
    start = field("tokenizer.ggml.add_bos_token")
    before = special.get("bos") if (pieces if start is None else start) else None
    after = special.get("eos") if field("tokenizer.ggml.add_eos_token") else None
    marks = [mark for mark in (before, after) if mark is not None]
    if marks:
        one = f"{before + ' ' if before else ''}$A{' ' + after if after else ''}"
        backend.post_processor = processors.TemplateProcessing(
            single=one,
            pair=f"{one} {one.replace('$A', '$B')}",
            special_tokens=[(mark, backend.token_to_id(mark)) for mark in dict.fromkeys(marks)],
        )


KINDS: Final[Mapping[str, Callable[[Field], Tokenizer]]] = MappingProxyType(
    {"gpt2": _bytes, "llama": _pieces}
)
