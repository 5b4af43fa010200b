# SPDX-License-Identifier: Apache-2.0
"""Find rows that repeat others: exactly, or nearly, inside the training rows and between them and the held-out ones.

Two rows are nearly equal when their sets of three consecutive words (letters and digits, whatever the case) have a Jaccard
similarity of `LIKE` or more.  In scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) every
character is a word.  The search is exact, not a sketch: sets that are so similar share one of their rarest
shingles, those in a prefix of length n - ceil(LIKE n) + 1 (Bayardo, Ma, Srikant: "Scaling Up All Pairs Similarity Search",
WWW 2007), and every pair that shares one is compared.  Where rows are so alike that this takes more than `MOST` steps,
the search ends there and says so.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fleetune.data.forms import Example

LIKE: Final = 0.8
WORDS: Final = 3  # of a shingle
MOST: Final = 100_000_000  # steps: candidates, and shingles of those that are compared
# Thai and Lao; Burmese; Khmer; kana; ideographs
UNSPACED: Final = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
WORD: Final = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")

Shingles = frozenset[int]


@dataclass(frozen=True)
class Twin:
    """A row that repeats an earlier one, by their indices."""

    row: int
    of: int


@dataclass(frozen=True)
class Duplicates:
    """Rows that repeat another: of the training rows an earlier one, of the held-out rows a training row."""

    equal_training: Sequence[Twin]
    equal_held_out: Sequence[Twin]  # to a training row
    near_training: Sequence[Twin]  # without the equal ones, as below
    near_held_out: Sequence[Twin]  # to a training row
    compared: int  # rows, of `rows` different ones, that the search for near twins reached
    rows: int


def find(examples: Sequence[Example], training: Sequence[int], held: Sequence[int]) -> Duplicates:
    """Return the rows of `examples` that repeat others, of those with the indices `training` and `held`."""
    known: dict[tuple[object, ...], int] = {}
    equal: tuple[list[Twin], list[Twin]] = [], []
    unique: list[int] = []  # training rows, each content once, then held-out rows that equal none
    for part, indices in enumerate((training, held)):
        for i in indices:
            content = (examples[i].messages, examples[i].response, examples[i].texts)
            first = known.get(content) if part else known.setdefault(content, i)
            if first is not None and first != i:
                equal[part].append(Twin(i, first))
            else:
                unique.append(i)
    near, compared = _near(examples, unique, len(unique) - (len(held) - len(equal[1])))
    return Duplicates(*equal, *near, compared=compared, rows=len(unique))


def _near(
    examples: Sequence[Example], order: Sequence[int], training: int
) -> tuple[tuple[list[Twin], list[Twin]], int]:
    """Return the near twins (of training rows, of held-out rows), and how many rows were compared."""
    words: dict[str, int] = {}
    sets = [_shingles(examples[i], words) for i in order]
    often = Counter(shingle for own in sets for shingle in own)
    index: dict[int, list[int]] = {}
    near: tuple[list[Twin], list[Twin]] = [], []
    spent = 0
    for number, own in enumerate(sets):
        rare = sorted(own, key=lambda s: (often[s], s))[: len(own) - math.ceil(LIKE * len(own)) + 1]
        tried: set[int] = set()
        for other in (other for shingle in rare for other in index.get(shingle, ())):
            spent += 1
            size = len(sets[other])
            if other in tried or not LIKE * len(own) <= size <= len(own) / LIKE:
                continue
            tried.add(other)
            spent += size
            if _similarity(own, sets[other]) >= LIKE:
                near[number >= training].append(Twin(order[number], order[other]))
                break
        if number < training:
            for shingle in rare:
                index.setdefault(shingle, []).append(number)
        if spent > MOST:
            return near, number + 1
    return near, len(sets)


def _shingles(example: Example, words: dict[str, int]) -> Shingles:
    """Return the row's shingles as numbers; `words` numbers all words so far."""
    parts = example.texts or tuple(content for _, content in example.messages)
    text = " ".join((*parts, example.response)).casefold()
    said = WORD.findall(text) or [text]  # marks alone are a word
    numbers = [words.setdefault(word, len(words) + 1) for word in said]
    numbers += [0] * (WORDS - len(numbers))
    return frozenset(
        a << 64 | b << 32 | c for a, b, c in zip(numbers, numbers[1:], numbers[2:], strict=False)
    )


def _similarity(one: Shingles, other: Shingles) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
