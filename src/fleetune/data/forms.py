"""Recognise the form of a row by its fields, and make an `Example` of it; docs/data.md lists the forms.

The context follows the instruction in one user turn, in Alpaca rows as in that project's training prompt
(tatsu-lab/stanford_alpaca, train.py).  A labelled row's answer is its label as text: an encoder reads its texts themselves, a
causal model a question about them (`LABELLED`).  Turns that are not text are left out and counted; if the assistant then speaks
twice in a row, the two turns become one.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, NoReturn

from fleetune.data.readers import names_of, value_text, whole


class BadRow(Exception):
    """(what is wrong, how to put it right), raised and caught within `fleetune.data`."""


def text_of(fields: Mapping[str, object], name: str, *, label: str = "", may_lack: bool = False) -> str:
    """Return the text of field `name`; `may_lack` lets it be absent, null or empty.  BadRow for anything else."""
    path = f"{label}.{name}" if label else name
    value = fields.get(name)
    if value is None and may_lack:
        return ""
    if name not in fields:
        raise BadRow(
            f"field {path!r} is missing (there are: {names_of(fields)})", f"add {name!r} to these rows"
        )
    if not isinstance(value, str):
        raise BadRow(f"field {path!r} is {value_text(value)}, not text", f"write {name!r} as text")
    if not value.strip() and not may_lack:
        raise BadRow(f"field {path!r} is empty", f"fill in {name!r}, or delete these rows")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise BadRow(f"field {path!r} holds {half}, half a character", "write the text out again") from error
    return value


def meta_of(fields: Mapping[str, object], used: Iterable[str]) -> dict[str, str]:
    """Return the fields besides `used` that are single values, as text (true and false as JSON writes them)."""
    return {
        whole(str(name)): str(value).lower() if isinstance(value, bool) else whole(str(value))
        for name, value in fields.items()
        if name not in used and value is not None and not isinstance(value, list | dict)
    }


CLIENT: Final = "client"
MAIN: Final = ("prompt", "response", "system", "context", "text", "label", "messages", CLIENT)
EXAMPLE: Final = "prompt=question,response=answer"
COLUMNS_HINT: Final = f"say which columns are which: --columns {EXAMPLE}; all forms: fleetune help data"


CHATS: Final = {
    "ShareGPT": ("conversations", "from", "value"),
    "chat messages": ("messages", "role", "content"),
}
ROLES: Final = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "developer": "system",
}
TOOLS: Final = ("tool", "function", "function_call", "function_response", "observation", "ipython")
CALLS: Final = ("tool_calls", "function_call")

Turns = tuple[tuple[tuple[str, str], ...], str]  # the turns before the answer, and the answer


def conversation(fields: Mapping[str, object], form: str, left_out: Counter[str]) -> Turns | None:
    """Return the turns of a ShareGPT or chat-messages row; None where no answer in text is left.

    `left_out` counts what is left out, by plural name.
    """
    key, speaker, says = CHATS[form]
    turns = fields.get(key)
    if not isinstance(turns, list) or not turns:
        what = f"is {value_text(turns)}" if key in fields else "is missing"
        raise BadRow(f"field {key!r} {what}", f"make {key!r} a list of {{{speaker}, {says}}}, question first")
    if fields.get("tools"):
        left_out["lists of tools"] += 1
    return joined(turns, key, speaker, says, left_out)


def joined(turns: list[Any], key: str, speaker: str, says: str, left_out: Counter[str]) -> Turns | None:
    """Return turns as (role, text), the last of which is the answer; None as in `conversation`."""
    if isinstance(turns[0], dict) and speaker not in turns[0] and {"role", "from"} & set(turns[0]):
        speaker, says = ("from", "value") if "from" in turns[0] else ("role", "content")
    found: list[tuple[str, str]] = []
    gap = less = False  # something was left out: since the last turn, in the whole row
    for number, turn in enumerate(turns):
        label = f"{key}[{number}]"
        if not isinstance(turn, dict):
            raise BadRow(
                f"field {label!r} is {value_text(turn)}", f"write each turn as {{{speaker}, {says}}}"
            )
        name = text_of(turn, speaker, label=label)
        calls = any(turn.get(call) for call in CALLS)
        if name in TOOLS or calls:
            left_out["turns of tools" if name in TOOLS else "turns that call tools"] += 1
            gap = less = True
        if name in TOOLS:
            continue
        role = ROLES.get(name)
        if role is None or (role == "system" and number > 0):
            roles = "system (first turn only), user (or human), assistant (or gpt)"
            raise BadRow(
                f"field '{label}.{speaker}' is {value_text(turn[speaker])}", f"the roles are {roles}"
            )
        text = _content(turn, says, label, left_out, may_lack=role == "system" or calls)
        if text is None or (calls and not text.strip()):
            gap = less = True
        elif gap and found and found[-1][0] == role == "assistant":
            found[-1] = (role, f"{found[-1][1]}\n{text}")
        else:
            found.append((role, text))
            gap = calls
    return _checked(found, key) if not less else _what_is_left(found, left_out)


def _what_is_left(found: list[tuple[str, str]], left_out: Counter[str]) -> Turns | None:
    """Return the turns up to the last answer of which a user's turn is the question, of a row that lost some."""
    speakers = [role for role, _ in found]
    ends = [i for i in range(1, len(found)) if speakers[i - 1 : i + 1] == ["user", "assistant"]]
    if not ends:
        left_out["rows without a question and an answer in text"] += 1
        return None
    return tuple(found[: ends[-1]]), found[ends[-1]][1]


