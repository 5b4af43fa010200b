# SPDX-License-Identifier: Apache-2.0
"""A limit of rows is shared by the clients of a folder, and few rows have few clients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fleetune import data
from fleetune.data import partition
from fleetune.tuning import methods


@pytest.fixture
def devices(tmp_path: Path) -> str:
    for client, count in (("a", 5), ("b", 1), ("c", 9)):
        rows = [{"instruction": f"{client}{i}", "response": "x"} for i in range(count)]
        (tmp_path / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("limit", "shares"),
    [
        (1, "a"),
        (3, "abc"),
        (4, "aabc"),
        (7, "aaabccc"),
        (8, "aaaabccc"),
        (11, "aaaaabccccc"),
        (99, "aaaaabccccccccc"),
    ],
)
def test_every_client_gives_as_many_rows_as_the_others(devices: str, limit: int, shares: str) -> None:
    told: list[str] = []
    found = data.read(devices, limit=limit, note=told.append)
    assert "".join(e.meta["client"] for e in found) == shares
    first = [e.messages[0][1] for e in found if e.meta["client"] == "c"]
    assert first == [f"c{i}" for i in range(len(first))]
    assert told == (["the limit of 1 row leaves 2 of 3 clients without any"] if limit == 1 else [])


@pytest.mark.parametrize(
    ("rows", "usual", "clients"),
    [(120, 100, 13), (40, 100, 8), (40, 8, 8), (4000, 100, 100), (40, 1, 1), (1780, 200, 200)],
)
def test_a_methods_usual_clients_follow_the_rows(tmp_path: Path, rows: int, usual: int, clients: int) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"{i}", "response": "x"}) + "\n" for i in range(rows)))
    parts = partition.split(partition.RowsSpec(str(file)), usual)
    assert len(parts.clients) == clients
    assert bool(parts.notes) == (clients < usual)
    asked = partition.split(partition.RowsSpec(str(file), clients=20), usual)
    assert (len(asked.clients), asked.notes) == (20, ())
    assert methods.entry("fwdllm").clients == 100
