# SPDX-License-Identifier: Apache-2.0
"""Take texts out of a row's fields, and show a row in one line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Final

from fleetune.data.readers import names_of, value_text, whole

SHOWN: Final = 8  # fields of a row that is shown
LETTERS: Final = 48  # of a value that is shown


class BadRow(Exception):
    """(what is wrong, how to put it right), raised and caught within `fleetune.data`."""


class NoForm(BadRow):
    """A first row in no form: what follows it would be refused for the same."""


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


def shown(fields: Mapping[str, object]) -> str:
    """Return a row in one printable line: its first fields with the begin of their values."""
    parts = [
        f"{_line(str(name), 40)}: {_value(value)}" for name, value in itertools.islice(fields.items(), SHOWN)
    ]
    return "{" + ", ".join(parts + [".."] * (len(fields) > SHOWN)) + "}"


def _value(value: object) -> str:
    if isinstance(value, list | dict) and len(value):
        inside = next(iter(value))
        names = (
            f" of {{{', '.join(_line(str(n), 20) for n in list(inside)[:4])}}}"
            if isinstance(inside, dict)
            else ""
        )
        return f"a list{names}" if isinstance(value, list) else "an object"
    return _line(value, LETTERS)


def _line(value: object, most: int) -> str:
    """Return a value as JSON writes it, cut, without letters that steer a terminal."""
    short = value[: most + 1] if isinstance(value, str) else value
    text = value_text(value) if not isinstance(value, str) else json.dumps(short, ensure_ascii=False)
    text = text.removeprefix("the number ")
    if isinstance(value, str) and len(value) > most:
        text = json.dumps(value[:most], ensure_ascii=False)[:-1] + '.."'
    return "".join(c if c.isprintable() else "?" for c in text)
