"""The expressions that `mutants.py` breaks are there; whether tests notice is seen by `make faults`."""

import ast

import pytest

from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}:{m.where}")
def test_the_expression_is_there_once_and_what_it_becomes_is_python(mutant):
    text = (ROOT / "src" / "fleetune" / mutant.file).read_text(encoding="utf-8")
    broken = mutant.applied(text)
    ast.parse(broken)
    assert broken != text
    for file in (word for word in mutant.noticed_by.split() if ".py" in word):
        assert (ROOT / "tests" / file).is_file(), file
