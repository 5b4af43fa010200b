"""A run that was started with relative paths is resumed, measured and repeated from any folder."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from fleetune import models
from fleetune.cli.main import main
from fleetune.common import files
from fleetune.runs import compression_folder, rundir
from fleetune.runs.compression_folder import CompressRequest
from fleetune.subject import Run

RECIPE = shlex.split("--rounds 1 --clients 2 --samples 0 --client-rows 0 --max-length 48 --held-out 4")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, an objective, and a run that was started in it with relative paths."""
    project = tmp_path_factory.mktemp("start") / "project"
    models.tiny_llama().save(project / "small")
    rows = [{"prompt": f"count {i}", "response": f"{i} {i + 1}"} for i in range(16)]
    (project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        assert main(["tune", "small", "rows.jsonl", "--method", "fedit", *RECIPE, "-qq"]) == 0
    return project


@pytest.fixture
def elsewhere(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project beside another folder, where rows of the same name are others; we are in that folder."""
    shutil.copytree(project, tmp_path / "project", symlinks=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Path("../project")


def run_in(project: Path) -> Path:
    return next(project.glob("runs/0001-*"))


def done_of(run: Path) -> dict[str, Any]:
    return next(e for e in rundir.events(run) if e["event"] == "done")


def test_a_run_is_resumed_from_another_folder(elsewhere, capsys):
    run = run_in(elsewhere)
    recipe = (run / "run.toml").read_text()
    before = done_of(run)
    for file in (run / "adapter").iterdir():
        file.unlink()
    Path("rows.jsonl").write_text('{"prompt": "not", "response": "these"}\n')
    assert main(["tune", "--resume", str(run)]) == 0
    assert f"{run}/report.html" in capsys.readouterr().out
    assert (run / "run.toml").read_text() == recipe  # the names that the user gave
    assert done_of(run)["digest"] == before["digest"]
    assert files.read_json(run / "env.json", "")[rundir.STARTED_IN] == "../.."
    assert len(Run(run).held_out()) == 4
    # finished already: its files are named as seen from here
    assert main(["tune", "--resume", str(run)]) == 0
    assert f"result    {run}/adapter" in capsys.readouterr().out


def test_a_run_is_repeated_from_another_folder(elsewhere):
    assert main(["tune", "-c", str(run_in(elsewhere) / "run.toml"), "-qq"]) == 0
    assert done_of(run_in(elsewhere))["digest"] == done_of(run_in(Path()))["digest"]
    assert Run(run_in(Path())).recipe.data == "../project/rows.jsonl"


def test_a_compression_finds_its_run_and_keeps_its_names(elsewhere, monkeypatch):
    here, run = Path.cwd(), run_in(elsewhere).name
    monkeypatch.chdir(elsewhere)
    request = CompressRequest(f"runs/{run}", True, "rtn", text="rows.jsonl")
    folder = elsewhere / compression_folder.create(request, Path("runs"))
    monkeypatch.chdir(here)
    found = compression_folder.request_of(folder)
    assert (found.model, found.text) == (f"../project/runs/{run}", "../project/rows.jsonl")
    compression_folder.write_record(folder, found, {"digest": "0"})
    assert compression_folder.record(folder)["model"] == f"runs/{run}"
    assert compression_folder.request_of(folder) == found


def test_names_that_are_no_paths_stay(elsewhere):
    start = rundir.start_of(run_in(elsewhere), {rundir.STARTED_IN: "../.."})
    assert start is not None
    assert rundir.find_from("rows.jsonl", start) == "../project/rows.jsonl"
    for name in ("", "owner/name", "/tmp", "x" * 5000):
        assert rundir.find_from(name, start) == name
    assert rundir.start_of(Path("a"), {rundir.STARTED_IN: ".."}) is None  # this folder
    assert rundir.start_of(Path("a"), {}) is None
