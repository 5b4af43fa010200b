# SPDX-License-Identifier: Apache-2.0
"""Settings say when they have an effect, and the header of a run shows those that have one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.common import settings
from fleetune.common.settings import setting
from fleetune.tuning import methods


@dataclass(frozen=True)
class Some:
    kind: str = setting("lora", "k", "lora, adapter or full")
    share: float = setting(0.0, "s", "a share")
    rank: int = setting(8, "r", "of lora and adapter", only_if="kind=lora|adapter")
    rate: float = setting(0.5, "e", "of the share", only_if="share")
    epochs: int = setting(1, "E", "without a share", only_if="share=0.0")


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (Some(), ["kind", "share", "rank", "epochs"]),
        (Some(kind="adapter", share=0.5), ["kind", "share", "rank", "rate"]),
        (Some(kind="full"), ["kind", "share", "epochs"]),
    ],
)
def test_a_setting_has_an_effect_by_the_value_of_another(chosen: Some, names: list[str]) -> None:
    assert [s.name for s in settings.of(Some) if s.has_effect(chosen)] == names


@pytest.mark.parametrize("name", methods.entries())
def test_conditions_name_settings_of_the_method(name: str) -> None:
    method = methods.module_of(name).Method()
    known = [s.name for s in methods.settings(name)]
    for s in methods.settings(name):
        assert not s.only_if or s.only_if.partition("=")[0] in known
        assert isinstance(s.has_effect(method), bool)


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
