"""`fleetune runs` and `compress --resume` among runs and what was made from them: names, what needs what, and locks."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_harness import QUICK, ZEROTH

from command_line import Capture, Patch, ok, refused
from command_line import call_json as call
from fleetune import models
from fleetune.cli.main import main
from fleetune.runs import rundir

RTN = ["--method", "rtn", "--set", "group=8"]
GKD = shlex.split(
    "--method gkd --set teacher=same --set keep_layers=2 --set steps=1 --set lmbda=0 --set batch_size=2 --data rows.jsonl --length 64"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(models.tiny_llama(layers=3).save(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def made(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder."""
    out = tmp_path_factory.mktemp("made")
    assert main(["tune", tiny, "demo", *QUICK, *ZEROTH, "--out", str(out), "-qq"]) == 0
    return out / "0001-fedkseed-tiny"


def a_run(made: Path) -> None:
    """Copy it as the next one."""
    with rundir.create(Path("runs"), "fedkseed", "tiny") as run:
        shutil.copytree(made, run.path, dirs_exist_ok=True)


def test_a_run_that_something_was_made_from_stays(tiny: str, made: Path, at: Path, capsys: Capture) -> None:
    a_run(made)
    a_run(made)
    for subject in ("runs/latest", "2"):  # a link that may soon point elsewhere, and a number
        assert call(capsys, "compress", subject, *RTN)[0] == 0
    record = json.loads(Path("runs/0003-rtn-fedkseed-tiny/compress.json").read_text())
    assert record["model"].endswith("runs/0002-fedkseed-tiny")
    err = refused(capsys, "runs", "rm", "latest")
    assert "latest is runs/0004-rtn-fedkseed-tiny now" in err
    assert "fleetune runs rm runs/0004-rtn-fedkseed-tiny" in err
    for names in (["2"], ["1", "2"], ["2", "3"], ["runs/latest"]):
        err = refused(capsys, "runs", "rm", *names)
        assert "is needed by" in err
        assert "runs/0004-rtn-fedkseed-tiny" in err
        assert ("runs/0003-rtn-fedkseed-tiny" in err) == ("3" not in names)
    assert len(list(Path("runs").glob("0*"))) == 4, "nothing is removed when one name is refused"
    assert call(capsys, "runs", "rm", "1", "3")[0] == 0, "nothing needs these"
    assert call(capsys, "runs", "rm", "2", "4")[0] == 0, "with all that needs it"
    assert list(Path("runs").iterdir()) == []
    assert "of runs rm alone" in refused(capsys, "runs", "--force")


def test_a_run_is_recorded_by_its_own_name(made: Path, at: Path, capsys: Capture, monkeypatch: Patch) -> None:
    a_run(made)
    Path("elsewhere").symlink_to("runs/0001-fedkseed-tiny")
    monkeypatch.chdir("runs/0001-fedkseed-tiny")
    whole = at / "runs" / "0001-fedkseed-tiny"
    links = {"../latest": "../0001-fedkseed-tiny", "../../elsewhere": "../../runs/0001-fedkseed-tiny"}
    for name, want in ({".": str(whole)} | links).items():
        told = ok(capsys, "compress", name, *RTN, "--out", "..")
        assert told[0]["model"] == want
        assert told[-1]["folder"].endswith("-rtn-fedkseed-tiny")


def test_plain_results_alone_are_compressed_further(tiny: str, made: Path, at: Path, capsys: Capture) -> None:
    a_run(made)
    assert call(capsys, "compress", "1", *RTN)[0] == 0
    assert call(capsys, "compress", tiny, *GKD)[0] == 0
    for subject in ("3", "latest", "runs/0003-gkd-tiny/model"):
        told = ok(capsys, "compress", subject, *RTN)
        assert told[0]["model"] == "runs/0003-gkd-tiny/model", subject
        assert not told[0]["run"]
        assert told[-1]["folder"].endswith("-rtn-gkd-tiny")
    of = {e["name"]: e["of"] for e in call(capsys, "runs")[1] if e["event"] == "compressed"}
    assert of["0004-rtn-gkd-tiny"] == "0003-gkd-tiny"
    assert "is needed by runs/0004-rtn-gkd-tiny" in refused(capsys, "runs", "rm", "3")
    ok(capsys, "eval", "4", "rows.jsonl", "--tasks", "loss")
    assert "compressed with rtn" in refused(capsys, "compress", "2", *RTN)
    assert "compressed with rtn" in refused(capsys, "compress", "runs/0004-rtn-gkd-tiny", *RTN)
    a_run(made)
    told = ok(capsys, "compress", "latest", *RTN)
    assert told[0]["model"] == "runs/0007-fedkseed-tiny", "the run is the newer one"
    shutil.rmtree("runs/0003-gkd-tiny/model")
    assert "is not finished" in refused(capsys, "compress", "3", *RTN)


HOLD = """
import sys
from pathlib import Path
from fleetune.runs import rundir
with rundir.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the folder until it is killed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], text=True, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "held\n"
        yield other


def test_a_compression_in_use_is_left_alone(tiny: str, at: Path, capsys: Capture) -> None:
    assert call(capsys, "compress", tiny, *RTN)[0] == 0
    folder = Path("runs/0001-rtn-tiny")
    before = sorted(p.name for p in folder.rglob("*"))
    with held_elsewhere(folder) as other:
        for command in (["compress", "--resume", "1"], ["runs", "rm", "1"], ["runs", "rm", "1", "--force"]):
            assert "runs/0001-rtn-tiny is in use by another process" in refused(capsys, *command)
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert call(capsys, "compress", "--resume", "1")[0] == 0
    assert sorted(p.name for p in folder.rglob("*")) == before, "the lock that the kill left is gone"
    assert call(capsys, "runs", "rm", "1")[0] == 0
    assert not folder.exists()
