# SPDX-License-Identifier: Apache-2.0
"""What cannot work is refused before anything heavy is imported, with what was meant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune import models
from fleetune.cli.main import main
from fleetune.data import readers
from fleetune.errors import UsageError
from fleetune.runs import compression_folder, rundir
from fleetune.runs.compression_folder import CompressRequest

RUN, SMALL = "runs/0001-fedit-tiny", "runs/0002-optq-fedit-tiny"


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run and a compression of it, as far as their names are read."""
    monkeypatch.chdir(tmp_path)
    Path(RUN).mkdir(parents=True)
    Path(RUN, "run.toml").write_text('model = "tiny"\ndata = "demo"\n')
    compression_folder.create(CompressRequest(RUN, True, "optq"), Path("runs"))
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    return tmp_path


REFUSED = {
    "measure runs/0003-typo": "no run '0003-typo' in runs",
    "measure runs/0001-fedit-tinny": f"did you mean {RUN}",
    "measure runs/0001x": f"did you mean {RUN}",
    "measure 7": f"the newest is {RUN}",
    "eval runs/0001-typo rows.jsonl": f"did you mean {RUN}",
    "compress runs/0001-typo": f"did you mean {RUN}",
    "eval runs/0001-fedit-tiny --text rows.jsonl": f"try: fleetune eval {RUN} rows.jsonl",
    "eval tiny rows.jsonl --text rows.jsonl": "without a field 'text' (there are: prompt, response), and --text is plain text",
    "export runs/0001-typo --to hf": f"did you mean {RUN}",
    "tune runs/0001-typo rows.jsonl": f"did you mean {RUN}",
    "tune ./nowhere rows.jsonl": "there is no file or directory './nowhere'",
    "tune smollm2-135 rows.jsonl": "Did you mean 'smollm2-135m'?",
    "tune tiny rows.jsonl --eval-data row.jsonl": "did you mean rows.jsonl?",
    "tune tiny rows.jsonl --method fedit --aggregation medain": "aggregation = 'medain' is none of mean, median",
    "tune tiny rows.jsonl --partition dirichlet:0.5": "dirichlet:ALPHA:COLUMN",
    "tune loop rows.jsonl": "'loop' is a link that leads nowhere",
    "plan a/b/c": "there is no file or directory 'a/b/c'",
    "plan smollm2-135m --ram lots": "--ram 'lots' is not a size",
    "plan smollm2-135m --uplink fast": "--uplink 'fast' is not a speed",
    "plan smollm2-135m --steps 0": "--steps 0 must be at least 1",
    "compress smollm2-135m --bpw 40": "bpw = 40.0 is not a number of bits a weight, below 33",
    "compress smollm2-135m --windows 0": "windows = 0 is below 1",
    "compress smollm2-135m --windows 0 --dry-run": "windows = 0 is below 1",
    "compress smollm2-135m --method rnt": "no compression method named 'rnt'. Did you mean 'rtn'?",
    "compress smollm2-135m --method optq --eval-text gone.txt": "no text file at gone.txt",
    "compress smollm2-135m --method rtn --eval-text rows.jsonl": "rows.jsonl holds rows without a field 'text'",
    "compress runs/0001-fedit-tiny --calibrate server --clients 2": "clients = 2 needs --calibrate clients or fleet",
    "eval smollm2-135m --limit 0": "limit = 0 is below 1",
    "eval smollm2-135m --answer-tokens 0": "answer_tokens = 0 is below 1",
    "eval smollm2-135m --text gone.txt": "no text file at gone.txt",
    "measure 1 --kept-gain": f"fleetune measure {SMALL} --kept-gain",
    "measure rows --kept-gain": "--kept-gain is of a compressed run's folder",
    "measure 1 2 --kept-gain": "--kept-gain is of one compressed run",
    "measure 2 --kept-gain": f"{SMALL} is not finished",
}


