"""A run that is given more rounds ends in the bits of one that had them from the start; a resumed run says how far it is."""

import json
import re
import types
from pathlib import Path
from typing import Any

import pytest

import command_line
import fleetune
from fleetune.cli.main import main
from fleetune.common import sums
from fleetune.errors import Interrupted, RecipeError, UsageError
from fleetune.runs import rundir
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.rounds import checkpoint
from fleetune.tuning.run import describe, resume
from heard import Heard

pytestmark = pytest.mark.usefixtures("place")
FEW: dict[str, Any] = command_line.FEW | {"clients": 3, "participation": 0.67, "limit": 60, "max_length": 64}
FEW |= {"samples": 2, "answer_tokens": 4}
METHODS: dict[str, dict[str, Any]] = {
    "fedit": {"r": 2, "batch_size": 2, "lr": 1e-2, "steps": 3, "server": "adam", "scaffold": True},
    "fedkseed": {"K": 16, "tau": 3, "lr": 1e-3, "batch_size": 2},
}


def tuned(rounds: int, method: str = "fedit", out: str = "runs") -> Any:
    options = FEW | {"method": method, "settings": METHODS[method], "rounds": rounds, "out": out}
    return fleetune.tune("tiny", "demo", **options)


def told(run: Path) -> list[dict[str, Any]]:
    """The events of a run without times and what depends on the machine."""
    unlike = ("t", "seconds", "rss", "wall", "peak_rss", "run", "result", "result_bytes", "seconds_local")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in unlike} for line in lines if line["event"] != "start"]


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_that_of_a_run_that_had_the_rounds_from_the_start(method):
    whole = tuned(3, method, "whole")
    short = tuned(1, method)
    assert short.digest != whole.digest
    longer = fleetune.resume_run(short, rounds=3)
    assert longer.digest == whole.digest == fleetune.list_runs()[0].digest
    assert longer.done.rounds == 3
    assert told(longer.folder) == told(whole.folder)
    assert not list(sums.faults(longer.folder))
    assert longer.done.tuned == whole.done.tuned
    assert (longer.folder / "samples.md").read_text() == (whole.folder / "samples.md").read_text()
    assert recipes.make(recipes.read(longer.folder / "run.toml")).rounds == 3
    assert "given more rounds: 3 in all" in (longer.folder / "log.txt").read_text()
    again = fleetune.resume_run(longer)  # by its own recipe, which has them now
    assert again.digest == whole.digest


def test_a_kill_while_it_is_written_down_costs_nothing(monkeypatch):
    """After four of the files: what is left is never taken for a finished run that has the rounds."""
    whole, short = tuned(3, out="whole"), tuned(1)
    left = iter(range(4))

    def until_killed(function: Any) -> Any:
        def called(*args: Any, **more: Any) -> Any:
            if next(left, None) is None:
                raise SystemExit("killed")
            return function(*args, **more)

        return called

    with monkeypatch.context() as killed:
        killed.setattr(resume, "write_atomic", until_killed(resume.write_atomic))
        for name in ("write", "status", "log"):
            killed.setattr(rundir.RunDir, name, until_killed(getattr(rundir.RunDir, name)))
        with pytest.raises(SystemExit, match="killed"):
            fleetune.resume_run(short, rounds=3)
    assert fleetune.resume_run(short, rounds=3).digest == whole.digest
    assert recipes.make(recipes.read(short.folder / "run.toml")).rounds == 3


@pytest.mark.parametrize("rounds", [-1, 2.5, "many", 10**9])
def test_from_python_too_what_is_no_number_of_rounds_is_refused(rounds):
    with pytest.raises(RecipeError, match="rounds"):
        fleetune.resume_run("1", rounds=rounds)


def test_what_cannot_be_longer_says_why_and_stays_as_it_is():
    def refused(said: str, rounds: int = 3) -> Any:
        with pytest.raises(UsageError, match=said) as caught:
            fleetune.resume_run(short, rounds=rounds)
        return caught.value

    short = tuned(2)
    digest = short.digest
    refused("has 2 rounds, and 1 are fewer", 1)
    assert fleetune.resume_run(short, rounds=2).digest == digest
    (short.folder / "fleet.json").write_text("{}")
    assert "fleetune export" in str(refused("of real devices").hint)
    (short.folder / "fleet.json").unlink()
    Path("runs/sweep.toml").write_text("")
    refused("a run of a sweep")
    Path("runs/sweep.toml").unlink()
    for _, file in rundir.checkpoints(short.folder):
        file.unlink()
    refused("no checkpoint left")
    assert rundir.status_of(short.folder) == "done"
    assert fleetune.resume_run(short).digest == digest


def test_what_decides_the_bits_is_compared():
    before = {"torch": "2.6", "threads": 2, "gpu": "A"}
    assert describe.machine_changes({}, before) == ""
    assert describe.machine_changes(before, before) == ""
    told = describe.machine_changes(before, {"torch": "2.7", "threads": 1})
    assert told.startswith("since the last sitting there changed: torch 2.6 -> 2.7, threads 2 -> 1;")


SHORT: dict[str, Any] = command_line.FEW | {"method": "fedit", "limit": 30, "max_length": 64, "rounds": 2}
SHORT |= {"settings": {"r": 2, "batch_size": 2, "lr": 1e-2, "steps": 3}}


def test_a_run_without_a_round_is_timed_anew(capsys):
    """To the same bits; later the rounds that are done tell the time."""
    whole = fleetune.tune("tiny", "demo", out="whole", **SHORT)
    for after in (0, 1):
        stop = Heard(lambda heard, after=after: len(heard.of("eval")) > after)  # in the next round
        with pytest.raises(Interrupted):
            fleetune.tune("tiny", "demo", listener=stop, **SHORT)
        capsys.readouterr()
        assert main(["tune", "--resume", "latest"]) == 0
        told = capsys.readouterr().err
        assert bool(re.search(r"^ time +about .*: 2 rounds × ", told, re.MULTILINE)) == (after == 0)
        assert bool(re.search(r"after round 1 of 2: about .* left, 1 round of", told)) == (after == 1)
        assert fleetune.list_runs()[0].digest == whole.digest


def test_a_run_whose_privacy_budget_is_spent_announces_no_round(tmp_path):
    lines = ({"v": 1, "t": 1.0, "event": "round", "round": r, "seconds": 3.0} for r in (1, 2))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / checkpoint.RELEASES).write_text(checkpoint._count_text(2))
    left = [0]
    account: Any = types.SimpleNamespace(rounds_within=lambda rounds, released: left[0])
    said = describe.progress_words(tmp_path, 6, account)
    assert said == "the privacy budget is spent after round 2 of 6: no other round is run"
    left[0] = 1
    assert describe.progress_words(tmp_path, 6, account).endswith("about 3.0 s left, 1 round of 3.0 s")
    assert describe.progress_words(tmp_path, 6).endswith("about 12 s left, 4 rounds of 3.0 s")
