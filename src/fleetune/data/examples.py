# SPDX-License-Identifier: Apache-2.0
"""Read data sets of instructions and answers as `Example`s, and report the rows that are wrong.

A source is a file (.jsonl, .json, .csv, .parquet), "demo" (the set that comes with Fleetune), or a data
set on the Hugging Face hub: "owner/name", or "owner/name:file" for one file of it.  The first row's fields
tell the form, and every row must have that form:

    Dolly          instruction, context (may be empty or absent), response
    Alpaca         instruction, input (may be empty or absent), output
    ShareGPT       conversations: a list of {from: human|gpt|system, value}
    chat messages  messages: a list of {role: user|assistant|system, content}
    labelled       label, and one or two texts: question and sentence (QNLI), premise and hypothesis, question1
                   and question2, sentence1 and sentence2, sentence, or text

A context is joined to its instruction in one user turn: "{instruction}\\n{context}" for Dolly and
"{instruction}\\n\\n### Input:\\n{input}", as in its own training prompt, for Alpaca
(tatsu-lab/stanford_alpaca, train.py).  The last turn of a conversation, the assistant's, is the answer; the
turns before it are the prompt.  Text is not changed.

The answer of a labelled row is its label, as text; QNLI's are "yes" (entailment) and "no", which a causal model
can write too.  An encoder reads the texts themselves, a causal model a question about them (`LABELLED`).  The
label stays among the row's fields, so that a partition can use it (dirichlet:0.5:label).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, TypeVar

from fleetune.common import sums
from fleetune.data import hub
from fleetune.data.readers import (
    READERS,
    FileRow,
    Problem,
    decode,
    names_of,
    no_file,
    rows_of,
    unreadable,
    value_text,
)
from fleetune.errors import DataError

T = TypeVar("T")

SHOWN = 5  # bad rows reported at once
PAIRS = {  # name: prompt field, context field, answer field, what joins the context
    "Dolly": ("instruction", "context", "response", "\n"),
    "Alpaca": ("instruction", "input", "output", "\n\n### Input:\n"),
}
LABELLED = {  # name: the fields to read, and what is asked about them
    "QNLI": (
        ("question", "sentence"),
        "Question: {}\nSentence: {}\nDoes the sentence contain the answer to the question, yes or no?",
    ),
    "premise and hypothesis": (
        ("premise", "hypothesis"),
        "Premise: {}\nHypothesis: {}\nHow does the hypothesis relate to the premise?",
    ),
    "question pair": (("question1", "question2"), "Question 1: {}\nQuestion 2: {}\nHow do the two relate?"),
    "sentence pair": (("sentence1", "sentence2"), "Sentence 1: {}\nSentence 2: {}\nHow do the two relate?"),
    "labelled sentence": (("sentence",), "{}\nHow is this sentence labelled?"),
    "labelled text": (("text",), "{}\nHow is this text labelled?"),
}
SPOKEN = {"QNLI": {"entailment": "yes", "not_entailment": "no", "0": "yes", "1": "no"}}  # GLUE's numbers, too
CHATS = {"ShareGPT": ("conversations", "from", "value"), "chat messages": ("messages", "role", "content")}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
NOT_READ = (".txt", ".tsv", ".ndjson", ".xlsx", ".gz", ".zip", ".zst")  # files, not hub ids, all the same
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[^:]+)?")


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its answer."""

    messages: tuple[tuple[str, str], ...]  # (role, content); system|user|assistant, the last is user
    response: str  # the assistant's answer: the loss is on this alone
    meta: Mapping[str, str] = field(default_factory=dict)  # the row's other fields that are single values
    texts: tuple[str, ...] = ()  # what an encoder reads, one text or a pair (none: the turns, a line each)
    where: str = field(default="", compare=False)  # "file:line"; "" for a row that is in no file


class _BadRow(Exception):
    """(what is wrong, how to put it right), raised and caught within this module."""


