# SPDX-License-Identifier: Apache-2.0
"""A resumed run says how far it is, how long the rest takes, and what changed since."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fleetune.cli.commands import tune
from fleetune.cli.console import Ui
from fleetune.data import Example
from fleetune.runs.events import TuneDone
from fleetune.tuning import describe, resumption
from fleetune.tuning.result import TuneResult


def test_the_rest_takes_as_long_as_the_rounds_before(tmp_path: Path) -> None:
    assert resumption.progress(tmp_path, 3) == "goes on after round 0 of 3"
    rounds = [
        {"v": 1, "t": 0, "event": "round", "round": r, "seconds": s}
        for r, s in ((1, 9.0), (2, 2.0), (3, 2.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in rounds))
    assert (
        resumption.progress(tmp_path, 8) == "goes on after round 3 of 8: about 10 s left, 5 rounds of 2.0 s"
    )
    assert resumption.progress(tmp_path, 4).endswith("about 2.0 s left, 1 round of 2.0 s")
    assert resumption.progress(tmp_path, 3) == "goes on after round 3 of 3"


def test_what_decides_the_bits_is_compared() -> None:
    before = {"torch": "2.6", "threads": 2, "given": ["rounds"], "gpu": "A"}
    assert resumption.changes({}, before) == ""
    assert resumption.changes(before, before) == ""
    told = resumption.changes(before, {"torch": "2.7", "threads": 1, "given": []})
    assert told.startswith("since the last sitting there changed: torch 2.6 -> 2.7, threads 2 -> 1;")


def test_the_time_of_a_resumed_run_says_what_it_counts() -> None:
    done = TuneDone(
        base={"loss": 2.0}, tuned={"loss": 1.0}, rows=3, run="runs/x", result="runs/x/adapter", result_bytes=1, rounds=1,
        bytes_up=1, bytes_down=1, seconds=1.0, wall=2.0, peak_rss=1, digest="d", result_sha256="s", moved=True, remarks=[],
    )  # fmt: skip
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
