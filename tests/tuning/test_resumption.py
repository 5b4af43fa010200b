# SPDX-License-Identifier: Apache-2.0
"""A resumed run says how far it is, how long the rest takes, and what changed since."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fleetune
from fleetune import models
from fleetune.cli.commands import tune
from fleetune.cli.console import Ui
from fleetune.cli.main import main
from fleetune.common.events import Event, RoundEvaluated, TuneDone
from fleetune.data import Example
from fleetune.errors import Interrupted
from fleetune.runs import metrics
from fleetune.tuning.result.finished import TuneResult
from fleetune.tuning.run import describe


def test_the_rest_takes_as_long_as_the_rounds_before(tmp_path: Path) -> None:
    assert describe.progress_words(tmp_path, 3) == "goes on after round 0 of 3"
    rounds = [
        {"v": 1, "t": 0, "event": "round", "round": r, "seconds": s}
        for r, s in ((1, 9.0), (2, 2.0), (3, 2.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in rounds))
    assert (
        describe.progress_words(tmp_path, 8)
        == "goes on after round 3 of 8: about 10 s left, 5 rounds of 2.0 s"
    )
    assert describe.progress_words(tmp_path, 4).endswith("about 2.0 s left, 1 round of 2.0 s")
    assert describe.progress_words(tmp_path, 3) == "goes on after round 3 of 3"


def test_what_decides_the_bits_is_compared() -> None:
    before = {"torch": "2.6", "threads": 2, "given": ["rounds"], "gpu": "A"}
    assert describe.machine_changes({}, before) == ""
    assert describe.machine_changes(before, before) == ""
    told = describe.machine_changes(before, {"torch": "2.7", "threads": 1, "given": []})
    assert told.startswith("since the last sitting there changed: torch 2.6 -> 2.7, threads 2 -> 1;")


def test_the_time_of_a_resumed_run_says_what_it_counts() -> None:
    done = TuneDone(
        base={"loss": 2.0},
        tuned={"loss": 1.0},
        rows=3,
        run="runs/x",
        result="runs/x/adapter",
        result_bytes=1,
        rounds=1,
        bytes_up=1,
        bytes_down=1,
        seconds=1.0,
        wall=2.0,
        peak_rss=1,
        digest="d",
        result_sha256="s",
        moved=True,
        remarks=[],
    )
    for resumed in (False, True):
        out = io.StringIO()
        tune.finish(Ui(stdout=out, stderr=io.StringIO()), TuneResult(Path("runs/x"), done), resumed=resumed)
        assert ("of all sittings, without the time between" in out.getvalue()) == resumed


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (Example((), "a text"), "column:client · 2 ± 1 windows each · 4 windows held out"),
        (Example((("user", "a"),), "b"), "column:client · 2 ± 1 rows each · 4 held out"),
        (Example((), "yes", {}, ("a",)), "column:client · 2 ± 1 rows each · 4 held out"),
    ],
)
def test_the_header_names_the_windows_of_texts(example: Example, words: str) -> None:
    job: Any = SimpleNamespace(
        examples=[example],
        rows=[[0], [0, 0, 0]],
        held=[0] * 4,
        recipe=SimpleNamespace(partition="column:client"),
    )
    assert f"{describe._split(job)}{describe._held(job)} held out" == words


# --- a whole run that is stopped and resumed ------------------------------------------------------------------

FEW: dict[str, Any] = {
    "method": "fedit",
    "settings": {"r": 2, "batch_size": 2, "lr": 1e-2},
    "clients": 2,
    "held_out": 4,
    "eval_rows": 4,
    "samples": 0,
    "threads": 1,
    "device": "cpu",
    "limit": 30,
    "max_length": 64,
    "rounds": 2,
}


class After(fleetune.Silent):
    """Stop when a round has been measured; the run goes on after the one before it, whose checkpoint is written."""

    def __init__(self, round: int) -> None:
        self.round = round

    def event(self, event: Event) -> None:
        if isinstance(event, RoundEvaluated) and event.round == self.round:
            raise Interrupted("enough")


def stopped(after: int) -> None:
    with pytest.raises(Interrupted):
        fleetune.tune("tiny", "demo", listener=After(after + 1), **FEW)


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny = models.tiny_llama()
    models.save(tiny.net, tiny.tokenizer, "tiny")
    return tmp_path


def told_change(told: str, round: int) -> str:
    """The change in the line of a round."""
    (line,) = re.findall(rf"^round {round}/2 .*$", told, re.MULTILINE)
    return re.search(r"change ([+-][\d.]+)", line)[1]  # type: ignore[index]


def recorded_change(run: Path, round: int) -> str:
    losses = {e["round"]: e["loss"] for e in metrics.events(run) if e["event"] == "eval"}
    return f"{losses[round] - losses[round - 1]:+.3f}"


@pytest.mark.parametrize("after", [0, 1])
def test_the_first_round_is_compared_with_the_one_before_the_stop(
    after: int, at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the console and in the lines of the library."""
    stopped(after)
    assert main(["tune", "--resume", "latest"]) == 0
    told = capsys.readouterr().err
    assert f"goes on after round {after} of 2" in told
    for round in range(after + 1, 3):
        assert told_change(told, round) == recorded_change(at / "runs/latest", round)
    stopped(after)
    run = fleetune.resume_run("latest", progress=True)
    told = capsys.readouterr().out
    for round in range(after + 1, 3):
        assert told_change(told, round) == recorded_change(run.folder, round)


def test_a_run_without_a_round_is_timed_anew(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the same bits; later the rounds that are done tell the time."""
    whole = fleetune.tune("tiny", "demo", out="whole", **FEW)
    for after in (0, 1):
        stopped(after)
        capsys.readouterr()
        assert main(["tune", "--resume", "latest"]) == 0
        told = capsys.readouterr().err
        assert bool(re.search(r"^ time +about .*: 2 rounds × ", told, re.MULTILINE)) == (after == 0)
        assert bool(re.search(r"after round 1 of 2: about .* left, 1 round of", told)) == (after == 1)
        assert fleetune.list_runs()[0].digest == whole.digest
