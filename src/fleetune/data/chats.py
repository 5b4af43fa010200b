# SPDX-License-Identifier: Apache-2.0
"""Read a conversation as turns in text: what tools were called for, and parts that are not text, are left out and counted.

A turn of a tool is left out, and the call in an assistant's turn; where that leaves the assistant speaking twice, the two
turns become one.  A conversation that lost turns ends with the last text of the assistant that answers a user; where there
is none, the row is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from fleetune.data.fields import BadRow, text_of
from fleetune.data.readers import value_text

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

    What is left out is counted in `left_out`, by a name in the plural.
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


def told(left_out: Mapping[str, int]) -> str:
    """Return what was left out of the conversations, in words; "" for nothing."""
    parts = [f"{count:,} {what}" for what, count in sorted(left_out.items()) if count]
    return f"left out of the conversations: {', '.join(parts)}" if parts else ""
