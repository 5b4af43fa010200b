"""Settings say when they have an effect, and words, sizes of memory and speeds of a line are read as people write them."""

import re
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.common import settings
from fleetune.common.settings import setting
from fleetune.errors import UsageError
from fleetune.tuning import methods


@dataclass(frozen=True)
class Some:
    kind: str = setting("lora", "k", "lora, adapter or full")
    share: float = setting(0.0, "s", "a share")
    rank: int = setting(8, "r", "of lora and adapter", only_if="kind=lora|adapter")
    rate: float = setting(0.5, "e", "of the share", only_if="share")
    epochs: int = setting(1, "E", "without a share", only_if="share=0.0")
    slow: float = setting(0.1, "v", "of small shares", only_if="share<0.5")


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (Some(), ["kind", "share", "rank", "epochs", "slow"]),
        (Some(kind="adapter", share=0.5), ["kind", "share", "rank", "rate"]),
        (Some(kind="full"), ["kind", "share", "epochs", "slow"]),
    ],
)
def test_a_setting_has_an_effect_by_the_value_of_another(chosen: Some, names: list[str]) -> None:
    assert [s.name for s in settings.of(Some) if s.has_effect(chosen)] == names


@pytest.mark.parametrize("name", methods.entries())
def test_conditions_name_settings_of_the_method(name: str) -> None:
    method = methods.module_of(name).Method()
    known = [s.name for s in methods.settings(name)]
    for s in methods.settings(name):
        assert not s.only_if or re.split("[=<]", s.only_if)[0] in known
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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("512 MB", 512 * 10**6),
        ("2GiB", 1 << 31),
        ("8e9", 8 * 10**9),
        ("1.5g", 1_500_000_000),
        (" 640 kb ", 640_000),
        ("16 KiB", 16384),
        ("1TB", 10**12),
        ("1234567", 1234567),
        ("123 b", 123),
        ("2E3MB", 2 * 10**9),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert settings.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["4", "1.5", "512", " 8 "])
def test_a_number_that_is_no_memory_is_asked_about(text: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean {text.strip()}GB"):
        settings.parse_bytes(text)


@pytest.mark.parametrize(
    "text", ["", "GB", "-4GB", "4 XB", "4GBs", "0", "0GB", "nan", "inf", "1e999", "4,5GB", "4 4GB", "4ib"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="ram"):
        settings.parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1Mbps", 125_000),
        ("500kbit/s", 62_500),
        ("2 MB/s", 2e6),
        ("1 Gbit/s", 125e6),
        ("9600bps", 1200),
        ("1.5 MiB/s", 1.5 * 2**20),
        ("3Kb/s", 375),
        ("10 Mbits/s", 1.25e6),
    ],
)
def test_speeds(text: str, rate: float) -> None:
    assert settings.parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "1M", "1e6", "Mbps", "-1Mbps", "0 Mbps", "1 Mbp", "fast", "1Mb", "1 parsec/s", "1e999bps"]
)
def test_what_is_no_speed(text: str) -> None:
    with pytest.raises(UsageError, match="uplink"):
        settings.parse_rate(text)
