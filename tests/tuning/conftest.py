"""The working folder, with the tiny model and rows."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def place(tiny: str, at: Path) -> Path:
    (at / "tiny").symlink_to(tiny)
    rows = (f'{{"instruction": "say {i}", "response": "{i} it is"}}\n' for i in range(24))
    (at / "rows.jsonl").write_text("".join(rows))
    return at
