"""Write a tokenizer as GGUF metadata (the ggml project's docs/gguf.md, "tokenizer.ggml.*").

    gpt2    byte-level BPE: tokens, merges, and the name of the rule that splits text first, decided by what tokenizer.json's
            pre_tokenizer does; a rule that llama.cpp has no name for becomes "default", with a note
    llama   BPE over characters with bytes as fallback, as sentencepiece makes it: tokens and scores.  Pieces
            join in the order of falling scores; minus the rank of a merge gives the order of the merges

A tokenizer without a chat template gets a template of the plain form in which Fleetune tunes and asks (`chat_template.py`): in a
GGUF file always, in a directory where transformers makes the same tokens of it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fleetune.data import Example
from fleetune.data.encode import encode, prompt_ids
from fleetune.errors import ModelError, UsageError
from fleetune.models.checks import config_of
from fleetune.models.families.foreign import foreign_file
from fleetune.models.gguf.convert import MARKS, RULES, WHOLE
from fleetune.models.net import chat_template as plain

SPECIAL: Final = ("bos", "eos", "unk", "pad")
TEMPLATE_FILE: Final = "chat_template.jinja"  # transformers' own name for it
NO_TEMPLATE: Final = (
    "the tokenizer has no chat template, and the form in which the model is tuned (each turn a line) cannot be said in "
    "one: give a runtime the prompt as a text"
)
OTHER_END: Final = (
    "apply_chat_template makes other tokens of an answer's end than tuning did: "
    "to tune on, add the end-of-text token's id yourself"
)
NO_LIMIT: Final = 1 << 20  # tokens: nothing is cut
CONVERSATION: Final = (
    ("system", "be  brief "),
    ("user", " hello\n 12"),
    ("assistant", "he"),
    ("user", "a's"),
)
ANSWER: Final = "hello 12\n"  # with a line break, which an end token that strips would take


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's terms."""

    model: str  # "gpt2" or "llama"
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]  # gguf.TokenType
    merges: Sequence[str]  # of "gpt2"
    scores: Sequence[float]  # of "llama"
    special: Mapping[str, int]  # bos, eos, unk, pad -> id
    add_bos: bool
    add_eos: bool
    space_prefix: bool | None  # of "llama": whether a text gets a space in front
    chat_template: str | Sequence[Mapping[str, str]]
    notes: tuple[str, ...]

    def add_to(self, writer: Any) -> None:
        """Write it into the metadata of a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for kind, token in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        writer.add_chat_template(self.chat_template)


def read(folder: Path, rows: int, config: Any, held: PreTrainedTokenizerBase | None = None) -> Vocabulary:
    """Read the tokenizer of a Hugging Face directory (if it is `held`, that), for an embedding of `rows` rows.

    ModelError when it cannot be loaded or has more tokens than rows; UsageError when it is of a kind that
    GGUF has no place for.
    """
    tokenizer = held or load(folder)
    rules = _rules(tokenizer, folder)
    model = rules["model"]
    ids = tokenizer.get_vocab()
    if ids and max(ids.values()) >= rows:
        raise ModelError(
            f"the tokenizer in {folder} has ids up to {max(ids.values())}, the model {rows} rows",
            hint="the tokenizer belongs to another model: fetch the model again",
        )
    merges = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model["merges"]]
    fallback = bool(model["byte_fallback"])
    pre, notes = ("default", []) if fallback else _rule(rules)
    special = _special(tokenizer, config)
    marked = tokenizer("a")["input_ids"]
    tokens, types = _tokens(ids, rules["added_tokens"], rows, special.get("unk") if fallback else None)
    return Vocabulary(
        model="llama" if fallback else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[] if fallback else [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges],
        scores=_scores(tokens, types, merges) if fallback else [],
        special=special,
        add_bos=marked[0] == special.get("bos"),
        add_eos=marked[-1] == special.get("eos"),
        space_prefix=_space_prefix(rules) if fallback else None,
        chat_template=_template(tokenizer),
        notes=tuple(notes),
    )


def _rules(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Return what tokenizer.json says; UsageError unless it is there, and of a BPE model with merges."""
    why, rules = "has no tokenizer.json, which GGUF files are written from", dict[str, Any]()
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        why = f"is a {rules['model']['type']} model; GGUF files are written for BPE"
        if rules["model"]["type"] == "BPE":
            why = "" if rules["model"]["merges"] else "has no merges, and llama.cpp reads none without"
    if why:
        raise UsageError(f"the tokenizer of {folder} {why}", hint="export to a directory instead: --to hf")
    return rules


