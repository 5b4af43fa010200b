# SPDX-License-Identifier: Apache-2.0
"""A run that is given more rounds ends in the bits of one that had as many from the start."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fleetune
from fleetune import models, report
from fleetune.cli.main import main
from fleetune.common import events as kinds
from fleetune.common import sums
from fleetune.errors import Interrupted, RecipeError, UsageError
from fleetune.runs import rundir
from fleetune.tuning.prepare import prepare, rates
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.run import resume

FEW: dict[str, Any] = {
    "clients": 3,
    "participation": 0.67,
    "held_out": 4,
    "eval_rows": 4,
    "samples": 2,
    "answer_tokens": 4,
    "threads": 1,
    "device": "cpu",
    "limit": 60,
    "max_length": 64,
}
METHODS: dict[str, dict[str, Any]] = {
    "fedit": {"r": 2, "batch_size": 2, "lr": 1e-2, "server": "adam", "scaffold": True},
    "fedkseed": {"K": 16, "tau": 3, "lr": 1e-3, "batch_size": 2},
}


@pytest.fixture(autouse=True)
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = models.tiny_llama()
    models.save(tiny.net, tiny.tokenizer, "tiny")


def tuned(rounds: int, method: str = "fedit", out: str = "runs", **more: Any) -> Any:
    return fleetune.tune(
        "tiny", "demo", method=method, settings=METHODS[method], rounds=rounds, out=out, **FEW | more
    )


def told(run: Path) -> list[dict[str, Any]]:
    """The events of a run without times and what depends on the machine."""
    unlike = ("t", "seconds", "rss", "wall", "peak_rss", "run", "result", "result_bytes", "seconds_local")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in unlike} for line in lines if line["event"] != "start"]


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_that_of_a_run_that_had_the_rounds_from_the_start(method: str) -> None:
    whole = tuned(3, method, "whole")
    short = tuned(1, method)
    assert short.digest != whole.digest
    longer = fleetune.resume_run(short, rounds=3)
    assert longer.digest == whole.digest == fleetune.list_runs()[0].digest
    assert longer.done.rounds == 3
    assert told(longer.folder) == told(whole.folder)
    assert not list(sums.faults(longer.folder))
    assert longer.done.tuned == whole.done.tuned
    for name in ("samples.md",):
        assert (longer.folder / name).read_text() == (whole.folder / name).read_text()
    assert recipes.make(recipes.read(longer.folder / "run.toml")).rounds == 3
    assert "given more rounds: 3 in all" in (longer.folder / "log.txt").read_text()
    again = fleetune.resume_run(longer)  # by its own recipe, which has them now
    assert again.digest == whole.digest


def test_the_rounds_that_are_told_are_those_of_the_longer_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The first event has the number that the run was begun with; run.toml has the present one."""
    longer = fleetune.resume_run(tuned(1), rounds=2)
    found = report.summary(longer.folder)
    assert (found["rounds"], found["rounds_planned"]) == (2, 2)
    assert main(["runs", "show", "latest"]) == 0
    assert re.search(r"^ *rounds +2$", capsys.readouterr().out, re.MULTILINE)
    assert "<dd>2 · 2 clients in each</dd>" in (longer.folder / "report.html").read_text()


def test_the_wall_time_has_the_search_for_a_rate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint has the time so far, so that a later sitting neither loses the search nor counts it again."""
    find = rates.find

    def slow(*args: Any) -> Any:
        recipe, found = find(*args)
        return recipe, [dataclasses.replace(rate, seconds=1000.0) for rate in found]

    monkeypatch.setattr(rates, "find", slow)
    settings = METHODS["fedit"] | {"lr": "auto"}
    run = fleetune.tune("tiny", "demo", method="fedit", settings=settings, rounds=1, out="runs", **FEW)
    assert 1000 < run.done.wall < 1500
    assert report.summary(run.folder)["seconds"] == run.done.wall
    longer = fleetune.resume_run(run, rounds=2)
    assert run.done.wall < longer.done.wall < 1500


def test_the_clients_are_measured_on_the_rows_that_they_were_measured_on_before() -> None:
    """A short run measures fewer of them."""
    short = tuned(1, client_rows=4, participation=0.34, clients=4)
    before = short.done.per_client
    longer = fleetune.resume_run(short, rounds=60)
    assert longer.done.per_client["n"] == before["n"]
    assert max(before["n"]) < 4
    assert longer.done.per_client["base"] == before["base"]


def test_a_stopped_run_may_be_given_more_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    whole = tuned(4, out="whole")

    class Once(fleetune.Silent):
        def event(self, event: fleetune.events.Event) -> None:
            if isinstance(event, kinds.RoundEvaluated) and event.round == 1:
                self.stop = True

        stop = False

        @property
        def stop_requested(self) -> bool:
            return self.stop

    with pytest.raises(Interrupted):
        tuned(2, listener=Once())
    assert main(["tune", "--resume", "latest", "--rounds", "4", "--dry-run"]) == 0
    assert main(["tune", "--resume", "latest", "--rounds", "4"]) == 0
    assert "goes on after round 1 of 4" in capsys.readouterr().err
    assert fleetune.list_runs()[0].digest == whole.digest


def test_a_stop_while_it_is_written_down_costs_nothing() -> None:
    """Between checkpoints and run.toml, in either order: the same command goes on."""
    whole, short = tuned(3, out="whole"), tuned(1)
    file = short.folder / "run.toml"
    old = file.read_text()
    with rundir.RunDir(short.folder) as folder:
        resume.write_rounds(recipes.make(recipes.read(file) | {"rounds": 3}), folder)
    assert rundir.status_of(short.folder) == "interrupted"
    new = file.read_text()
    file.write_text(old)
    with pytest.raises(RecipeError, match="rounds = 1, and was 3"):
        fleetune.resume_run(short)
    assert fleetune.resume_run(short, rounds=3).digest == whole.digest
    short = tuned(1, out="other")
    (short.folder / "run.toml").write_text(new)
    with pytest.raises(RecipeError, match="rounds = 3, and was 1"):
        fleetune.resume_run(short)
    assert fleetune.resume_run(short, rounds=3).digest == whole.digest


@pytest.mark.parametrize("written", range(6))
def test_a_kill_while_it_is_written_down_costs_nothing(written: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of the files: what is left is never taken for a finished run that has the rounds."""
    whole, short = tuned(3, out="whole"), tuned(1)
    left = iter(range(written))

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
def test_from_python_too_what_is_no_number_of_rounds_is_refused(rounds: Any) -> None:
    with pytest.raises(RecipeError, match="rounds"):
        fleetune.resume_run("1", rounds=rounds)


