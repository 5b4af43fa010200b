# SPDX-License-Identifier: Apache-2.0
"""A resumed run says how far it is, how long the rest takes, and what changed since."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import fleetune
from fleetune import models
from fleetune.cli.main import main
from fleetune.common.events import Event, RoundEvaluated
from fleetune.errors import Interrupted
from fleetune.tuning.run import describe


def test_what_decides_the_bits_is_compared() -> None:
    before = {"torch": "2.6", "threads": 2, "gpu": "A"}
    assert describe.machine_changes({}, before) == ""
    assert describe.machine_changes(before, before) == ""
    told = describe.machine_changes(before, {"torch": "2.7", "threads": 1})
    assert told.startswith("since the last sitting there changed: torch 2.6 -> 2.7, threads 2 -> 1;")


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
