"""What a run keeps of people's rows: nothing readable with --no-samples, else files that are the owner's alone, and a note."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from fleetune.cli.main import main
from fleetune.models import tiny_llama

MARK = "zanzibar"  # in every prompt and every answer


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("private")
    tiny_llama().save(at / "llama")
    rows = [{"instruction": f"what is {MARK} {n}?", "output": f"{MARK} is {n}"} for n in range(12)]
    (at / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return at


def tune(places: Path, out: Path, *more: str) -> int:
    words = ["--method", "fedit", "--clients", "2", "--rounds", "1", "--held-out", "3", "--max-length", "64"]
    given = [
        "tune",
        str(places / "llama"),
        str(places / "rows.jsonl"),
        *words,
        "--out",
        str(out),
        "--offline",
    ]
    return main([*given, *more])


def holding(folder: Path) -> set[str]:
    """The files with the mark in them, as text or in any other bytes."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    return {str(p.relative_to(folder)) for p in files if MARK.encode() in p.read_bytes()}


def test_no_samples_keeps_no_text_anywhere(places, tmp_path, capsys):
    words = ("--no-samples", "--rouge-rows", "2", "--answer-tokens", "4", "--set", "r=1")
    assert tune(places, tmp_path, *words) == 0
    (run,) = tmp_path.glob("0001-*")
    assert holding(tmp_path) == set()
    assert not (run / "samples.md").exists()
    told = "".join(capsys.readouterr())
    assert "samples.md" not in told
    assert "the report shows the text" not in told
    assert "samples = 0" in (run / "run.toml").read_text()
    assert "This page shows the text" not in (run / "report.html").read_text()


def test_text_that_is_kept_is_the_owners_alone_and_is_told(places, tmp_path, capsys):
    assert tune(places, tmp_path, "--samples", "2", "--answer-tokens", "4") == 0
    (run,) = tmp_path.glob("0001-*")
    kept = holding(run)
    assert kept == {"eval.json", "samples.md", "report.html"}
    if sys.platform != "win32":
        assert {stat.S_IMODE((run / name).stat().st_mode) for name in kept} == {0o600}
    told = "the report shows the text of 2 held-out rows"
    assert told in "".join(capsys.readouterr())
    assert main(["runs", "show", "1", "--out", str(tmp_path)]) == 0
    assert told in "".join(capsys.readouterr())
    assert "This page shows the text of 2 held-out rows" in (run / "report.html").read_text()