def read(source: str, *, limit: int | None = None, offline: bool = False) -> list[Example]:
    """Read `source` (see the module), at most the first `limit` rows; `offline` uses the hub's cache alone.

    DataError names file, line and field of the first bad rows (up to 5), or says why the source is not
    there, not readable, or empty.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit of rows must be at least 1, got {limit}", hint="leave it out to read all")
    form, first = "", ""

    def make(row: FileRow) -> list[Example]:
        nonlocal form, first
        own = _form(row.fields)
        if form and own and own != form:
            raise _BadRow(f"is in {own} form, but {first} is in {form} form", "keep one form per data set")
        if not form:
            form, first = own or _no_form(row.fields), row.where
        if form in LABELLED:
            found = _labelled(row.fields, form)
        else:
            found = _pair(row.fields, form) if form in PAIRS else _chat(row.fields, form)
        return [replace(found, where=row.where)]

    files = _files(source, offline)
    rows = itertools.chain.from_iterable(rows_of(path, shown) for path, shown in files)
    return _collect(rows, make, limit, source)


def digests(source: str, *, offline: bool = False) -> dict[str, str]:
    """Return the SHA-256 of every file of a source as they lie on the disk, by the name that is shown for it."""
    return {shown: sums.sha256(path) for path, shown in _files(source, offline)}


def row_of(example: Example) -> dict[str, object]:
    """Return the example as a row that `read` reads back to the same: labelled ones as they were, others as chat messages."""
    for names, question in LABELLED.values():
        fits = example.texts and len(names) == len(example.texts)
        if fits and example.messages == (("user", question.format(*example.texts)),):
            return {**example.meta, **dict(zip(names, example.texts, strict=True))}
    turns = [*example.messages, ("assistant", example.response)]
    return {**example.meta, "messages": [{"role": role, "content": content} for role, content in turns]}


def read_text(path: str | Path) -> list[str]:
    """Read plain text for perplexity: a list of texts.

    A file of rows (.jsonl, .json, .csv, .parquet) gives the field `text` of each row where it is not blank;
    any other file is one text.  DataError as for `read`.
    """
    shown = str(path)
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):
        raise no_file(shown)
    if file.suffix.lower() in READERS:
        return _collect(rows_of(file, shown), _blank_or_text, None, shown)
    try:
        text = decode(file.read_bytes(), shown)
    except OSError as error:
        raise unreadable(shown, error) from error
    return _collect([FileRow(shown, {"text": text})], _blank_or_text, None, shown)


def _blank_or_text(row: FileRow) -> list[str]:
    """Return the field `text` of a row in a list, or an empty list where it is blank."""
    text = _text(row.fields, "text", may_lack="text" in row.fields)
    return [text] if text.strip() else []


def _collect(
    rows: Iterable[FileRow | Problem], make: Callable[[FileRow], list[T]], limit: int | None, source: str
) -> list[T]:
    """Make every row with `make` and join the results; DataError with the bad rows, or when there is nothing."""
    found: list[T] = []
    problems: list[Problem] = []
    for row in itertools.islice(rows, limit):
        try:
            if isinstance(row, Problem):
                raise _BadRow(row.what, row.fix)
            found += make(row)
        except _BadRow as bad:
            problems.append(Problem(row.where, *bad.args))
            if len(problems) == SHOWN:
                break
    if problems:
        many = f"the first {SHOWN} bad rows" if len(problems) == SHOWN else f"{len(problems)} bad row(s)"
        lines = [f"{problem.where}: {problem.what}" for problem in problems]
        fixes = dict.fromkeys(problem.fix for problem in problems)
        raise DataError("\n  ".join([f"{many} in {source}", *lines]), hint="; ".join(fixes))
    if not found:
        raise DataError(f"{source} has no rows", hint="check that the file was written or downloaded in full")
    return found


def _files(source: str, offline: bool) -> list[tuple[Path, str]]:
    """Return the files of a source, each with the name to show for it."""
    if source == "demo":
        return [(Path(__file__).with_name("demo.jsonl"), "demo")]
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        return [(path, source)]
    like_a_file = Path(source.partition(":")[0]).suffix.lower() in (*READERS, *NOT_READ)
    if os.path.isdir(path) or like_a_file or not HUB_ID.fullmatch(source):
        raise no_file(source)
    return hub.files(source, offline)


# Forms: a row's fields become an Example.


def _form(fields: Mapping[str, object]) -> str:
    """Return the form that the fields indicate, "" if none."""
    for name, (turns, _, _) in CHATS.items():
        if turns in fields:
            return name
    fits = [name for name, (prompt, _, answer, _) in PAIRS.items() if prompt in fields and answer in fields]
    if len(fits) > 1:
        raise _BadRow("has both field 'response' (Dolly) and field 'output' (Alpaca)", "keep one of them")
    if not fits and "label" in fields:
        fits = [name for name, (texts, _) in LABELLED.items() if all(text in fields for text in texts)]
    return fits[0] if fits else ""


def _no_form(fields: Mapping[str, object]) -> NoReturn:
    """Return the problem of a first row that is in no form."""
    if "instruction" in fields:
        what = "field 'response' (Dolly) or 'output' (Alpaca) is missing"
    else:
        what = "field 'instruction', 'messages' or 'conversations' is missing"
    raise _BadRow(
        f"{what} (the row has: {names_of(fields)})",
        "name the fields instruction, context, response (Dolly); instruction, input, output (Alpaca); "
        "conversations (ShareGPT); messages (chat); or label with text, with sentence1 and sentence2, ..",
    )


def _pair(fields: Mapping[str, object], form: str) -> Example:
    """Read a Dolly or Alpaca row."""
    ask, given, answer, join = PAIRS[form]
    for other, (_, other_given, _, _) in PAIRS.items():
        if other != form and other_given in fields and given not in fields:
            raise _BadRow(
                f"field {other_given!r} is of the {other} form, the others are of the {form} form",
                f"rename {other_given!r} to {given!r}",
            )
    instruction = _text(fields, ask)
    context = _text(fields, given, may_lack=True)
    prompt = instruction + join + context if context.strip() else instruction
    return Example((("user", prompt),), _text(fields, answer), _meta(fields, (ask, given, answer)))


def _labelled(fields: Mapping[str, object], form: str) -> Example:
    """Read a row of one or two texts and a label, which may be a number (GLUE's; -1 is none)."""
    names, question = LABELLED[form]
    value = fields.get("label")
    if isinstance(value, bool | int) and value >= 0:
        label = str(value).lower()
    elif isinstance(value, int):
        raise _BadRow(f"field 'label' is {value}: the row has no label", "leave out the rows without one")
    else:
        label = _text(fields, "label").strip()
    texts = tuple(_text(fields, name) for name in names)
    answer = SPOKEN.get(form, {}).get(label, label)
    return Example((("user", question.format(*texts)),), answer, _meta(fields, names), texts)


def _chat(fields: Mapping[str, object], form: str) -> Example:
    """Read a ShareGPT or chat-messages row."""
    key, speaker, says = CHATS[form]
    turns = fields.get(key)
    if not isinstance(turns, list) or not turns:
        what = f"is {value_text(turns)}" if key in fields else "is missing"
        raise _BadRow(
            f"field {key!r} {what}", f"make {key!r} a list of {{{speaker}, {says}}}, question first"
        )
    messages: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        label = f"{key}[{number}]"
        if not isinstance(turn, dict):
            raise _BadRow(
                f"field {label!r} is {value_text(turn)}", f"write each turn as {{{speaker}, {says}}}"
            )
        role = ROLES.get(_text(turn, speaker, label=label))
        if role is None or (role == "system" and number > 0):
            roles = "system (first turn only), user (or human), assistant (or gpt)"
            raise _BadRow(
                f"field '{label}.{speaker}' is {value_text(turn[speaker])}", f"the roles are {roles}"
            )
        messages.append((role, _text(turn, says, label=label, may_lack=role == "system")))
    *prompt, (last, response) = messages
    if last != "assistant":
        raise _BadRow(
            f"field {key!r}: the last turn is from the {last}", "end each row with the assistant's answer"
        )
    if not prompt or prompt[-1][0] != "user":
        before = f"from the {prompt[-1][0]}" if prompt else "missing"
        raise _BadRow(
            f"field {key!r}: the turn before the answer is {before}", "put the user's turn before it"
        )
    return Example(tuple(prompt), response, _meta(fields, (key,)))


def _text(fields: Mapping[str, object], name: str, *, label: str = "", may_lack: bool = False) -> str:
    """Return the text of field `name`; `may_lack` lets it be absent, null or empty."""
    path = f"{label}.{name}" if label else name
    value = fields.get(name)
    if value is None and may_lack:
        return ""
    if name not in fields:
        raise _BadRow(
            f"field {path!r} is missing (there are: {names_of(fields)})", f"add {name!r} to these rows"
        )
    if not isinstance(value, str):
        raise _BadRow(f"field {path!r} is {value_text(value)}, not text", f"write {name!r} as text")
    if not value.strip() and not may_lack:
        raise _BadRow(f"field {path!r} is empty", f"fill in {name!r}, or delete these rows")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise _BadRow(f"field {path!r} holds {half}, half a character", "write the text out again") from error
    return value


def _meta(fields: Mapping[str, object], used: Iterable[str]) -> dict[str, str]:
    """Return the fields besides `used` that are single values, as text (true and false as JSON writes them)."""
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in fields.items()
        if name not in used and value is not None and not isinstance(value, list | dict)
    }
