# SPDX-License-Identifier: Apache-2.0
"""The library in a notebook: lines while it works, sweeps, lists of runs, and answers."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

import fleetune
from fleetune import models
from fleetune.cli.main import main
from fleetune.common.events import SweepDone, SweepRun
from fleetune.models.net.model import Model
from fleetune.runs import listener

ROWS = [{"instruction": f"say {i}", "response": f"{i} it is"} for i in range(12)]
FEW: dict[str, Any] = {
    "clients": 2,
    "rounds": 1,
    "held_out": 2,
    "samples": 0,
    "threads": 1,
    "device": "cpu",
    "method": "mezo",
    "max_length": 32,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs")
    model = models.tiny_llama()
    models.save(model.net, model.tokenizer, folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    return fleetune.open(place / "tiny").load()


def tune(place: Path, out: Path, **given: Any) -> fleetune.TuneResult:
    return fleetune.tune(
        place / "tiny", ROWS, **{**FEW, "settings": {"tau": 1, "lr": 1e-4}, "out": out, **given}
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# Progress -----------------------------------------------------------------------------------------


def test_a_run_prints_on_a_terminal_and_nothing_into_a_pipe(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, str] = {}
    for name, stream in (("terminal", Terminal()), ("pipe", io.StringIO())):
        monkeypatch.setattr(sys, "stdout", stream)
        tune(place, tmp_path / name)
        said[name] = stream.getvalue()
    assert said["pipe"] == ""
    assert "\x1b" not in said["terminal"]
    lines = said["terminal"].splitlines()
    assert lines[0].startswith("fleetune tune · mezo")
    assert [line.split("  ")[0] for line in lines if line.startswith("round ")] == ["round 0/1", "round 1/1"]
    assert any(line.startswith("done  loss ") for line in lines)
    assert lines[-1].endswith("report.html")


def test_what_is_asked_for_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    own = fleetune.Silent()
    for stream, usual in ((Terminal(), listener.Progress), (io.StringIO(), fleetune.Silent)):
        monkeypatch.setattr(sys, "stdout", stream)
        assert type(listener.heard_by(None, None)) is usual
        assert type(listener.heard_by(None, True)) is listener.Progress
        assert type(listener.heard_by(None, False)) is fleetune.Silent
        assert listener.heard_by(own, None) is listener.heard_by(own, False) is own


def test_counts_are_printed_every_ten_seconds_and_names_are_made_safe() -> None:
    now, stream = [0.0], io.StringIO()
    shown = listener.Progress(stream, clock=lambda: now[0])
    for done in range(30):
        now[0] = float(done)
        shown.progress("blocks", done, 30)
    shown.note("a client\x1b[31m")
    assert stream.getvalue().splitlines() == ["blocks 10/30", "blocks 20/30", "a client\\x1b[31m"]


# Sweeps and runs ----------------------------------------------------------------------------------


class Log(fleetune.Silent):
    def __init__(self) -> None:
        self.events: list[fleetune.events.Event] = []
        self.stop = False

    def event(self, event: fleetune.events.Event) -> None:
        self.events.append(event)
        self.stop = self.stop or isinstance(event, SweepRun)

    @property
    def stop_requested(self) -> bool:
        return self.stop


def test_a_sweep_stops_goes_on_and_is_the_commands_sweep(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log()
    given: dict[str, Any] = {**FEW, "settings": {"tau": 1, "lr": 1e-4}, "out": tmp_path}
    with pytest.raises(fleetune.errors.Interrupted) as stopped:
        fleetune.sweep(place / "tiny", ROWS, vary={"lr": [1e-5, 1e-4]}, listener=log, **given)
    assert "fleetune sweep --resume" in stopped.value.hint
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    done = fleetune.resume_sweep("latest", out=tmp_path)
    monkeypatch.undo()
    lines = [line for line in terminal.getvalue().splitlines() if line.startswith("000")]
    assert [line.endswith("done before") for line in lines] == [True, False]
    assert [run.folder.name[:4] for run in done.runs] == ["0001", "0002"]
    assert [cell["values"]["lr"] for cell in done.cells] == [1e-5, 1e-4]
    assert done.page.is_file()
    assert fleetune.list_runs(done.folder) == list(done.runs)
    assert main(["sweep", "--resume", str(done.folder), "--out", str(tmp_path), "--json"]) == 0
    assert capsys.readouterr().out.count('"skipped": true') == 2
    fleetune.resume_sweep(done, out=tmp_path, listener=(late := Log()))
    assert isinstance(late.events[-1], SweepDone)


def test_finished_runs_are_listed_with_their_results(place: Path, tmp_path: Path) -> None:
    first, second = tune(place, tmp_path), tune(place, tmp_path, seed=7)
    (second.folder / "status").write_text("interrupted\n")
    found = fleetune.list_runs(tmp_path)
    assert [run.folder.name for run in found] == [first.folder.name]
    assert found[0].done.tuned == first.done.tuned
    assert fleetune.list_runs(tmp_path / "nowhere") == []


# Answers ------------------------------------------------------------------------------------------


def test_a_model_answers_by_name_and_in_memory(place: Path, model: Model) -> None:
    asked: dict[str, Any] = {"max_tokens": 6, "system": "Be short."}
    answer = fleetune.generate(model, "hello", **asked)
    assert fleetune.generate(place / "tiny", "hello", **asked) == answer
    drawn = {fleetune.generate(model, "hello", temperature=2.0, seed=s, max_tokens=6) for s in (1, 1, 2)}
    assert len(drawn) == 2
