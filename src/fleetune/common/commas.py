# SPDX-License-Identifier: Apache-2.0
r"""Write words as one text with commas between them, and read them back: a comma of a word itself is written `\,`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_BETWEEN: Final = re.compile(r"(?<!\\),")


def split(text: str) -> list[str]:
    """Return the words of a text, without spaces around them; an empty one for nothing between two commas."""
    return [word.strip().replace("\\,", ",") for word in _BETWEEN.split(text)]


def given(text: str) -> list[str]:
    """Return the words of a text without empty ones."""
    return [word for word in split(text) if word]


def join(words: Iterable[str]) -> str:
    """Return the text that `split` reads as these words, where none ends with a backslash."""
    return ",".join(word.replace(",", "\\,") for word in words)
