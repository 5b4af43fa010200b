"""Commands in hints: a shell reads back the words that were meant, and none of them drives a terminal."""

import os
import shlex
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.common.shell import command, quoted

CONTROLS = ["a\nb", "\x1b[31mred", "it's\ta\\tab\r", "\x9b2J\u2028\u202e"]
ODD = [*CONTROLS, "-", "", "a b", "\udcff.gguf", "ü ñ", "$(x) `y`!\x07"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("word", ODD)
def test_bash_reads_what_was_meant(word: str) -> None:
    line = f"printf %s {quoted(word)}"
    told = subprocess.check_output(["bash", "-c", line], env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert told == os.fsencode(word)


@given(st.text(max_size=20))
def test_a_word_is_one_printable_line(word: str) -> None:
    shown = quoted(word)
    assert shown.isprintable()
    if word.isprintable():
        assert shown == shlex.quote(word)


def test_a_command_is_its_words() -> None:
    assert command("eval", "my run", 3) == "fleetune eval 'my run' 3"
    assert command("eval", "a\nb") == r"fleetune eval $'a\nb'"
