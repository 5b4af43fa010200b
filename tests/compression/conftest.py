"""A folder to work in, with a text and rows."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that we are in; text.txt and rows.jsonl lie there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The heron stood still in the shallow water. " * 8)
    rows = [{"instruction": f"count to {i}", "response": " ".join(map(str, range(i)))} for i in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path
