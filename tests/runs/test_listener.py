"""The log of a folder: lines with times, rotated by size, and nothing that stops a run."""

import logging
import os
import re

import pytest

import fleetune
from command_line import FEW
from fleetune.common.events import RoundEvaluated
from fleetune.runs.listener import LOG, LogFile, Logged
from heard import Heard


@pytest.fixture
def log(tmp_path):
    made = LogFile(tmp_path)
    yield made
    made.close()


def lines(folder) -> list[str]:
    return (folder / LOG).read_text().splitlines()


def test_what_is_said_is_written_with_the_time_for_the_owner_alone(log, tmp_path):
    heard = Heard()
    listener = Logged(heard, log)
    listener.note("device \x1b[31mpress-3\n is ready")
    listener.event(RoundEvaluated(round=1, loss=2.5))
    assert heard.notes == ["device \x1b[31mpress-3\n is ready"]
    found = lines(tmp_path)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in found)
    assert [line[20:] for line in found] == [r"device \x1b[31mpress-3\n is ready", "round 1: val loss 2.500"]
    assert (tmp_path / LOG).stat().st_mode & 0o777 == 0o600


def test_a_full_one_is_rotated_and_old_ones_go(log, tmp_path, monkeypatch):
    log.maxBytes = 200
    for i in range(60):
        log.write(f"line {i} of a long run")
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["log.txt", "log.txt.1", "log.txt.2", "log.txt.3"]
    assert "line 59" in lines(tmp_path)[-1]
    found = [path.stat() for path in tmp_path.iterdir()]
    assert all(each.st_size <= 200 and each.st_mode & 0o777 == 0o600 for each in found)


def test_warnings_of_the_package_are_in_it_while_it_takes_them(log, tmp_path, caplog):
    logger = logging.getLogger("fleetune.somewhere")
    logger.warning("before")
    with log.warned():
        logger.warning("the disk is slow")
    logger.warning("after")
    assert [line[20:] for line in lines(tmp_path)] == ["the disk is slow"]


def test_a_log_that_cannot_be_written_stops_nothing(log, tmp_path):
    os.mkfifo(tmp_path / LOG)
    log.write("nobody reads this")
    assert not list(tmp_path.glob("log.txt.*"))


def test_a_run_keeps_one(tmp_path):
    recipe = {"model": str(tmp_path / "m"), "data": str(tmp_path / "rows.jsonl"), "method": "fedit"}
    fleetune.models.tiny_llama().save(tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "count", "response": "1 2 3"}\n' * 20)
    few = FEW | {"max_length": 48, "settings": {"r": 2, "steps": 1, "lr": 1e-2}}
    done = fleetune.tune(**recipe, **few, out=tmp_path / "runs")
    said = [line[20:] for line in lines(done.folder)]
    assert said[-1] == f"done, digest {done.digest}"
    assert any(line.startswith("round 1: val loss ") for line in said)
