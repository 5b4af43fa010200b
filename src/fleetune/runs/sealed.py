# SPDX-License-Identifier: Apache-2.0
"""Write JSON files that end with a checksum of their content, and read them back; a changed one is found.

    {"base": .., "samples": [..], "crc32": "9a0c1f27"}

The checksum is of the content as `json.dumps` writes it, without the checksum itself.  A file of an earlier version has
none, and is taken as it is.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fleetune.common.files import read_text
from fleetune.errors import StorageError

KEY: Final = "crc32"


def to_text(content: Mapping[str, Any], *, indent: int | None = 1) -> str:
    """Return the content as JSON with its checksum, ready for a file."""
    return json.dumps({**content, KEY: _checksum(content)}, indent=indent, ensure_ascii=False)


def finite(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content as strict JSON holds it: a number that is not finite is None, as it is in an event."""
    found: dict[str, Any] = json.loads(json.dumps(dict(content)), parse_constant=lambda _: None)
    return found


def from_text(text: str) -> dict[str, Any]:
    """Return the content without its checksum; ValueError, with what is wrong, for a text that is damaged."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a table")
    stated = found.pop(KEY, None)
    if stated is not None and stated != (own := _checksum(found)):
        raise ValueError(f"its checksum is {own}, it states {stated}")
    return found


def read(file: Path, hint: str) -> dict[str, Any]:
    """Read a file; StorageError, with `hint`, when it is missing or damaged."""
    try:
        return from_text(read_text(file))
    except FileNotFoundError as error:
        raise StorageError(f"{file} is gone", hint=hint) from error
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise StorageError(f"{file} is damaged ({error})", hint=hint) from error


def checksum(text: str) -> str:
    """Return the CRC-32 of a text in UTF-8, as 8 hexadecimal digits."""
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


def _checksum(content: Mapping[str, Any]) -> str:
    return checksum(json.dumps(content, ensure_ascii=False))
