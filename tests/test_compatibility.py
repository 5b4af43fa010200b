# SPDX-License-Identifier: Apache-2.0
"""Folders that an earlier version wrote (b10b172, before the code was moved) are read, resumed and exported as they were.

`files_b10b172` holds a tiny model, a ledger's run, an adapter's run, a run that was stopped after its first of two rounds,
a compression by OPTQ and one by rounding; `expected.json` holds what that version printed of them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fleetune.cli.main import main
from fleetune.seeds import ledger as ledgers

KEPT = Path(__file__).parent / "files_b10b172"
EXPECTED = json.loads((KEPT / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(KEPT / "runs", tmp_path / "runs")
    shutil.copytree(KEPT / "tiny", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def events(capsys: pytest.CaptureFixture[str], *command: str) -> list[dict[str, Any]]:
    code = main([*command, "--json", "--offline"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_the_ledger_is_what_it_was(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert events(capsys, "ledger", "show", "1") == [EXPECTED["show"] | {"trains": "weights"}]
    assert events(capsys, "ledger", "verify", "1") == [EXPECTED["verify"]]


def test_the_ledger_is_shown_with_its_learning_rate(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rate = ledgers.load(at / "runs" / "0001-fedkseed-tiny" / "ledger.safetensors").head.hyper["lr"]
    assert main(["ledger", "show", "1"]) == 0
    assert f"fedkseed, lr {rate:g}, constant, eps" in capsys.readouterr().out


@pytest.mark.parametrize("number", EXPECTED["eval"])
def test_runs_and_compressed_models_measure_the_same(
    number: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On other processors sums of floats differ in their last bits."""
    (found,) = events(capsys, "eval", number, "--tasks", "loss", "--device", "cpu")
    assert found["loss"] == pytest.approx(EXPECTED["eval"][number], rel=1e-5)


@pytest.mark.parametrize("what", EXPECTED["exports"])
def test_exports_have_the_same_bytes(what: str, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number, target = what.split()
    events(capsys, "export", number, "--to", target, "--path", "out")
    file = "adapter_model.safetensors" if target == "peft" else "model.safetensors"
    assert hashlib.sha256((at / "out" / file).read_bytes()).hexdigest() == EXPECTED["exports"][what]


def test_the_list_of_runs_is_the_same(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = events(capsys, "runs")
    of_then = [{k: v for k, v in row.items() if k not in ("path", "intact")} for row in found]
    assert of_then == EXPECTED["runs"]
    assert all(row["intact"] for row in found if row["event"] == "run")


def test_its_report_is_written_anew(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "show", "1"]) == 0
    assert "fedkseed" in (at / "runs" / "0001-fedkseed-tiny" / "report.html").read_text(encoding="utf-8")