def load(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face directory; ModelError when that fails."""
    with foreign_file(folder, "has a tokenizer that cannot be loaded"):
        # transformers would not know the type of a model with widths of its own
        config = config_of(folder) if (folder / "config.json").is_file() else None
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    return tokenizer


def _special(tokenizer: PreTrainedTokenizerBase, config: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for kind in SPECIAL:
        token = getattr(tokenizer, f"{kind}_token_id", None)
        if token is None:
            token = getattr(config, f"{kind}_token_id", None)
        if isinstance(token, int):
            found[kind] = token
    return found


def add_template(source: Path, folder: Path) -> list[str]:
    """Write a template of the plain form into `folder` where the tokenizer of `source` has no chat template.

    Returns a note where that cannot be done, or not for the end of an answer.
    """
    try:
        tokenizer = load(source)
    except ModelError:  # loading the directory says so
        return []
    if not plain.is_plain(tokenizer):
        return []
    notes = give_template(tokenizer)
    if NO_TEMPLATE not in notes:
        (folder / TEMPLATE_FILE).write_text(str(tokenizer.chat_template), encoding="utf-8")
    return notes


def give_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give a template of the plain form to a tokenizer that has no chat template.

    Returns a note where transformers would make other tokens of it: of a prompt, then it gets none; or of an answer.
    """
    if not plain.is_plain(tokenizer):
        return []
    template = plain.template(tokenizer)
    turns = [{"role": role, "content": content} for role, content in CONVERSATION]
    example = Example(CONVERSATION, ANSWER, {})
    prompt = tokenizer.apply_chat_template(
        turns, chat_template=template, add_generation_prompt=True, return_dict=False
    )
    if prompt != prompt_ids(example, tokenizer, NO_LIMIT).tolist():
        return [NO_TEMPLATE]
    whole = tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": ANSWER}], chat_template=template, return_dict=False
    )
    tokenizer.chat_template = template
    return [] if whole == encode(example, tokenizer, NO_LIMIT).ids.tolist() else [OTHER_END]


def _template(tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]]:
    if plain.is_plain(tokenizer):
        return plain.template(tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return str(template)


def _steps(pre: Mapping[str, Any] | None) -> list[str]:
    """Return what a pre_tokenizer does, step by step; a step that llama.cpp has in no rule starts with "?"."""
    if pre is None:
        return []
    match pre:
        case {"type": "Sequence"}:
            return [step for part in pre["pretokenizers"] for step in _steps(part)]
        case {"type": "Digits", "individual_digits": True}:
            return ["digit"]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return ["bytes+words" if pre.get("use_regex", True) else "bytes"]
        case {
            "type": "Split",
            "pattern": {"Regex": str(pattern)},
            "behavior": behavior,
            "invert": bool(invert),
        }:
            # the rules' patterns leave no text between matches, so what is removed around them is nothing
            same = (behavior, invert) in (("Isolated", False), ("Removed", True))
            return [pattern if same else f"?{behavior}"]
    return [f"?{pre.get('type')}"]


def _rule(rules: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return llama.cpp's name of the rule that splits text, and notes on what it does differently."""
    notes = []
    steps, whole = tuple(_steps(rules["pre_tokenizer"])), bool(rules["model"].get("ignore_merges"))
    names = sorted((name for name in RULES if RULES[name] == steps), key=lambda n: (n in WHOLE) != whole)
    pre = next(iter(names), None)
    if pre is None:
        notes.append(
            "llama.cpp has no name for the tokenizer's splitting rule: some text may split differently"
        )
    elif whole != (pre in WHOLE):
        notes.append(f"llama.cpp's rule '{pre}' merges words that are tokens themselves differently")
    if pre in MARKS:
        notes.append(f"llama.cpp's rule '{pre}' parts a letter from a combining mark that follows")
    if (rules["normalizer"] or {}).get("type") not in (None, "NFC"):
        notes.append(
            "llama.cpp leaves the tokenizer's text normalisation out: some text may split differently"
        )
    return pre or "default", notes


def _tokens(
    ids: Mapping[str, int], added: Sequence[Mapping[str, Any]], rows: int, unknown: int | None
) -> tuple[list[str], list[int]]:
    """Return texts and types of the ids 0 to rows - 1; `unknown` is given when "<0x41>" are bytes."""
    kinds = gguf.TokenType
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(kinds.UNUSED)] * rows
    for text, i in ids.items():
        byte = unknown is not None and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[i], types[i] = text, int(kinds.BYTE if byte else kinds.NORMAL)
    for token in added:
        text, i = token["content"], token["id"]
        control = token["special"] or (text.startswith("<|") and text.endswith("|>"))
        tokens[i], types[i] = text, int(kinds.CONTROL if control else kinds.USER_DEFINED)
    if unknown is not None:
        types[unknown] = int(kinds.UNKNOWN)
    return tokens, types


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]]) -> list[float]:
    """Score tokens: minus the rank of the first merge that makes one; letters after all merges, marks and bytes 0."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    last = len(merges)
    normal, added = int(gguf.TokenType.NORMAL), int(gguf.TokenType.USER_DEFINED)
    return [
        -float(ranks.get(text, last)) if kind == normal or (kind == added and text in ranks) else 0.0
        for text, kind in zip(tokens, types, strict=True)
    ]


def _space_prefix(rules: Mapping[str, Any]) -> bool:
    """Return whether the normalizer or the pre_tokenizer puts a space in front of a text."""
    whole = json.dumps([rules["normalizer"], rules["pre_tokenizer"]])
    return (
        '"Prepend"' in whole or '"prepend_scheme": "first"' in whole or '"prepend_scheme": "always"' in whole
    )
