"""Run folders: numbers, the lock, metrics that survive kills, checkpoints that survive damage, full disks."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fleetune.common.files import HIDDEN
from fleetune.errors import StorageError, UsageError
from fleetune.runs import rundir
from fleetune.runs.rundir import KEEP, RunDir, check_name, checkpoints, create, events, find, listing
from fleetune.tuning.exchange.messages import Message, Payload, encode
from fleetune.tuning.rounds import checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    with create(tmp_path / "runs", "fedkseed", "tiny") as opened:
        opened.write("run.toml", "model = 'tiny'\n")
        yield opened


def folder(out: Path, name: str) -> Path:
    path = out / name
    path.mkdir(parents=True)
    (path / "run.toml").write_text("")
    return path


def put(run: RunDir, round: int, payload: Payload) -> None:
    run.checkpoint(round, encode(Message(round, b"", payload)))


def get(run: RunDir) -> tuple[int, Payload] | None:
    return run.restore(checkpoint.decode)


def state(value: int) -> Payload:
    return Payload({"w": np.full(50, value, np.int32)}, {"round": value})


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `size`: a disk that is full, on any file system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_runs_are_numbered_and_latest_points_to_the_newest(tmp_path):
    out = tmp_path / "deep" / "runs"
    names = []
    models = {"mezo": "smollm2-135m", "fedit": "/some where/My Model.Q4.gguf", "x": "org/Name_1B"}
    for method, model in models.items():
        with create(out, method, model) as run:
            names.append(run.path.name)
            assert (run.path / "checkpoints").is_dir()
            assert (out / "latest").resolve() == run.path.resolve()
            assert os.readlink(out / "latest") == run.path.name  # so that the folder can be moved
    assert names == ["0001-mezo-smollm2-135m", "0002-fedit-my-model.q4", "0003-x-name-1b"]
    with create(out, "x", "???") as run:
        assert run.path.name == "0004-x-model"
    assert sorted(p.name for p in out.iterdir()) == [*names, "0004-x-model", "latest"]


def test_runs_that_start_together_get_numbers_of_their_own(tmp_path):
    def start(method: str) -> int:
        with create(tmp_path, method, "m") as run:
            return int(run.path.name.split("-")[0])

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(start, [f"method{i}" for i in range(24)]))
    assert len(set(numbers)) == 24
    assert len([p for p in tmp_path.iterdir() if p.name[0].isdecimal()]) == 24


def test_find(tmp_path, monkeypatch):
    out = tmp_path / "runs"
    with pytest.raises(UsageError, match="no run 'latest'"):
        find("latest", out)
    seven, twelve = folder(out, "0007-mezo-m"), folder(out, "0012-fedit-m")
    (out / "0013-unfinished").mkdir()
    assert listing(out) == [seven, twelve]
    for name in ("7", "07", "0007", "0007-mezo-m", str(seven)):
        assert find(name, out) == seven, name
    assert find("latest", out) == twelve
    assert find("12", out) == twelve
    for name in ("1", "2", "70", "mezo", "0013-unfinished", "007-mezo-m", "nowhere/at/all", "0"):
        with pytest.raises(UsageError, match=f"no run '{name}'") as caught:
            find(name, out)
        assert "fleetune runs" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="is not a run folder"):
        find(str(out / "0013-unfinished"), out)
    with pytest.raises(UsageError, match="there is no file or folder 'basis model'"):
        check_name("basis model", out)
    monkeypatch.chdir(out)
    assert find("0007-mezo-m", tmp_path / "elsewhere") == Path("0007-mezo-m")


def test_latest_never_points_to_a_run_that_is_gone(tmp_path):
    for model in "abc":
        with create(tmp_path, "mezo", model) as run:
            run.write("run.toml", "")
    RunDir(tmp_path / "0003-mezo-c").remove()
    assert (tmp_path / "latest").resolve().name == "0002-mezo-b"
    RunDir(tmp_path / "0001-mezo-a").remove()
    assert (tmp_path / "latest").resolve().name == "0002-mezo-b"
    RunDir(tmp_path / "latest").remove()
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys
from pathlib import Path
from fleetune.errors import UsageError
from fleetune.runs.rundir import RunDir
try:
    run = RunDir(Path(sys.argv[1]))
except UsageError as error:
    print("refused", error, flush=True)
    sys.exit(2)
print("held", flush=True)
sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path)], **pipes)


def test_a_second_process_is_refused_until_the_first_is_gone(run):
    with holder(run.path) as second:
        text, _ = second.communicate(timeout=60)
        assert second.returncode == 2
        assert text.startswith("refused")
        assert f"{run.path} is in use by another process" in text
    run.close()
    with holder(run.path) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="in use by another process"):
            RunDir(run.path)
        other.send_signal(signal.SIGKILL)  # a killed process holds nothing
        other.wait(timeout=60)
        RunDir(run.path).close()


def test_a_folder_is_held_by_one_and_is_left_as_it_was(tmp_path):
    said = pytest.raises(UsageError, match="in use by another process")
    with rundir.locked(tmp_path), said, rundir.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / rundir.LOCK).write_text("")  # as a kill leaves it
    with rundir.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_events_are_recorded_one_a_line_and_read_back(run):
    measured = {"event": "eval", "round": 0, "loss": np.float32(0.5), "n": np.int64(3)}
    written = [run.record(e) for e in ({"event": "start", "counts": {"ü": [1, 2]}}, measured)]
    assert written == list(events(run.path))
    assert [e["v"] for e in written] == [1, 1]
    assert written[1]["t"] >= written[0]["t"] > 1.6e9
    assert written[1]["loss"] == 0.5
    lines = (run.path / "metrics.jsonl").read_bytes().split(b"\n")
    assert len(lines) == 3
    assert lines[2] == b""
    assert json.loads(lines[0]) == written[0]


def test_a_number_that_is_not_finite_is_recorded_as_null(run):
    event = {"event": "eval", "loss": float("nan"), "base": {"loss": float("inf"), "x": [-np.inf, 1]}}
    back = run.record(event)
    assert back["loss"] is None
    assert back["base"] == {"loss": None, "x": [None, 1]}
    (line,) = (run.path / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in line
    assert "Infinity" not in line
    assert list(events(run.path)) == [back]


def test_a_torn_line_is_left_out(run):
    first = run.record({"event": "a", "round": 1})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'\n[1]\n{"no": "event"}\n\xff\xfe\n{"event": "b", "rou')
    assert list(events(run.path)) == [first]
    assert list(events(run.path / "none")) == []


def test_cut_drops_later_rounds_the_end_and_what_was_torn(run):
    kept = [run.record({"event": "start"})]
    kept += [run.record({"event": e, "round": r}) for r in (0, 1, 2) for e in ("client", "round", "eval")]
    run.record({"event": "client", "round": 3})
    run.record({"event": "done"})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "client", "round": 1')
    before = (run.path / "metrics.jsonl").read_bytes()
    assert run.cut(2) == []
    after = (run.path / "metrics.jsonl").read_bytes()
    assert list(events(run.path)) == kept
    assert after == b"".join(line + b"\n" for line in before.split(b"\n")[: len(kept)])  # byte for byte
    again = run.record({"event": "client", "round": 3})  # the open file is the new one
    assert list(events(run.path)) == [*kept, again]
    run.record({"event": "done"})
    assert run.cut(2) == []
    assert (run.path / "metrics.jsonl").read_bytes() == after
    run.cut(-1)
    assert (run.path / "metrics.jsonl").read_bytes() == b""


def test_cut_removes_temporary_files_and_checkpoints_of_later_rounds(run):
    for r in (1, 2):
        put(run, r, state(r))
    left = [run.path / ".ledger.safetensors.x1.tmp", run.path / "checkpoints" / ".round-000003.ckpt.x2.tmp"]
    for path in left:
        path.write_bytes(b"half")
    (run.path / f".adapter.x3{HIDDEN}").mkdir()
    run.cut(1)
    assert not any(path.exists() for path in left)
    assert [r for r, _ in checkpoints(run.path)] == [1]
    assert (run.path / "run.toml").exists()


def test_the_last_checkpoints_are_kept_and_the_newest_is_restored(run):
    assert get(run) is None
    for r in range(5):
        put(run, r, state(r))
        found = get(run)
        assert found[0] == r
        assert found[1].scalars == {"round": r}
        assert found[1].arrays["w"].tolist() == [r] * 50
        assert [n for n, _ in checkpoints(run.path)] == list(range(max(0, r + 1 - KEEP), r + 1))
    assert KEEP == 2
    names = sorted(p.name for p in (run.path / "checkpoints").iterdir())
    assert names == ["round-000003.ckpt", "round-000004.ckpt"]


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, cut):
    put(run, 4, state(4))
    put(run, 5, state(5))
    newest = run.path / "checkpoints" / "round-000005.ckpt"
    data = newest.read_bytes()
    newest.write_bytes(data[:100] if cut else data[:100] + bytes([data[100] ^ 4]) + data[101:])
    found = get(run)
    assert (found[0], found[1].scalars["round"]) == (4, 4)
    assert "checkpoint round-000005.ckpt is not usable" in (run.path / "log.txt").read_text()
    run.cut(4)
    put(run, 5, state(55))
    assert get(run)[1].scalars["round"] == 55


def test_when_all_are_damaged_it_is_said_and_nothing_is_lost(run):
    for r in (6, 7):
        put(run, r, state(r))
        (run.path / "checkpoints" / f"round-{r:06d}.ckpt").write_bytes(b"FT1")
    with pytest.raises(StorageError, match=r"no checkpoint in .* is usable") as caught:
        get(run)
    assert f"rm {run.path}/checkpoints/*.ckpt" in (caught.value.hint or "")
    assert [r for r, _ in checkpoints(run.path)] == [6, 7]
    for _, path in checkpoints(run.path):  # what the hint says
        path.unlink()
    assert get(run) is None


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(run):
    put(run, 1, state(1))
    put(run, 2, state(2))
    before = {p.name: p.read_bytes() for p in (run.path / "checkpoints").iterdir()}
    big = Payload({"w": np.zeros(100_000, np.float32)}, {})
    with file_size_limit(150_000), pytest.raises(StorageError, match=r"round-000003\.ckpt"):
        put(run, 3, big)
    assert {p.name: p.read_bytes() for p in (run.path / "checkpoints").iterdir()} == before
    put(run, 3, state(3))  # space was made: it goes on
    assert [n for n, _ in checkpoints(run.path)] == [2, 3]


def test_a_disk_that_fills_up_under_the_metrics_is_one_clear_error(tmp_path):
    with pytest.raises(StorageError, match=r"metrics\.jsonl"), create(tmp_path, "mezo", "m") as run:
        run.record({"event": "start"})
        with file_size_limit(2_000):
            try:
                for r in range(100):
                    run.record({"event": "round", "round": r})
            finally:
                run.close()  # while the disk is still full: no second error hides the first
    with RunDir(tmp_path / "0001-mezo-m") as again:  # and the lock was given back
        again.cut(3)
        assert [e.get("round") for e in events(again.path)] == [None, 0, 1, 2, 3]
