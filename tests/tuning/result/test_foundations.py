"""A run or a sweep whose data or base changed since: it is not measured on, or continued with, other rows."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Capture
from fleetune import models
from fleetune.cli.main import main
from fleetune.tuning.run import run as jobs

RUN = shlex.split(
    "--method fedit --set r=2 --set steps=1 --clients 2 --rounds 1 --held-out 6 --eval-rows 3 "
    "--max-length 48 --samples 0 --device cpu"
)
SWEEP = """\
model = "tiny"
data = "data.jsonl"
method = "fedit"
clients = 2
rounds = 1
held_out = 6
max_length = 48
samples = 0
device = "cpu"
[set]
r = 2
steps = 1
[sweep]
lr = [1e-3, 1e-2]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    place = tmp_path_factory.mktemp("made")
    models.tiny_llama().save(place / "tiny")
    rows = [{"instruction": f"count to {i}", "response": f"one to {i}"} for i in range(24)]
    (place / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (place / "sweep.toml").write_text(SWEEP)
    return place


@pytest.fixture
def at(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, as the working folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reverse(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[::-1]))


def test_a_run_whose_data_changed_is_not_measured_on_them(at, capsys):
    assert main(["tune", "tiny", "data.jsonl", *RUN]) == 0
    assert main(["eval", "1", "--tasks", "loss"]) == 0
    shutil.copy("data.jsonl", "kept.jsonl")
    reverse(at / "data.jsonl")
    capsys.readouterr()
    for words in (["eval", "1", "--tasks", "loss"], ["measure", "1"], ["compress", "1", "--method", "optq"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "data.jsonl was changed since" in said
        assert "other clients' and held-out rows" in said
        assert "fleetune eval runs/0001-fedit-tiny FILE" in said
    # rows that are named are no held-out ones
    assert main(["eval", "1", "data.jsonl", "--tasks", "loss"]) == 0
    shutil.copy("kept.jsonl", "data.jsonl")
    assert main(["eval", "1", "--tasks", "loss"]) == 0


@pytest.fixture
def half(at: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Callable[[], int]:
    """A sweep of which one of two runs is finished; what continues it."""
    tune = jobs.tune
    begun: list[object] = []

    def once(job: object, run: object, listener: object) -> object:
        begun.append(job)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return tune(job, run, listener)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "tune", once)
    assert main(["sweep", "sweep.toml"]) == 130
    assert "resume: fleetune sweep --resume runs/0001-sweep-sweep\n" in capsys.readouterr().err
    return lambda: main(["sweep", "--resume", "latest"])


@pytest.mark.parametrize("what", ["data", "base"])
def test_a_sweep_that_goes_on_with_other_rows_or_base_says_so(what, at, half, capsys):
    if what == "data":
        reverse(at / "data.jsonl")
    else:
        shutil.rmtree("tiny") if not Path("tiny").is_symlink() else Path("tiny").unlink()
        models.tiny_llama(seed=9).save(at / "tiny")
    capsys.readouterr()
    assert half() == 0
    said = capsys.readouterr().err.replace("\n", " ")
    why = "different rows (the data changed between them)" if what == "data" else "different base models"
    assert why in said
    assert "their losses do not compare" in said
