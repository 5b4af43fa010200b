# SPDX-License-Identifier: Apache-2.0
"""Rows that repeat others: the search finds what comparing every pair finds."""

from __future__ import annotations

import random
import re

import pytest

from fleetune.data import duplicates
from fleetune.data.duplicates import LIKE, Twin, find
from fleetune.data.forms import Example


def row(question: str, answer: str) -> Example:
    return Example((("user", question),), answer)


def like(one: Example, other: Example) -> float:
    """Jaccard similarity of the sets of three consecutive words, by definition."""
    sets = []
    for example in (one, other):
        words = re.findall(r"\w+", f"{example.messages[0][1]} {example.response}".lower())
        sets.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    """Rows of which many are near to another, at all similarities."""
    draw = random.Random(5)
    made = []
    for _ in range(40):
        words = [f"w{draw.randrange(60)}" for _ in range(draw.randrange(8, 60))]
        for _ in range(4):
            for _ in range(draw.choice([0, 1, 1, 2])):
                words[draw.randrange(len(words))] = f"w{draw.randrange(60)}"
            made.append(row(" ".join(words[:5]), " ".join(words[5:])))
    draw.shuffle(made)
    return made


@pytest.mark.parametrize(
    "text",
    [
        "请用简单的话解释一下为什么天空在白天看起来是蓝色的而在傍晚却是红色的呢谢谢",
        "どうして空は昼間は青く見えて夕方には赤く見えるのか簡単な言葉で説明してください",
        "ช่วยอธิบายด้วยคำง่ายๆว่าทำไมท้องฟ้าจึงเป็นสีฟ้าในตอนกลางวันและเป็นสีแดงในตอนเย็น",
    ],
)
def test_near_rows_are_found_in_scripts_without_spaces(text: str) -> None:
    near, other = text[:-1] + "x", text[len(text) // 2 :] + text[: len(text) // 3]
    rows = [row(text, "是"), row(near, "是"), row(other[::-1], "是")]
    assert find(rows, [0], [1, 2]).near_held_out == [Twin(1, 0)]
    assert find(rows, [0, 1, 2], []).near_training == [Twin(1, 0)]


def test_words_with_spaces_stay_words() -> None:
    assert duplicates.WORD.findall("Straße naïve 12_a 안녕 하세요 ηλιος") == [
        "Straße", "naïve", "12_a", "안녕", "하세요", "ηλιος",
    ]  # fmt: skip
    assert duplicates.WORD.findall("GPT模型v2") == ["GPT", "模", "型", "v2"]


def test_it_finds_what_comparing_every_pair_finds(rows: list[Example]) -> None:
    training, held = list(range(0, len(rows), 2)), list(range(1, len(rows), 2))
    found = find(rows, training, held)
    equal = [i for i in training if any(rows[j] == rows[i] for j in training if j < i)]
    assert [twin.row for twin in found.equal_training] == equal
    leak = [i for i in held if any(rows[j] == rows[i] for j in training)]
    assert [twin.row for twin in found.equal_held_out] == leak
    unique = [i for i in training if i not in equal]
    near = [i for i in unique if any(like(rows[i], rows[j]) >= LIKE for j in unique if j < i)]
    assert [twin.row for twin in found.near_training] == near
    assert len(near) > 10
    flatters = [i for i in held if i not in leak and any(like(rows[i], rows[j]) >= LIKE for j in unique)]
    assert [twin.row for twin in found.near_held_out] == flatters
    assert len(flatters) > 10
    assert all(like(rows[t.row], rows[t.of]) >= LIKE for t in (*found.near_training, *found.near_held_out))
    assert found.compared == found.rows


def test_case_and_marks_do_not_make_a_row_another() -> None:
    rows = [
        row("What is it?", "A fox."),
        row("what is it", "a FOX"),
        row("What is it?", "A fox."),
        row("Why", "no"),
    ]
    found = find(rows, [0, 1, 3], [2])
    assert (found.equal_held_out, found.near_training) == ([Twin(2, 0)], [Twin(1, 0)])
    assert (found.equal_training, found.near_held_out) == ([], [])


def test_the_search_ends_and_says_where(rows: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST", 50)
    found = find(rows, range(len(rows)), [])
    assert 0 < found.compared < found.rows


def test_rows_without_a_word_are_near_only_where_their_marks_are_equal() -> None:
    rows = [row("\N{GRINNING FACE}", "!!!"), row("???", "+"), row("!", "..."), row("???", "+")]
    found = find(rows, [0, 1], [2, 3])
    assert not found.near_training
    assert not found.near_held_out
    assert found.equal_held_out == [Twin(3, 1)]
