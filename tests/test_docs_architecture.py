# SPDX-License-Identifier: Apache-2.0
"""docs/architecture.md names files that exist, and its table is that of docs/architecture.toml."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "fleetune"
LAYERS = tomllib.loads((ROOT / "docs" / "architecture.toml").read_text(encoding="utf-8"))["layer"]
SPEC = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
assert SPEC is not None
assert SPEC.loader is not None
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)


@pytest.mark.parametrize("page", ["architecture.md", "view.md", "ledger.md", "glossary.md"])
def test_every_file_that_is_named_exists(page: str):
    text = build.with_part((ROOT / "docs" / page).read_text(encoding="utf-8"), "architecture", "")
    named = re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.\w+)?)`", text)
    gone = [n for n in named if not (PACKAGE / n).exists() and not (ROOT / n).exists()]
    assert not [n for n in gone if n not in ("model/", "runs/", "adapter/", "base/")]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer["name"])
def test_what_a_layer_holds_exists(layer: dict):
    for names, _ in layer.get("holds", ()):
        for name in names.split(", "):
            assert (PACKAGE / layer["name"] / name).exists(), name


def test_the_table_names_every_layer_and_is_on_its_page():
    text = build.architecture_table(LAYERS)
    assert all(layer["name"] in text and layer["does"] in text for layer in LAYERS)
    assert text in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_a_part_is_written_between_its_marks_and_again():
    page = "before\n<!-- x -->\nold\n<!-- /x -->\nafter\n"
    once = build.with_part(page, "x", "new \\1")
    assert once == "before\n<!-- x -->\n\nnew \\1\n\n<!-- /x -->\nafter\n"
    assert build.with_part(once, "x", "new \\1") == once
    assert build.with_part("no marks\n", "x", "new") == "no marks\n"
