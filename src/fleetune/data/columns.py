# SPDX-License-Identifier: Apache-2.0
"""Read columns of the data under other names: `prompt=question,response=answer`.

A name on the left is a field of one of the forms (`forms.py`); on the right stands the column of the data that holds it.
A form that does not have all names on the left is not considered.  `client` may be named beside any form: its column
stays, and `client` is a column too, so that `--partition column:client` makes a client of each of its values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from fleetune.common.shell import quoted
from fleetune.data.fields import NoForm, shown
from fleetune.data.readers import names_of
from fleetune.errors import RecipeError, closest, suggest

CLIENT: Final = "client"
MAIN: Final = ("prompt", "response", "system", "context", "text", "label", "messages", CLIENT)
EXAMPLE: Final = "prompt=question,response=answer"
TURN: Final = {"role", "from", "content", "value"}
ASKED: Final = (  # names that prompts have in the data of others
    "prompt",
    "question",
    "instruction",
    "ask",
    "query",
    "input",
    "source",
    "problem",
    "user",
    "human",
    "request",
    "article",
    "document",
    "title",
    "q",
)
ANSWERED: Final = (
    "response",
    "answer",
    "completion",
    "output",
    "target",
    "reply",
    "solution",
    "assistant",
    "summary",
    "chosen",
    "label",
    "a",
)


def parse(spec: str, known: Collection[str]) -> dict[str, str]:
    """Return name -> column of a list `NAME=COLUMN,..`; {} for "".  RecipeError for what is none, and for unknown names."""
    found: dict[str, str] = {}
    for part in spec.split(",") if spec else []:
        name, equals, column = (piece.strip() for piece in part.partition("="))
        why = ""
        if not (name and equals and column):
            why = f"{part.strip()!r} is not NAME=COLUMN"
        elif name not in known:
            why = f"no form has a field {name!r}." + suggest(name, known)
        elif name in found:
            why = f"{name!r} is named twice"
        elif name != CLIENT and column in [c for n, c in found.items() if n != CLIENT]:
            why = f"column {column!r} is named twice"
        if why:
            raise RecipeError(
                [f"columns = {spec!r}: {why}"],
                hint=f"such as --columns {EXAMPLE}; the names: {', '.join(MAIN)}",
            )
        found[name] = column
    return found


def renamed(fields: Mapping[str, object], mapped: Mapping[str, str]) -> dict[str, object]:
    """Return a row with the mapped columns under the names of the form; a column that had such a name is hidden."""
    moved = {column for name, column in mapped.items() if name != CLIENT}
    rest = {name: value for name, value in fields.items() if name not in moved and name not in mapped}
    return rest | {name: fields[column] for name, column in mapped.items() if column in fields}


def check_first(fields: Mapping[str, object], mapped: Mapping[str, str], optional: Collection[str]) -> None:
    """Raise NoForm when the first row lacks a mapped column that no row may lack."""
    for name, column in mapped.items():
        if column not in fields and name not in optional:
            near = closest(column, map(str, fields))
            raise NoForm(
                f"has no column {column!r} to read as {name} (the row has: {names_of(fields)})\n    row: {shown(fields)}",
                (f"did you mean {near!r}? " if near else "") + flag(fields),
            )


def flag(fields: Mapping[str, object]) -> str:
    """Return how to map a row's columns, with the flag that may be meant."""
    return f"say which columns are which: --columns {quoted(guess(fields))}; all forms: docs/data.md"


def guess(fields: Mapping[str, object]) -> str:
    """Return a mapping that a row's fields suggest."""
    usable = {
        str(n): v
        for n, v in fields.items()
        if str(n).isprintable() and len(str(n)) <= 40 and "," not in str(n)
    }
    for name, value in usable.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and TURN & set(value[0]):
            return f"messages={name}"
    texts = [
        n
        for n, v in usable.items()
        if isinstance(v, str) and not v.strip().lstrip("-").replace(".", "").isdigit()
    ]
    asked, answered = _named(texts, ASKED), _named(texts, ANSWERED)
    others = [n for n in texts if n not in (asked, answered)]
    if len(texts) == len(fields) == 1:
        return f"text={texts[0]}"
    asked = asked or (others.pop(0) if others else "COLUMN")
    answered = answered or max(others, key=lambda name: len(str(usable[name])), default="COLUMN")
    return f"prompt={asked},response={answered}"


def _named(columns: Collection[str], names: Collection[str]) -> str:
    lower = {column.lower(): column for column in reversed(list(columns))}
    return next((lower[name] for name in names if name in lower), "")
