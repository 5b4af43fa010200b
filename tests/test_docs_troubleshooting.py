# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md has a section for each error class, and quotes messages that the code really has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fleetune import errors

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CLASSES = [
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.FleetuneError)
]
SECTIONS = dict(re.findall(r"(?ms)^## (\w+)\n(.*?)(?=^## |\Z)", PAGE))


def texts() -> str:
    """Every string in the source, f-strings as their constant pieces."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "src").rglob("*.py")]
    constants = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return "\0".join(value for value in constants if isinstance(value, str))


def test_every_error_class_has_a_section():
    assert list(SECTIONS) == CLASSES


@pytest.mark.parametrize("name", CLASSES)
def test_the_table_states_the_exit_code(name: str):
    code = getattr(errors, name).exit_code
    (line,) = [row for row in PAGE.splitlines() if re.match(r"\| \d", row) and f"](#{name.lower()})" in row]
    assert line.startswith(f"| {code} |")


def test_the_quoted_messages_are_those_of_the_code():
    source = texts()
    for name, section in SECTIONS.items():
        lines = [
            line for block in re.findall(r"```text\n(.*?)```", section, re.S) for line in block.split("\n")
        ]
        assert len(lines) > 1, name
        for line in lines:
            gone = [piece for piece in line.split("..") if piece not in source]
            assert not gone, f"{name}: {gone} of {line!r}"