def test_other_options_stay_what_they_were() -> None:
    short = tuned(1)
    file = short.folder / "run.toml"
    file.write_text(file.read_text().replace("seed = 42", "seed = 43"))
    with pytest.raises(RecipeError, match="seed = 43, and was 42"):
        fleetune.resume_run(short, rounds=3)
    assert main(["tune", "--resume", "latest", "--rounds", "3", "--set", "lr=1"]) == 2


def test_what_cannot_be_longer_says_why_and_stays_as_it_is() -> None:
    short = tuned(2)
    digest = short.digest
    with pytest.raises(UsageError, match="has 2 rounds, and 1 are fewer"):
        fleetune.resume_run(short, rounds=1)
    assert fleetune.resume_run(short, rounds=2).digest == digest
    (short.folder / "fleet.json").write_text("{}")
    with pytest.raises(UsageError, match="of real devices") as refused:
        fleetune.resume_run(short, rounds=3)
    assert "fleetune export" in str(refused.value.hint)
    (short.folder / "fleet.json").unlink()
    Path("runs/sweep.toml").write_text("")
    with pytest.raises(UsageError, match="a run of a sweep"):
        fleetune.resume_run(short, rounds=3)
    Path("runs/sweep.toml").unlink()
    for _, file in rundir.checkpoints(short.folder):
        file.unlink()
    with pytest.raises(UsageError, match="no checkpoint left"):
        fleetune.resume_run(short, rounds=3)
    assert rundir.status_of(short.folder) == "done"
    assert fleetune.resume_run(short).digest == digest


def changed_base() -> None:
    other = models.tiny_llama(seed=7)
    models.save(other.net, other.tokenizer, "tiny")


def changed_rows() -> None:
    file = Path("rows.jsonl")
    file.write_text(file.read_text().replace("say", "shout"))


@pytest.mark.parametrize(
    ("change", "what"), [(changed_base, "the base model has"), (changed_rows, "the clients' rows have")]
)
def test_a_refusal_writes_nothing(
    change: Callable[[], None], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that the run stands on is compared before a run that is done is said to be unfinished."""
    rows = [{"prompt": f"say {n}", "response": f"{n} it is"} for n in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = fleetune.tune("tiny", "rows.jsonl", method="fedit", settings=METHODS["fedit"], rounds=1, **FEW)
    before = files_of(run.folder)
    change()
    assert main(["tune", "--resume", "1", "--rounds", "2"]) == 2
    err = capsys.readouterr().err
    assert "was begun with something else than there is now" in err
    assert f"{what} the digest" in err
    assert "rounds =" not in err, "the number of rounds is what was asked for"
    assert files_of(run.folder) == before


@pytest.mark.parametrize(("more", "left"), [((), 0), (("--rounds", "4"), 3)])
def test_a_dry_run_states_the_time_of_the_rounds_that_are_left(
    more: tuple[str, ...], left: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tuned(1)
    before = files_of(run.folder)
    assert main(["tune", "--resume", "1", *more, "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert f"goes on after round 1 of {1 + left}" in err
    assert f"{left} rounds × 2 clients" in err or not left
    if left:
        as_many = recipes.make(recipes.read(run.folder / "run.toml") | {"rounds": left})
        assert found["steps"] == prepare.dry_run(as_many, offline=True).steps
    else:
        assert "steps" not in found
    assert files_of(run.folder) == before
    changed_base()
    assert main(["tune", "--resume", "1", *more, "--dry-run"]) == 2, "what would be refused is"


def files_of(run: Path) -> dict[str, bytes]:
    """Every file of a run, by its path in there, but the lock."""
    return {
        str(p.relative_to(run)): p.read_bytes()
        for p in run.rglob("*")
        if p.is_file() and p.name != rundir.LOCK
    }


def test_a_run_whose_patience_was_over_is_not_longer() -> None:
    method = METHODS["fedit"] | {"lr": 0.3, "server": "avg", "scaffold": False}
    run = fleetune.tune("tiny", "demo", method="fedit", settings=method, rounds=6, patience=1, **FEW)
    assert run.done.stopped_early
    with pytest.raises(UsageError, match="patience = 1 was over"):
        fleetune.resume_run(run, rounds=9)


@pytest.mark.parametrize("text", ["many", "0", "-3", "2.5"])
def test_what_is_no_number_of_rounds_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (Path("runs") / "0001-x").mkdir(parents=True)
    Path("runs/0001-x/run.toml").write_text('model = "tiny"\ndata = "demo"\n')
    assert main(["tune", "--resume", "1", "--rounds", text]) == 2
    assert "rounds" in capsys.readouterr().err