def test_what_cannot_work_is_refused_without_torch(at: Path) -> None:
    """One process for all lines: each must be refused, and torch must not be there at the end."""
    Path("loop").symlink_to("loop")
    script = (
        "import sys, fleetune.cli.main as c\n"
        f"codes = [c.main(line.split()) for line in {list(REFUSED)!r}]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[2] * len(REFUSED)} False"
    told = done.stderr.split("error: ")[1:]
    for line, text in zip(told, REFUSED.values(), strict=True):
        assert text in line


def test_a_compression_of_a_model_has_no_gain_to_keep(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compression_folder.create(CompressRequest("tiny", False, "optq"), Path("runs"))
    assert main(["measure", "3", "--kept-gain"]) == 2
    assert "was made from a model, not from a run" in capsys.readouterr().err
    Path(SMALL, "compress.json").unlink()
    assert main(["measure", "1", "--kept-gain"]) == 2
    assert f"compress it first: fleetune compress {RUN}" in capsys.readouterr().err


def test_no_run_is_suggested_where_there_is_none() -> None:
    assert rundir.none_such("3", Path("runs"), []).hint == "runs there are: fleetune runs"
    assert (
        rundir.none_such("x", Path("a"), ["0001-y-z"]).hint
        == "the newest is a/0001-y-z; runs there are: fleetune runs --out a"
    )


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model that is loaded fail the test."""

    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", loaded)


def test_a_quorum_that_no_round_has_is_refused_before_the_model_is_loaded(
    at: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    row = json.dumps({"instruction": "a", "response": "b"}) + "\n"
    Path("rows.jsonl").write_text(row * 20)
    words = ["tune", "tiny", "rows.jsonl", "--method", "fedit", "--clients", "3", "--quorum"]
    assert main([*words, "4"]) == 2
    assert "quorum = 4, but 3 clients are asked in a round" in capsys.readouterr().err
    assert main([*words, "2", "--participation", "0.3"]) == 2
    assert "quorum = 2, but 1 client is asked in a round" in capsys.readouterr().err


def test_a_compression_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    at: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    Path("file").write_text("")
    assert main(["compress", "tiny", "--method", "rtn", "--out", "file/runs"]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_the_list_of_runs_names_a_report_that_is_there(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    assert "report" not in capsys.readouterr().out
    page = Path(RUN, "report.html")
    page.write_text("<html></html>")
    assert main(["runs"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["report", str(page)]


def test_rows_with_a_field_text_are_a_text(at: Path) -> None:
    Path("texts.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    Path("a.txt").write_text("a")
    for name in ("texts.jsonl", "a.txt", "nowhere.txt", "nowhere.jsonl"):
        readers.require_text(name, hint="")
    with pytest.raises(UsageError, match=r"rows\.jsonl holds rows"):
        readers.require_text("rows.jsonl", hint="")


AS_TEXT = {
    "compress tiny --text rows.jsonl": "--data rows.jsonl",
    "compress tiny --eval-text rows.jsonl": "leave it out, and measure on rows once it is compressed: fleetune eval latest rows.jsonl",
    "compress tiny --method gkd --data rows.jsonl --eval-text rows.jsonl": "leave it out, and measure on rows once it is compressed: fleetune eval latest rows.jsonl",
    "eval tiny --text rows.jsonl": "fleetune eval tiny rows.jsonl",
    "measure tiny --text rows.jsonl": "--data rows.jsonl",
}


@pytest.mark.parametrize("line", AS_TEXT)
def test_rows_that_are_given_as_a_text_are_told_how_to_be_given(
    line: str, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    err, again = capsys.readouterr().err, AS_TEXT[line]
    flag = "--eval-text" if "--eval-text" in line else "--text"
    told = f"rows.jsonl holds rows without a field 'text' (there are: prompt, response), and {flag} is plain text"
    assert err.startswith(f"error: {told}\n  try: {again}\n")
