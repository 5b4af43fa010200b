# SPDX-License-Identifier: Apache-2.0
"""The docs are those of this code: generated pages are up to date, links and commands exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.cli import main as cli
from fleetune.tuning import methods

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def test_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "build.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_in_the_docs_parses(page):
    blocks = re.findall(r"```(?:sh|console)?\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    text = "\n".join([*blocks, *re.findall(r"(?m)^    (.*)$", page.read_text(encoding="utf-8"))])
    for line in re.findall(r"(?m)^\s*(?:\$ )?(fleetune [a-z].*?)(?:\s{3,}.*)?$", text):
        words = shlex.split(line, comments=True)[1:]
        _, unknown = cli.build_parser().parse_known_args(words)
        assert not unknown, line


def test_the_readme_lists_every_method():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in methods.entries())
