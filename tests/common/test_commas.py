# SPDX-License-Identifier: Apache-2.0
"""Words with commas between them, and in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.common import settings

WORDS = st.text(st.sampled_from("ab ,\\"), max_size=6).map(str.strip).filter(lambda w: not w.endswith("\\"))


@given(st.lists(WORDS, min_size=1))
def test_what_is_written_is_read(words: list[str]) -> None:
    assert settings.split_words(settings.join_words(words)) == words
    assert settings.given_words(settings.join_words(words)) == [word for word in words if word]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("yes,no", ["yes", "no"]),
        (" yes , no,", ["yes", "no"]),
        ("a\\b,c", ["a\\b", "c"]),
        (r"late\, but paid,paid", ["late, but paid", "paid"]),
        ("", []),
    ],
)
def test_texts_are_read_as_before_but_for_a_comma_after_a_backslash(text: str, words: list[str]) -> None:
    assert settings.given_words(text) == words
