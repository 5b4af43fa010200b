"""A sweep: which runs it is, what it refuses before any work, what a kill leaves, and what its page says."""

import csv
import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import call, events, ok, refused
from fleetune import models
from fleetune.errors import RecipeError
from fleetune.report import runlog
from fleetune.report import sweep as summary
from fleetune.report.sweep import GridRun
from fleetune.runs import rundir
from fleetune.tuning import sweep
from fleetune.tuning.prepare import prepare
from fleetune.tuning.recipe import recipe
from heard import Heard

RECIPE = """\
model = "./tiny"
data = "demo"
method = "fedkseed"
partition = "dirichlet:0.5:client"
clients = 3
rounds = {rounds}
limit = 60
held_out = 8
max_length = 64
samples = 0
seed = 5
[set]
K = 16
tau = 2
lr = 1e-3
law = "rademacher"
"""
BASE: dict[str, Any] = tomllib.loads(RECIPE.format(rounds=2))


@pytest.fixture
def at(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny").symlink_to(tiny)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(rounds=2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digests(folder: Path) -> dict[str, str]:
    done = {run.name: list(rundir.events(run))[-1] for run in rundir.listing(folder)}
    return {name: event["digest"] for name, event in done.items()}


def test_every_combination_once_and_whole_seeds_first():
    grid = sweep.make_grid({**BASE, "sweep": {"seeds": 2, "alpha": [0.5, 2.0], "K": [8, 16, 64]}})
    assert [(p.seed, *p.values) for p in grid.points] == [
        (seed, alpha, K) for seed in (5, 6) for alpha in (0.5, 2.0) for K in (8, 16, 64)
    ]
    last = grid.points[-1]
    assert last.recipe.partition == "dirichlet:2:client"
    assert last.recipe.set == {**BASE["set"], "K": 64}
    assert (last.recipe.seed, last.recipe.rounds, last.recipe.clients) == (6, 2, 3)
    assert last.name == "0012-alpha-2-k-64-seed-6"
    assert len({p.name for p in grid.points}) == 12
    assert BASE["set"]["K"] == 16  # the base is not written into


def test_names_are_options_settings_or_dotted_and_flags_override_the_table():
    values = {**BASE, "sweep": {"K": [8], "rounds": [1]}}
    grid = sweep.make_grid(values, ["K=32,64", "set.lr=1e-3,1e-4", "dtype=fp32,bf16"], 3)
    assert [(a.name, a.key, a.values) for a in grid.axes] == [
        ("K", "set.K", (32, 64)),
        ("rounds", "rounds", (1,)),
        ("set.lr", "set.lr", (1e-3, 1e-4)),
        ("dtype", "dtype", ("fp32", "bf16")),
    ]
    assert len(grid.points) == 3 * 2 * 1 * 2 * 2
    dotted = sweep.make_grid({**BASE, "sweep": {"set": {"K": [8, 16]}}})  # set.K = [..] in TOML
    assert dotted.axes[0].key == "set.K"


def test_methods_can_vary_and_a_setting_of_one_of_them_is_refused_for_the_others():
    grid = sweep.make_grid({**BASE, "set": {}}, ["method=fedkseed,fedit", "lr=1e-3,1e-4"])
    sweep.check(grid)
    assert [p.recipe.method for p in grid.points] == ["fedkseed", "fedkseed", "fedit", "fedit"]
    with pytest.raises(RecipeError, match="fedit has no setting 'K'"):
        sweep.check(sweep.make_grid({**BASE, "set": {}}, ["method=fedkseed,fedit", "K=16,32"]))


def test_the_file_gives_the_grid_back(tmp_path):
    values = {**BASE, "eval_data": 'a "b"\\c.jsonl'}
    grid = sweep.make_grid(values, ["alpha=0.5,1e-2", "set.law=hashed,gaussian", "set.backprop=0.0,0.5"], 2)
    (tmp_path / "sweep.toml").write_text(sweep.to_toml(grid), encoding="utf-8")
    assert sweep.read(tmp_path) == grid


BAD = {
    "unknown name": (["--vary", "roundz=1,2"], "Did you mean 'rounds'"),
    "no values": (["--vary", "K="], "is not a list of values"),
    "no equals sign": (["--vary", "K"], "is not NAME=VALUE,VALUE"),
    "a value twice": (["--vary", "K=16,16"], "has a value twice"),
    "one thing by two names": (["--vary", "K=16,32", "--vary", "set.K=64"], "varies twice"),
    "an alpha of nothing": (["--vary", "alpha=0.5,0"], "alpha must be a number greater than 0"),
    "alpha of no Dirichlet": (["--vary", "alpha=0.5,1", "--partition", "iid"], "partition = 'iid'"),
    "the seed by name": (["--vary", "seed=1,2"], "--seeds N"),
    "nothing varies": ([], "nothing varies"),
    "too many runs": (["--vary", "K=16,32", "--seeds", "9999"], "are more than 10,000"),
    "more clients than rows": (["--vary", "clients=2,500"], "clients 500 · seed 5: no rows for a client"),
    "a recipe that is not there": (["nosuch.toml"], "no recipe at"),
    "no recipe": (None, "needs a RECIPE"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_before_any_work(case, at, capsys, monkeypatch):
    def no_model(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", no_model)
    before = sorted(at.rglob("*"))
    args, text = BAD[case]
    file = [] if args is None or "nosuch.toml" in args else ["recipe.toml"]
    code, out, err = call(capsys, "sweep", *file, *(args or []))
    assert code == 2, err
    assert text in err
    assert err.startswith("error: ")
    assert out == ""
    assert sorted(at.rglob("*")) == before, "something was left behind"


def test_a_dry_run_lists_the_runs_and_leaves_nothing(at, capsys):
    code, out, err = call(capsys, "sweep", "recipe.toml", "--vary", "K=8,16", "--seeds", "2", "--dry-run")
    assert code == 0
    assert "0004-k-16-seed-6" in out
    assert "4 runs" in err
    assert not (at / "runs").exists()


def test_a_whole_sweep_is_the_runs_that_tune_would_have_made(at, capsys):
    said = ok(capsys, "sweep", "recipe.toml", "--vary", "alpha=0.5,2", "--seeds", "2")
    runs = [e for e in said if e["event"] == "run"]
    assert said[0]["event"] == "sweep"
    assert said[0]["axes"] == {"alpha": [0.5, 2]}
    assert [(e["values"], e["seed"]) for e in runs] == [([0.5], 5), ([2], 5), ([0.5], 6), ([2], 6)]
    done = said[-1]
    assert done["event"] == "done"
    folder = Path(done["path"])
    assert (folder / "status").read_text() == "done\n"
    again = shlex.split("tune -c recipe.toml --partition dirichlet:2:client --seed 6 --out alone")
    assert digests(folder)["0004-alpha-2-seed-6"] == ok(capsys, *again)[-1]["digest"]
    assert len(set(digests(folder).values())) == 4
    for cell in done["cells"]:  # mean and spread against the runs' own records
        losses = [e["tuned"]["loss"] for e in runs if e["values"] == list(cell["values"].values())]
        assert cell["tuned"]["loss"]["mean"] == pytest.approx(np.mean(losses), rel=1e-12)
        assert cell["tuned"]["loss"]["spread"] == pytest.approx(np.std(losses, ddof=1), rel=1e-9)
        assert cell["runs"] == 2
    page = (folder / "sweep.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|src=", page)
    assert page.count("<svg ") == 1
    rows = list(csv.DictReader((folder / "sweep.csv").read_text(encoding="utf-8").splitlines()))
    assert [(float(r["alpha"]), int(r["seed"])) for r in rows] == [(0.5, 5), (2, 5), (0.5, 6), (2, 6)]
    assert [float(r["tuned_loss"]) for r in rows] == [e["tuned"]["loss"] for e in runs]
    assert {r["status"] for r in rows} == {"done"}
    assert f"fleetune runs --out {folder}" in call(capsys, "runs")[2]
    assert [e["name"] for e in ok(capsys, "runs", "--out", folder)] == [Path(e["run"]).name for e in runs]


def test_every_open_learning_rate_is_searched_and_each_runs_rate_is_shown(at, capsys):
    (at / "recipe.toml").write_text(RECIPE.format(rounds=1).partition("[set]")[0])
    code, out, err = call(capsys, "sweep", "recipe.toml", "--vary", "method=fedit,signlora")
    assert code == 0
    assert "fleetune sweep · fedit, signlora\n" in err
    assert "lr searched (fedit, signlora)" in err
    rows = list(csv.DictReader((at / "runs/0001-sweep-recipe/sweep.csv").read_text().splitlines()))
    found = re.findall(r"lr = (\S+), found in", err)
    assert [float(row["lr"]) for row in rows] == [float(rate) for rate in found]
    page = (at / "runs/0001-sweep-recipe/sweep.html").read_text(encoding="utf-8")
    for row, rate in zip(rows, found, strict=True):
        assert re.search(rf"{row['method']} +1 +{rate} ", out)
        assert f">{rate}<" in page
    call(capsys, "sweep", "recipe.toml", "--method", "fedit", "--vary", "lr=auto,1e-3")
    rows = list(csv.DictReader((at / "runs/0002-sweep-recipe/sweep.csv").read_text().splitlines()))
    assert [row["lr"] for row in rows] == ["auto", "0.001"], "what varies is as it was given"


@pytest.mark.usefixtures("at")
def test_a_sweep_tells_of_the_search_for_a_rate_and_counts_rounds_itself(tmp_path):
    heard = Heard()
    values = {**BASE, "rounds": 1, "set": {**BASE["set"], "lr": "auto"}}
    sweep.start(sweep.make_grid(values, ["K=16,32"]), tmp_path / "runs", heard, offline=True)
    assert {what for what, *_ in heard.counts} == {"finding lr", "rounds"}
    assert {total for what, _, total, _ in heard.counts if what == "rounds"} == {2}


@pytest.mark.faults
def test_kill_9_then_resume_gives_the_same_bits(at, capsys):
    (at / "recipe.toml").write_text(RECIPE.format(rounds=8))
    args = ["sweep", "recipe.toml", "--vary", "K=8,16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fleetune", *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder = at / "runs" / "0001-sweep-recipe"
    for _ in range(6000):  # a busy machine takes its time
        if list(folder.glob("0002-*/checkpoints/round-000003.ckpt")):
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert list(folder.glob("0002-*/checkpoints/*.ckpt")), "the second run did not start"
    assert ok(capsys, "sweep", "--resume", folder)[-1]["event"] == "done"
    assert call(capsys, *args, "--out", "whole", "-qq")[0] == 0
    assert digests(Path("whole") / "0001-sweep-recipe") == digests(folder)


def test_a_run_whose_model_or_data_is_wrong_does_not_stop_the_others(at, capsys, monkeypatch):
    real = prepare.prepare

    def failing(recipe: recipe.Recipe, **options: Any) -> prepare.TuneJob:
        if recipe.set["K"] == 8:
            raise IndexError("too few directions")
        return real(recipe, **options)

    monkeypatch.setattr(prepare, "prepare", failing)
    args = ("recipe.toml", "--vary", "K=8,16", "--rounds", "1", "--json")
    for more in (args, ("--resume", "latest", "--json")):
        code, out, _ = call(capsys, "sweep", *more)
        assert code == 1
        runs = [e for e in events(out) if e["event"] == "run"]
        assert ["too few directions" in e["failed"] for e in runs] == [True, False]
    assert runs[1]["skipped"]
    assert "failed: " in (at / "runs" / "0001-sweep-recipe" / "log.txt").read_text()


def test_a_sweep_in_use_or_changed_is_refused(at, capsys):
    assert call(capsys, "sweep", "recipe.toml", "--vary", "K=8,16", "--rounds", "1", "-qq")[0] == 0
    folder = Path("runs") / "0001-sweep-recipe"
    with rundir.RunDir(folder):
        code, _, err = call(capsys, "sweep", "--resume", folder)
    assert code == 2
    assert "in use by another process" in err
    text = (folder / "sweep.toml").read_text()
    (folder / "sweep.toml").write_text(text.replace("rounds = 1 ", "rounds = 2 "))
    err = refused(capsys, "sweep", "--resume", folder)
    assert "was made by another recipe" in err
    err = refused(capsys, "sweep", "--resume", folder, "--rounds", "3")
    assert "takes no other option" in err
    err = refused(capsys, "sweep", "--resume", "7")
    assert "no sweep '7'" in err


def fake(folder: Path, values: tuple[Any, ...], seed: int, base: float, losses: list[float]) -> GridRun:
    """A finished run with these losses by round, each round of 1,000 bytes."""
    run = folder / f"{len(list(folder.iterdir())) + 1:04d}-run"
    run.mkdir()
    lines: list[dict[str, Any]] = [{"event": "eval", "round": 0, "loss": base}]
    for r, loss in enumerate(losses, 1):
        sent = {"bytes_up": 400, "bytes_down": 600, "bytes_total": 1000 * r}
        lines.append({"event": "round", "round": r, **sent, "seconds": 2.0})
        lines.append({"event": "eval", "round": r, "loss": loss})
    ends = {"base": {"loss": base}, "tuned": {"loss": losses[-1]}}
    lines.append({"event": "done", **ends, "bytes_up": 400 * len(losses), "bytes_down": 600 * len(losses)})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "status").write_text("done\n")
    return GridRun(values, seed, runlog.read(run))


def test_a_final_measure_is_the_mean_over_seeds_with_the_spread_of_the_change(tmp_path):
    """Of a whole grid of alpha and K with 4 seeds: losses [alpha, K, seed, round]."""
    rng = np.random.default_rng(2)
    base = 4.0 + rng.normal(size=4)
    losses = base[None, None, :, None] - rng.uniform(0.1, 0.9, size=(3, 2, 4, 3))
    runs = [
        fake(tmp_path, (a, k), s, float(base[s]), losses[i, j, s].tolist())
        for s in range(4)
        for i, a in enumerate((0.5, 1.0, 2.0))
        for j, k in enumerate((8, 512))
    ]
    end = summary.final(1, 512, "loss", runs)
    by_seed = losses[:, 1, :, -1].mean(axis=0)  # over alpha
    assert end.mean == pytest.approx(by_seed.mean())
    assert end.spread == pytest.approx(np.std(by_seed - base, ddof=1))
    assert end.number == 4
