# SPDX-License-Identifier: Apache-2.0
"""Recognise the form of a row by its fields, and make an `Example` of it.

    Dolly               instruction, context (may be empty or absent), response
    Alpaca              instruction, input (may be empty or absent), output
    prompt, response    prompt, response; system and context may be empty or absent
    prompt, completion  the same with completion; both may be lists of turns, as TRL has them
    question, answer    question, answer; system and context may be empty or absent (GSM8K)
    E2E                 mr, ref; or meaning_representation, human_reference
    ShareGPT            conversations: a list of {from: human|gpt|system, value}
    chat messages       messages: a list of {role: user|assistant|system, content}
    labelled            label, and one or two texts: question and sentence (QNLI), premise and hypothesis, question1
                        and question2, sentence1 and sentence2, sentence, or text
    text                text, and no label: training is continued on the whole text, there is no prompt

A context is joined to its instruction in one user turn: "{instruction}\\n{context}", and for Alpaca
"{instruction}\\n\\n### Input:\\n{input}", as in its own training prompt (tatsu-lab/stanford_alpaca, train.py).  The last
turn of a conversation, the assistant's, is the answer; the turns before it are the prompt.  Text is not changed.

The answer of a labelled row is its label, as text; QNLI's are "yes" (entailment) and "no", which a causal model
can write too.  An encoder reads the texts themselves, a causal model a question about them (`LABELLED`).  The
label stays among the row's fields, so that a partition can use it (dirichlet:0.5:label).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, NoReturn

from fleetune.data import columns
from fleetune.data.chats import CHATS, conversation, joined
from fleetune.data.fields import BadRow, NoForm, meta_of, shown, text_of
from fleetune.data.readers import names_of

SYSTEM: Final = "system"
TEXT: Final = "plain text"


class Pair(NamedTuple):
    """The fields of a question and its answer, and what joins the context to the question."""

    prompt: str
    context: str
    response: str
    join: str = "\n"


OLD: Final = {
    "Dolly": Pair("instruction", "context", "response"),
    "Alpaca": Pair("instruction", "input", "output", "\n\n### Input:\n"),
}
NEW: Final = {  # the field `system` is a turn of these
    "prompt and response": Pair("prompt", "context", "response"),
    "prompt and completion": Pair("prompt", "context", "completion"),
    "question and answer": Pair("question", "context", "answer"),
    "E2E": Pair("mr", "context", "ref"),
    "E2E of the hub": Pair("meaning_representation", "context", "human_reference"),
}
PAIRS: Final = OLD | NEW
LABELLED: Final = {  # name: the fields to read, and what is asked about them
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
SPOKEN: Final = {
    "QNLI": {"entailment": "yes", "not_entailment": "no", "0": "yes", "1": "no"}
}  # GLUE's numbers, too
OPTIONAL: Final = {SYSTEM, columns.CLIENT, "context", "input"}
FIELDS: Final = tuple(
    dict.fromkeys(
        (
            *columns.MAIN,
            *OPTIONAL,
            *(name for pair in PAIRS.values() for name in pair[:3]),
            *(name for texts, _ in LABELLED.values() for name in texts),
            *(turns for turns, _, _ in CHATS.values()),
        )
    )
)


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its answer; or a text that training is continued on, which has no messages."""

    messages: tuple[tuple[str, str], ...]  # (role, content); system|user|assistant, the last is user
    response: str  # the assistant's answer, or the whole text: the loss is on this alone
    meta: Mapping[str, str] = field(default_factory=dict)  # the row's other fields that are single values
    texts: tuple[str, ...] = ()  # what an encoder reads, one text or a pair (none: the turns, a line each)
    where: str = field(default="", compare=False)  # "file:line"; "" for a row that is in no file


def form_of(fields: Mapping[str, object], mapped: Collection[str] = ()) -> str:
    """Return the form that the fields indicate, "" if none; it has all `mapped` fields.  BadRow where two fit."""
    wanted = set(mapped) - {columns.CLIENT}

    def fits(*names: str, optional: Collection[str] = ()) -> bool:
        return all(name in fields for name in names) and wanted <= {*names, *optional}

    def pairs(kind: Mapping[str, Pair]) -> list[str]:
        found = [n for n, p in kind.items() if fits(p.prompt, p.response, optional=(p.context, SYSTEM))]
        if len(found) > 1:
            _refuse_both(fields, *found[:2])
        return found

    chats = [name for name, (turns, _, _) in CHATS.items() if fits(turns)]
    labelled = [name for name, (texts, _) in LABELLED.items() if fits("label", *texts)]
    found = chats or pairs(OLD) or labelled or pairs(NEW) or [TEXT] * fits("text")
    return found[0] if found else ""


