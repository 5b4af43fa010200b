"""Numbers and measures as people read them."""

import os
import shlex
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.common import display
from fleetune.common.display import change, command, improved, one_line, show


@pytest.mark.parametrize(
    ("kind", "number", "text"),
    [
        ("bytes", 0, "0 B"),
        ("bytes", 999, "999 B"),
        ("bytes", 999.6, "1.0 kB"),
        ("bytes", 99_960, "100 kB"),
        ("bytes", 999_500, "1.0 MB"),
        ("bytes", 1.19e9, "1.19 GB"),
        ("bytes", 5e18, "5000 PB"),
        ("bytes", None, "-"),
        ("time", 0.04, "0.0 s"),
        ("time", 9.96, "10 s"),
        ("time", 59.6, "1m00s"),
        ("time", 124, "2m04s"),
        ("time", 3599.6, "1h00m"),
        ("time", 86_399, "1d00h"),
        ("time", None, "-"),
        ("count", 4096, "4,096"),
        ("count", 150_000, "150 k"),
        ("count", 134_515_008, "135 M"),
        ("count", 1.235e9, "1.24 B"),
        ("count", 999_600, "1.00 M"),
        ("count", None, "-"),
    ],
)
def test_numbers_for_people(kind: str, number: float | None, text: str) -> None:
    assert getattr(display, f"human_{kind}")(number) == text


def test_change_is_in_percent_for_losses_and_in_points_else() -> None:
    assert change("loss", 2.914, 2.377) == "-18.4 %"
    assert change("rouge_l", 12.6, 24.9) == "+12.3"
    assert change("loss", None, 2.0) == change("loss", 0.0, 2.0) == change("loss", float("nan"), 1.0) == ""
    assert improved("loss", 2.9, 2.3) is True
    assert improved("rouge_l", 12.6, 9.0) is False
    assert improved("loss", 2.0, 2.0) is None
    assert show("loss", 2.37749) == "2.377"
    assert show("rouge_l", None) == "-"
    assert display.metric("gsm8k_acc").label == "gsm8k acc"


def test_a_loss_below_zero_has_no_percentage_and_float_noise_is_no_change() -> None:
    assert change("loss", -0.5, -0.6) == "-0.100"  # in percent of a negative base it would read +20.0
    assert change("objective", -0.25, -0.5) == "-0.2500"
    assert improved("objective", -0.25, -0.5) is True
    assert improved("loss", 4.669, 4.669 * (1 + 1e-9)) is None


def test_the_words_have_the_error_and_better_is_said_beyond_noise_alone() -> None:
    assert change("loss", 4.0, 3.656, 0.048) == "-8.6 ± 1.2 %"
    assert change("loss", 4.0, 3.996, 0.0004) == "-0.10 ± 0.01 %"
    assert change("accuracy", 50.0, 62.3, 4.0) == "+12.3 ± 4.0"
    assert change("loss", 4.0, 3.656) == "-8.6 %"
    assert improved("loss", 4.0, 3.9, 0.04) is True
    assert improved("loss", 4.0, 4.1, 0.04) is False
    assert improved("loss", 4.0, 3.9, 0.051) is None


@pytest.mark.parametrize(
    "pad", [" \u200b", "\u3164", "\u2800", "\uffa0\u115f", "\u2060 ", "\u200d", "\xa0\ufeff", " \ufe0f"]
)
def test_padding_of_letters_that_are_not_seen_is_one_blank_or_escaped(pad: str) -> None:
    padded = f"over{pad * 40}error: it is not"
    assert display.single_spaced(padded) == "over error: it is not"
    if "\ufe0f" not in pad:  # which stands before blanks in an emoji
        for shown in (one_line(padded), display.message_text(padded)):
            assert r"\u" in shown or r"\xa0" in shown
            assert not set(pad) & set(shown) - {" ", "\xa0"}


@pytest.mark.parametrize(
    "text", ["می\u200cخواهم", "👩\u200d🔬 lab", "❤\ufe0f yes", "two  blanks", "x\u2800y"]
)
def test_letters_of_a_word_stay(text: str) -> None:
    assert one_line(text) == display.message_text(text) == text


CONTROLS = ["a\nb", "\x1b[31mred", "it's\ta\\tab\r", "\x9b2J\u2028\u202e"]
ODD = [*CONTROLS, "-", "", "a b", "\udcff.gguf", "ü ñ", "$(x) `y`!\x07"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("word", ODD)
def test_bash_reads_what_was_meant(word: str) -> None:
    line = f"printf %s {display.quoted(word)}"
    told = subprocess.check_output(["bash", "-c", line], env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert told == os.fsencode(word)


@given(st.text(max_size=20))
def test_a_word_is_one_printable_line(word: str) -> None:
    shown = display.quoted(word)
    assert shown.isprintable()
    if word.isprintable():
        assert shown == shlex.quote(word)


def test_a_command_is_its_words() -> None:
    assert command("eval", "my run", 3) == "fleetune eval 'my run' 3"
    assert command("eval", "a\nb") == r"fleetune eval $'a\nb'"
