# SPDX-License-Identifier: Apache-2.0
"""Cut plain texts, on which training is continued, into rows; and begin one, for the model to continue.

A text is its tokens, after the start mark and before the end mark that the tokenizer has.  One that is longer than
`max_length` becomes several rows, each of which begins with the last token of the row before it: every token of the text
but the first bears the loss in exactly one row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

from fleetune.data.forms import Example

OPENING: Final = "text"  # the speaker of a text's begin, which no template writes
LONGEST: Final = 200  # letters of a begin that the model is given to continue


def is_text(example: Example) -> bool:
    """Whether an example is a plain text, or the begin of one."""
    return not example.messages or example.messages[0][0] == OPENING


def begun(example: Example) -> Example:
    """Return a plain text as its begin, which is the prompt, and the rest, which is the answer; others as they are."""
    if example.messages:
        return example
    text = example.response
    half = max(1, min(len(text) // 2, LONGEST))
    at = text.rfind(" ", 1, half + 1)
    at = at if at > 0 else half
    return dataclasses.replace(example, messages=((OPENING, text[:at]),), response=text[at:])


def rows_of(ids: Sequence[int], max_length: int) -> Iterator[Sequence[int]]:
    """Yield the tokens of a text's rows, at most `max_length` in each; the first of a row bears no loss."""
    for start in range(0, max(1, len(ids) - 1), max_length - 1):
        yield ids[start : start + max_length]
