# SPDX-License-Identifier: Apache-2.0
r"""Write a command so that it can be pasted into a shell, and name the one that installs an extra.

A path with a space is quoted.  A word with line breaks or other control characters is written as bash and zsh read it,
`$'a\nb'`: shown as it is it would drive the terminal.

A Fleetune that came from a folder or a file is not to be had by its name: pip states where it came from in the file
`direct_url.json` of an installed package (PEP 610), and the command names that place.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname


def quoted(word: object) -> str:
    """Return one word of a command, in quotes where a shell would split or expand it."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(map(_escaped, text)) + "'"


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return "\\" + letter if letter in "\\'" else letter
    code = ord(letter)
    if letter == "\n":
        return r"\n"
    if code < 0x80 or 0xDC80 <= code < 0xDD00:  # ASCII, or a byte of a name that is not UTF-8
        return f"\\x{code & 0xFF:02x}"
    return f"\\U{code:08x}"


def command(*words: object) -> str:
    """Return `fleetune WORD ..`, each word quoted where it needs to be."""
    return " ".join(["fleetune", *map(quoted, words)])


@cache
def pip_install(extra: str = "") -> str:
    """Return the command that installs Fleetune with an extra (none for ""), from where this Fleetune came from."""
    wanted = f"[{extra}]" if extra else ""
    origin = _origin()
    url, inside = (_text(origin, name) for name in ("url", "subdirectory"))
    if isinstance(folder := origin.get("dir_info"), dict):
        place = Path(url2pathname(urlsplit(url).path), inside)
        return f"pip install {'-e ' if folder.get('editable') else ''}{quoted(f'{place}{wanted}')}"
    if isinstance(source := origin.get("vcs_info"), dict):
        revision = _text(source, "requested_revision") or _text(source, "commit_id")
        url = f"{_text(source, 'vcs') or 'git'}+{url}" + (f"@{revision}" if revision else "")
        url += f"#subdirectory={inside}" if inside else ""
    return f"pip install {quoted(f'fleetune{wanted}' + (f' @ {url}' if url else ''))}"


def _text(found: Mapping[str, Any], name: str) -> str:
    """Return a text of pip's notes; "" where there is none."""
    text = found.get(name)
    return text if isinstance(text, str) else ""


def _origin() -> dict[str, Any]:
    """Return what pip noted of the origin; {} for a package from an index, and where nothing can be read."""
    try:
        text = metadata.distribution("fleetune").read_text("direct_url.json")
        found = json.loads(text or "{}")
    except (metadata.PackageNotFoundError, OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