def _content(
    turn: Mapping[str, Any], says: str, label: str, left_out: Counter[str], *, may_lack: bool
) -> str | None:
    """Return the text of a turn, which may be a list of parts; None where no part is text."""
    parts = turn.get(says)
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        return text_of(turn, says, label=label, may_lack=may_lack)
    texts = [part for part in parts if part.get("type", "text") in ("text", "input_text", "output_text")]
    if others := len(parts) - len(texts):
        left_out["parts that are not text"] += others
    where = f"{label}.{says}"
    return "\n".join(text_of(part, "text", label=where) for part in texts) if texts else None


def _checked(messages: list[tuple[str, str]], key: str) -> Turns:
    *prompt, (last, response) = messages
    if last != "assistant":
        raise BadRow(
            f"field {key!r}: the last turn is from the {last}", "end each row with the assistant's answer"
        )
    if not prompt or prompt[-1][0] != "user":
        before = f"from the {prompt[-1][0]}" if prompt else "missing"
        raise BadRow(
            f"field {key!r}: the turn before the answer is {before}", "put the user's turn before it"
        )
    return tuple(prompt), response


def left_out_text(left_out: Mapping[str, int]) -> str:
    """Return what was left out of the conversations, in words; "" for nothing."""
    parts = [f"{count:,} {what}" for what, count in sorted(left_out.items()) if count]
    return f"left out of the conversations: {', '.join(parts)}" if parts else ""


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
# GLUE's numbers, too
SPOKEN: Final = {"QNLI": {"entailment": "yes", "not_entailment": "no", "0": "yes", "1": "no"}}
OPTIONAL: Final = {SYSTEM, CLIENT, "context", "input"}
FIELDS: Final = tuple(
    dict.fromkeys(
        (
            *MAIN,
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

    @property
    def content(self) -> tuple[object, ...]:
        """What is read and trained on: two rows with the same are equal."""
        return self.messages, self.response, self.texts

    def earlier(self) -> Iterator["Example"]:
        """Yield the answers before the last one, each with the turns before it."""
        for at, (role, text) in enumerate(self.messages):
            if role == "assistant" and text.strip() and at and self.messages[at - 1][0] == "user":
                yield replace(self, messages=self.messages[:at], response=text)


def form_of(fields: Mapping[str, object], mapped: Collection[str] = ()) -> str:
    """Return the form that the fields indicate, "" if none; it has all `mapped` fields.  BadRow where two fit."""
    wanted = set(mapped) - {CLIENT}

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
    raise BadRow(what, f"keep one of them, or {COLUMNS_HINT}")


def fields_of(form: str) -> tuple[str, ...]:
    """Return the fields of a form, those that may lack among them."""
    if form in LABELLED:
        return *LABELLED[form][0], "label"
    if form in PAIRS:
        return *PAIRS[form][:3], SYSTEM
    return ("text",) if form == TEXT else (CHATS[form][0],)


def example_of(
    fields: Mapping[str, object], form: str, mapped: Collection[str], left_out: Counter[str]
) -> Example | None:
    """Return a row in a form as an example; None where nothing of it is left.  BadRow for a bad one."""
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