def _refuse_both(fields: Mapping[str, object], one: str, other: str) -> NoReturn:
    """Raise for a row that two forms fit."""
    a, b = PAIRS[one], PAIRS[other]
    if a.response != b.response:
        what = f"has both field {a.response!r} ({one}) and field {b.response!r} ({other})"
    else:
        what = f"has both field {a.prompt!r} ({one}) and field {b.prompt!r} ({other})"
    raise NoForm(f"{what}\n    row: {shown(fields)}", f"keep one of them, or {columns.flag(fields)}")


def refuse(fields: Mapping[str, object], mapped: Mapping[str, str]) -> NoReturn:
    """Raise for a first row that is in no form; `fields` are those of the data, before they were renamed."""
    what = "has the fields of no form"
    if "instruction" in fields and not mapped:
        what = "field 'response' (Dolly) or 'output' (Alpaca) is missing"
    elif mapped:
        what = f"has the fields of no form with {', '.join(mapped)}"
    hint = columns.flag(fields)
    if any(all(text in fields for text in texts) for texts, _ in LABELLED.values()) and not mapped:
        hint = f"give each row a label, in the field 'label'; or {hint}"
    raise NoForm(f"{what} (the row has: {names_of(fields)})\n    row: {shown(fields)}", hint)


def example_of(
    fields: Mapping[str, object], form: str, mapped: Collection[str], left_out: Counter[str]
) -> Example | None:
    """Return a row in a form as an example; None where nothing of it is left (see `chats.py`).  BadRow for a bad one."""
    if form == TEXT:
        return Example((), text_of(fields, "text"), meta_of(fields, ("text",)))
    if form in LABELLED:
        return _labelled(fields, form)
    if form in PAIRS:
        return _pair(fields, form, mapped, left_out)
    turns = conversation(fields, form, left_out)
    return Example(*turns, meta_of(fields, (CHATS[form][0],))) if turns else None


def row_of(example: Example) -> dict[str, object]:
    """Return the example as a row that reads back to the same: labelled ones and texts as they were, others as messages."""
    for names, question in LABELLED.values():
        fits = example.texts and len(names) == len(example.texts)
        if fits and example.messages == (("user", question.format(*example.texts)),):
            return {**example.meta, **dict(zip(names, example.texts, strict=True))}
    if not example.messages:
        return {**example.meta, "text": example.response}
    turns = [*example.messages, ("assistant", example.response)]
    return {**example.meta, "messages": [{"role": role, "content": content} for role, content in turns]}


def _pair(
    fields: Mapping[str, object], form: str, mapped: Collection[str], left_out: Counter[str]
) -> Example | None:
    """Read a question and its answer; TRL has both as lists of turns, too."""
    ask, given, answer, join = pair = PAIRS[form]
    for name, other in OLD.items():
        if form in OLD and other != pair and other.context in fields and given not in fields:
            raise BadRow(
                f"field {other.context!r} is of the {name} form, the others are of the {form} form",
                f"rename {other.context!r} to {given!r}",
            )
    asked, said = fields.get(ask), fields.get(answer)
    if isinstance(asked, list) and isinstance(said, list) and asked and said and form in NEW:
        turns = joined([*asked, *said], f"{ask} + {answer}", "role", "content", left_out)
        return Example(*turns, meta_of(fields, (ask, answer))) if turns else None
    instruction = text_of(fields, ask)
    context = text_of(fields, given, may_lack=True)
    prompt = instruction + join + context if context.strip() else instruction
    messages: tuple[tuple[str, str], ...] = (("user", prompt),)
    used = [ask, given, answer]
    if form in NEW or SYSTEM in mapped:
        used.append(SYSTEM)
        system = text_of(fields, SYSTEM, may_lack=True)
        messages = (("system", system), *messages) if system.strip() else messages
    return Example(messages, text_of(fields, answer), meta_of(fields, used))


def _labelled(fields: Mapping[str, object], form: str) -> Example:
    """Read a row of one or two texts and a label, which may be a number (GLUE's; -1 is none)."""
    names, question = LABELLED[form]
    value = fields.get("label")
    if isinstance(value, bool | int) and value >= 0:
        label = str(value).lower()
    elif isinstance(value, int):
        raise BadRow(f"field 'label' is {value}: the row has no label", "leave out the rows without one")
    else:
        label = text_of(fields, "label").strip()
    texts = tuple(text_of(fields, name) for name in names)
    answer = SPOKEN.get(form, {}).get(label, label)
    return Example((("user", question.format(*texts)),), answer, meta_of(fields, names), texts)
