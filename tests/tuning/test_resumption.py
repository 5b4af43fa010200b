# SPDX-License-Identifier: Apache-2.0
"""A resumed run says how far it is, how long the rest takes, and what changed since."""

from __future__ import annotations

import json
from pathlib import Path

from fleetune.tuning import resumption


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
